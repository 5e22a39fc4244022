"""timm's plain vision transformers, recognised by their classes and read from their attributes.

VisionTransformer is ViT, DeiT, DINOv2, and the towers of CLIP and SigLIP; Eva is EVA-02, DINOv3, the Perception Encoder
and the ViTs with rotary embeddings; Beit is BEiT and BEiT v2. Written for timm 1.0. This file never imports timm.
"""

from __future__ import annotations

from torch import nn

from fga_fast.models.common import attribute, cannot, check_methods, class_of, only_size, pair
from fga_fast.models.layout import ModelLayout
from fga_fast.settings import Pooling

# Class -> methods that decide which tokens are patches and which are pooled; a subclass must not replace these.
_TOWERS: dict[str, tuple[str, ...]] = {
    "VisionTransformer": ("_pos_embed", "forward_features", "pool"),
    "Eva": ("_pos_embed", "forward_features", "pool"),
    "Beit": ("forward_features", "forward_head"),
    "VisionTransformerRelPos": ("forward_features", "forward_head"),
}
_MODULES = tuple(f"timm.models.{name}" for name in ("vision_transformer", "deit", "eva", "beit"))
_MODULES += ("timm.models.vision_transformer_relpos",)

_REFUSED_POOLS: dict[str, str] = {
    "": "global_pool='' returns every token and no logits; create the model with a pooling and a head",
    "max": "max pooling reads a different token for every channel, so no row of the rollout stands for the logits",
    "avgmax": "half of its pooling is a maximum, which reads a different token for every channel",
    "prr": "'prr' pooling adds a self-attention without a residual path after the last block",
}


def is_tower(module: nn.Module) -> bool:
    """Whether `module` is one of timm's supported classes or a subclass of one."""
    return class_of(module, _TOWERS, "timm.models") is not None


def read_layout(tower: nn.Module, image_size: tuple[int, int] | None = None) -> ModelLayout:
    """Layout of a timm tower.

    Args:
        tower: module for which `is_tower` is true.
        image_size: size of the images to explain, for a tower with dynamic_img_size=True; None: the tower's own.
    """
    family = class_of(tower, _TOWERS, "timm.models") or ""
    _check_forward(tower, _TOWERS[family])
    size, grid = _read_size(tower, image_size)
    prefix = int(attribute(tower, "num_prefix_tokens"))
    pooling, pooled = _read_pooling(tower, family, prefix, prefix + grid[0] * grid[1])
    return ModelLayout(
        blocks=tuple(attribute(tower, "blocks")),
        prefix_tokens=prefix,
        grid=grid,
        pooling=pooling,
        pooled=pooled,
        image_size=size,
        in_chans=int(attribute(tower, "in_chans")),
        d_model=int(attribute(tower, "embed_dim")),
        tower=tower,
    )


def _check_forward(tower: nn.Module, methods: tuple[str, ...]) -> None:
    """Refuses towers whose order of tokens may differ from timm's own."""
    unknown = "which tokens are patches (registers may come after the patches) and which are pooled"
    check_methods(tower, methods, _MODULES, unknown)
    if not isinstance(getattr(tower, "blocks", None), (nn.Sequential, nn.ModuleList)):
        raise cannot(tower, "it has no blocks")
    patch_drop = getattr(tower, "patch_drop", None)
    if tower.training and getattr(patch_drop, "prob", 0.0) > 0:
        raise cannot(tower, "patch drop is active (patch_drop_rate > 0 in train mode); call model.eval() first")
    if tower.training and getattr(tower, "distilled_training", False):
        raise cannot(tower, "it returns two logits in distilled training; call model.eval() first")


def _read_size(tower: nn.Module, wanted: tuple[int, int] | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Image size and grid of one explanation. `wanted`: the size of its images, if the tower takes several."""
    patch_embed = attribute(tower, "patch_embed")
    own = getattr(patch_embed, "img_size", None)
    dynamic = bool(getattr(tower, "dynamic_img_size", False))
    if not dynamic and own is not None:
        own = pair(own, tower, "img_size")
        only_size(wanted, own, tower, "create the model with that img_size, or with dynamic_img_size=True")
    size = pair(own if wanted is None else wanted, tower, "img_size")
    if size == own and not dynamic:
        return size, pair(getattr(patch_embed, "grid_size", None), tower, "grid_size")
    patch = pair(attribute(patch_embed, "patch_size"), tower, "patch_size")
    if size[0] % patch[0] or size[1] % patch[1]:
        what = f"{size[0]} x {size[1]} pixels are no whole number of {patch[0]} x {patch[1]} patches"
        if wanted is None:
            raise cannot(tower, f"images of {what}")
        raise ValueError(f"image_size: {what} of {type(tower).__name__}; resize or crop the images")
    return size, pair(attribute(patch_embed, "dynamic_feat_size")(size), tower, "grid_size")


def _read_pooling(tower: nn.Module, family: str, prefix: int, tokens: int) -> tuple[Pooling, tuple[int, int]]:
    """The kind of pooling and the range of tokens that it reads."""
    if class_of(tower, ("VisionTransformerDistilled",), "timm.models.deit"):
        return "average", (0, 2)  # the mean of two heads, on the class token and the distillation token
    include_prefix = bool(getattr(tower, "pool_include_prefix", False))
    seen = (0 if include_prefix else prefix, tokens)
    global_pool = str(getattr(tower, "global_pool", ""))
    attn_pool = getattr(tower, "attn_pool", None)
    # As timm does, look at attn_pool before global_pool. Eva's attention pool reads the prefix too.
    if attn_pool is not None and global_pool != "prr":
        _check_attention_pool(tower, attn_pool)
        return "attention", (0, tokens) if family == "Eva" else seen
    if global_pool == "token":
        return "token", (0, 1)
    if global_pool == "avg":
        return "average", seen
    raise cannot(tower, _REFUSED_POOLS.get(global_pool, f"global_pool='{global_pool}' is not a known pooling"))


def _check_attention_pool(tower: nn.Module, pool: nn.Module) -> None:
    kind = type(pool).__name__
    latents = getattr(pool, "latent_len", None)
    if "AttentionPoolLatent" not in [cls.__name__ for cls in type(pool).__mro__]:
        raise cannot(tower, f"its attention pooling is a {kind}; expected timm's AttentionPoolLatent")
    if latents != 1:
        raise cannot(tower, f"its attention pooling has {latents} latent queries; expected 1, the start of the rollout")
    if getattr(pool, "pool", "") not in ("token", "avg"):
        raise cannot(tower, "its attention pooling returns a sequence instead of one vector per image")
