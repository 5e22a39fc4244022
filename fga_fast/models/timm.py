"""timm's VisionTransformer family: ViT, DeiT, DINOv2, and the towers of CLIP and SigLIP.

Read against timm 1.0: `models/vision_transformer.py` and `models/deit.py`. timm itself is never imported; its classes
are recognised by name and defining module, so that the package works (and refuses clearly) without timm installed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fga_fast.models.layout import ModelLayout, Pooling

_TOWER_MODULES = ("timm.models.vision_transformer", "timm.models.deit")

_WINDOWED = (
    "windowed attention: a token attends only inside its own window, so a block has no attention map over all tokens "
    "and the blocks' maps cannot be multiplied into one rollout over the patches"
)
_HIERARCHICAL = (
    "hierarchical: tokens are merged or pooled between stages, so successive attention maps have different sizes and "
    "cannot be multiplied into one rollout over the patches"
)
_NOT_SDPA = "its attention is no plain softmax attention over tokens: "

# Class name -> why the method does not apply. Looked up over a module's whole MRO, so subclasses are covered.
_REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "DaVit", "Twins", "Nest"),
        _WINDOWED,
    ),
    "GlobalContextVit": _WINDOWED,
    "VisionTransformerSAM": _WINDOWED,
    **dict.fromkeys(
        ("PyramidVisionTransformerV2", "MultiScaleVit", "Hiera", "HieraDet", "PoolingVisionTransformer", "CoaT"),
        _HIERARCHICAL,
    ),
    **dict.fromkeys(
        ("MaxxVit", "Levit", "LevitDistilled", "EfficientVit", "EfficientVitMsra", "EfficientFormer", "TinyVit"),
        _HIERARCHICAL,
    ),
    "Xcit": _NOT_SDPA + "cross-covariance attention mixes channels instead of tokens",
    "Cait": _NOT_SDPA + "talking-heads projections mix the attention maps of different heads before and after softmax",
    "VOLO": _NOT_SDPA + "outlook attention predicts its weights from the centre token alone",
    "ConVit": _NOT_SDPA + "gated positional attention mixes two softmaxes",
    "CrossVit": "two branches with different patch sizes exchange class tokens, so there is no single token grid",
    "TNT": "two nested transformers, over pixels and over patches, so there is no single token grid",
    "VisionTransformerRelPos": "relative-position variants of VisionTransformer are not among the supported families",
}

# Blocks in which one block makes two attention calls, or subtracts one attention map from another.
_REFUSED_PARTS: dict[str, str] = {
    "DiffAttention": "differential attention subtracts two softmax maps, so the relevance of a map is not defined",
    "DiffParallelScalingBlock": "differential attention subtracts two softmax maps, so relevance is not defined",
    "ParallelThingsBlock": "each block holds several attentions side by side; one attention a block is expected",
}

_REFUSED_POOLS: dict[str, str] = {
    "": "global_pool='' returns every token and no logits; create the model with a pooling and a head",
    "max": "max pooling reads a different token for every channel, so no row of the rollout stands for the logits",
    "avgmax": "half of its pooling is a maximum, which reads a different token for every channel",
    "prr": "'prr' pooling runs a further self-attention without a residual path after the last block",
}


def is_tower(module: nn.Module) -> bool:
    """Whether `module` is timm's VisionTransformer or a subclass of it."""
    return any(
        cls.__name__ == "VisionTransformer" and cls.__module__ == _TOWER_MODULES[0] for cls in type(module).__mro__
    )


def refusal(module: nn.Module) -> str | None:
    """Reason why `module` is a vision transformer that the method does not apply to, or None."""
    for cls in type(module).__mro__:
        # Only these libraries' classes: a user's own wrapper may well be called Nest or Twins.
        if cls.__name__ in _REFUSED and cls.__module__.startswith(("timm.", "torchvision.")):
            return _REFUSED[cls.__name__]
        if cls.__name__ == "VisionTransformer" and cls.__module__.startswith(("torchvision.", "open_clip.")):
            return (
                f"it comes from {cls.__module__.split('.')[0]}, whose nn.MultiheadAttention is not tapped; use timm's "
                "VisionTransformer with the same weights"
            )
    if any(cls.__name__ == "ScriptModule" for cls in type(module).__mro__):
        return "TorchScript modules hide their attention calls; pass the eager model"
    return None


def read_layout(tower: nn.Module) -> ModelLayout:
    """Layout of a timm VisionTransformer.

    Args:
        tower: module for which `is_tower` is true.

    Returns:
        Its `ModelLayout`. For the distilled DeiT, whose logits are the mean of a class-token head and a
        distillation-token head, `pooling` is "average" over these two tokens: both are read with equal weight.

    Raises:
        ValueError: the tower is configured in a way that the method cannot explain exactly.
    """
    _check_forward(tower)
    _check_blocks(tower)
    patch_embed = _attribute(tower, "patch_embed")
    grid = _pair(getattr(patch_embed, "grid_size", None), tower, "grid_size")
    image_size = _pair(getattr(patch_embed, "img_size", None), tower, "img_size")
    prefix = int(_attribute(tower, "num_prefix_tokens"))
    tokens = prefix + grid[0] * grid[1]
    pooling, pooled = _read_pooling(tower, prefix, tokens)
    return ModelLayout(
        tower=tower,
        blocks=tuple(_attribute(tower, "blocks")),
        prefix_tokens=prefix,
        grid=grid,
        pooling=pooling,
        pooled=pooled,
        image_size=image_size,
        in_chans=int(_attribute(tower, "in_chans")),
        d_model=int(_attribute(tower, "embed_dim")),
    )


