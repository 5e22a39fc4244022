"""Finds the vision transformer in a model and reads its layout.

Only looks at the modules: it runs nothing, changes nothing and imports no model library. It recognises a family by the
classes of the modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from types import ModuleType

from torch import nn

from fga_fast.models import huggingface, open_clip, timm, torchvision
from fga_fast.models.layout import ModelLayout, two
from fga_fast.models.refused import check_inside
from fga_fast.models.refused import reason as refusal

# Tried in this order. Each file has `is_tower(module)` and `read_layout(tower, image_size)`.
FAMILIES = (timm, huggingface, open_clip, torchvision)

SUPPORTED = (
    "timm's plain ViTs (ViT, DeiT, DINOv2, DINOv3, EVA-02, BEiT, CLIP, SigLIP, PE), open_clip's image towers, Hugging "
    "Face's ViT, DeiT, BEiT, CLIP, SigLIP, DINOv2 and DINOv3, and torchvision's VisionTransformer"
)


def find_layout(model: nn.Module, image_size: tuple[int, int] | None = None) -> ModelLayout:
    """Layout of the one supported vision transformer inside `model`.

    `fga_fast.models.find.SUPPORTED` names the supported families, and docs/models.md has a table. The tower may be the
    model itself or any module inside it; text towers of dual encoders do not count. The layout's pooling is that of the
    library: this function does not see what your own wrapper does with the tower's output.

    Args:
        model: any module from images [B, channels, height, width] to logits [B, classes].
        image_size: (height, width) of the images to explain, for towers that take several sizes; None: the size that
            the tower was built for.

    Returns:
        The tower's `ModelLayout`.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: there is no supported tower, more than one, or one that the method cannot explain, or the tower does
            not take `image_size`; the message names the class, the reason and what to do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module from images to logits, got {type(model).__name__}"
            + ("; load these weights into the model with model.load_state_dict()" if isinstance(model, Mapping) else "")
        )
    if image_size is not None:
        image_size = two("image_size", image_size, least=1)
    towers: dict[str, tuple[ModuleType, nn.Module]] = {}
    for name, module in _outermost(model):
        reason = refusal(module)
        if reason is not None:
            where = f" (at '{name}')" if name else ""
            raise ValueError(f"model: {type(module).__name__}{where} cannot be explained: {reason}")
        family = _family(module)
        if family is not None:
            towers[name] = family, module
    if not towers:
        raise ValueError(
            f"model: no supported vision transformer found in {type(model).__name__}; supported are {SUPPORTED}, alone "
            "or anywhere inside a wrapper that registers the tower as a submodule. For another vision transformer "
            "(your own, vit-pytorch's, MONAI's) say where its blocks are: ModelLayout(blocks=..., prefix_tokens=..., "
            "grid=..., pooling=...), as docs/your_model.md shows"
        )
    if len(towers) > 1:
        found = ", ".join(f"'{name}' ({type(tower).__name__})" for name, (_, tower) in towers.items())
        raise ValueError(
            f"model: expected exactly one vision transformer, found {len(towers)}: {found}; pass a model that contains "
            "only the tower to explain, e.g. a wrapper with the other one's output precomputed"
        )
    ((family, tower),) = towers.values()
    check_inside(tower)
    layout: ModelLayout = family.read_layout(tower, image_size)
    return layout


def has_no_head(model: nn.Module, layout: ModelLayout, width: int) -> bool:
    """Whether outputs [B, width] of `model` are the tower's features: nothing with weights comes after the tower.

    A wrapper around a tower has no head either, unless it has weights of its own. A tower's head may have been replaced
    by nn.Identity.
    """
    tower = layout.tower
    if tower is None or width not in (layout.d_model, getattr(tower, "output_dim", None)):
        return False
    heads = [part for name in ("head", "heads") if isinstance(part := getattr(tower, name, None), nn.Module)]
    inside = {id(weight) for weight in chain(tower.parameters(), tower.buffers())}
    inside -= {id(weight) for head in heads for weight in head.parameters()}
    return all(id(weight) in inside for weight in chain(model.parameters(), model.buffers()))


def active_randomness(model: nn.Module) -> list[str]:
    """Names of submodules that would draw random numbers in a forward pass: dropout of any kind in train mode.

    Callers refuse such a model: its explanation would not belong to the logits that a user sees. A module counts if it
    is in train mode and has a drop probability above 0 (torch's Dropout modules, DropPath and PatchDropout, the
    attention modules of torch and Hugging Face) or shifts its rotary embeddings at random (DINOv3).
    """
    return [name or type(module).__name__ for name, module in model.named_modules() if _draws(module)]


def _draws(module: nn.Module) -> bool:
    if not module.training:
        return False
    name = type(module).__name__
    rates: tuple[str, ...] = ()
    if "Drop" in name:
        rates = ("p", "prob", "drop_prob")
    elif "Attention" in name:
        rates = ("dropout", "attention_dropout", "dropout_prob")
    elif "Rotary" in name or "Rope" in name:
        if getattr(module, "aug_active", False) is True:
            return True
        module = getattr(module, "config", module)
        rates = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
    values = (getattr(module, rate, 0.0) for rate in rates)
    return any(isinstance(value, (int, float)) and value > 0 for value in values)


def _family(module: nn.Module) -> ModuleType | None:
    """The file of this package that can read `module`, if it is a tower."""
    return next((family for family in FAMILIES if family.is_tower(module)), None)


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules in the order of registration, each once, without those inside a recognised tower."""
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if _family(module) is not None:
            continue
        children = [(f"{name}.{child}" if name else child, part) for child, part in module.named_children()]
        stack.extend(reversed(children))
