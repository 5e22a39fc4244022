"""What the readers of all model families share: recognising classes without importing them, and refusing clearly."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn


def is_a(module: nn.Module, names: Collection[str], package: str) -> bool:
    """Whether a class of `module`'s MRO has one of the names and was defined in `package` or below it."""
    return class_of(module, names, package) is not None


def class_of(module: nn.Module, names: Collection[str], package: str) -> str | None:
    """Name of the first class of the MRO with one of the names that was defined in `package` or below it."""
    for cls in type(module).__mro__:
        if cls.__name__ in names and (cls.__module__ == package or cls.__module__.startswith(package + ".")):
            return cls.__name__
    return None


def attribute(module: nn.Module, name: str) -> Any:
    """Attribute that is a number, a string or a module; nn.Module types every attribute as Tensor | Module."""
    return getattr(module, name)


def cannot(tower: nn.Module, reason: str) -> ValueError:
    """The error for a tower that is known, but configured in a way that cannot be explained."""
    return ValueError(f"model: {type(tower).__name__} cannot be explained: {reason}")


def pair(value: object, tower: nn.Module, name: str) -> tuple[int, int]:
    """(height, width) of an attribute that is one number for both or a pair.

    Raises:
        ValueError: it is neither; `name` says which attribute of `tower` it was.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return int(value[0]), int(value[1])
    raise cannot(tower, f"it has no fixed {name} (got {value!r}); give one: find_layout(model, image_size=(224, 224))")


def cut(image_size: tuple[int, int], patch_size: tuple[int, int], tower: nn.Module) -> tuple[int, int]:
    """Grid of patches (gh, gw) that a strided convolution without padding cuts an image into.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    grid = image_size[0] // patch_size[0], image_size[1] // patch_size[1]
    if min(grid) < 1:
        raise ValueError(
            f"image_size: {image_size[0]} x {image_size[1]} holds no patch of {patch_size[0]} x {patch_size[1]} pixels "
            f"({type(tower).__name__})"
        )
    return grid


def only_size(image_size: tuple[int, int] | None, own: tuple[int, int], tower: nn.Module, advice: str) -> None:
    """Refuses another image size than the tower's own, for towers that take one size only."""
    if image_size is not None and image_size != own:
        raise ValueError(
            f"image_size: {type(tower).__name__} takes images of {own[0]} x {own[1]} only, got {image_size[0]} x "
            f"{image_size[1]}; {advice}"
        )
