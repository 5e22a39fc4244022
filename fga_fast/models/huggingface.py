"""Vision towers of Hugging Face transformers: ViT, DeiT, BEiT, the CLIP family, SigLIP, DINOv2 and DINOv3.

A tower may stand alone, in its `...ForImageClassification` model or in a dual encoder (CLIPModel, SiglipModel). Written
for transformers 5; the names of version 4 are known too. This file never imports transformers.

Dinov2ForImageClassification, with or without registers, reads the class token *and* the mean of the patches through one
linear layer. No single row of the rollout represents such logits. As usual for DINOv2, we take the class token's row;
the gradients are those of the whole logit. For the half that reads the patches, use
`dataclasses.replace(find_layout(model), pooling="average", pooled=None)`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fga_fast.models.common import attribute, cannot, check_methods, class_of, cut, pair
from fga_fast.models.layout import ModelLayout
from fga_fast.settings import Pooling

_PACKAGE = "transformers.models"
_CLIPS = ("CLIP", "MetaClip2", "ChineseCLIP", "AltCLIP")

# Class of the tower -> tokens in front of the patches, not counting registers. In transformers 4 the tower of CLIP and
# similar models is the ...VisionTransformer inside the ...VisionModel.
_TOWERS: dict[str, int] = {
    **dict.fromkeys(("ViTModel", "ViTMSNModel", "BeitModel", "Data2VecVisionModel"), 1),
    **dict.fromkeys(("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"), 1),
    **dict.fromkeys((f"{name}Vision{kind}" for name in _CLIPS for kind in ("Model", "Transformer")), 1),
    **dict.fromkeys(("SiglipVisionModel", "SiglipVisionTransformer"), 0),
    "DeiTModel": 2,
}

# Class of a model with a classifier -> how it reads its tower's tokens: pooling, start and stop of the range (None: at
# the last token). Other classes around a tower read its pooled output.
_HEADS: dict[str, tuple[Pooling, int, int | None]] = {
    **{f"{name}ForImageClassification": ("token", 0, 1) for name in ("ViT", "ViTMSN", "DeiT", "Dinov2")},
    "Dinov2WithRegistersForImageClassification": ("token", 0, 1),
    "DeiTForImageClassificationWithTeacher": ("average", 0, 2),  # the mean of two heads, one a token
    "CLIPForImageClassification": ("average", 1, None),
    "MetaClip2ForImageClassification": ("average", 1, None),
    "SiglipForImageClassification": ("average", 0, None),
}

_BLOCKS = ("layers", "layer", "encoder.layers", "encoder.layer", "model.layers", "model.layer")


def is_tower(module: nn.Module) -> bool:
    """Whether `module` is a supported tower, alone or with its classifier."""
    if class_of(module, _HEADS, _PACKAGE):
        return True
    # A module without embeddings is the shell that transformers 4 puts around some towers.
    return class_of(module, _TOWERS, _PACKAGE) is not None and hasattr(module, "embeddings")


def read_layout(module: nn.Module, image_size: tuple[int, int] | None = None) -> ModelLayout:
    """Layout of a Hugging Face vision tower.

    Args:
        module: module for which `is_tower` is true.
        image_size: size of the images to explain; None: the size in the tower's config. Some towers take any size,
            others only if a wrapper calls them with interpolate_pos_encoding=True.
    """
    tower = next(part for part in module.modules() if is_tower(part) and not class_of(part, _HEADS, _PACKAGE))
    check_methods(tower, ["forward"], [_PACKAGE], "which tokens are patches")
    config = attribute(tower, "config")
    _check_attention(tower, config)
    size = pair(config.image_size if image_size is None else image_size, tower, "image_size")
    grid = cut(size, pair(config.patch_size, tower, "patch_size"), tower)
    prefix = _TOWERS[class_of(tower, _TOWERS, _PACKAGE) or ""] + int(getattr(config, "num_register_tokens", 0))
    pooling, pooled = _pooling(module, tower, prefix, prefix + grid[0] * grid[1])
    return ModelLayout(
        blocks=_blocks(tower),
        prefix_tokens=prefix,
        grid=grid,
        pooling=pooling,
        pooled=pooled,
        image_size=size,
        in_chans=int(config.num_channels),
        d_model=int(config.hidden_size),
        tower=tower,
    )


def _check_attention(tower: nn.Module, config: Any) -> None:
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in (None, "sdpa", "eager"):
        raise cannot(
            tower,
            f"attn_implementation={implementation!r} computes attention in a fused kernel that cannot be tapped; call "
            "model.set_attn_implementation('sdpa'), or load the model with attn_implementation='sdpa'",
        )


def _blocks(tower: nn.Module) -> tuple[nn.Module, ...]:
    for path in _BLOCKS:
        found: Any = tower
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList) and len(found):
            return tuple(found)
    raise cannot(tower, f"its blocks are not where transformers 4 and 5 put them ({', '.join(_BLOCKS)})")


def _pooling(module: nn.Module, tower: nn.Module, prefix: int, tokens: int) -> tuple[Pooling, tuple[int, int]]:
    """The kind of pooling and the range of tokens that it reads."""
    head = class_of(module, _HEADS, _PACKAGE)
    if head is not None:
        pooling, start, stop = _HEADS[head]
        return pooling, (start, tokens if stop is None else stop)
    if getattr(attribute(tower, "config"), "use_mean_pooling", False):  # BEiT
        return "average", (prefix, tokens)
    if prefix > 0:
        return "token", (0, 1)
    if getattr(tower, "head", None) is not None:  # SigLIP's probe: one query over all tokens
        return "attention", (0, tokens)
    return "average", (0, tokens)
