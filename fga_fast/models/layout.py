"""What a relevance rollout has to know about a model: its blocks, its token order and how logits are read.

`find_layout` looks at the modules only. It runs nothing, changes nothing and imports no model library: families are
recognised by the classes of the modules that the caller already built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

Pooling = Literal["token", "average", "attention"]


@dataclass(frozen=True)
class ModelLayout:
    """Places in a vision transformer that an explanation needs.

    Attributes:
        tower: the vision transformer inside the model (the model itself, or a submodule of it).
        blocks: its L transformer blocks in forward order; the output of block l is the residual stream x_l [B, N, C].
        prefix_tokens: tokens in front of the patches (class, distillation, registers); N = prefix_tokens + gh * gw.
        grid: (gh, gw), patches along height and width; patch p sits at row p // gw, column p % gw.
        pooling: how the residual stream becomes one vector. "token": one token is read. "average": the tokens of
            `pooled` are averaged with equal weight. "attention": one learned query attends to the tokens of `pooled`,
            in one more scaled_dot_product_attention call after the blocks.
        pooled: token range [start, stop) that the pooling reads; (0, 1) for "token".
        image_size: (height, width) of the images the tower takes.
        in_chans: channels of those images.
        d_model: width C of the residual stream.
    """

    tower: nn.Module
    blocks: tuple[nn.Module, ...]
    prefix_tokens: int
    grid: tuple[int, int]
    pooling: Pooling
    pooled: tuple[int, int]
    image_size: tuple[int, int]
    in_chans: int
    d_model: int

    @property
    def patches(self) -> int:
        """Number of patches P = gh * gw."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Number of tokens N = prefix tokens + patches."""
        return self.prefix_tokens + self.patches


def find_layout(model: nn.Module) -> ModelLayout:
    """Layout of the one supported vision transformer inside `model`.

    Supported: timm's `VisionTransformer` family (ViT, DeiT and its distilled form, DeiT III, DINOv2 with and without
    registers, timm's CLIP and SigLIP towers) with class-token, average or attention pooling. The tower may be the
    model itself or sit anywhere inside it; what a wrapper does with the tower's output is not looked at.

    Args:
        model: any module from images [B, channels, height, width] to logits [B, classes].

    Returns:
        The tower's `ModelLayout`.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: no supported tower, more than one, or one that the method cannot explain; the message names the
            class, the reason and what to do.
    """
    # Imported here because the family files need ModelLayout from this one.
    from fga_fast.models import timm

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module from images to logits, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):  # what torch.compile returns
        raise ValueError(
            "model: it is compiled by torch.compile, whose graph hides its attention; pass the model that was compiled"
        )
    towers: dict[str, nn.Module] = {}
    for name, module in _outermost(model):
        reason = timm.refusal(module)
        if reason is not None:
            where = f" (at '{name}')" if name else ""
            raise ValueError(f"model: {type(module).__name__}{where} cannot be explained: {reason}")
        if timm.is_tower(module):
            towers[name] = module
    if not towers:
        raise ValueError(
            f"model: no supported vision transformer found in {type(model).__name__}; supported are timm's "
            "VisionTransformer models (ViT, DeiT, DINOv2, CLIP and SigLIP towers), alone or inside a wrapper that "
            "registers the tower as a submodule"
        )
    if len(towers) > 1:
        found = ", ".join(f"'{name}' ({type(tower).__name__})" for name, tower in towers.items())
        raise ValueError(
            f"model: expected exactly one vision transformer, found {len(towers)}: {found}; pass a model that holds "
            "only the tower to be explained, e.g. a wrapper with the other one's output precomputed"
        )
    (tower,) = towers.values()
    return timm.read_layout(tower)


def active_randomness(model: nn.Module) -> list[str]:
    """Names of submodules that would draw random numbers in a forward pass: dropout of any kind in train mode.

    An explanation of such a model would not be of the logits that a user sees, so callers refuse it. A module counts
    if it is in train mode and has a drop probability above 0 (torch's Dropout modules, timm's DropPath and
    PatchDropout).
    """
    return [name or type(module).__name__ for name, module in model.named_modules() if _drops(module)]


def _drops(module: nn.Module) -> bool:
    if not module.training or "Drop" not in type(module).__name__:
        return False
    rates = (getattr(module, name, 0.0) for name in ("p", "prob", "drop_prob"))
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules in forward-registration order, once each, without looking inside a tower that was recognised."""
    from fga_fast.models import timm

    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if timm.is_tower(module) or timm.refusal(module) is not None:
            continue
        children = [(f"{name}.{child}" if name else child, part) for child, part in module.named_children()]
        stack.extend(reversed(children))