def _attribute(tower: nn.Module, name: str) -> Any:
    # nn.Module types every attribute as Tensor | Module; timm's towers also hold numbers and strings.
    return getattr(tower, name)


def _refuse(tower: nn.Module, reason: str) -> ValueError:
    return ValueError(f"model: {type(tower).__name__} cannot be explained: {reason}")


def _is_distilled(tower: nn.Module) -> bool:
    return any(cls.__name__ == "VisionTransformerDistilled" for cls in type(tower).__mro__)


def _check_forward(tower: nn.Module) -> None:
    """Refuse towers whose token order or grid is not the one that timm's own code produces."""
    for method in ("_pos_embed", "forward_features", "pool"):
        owner = next((cls for cls in type(tower).__mro__ if method in vars(cls)), None)
        if owner is not None and owner.__module__ not in _TOWER_MODULES:
            raise _refuse(
                tower,
                f"{owner.__name__} replaces VisionTransformer.{method}, so which tokens are patches and which are "
                "pooled is not known (registers may come after the patches, for example)",
            )
    patch_embed = getattr(tower, "patch_embed", None)
    if getattr(tower, "dynamic_img_size", False):
        raise _refuse(
            tower,
            "dynamic_img_size=True makes the patch grid depend on the input; create the model with "
            "dynamic_img_size=False and the img_size you explain at",
        )
    if getattr(patch_embed, "dynamic_img_pad", False):
        raise _refuse(tower, "dynamic_img_pad=True pads images to an unknown grid; create the model without it")
    patch_drop = getattr(tower, "patch_drop", None)
    if tower.training and getattr(patch_drop, "prob", 0.0) > 0:
        raise _refuse(tower, "patch drop is active (patch_drop_rate > 0 in train mode); call model.eval() first")
    if getattr(tower, "grad_checkpointing", False):
        raise _refuse(
            tower,
            "gradient checkpointing runs every block twice; call set_grad_checkpointing(False) before explaining",
        )
    if tower.training and getattr(tower, "distilled_training", False):
        raise _refuse(tower, "it returns two logits in distilled training; call model.eval() first")


def _check_blocks(tower: nn.Module) -> None:
    """Refuse blocks that do not make exactly one plain scaled_dot_product_attention call."""
    blocks = getattr(tower, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise _refuse(tower, "it has no blocks")
    for name, module in tower.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _REFUSED_PARTS:
                raise _refuse(tower, f"'{name}' is a {cls.__name__}: {_REFUSED_PARTS[cls.__name__]}")
        if getattr(module, "fused_attn", True) is False:
            raise _refuse(
                tower,
                f"'{name}' has fused_attn=False and computes attention without scaled_dot_product_attention, which is "
                "the call that is tapped; call timm.layers.set_fused_attn(True) before creating the model, or set "
                "fused_attn = True on its attention modules",
            )


def _read_pooling(tower: nn.Module, prefix: int, tokens: int) -> tuple[Pooling, tuple[int, int]]:
    """Pooling kind and the range of tokens that it reads."""
    if _is_distilled(tower):
        return "average", (0, 2)
    include_prefix = bool(getattr(tower, "pool_include_prefix", False))
    seen = (0 if include_prefix else prefix, tokens)
    global_pool = str(getattr(tower, "global_pool", ""))
    attn_pool = getattr(tower, "attn_pool", None)
    # timm looks at attn_pool before global_pool, so this order is what decides.
    if attn_pool is not None and global_pool != "prr":
        return "attention", _check_attention_pool(tower, attn_pool, seen)
    if global_pool == "token":
        return "token", (0, 1)
    if global_pool == "avg":
        return "average", seen
    raise _refuse(tower, _REFUSED_POOLS.get(global_pool, f"global_pool='{global_pool}' is not a known pooling"))


def _check_attention_pool(tower: nn.Module, pool: nn.Module, seen: tuple[int, int]) -> tuple[int, int]:
    kind = type(pool).__name__
    latents = getattr(pool, "latent_len", None)
    if "AttentionPoolLatent" not in [cls.__name__ for cls in type(pool).__mro__]:
        raise _refuse(tower, f"its attention pooling is a {kind}; expected timm's AttentionPoolLatent")
    if latents != 1:
        raise _refuse(tower, f"its attention pooling has {latents} latent queries; expected 1, whose row is the seed")
    if getattr(pool, "pool", "") not in ("token", "avg"):
        raise _refuse(tower, "its attention pooling returns a sequence instead of one vector per image")
    return seen


def _pair(value: object, tower: nn.Module, name: str) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise _refuse(
            tower, f"its patch embedding has no fixed {name} (got {value!r}); create the model with an img_size"
        )
    return int(value[0]), int(value[1])
