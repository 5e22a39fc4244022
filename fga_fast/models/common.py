"""Shared by the readers of all model families: recognises classes without importing them, and refuses clearly."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn


def class_of(module: nn.Module, names: Collection[str], package: str) -> str | None:
    """The first name in the MRO that is one of `names` and whose class was defined in `package` or below it."""
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in names and _is_in(cls, package)), None)


def _is_in(cls: type, package: str) -> bool:
    return cls.__module__ == package or cls.__module__.startswith(package + ".")


def check_methods(tower: nn.Module, methods: Iterable[str], packages: Collection[str], unknown: str) -> None:
    """Refuses a subclass from outside `packages` that replaces a method; `unknown` is what is then no longer known."""
    for method in methods:
        owners = [cls for cls in type(tower).__mro__ if method in vars(cls)]
        known = [cls for cls in owners if any(_is_in(cls, package) for package in packages)]
        if owners[:1] != known[:1]:
            replaced = f"{(known or owners)[0].__name__}.{method}"
            raise cannot(
                tower,
                f"{owners[0].__name__} replaces {replaced}, so {unknown} is not known; say it with "
                "Explainer(model, layout=ModelLayout(blocks=..., prefix_tokens=..., grid=..., pooling=...))",
            )


def attribute(module: nn.Module, name: str) -> Any:
    """An attribute typed as Any: nn.Module types every attribute as Tensor | Module."""
    return getattr(module, name)


def cannot(tower: nn.Module, reason: str) -> ValueError:
    """The error for a known tower with a configuration that cannot be explained."""
    return ValueError(f"model: {type(tower).__name__} cannot be explained: {reason}")


def pair(value: object, tower: nn.Module, name: str) -> tuple[int, int]:
    """(height, width) from the attribute `name` of `tower`: a pair, or one number for both."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return int(value[0]), int(value[1])
    raise cannot(tower, f"it has no fixed {name} (got {value!r}); give one: find_layout(model, image_size=(224, 224))")


def cut(image_size: tuple[int, int], patch_size: tuple[int, int], tower: nn.Module) -> tuple[int, int]:
    """Grid of patches (gh, gw) that a strided convolution without padding makes of an image."""
    grid = image_size[0] // patch_size[0], image_size[1] // patch_size[1]
    if min(grid) < 1:
        raise ValueError(
            f"image_size: expected at least one patch of {patch_size[0]} x {patch_size[1]} pixels "
            f"({type(tower).__name__}), got {image_size[0]} x {image_size[1]}; give larger images"
        )
    return grid


def only_size(image_size: tuple[int, int] | None, own: tuple[int, int], tower: nn.Module, advice: str) -> None:
    """For towers that take one image size only: refuses any other."""
    if image_size is not None and image_size != own:
        raise ValueError(
            f"image_size: {type(tower).__name__} takes images of {own[0]} x {own[1]} only, got {image_size[0]} x "
            f"{image_size[1]}; {advice}"
        )
