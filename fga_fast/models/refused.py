"""Vision transformers that the method does not apply to, by name, each with its reason."""

from __future__ import annotations

from torch import nn

_WINDOWED = (
    "windowed attention: a token attends only inside its own window, so a block has no attention map over all tokens "
    "and the blocks' maps cannot be multiplied into one rollout over the patches"
)
_HIERARCHICAL = (
    "hierarchical: tokens are merged or pooled between stages, so successive attention maps have different sizes and "
    "cannot be multiplied into one rollout over the patches"
)
_NOT_PLAIN = "its attention is no plain softmax attention over tokens: "
_VIDEO = "it reads videos: its tokens are no grid over one image"
_NO_LOGITS = "it returns feature maps or pixels, no logits or image features to explain; use its base model"
_FLEXIBLE = "it takes packed patches of varying grids under a boolean padding mask; use the fixed-size model instead"

# Package -> class name -> reason. Subclasses count too. Classes of other packages do not: a user's own wrapper may be
# called Nest or Twins.
REFUSED: dict[str, dict[str, str]] = {
    "timm": {
        **dict.fromkeys(("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr"), _WINDOWED),
        **dict.fromkeys(("DaVit", "Twins", "Nest", "GlobalContextVit", "VisionTransformerSAM"), _WINDOWED),
        **dict.fromkeys(("PyramidVisionTransformerV2", "MultiScaleVit", "Hiera", "HieraDet"), _HIERARCHICAL),
        **dict.fromkeys(("PoolingVisionTransformer", "CoaT", "MaxxVit", "Levit", "LevitDistilled"), _HIERARCHICAL),
        **dict.fromkeys(("EfficientVit", "EfficientVitMsra", "EfficientFormer", "TinyVit"), _HIERARCHICAL),
        **dict.fromkeys(("EfficientFormerV2", "NextViT", "MetaFormer", "EfficientVitLarge", "FastVit"), _HIERARCHICAL),
        "Xcit": _NOT_PLAIN + "cross-covariance attention mixes channels instead of tokens",
        "Cait": _NOT_PLAIN
        + "talking-heads projections mix the attention maps of different heads before and after softmax",
        "VOLO": _NOT_PLAIN + "outlook attention predicts its weights from the centre token alone",
        "ConVit": _NOT_PLAIN + "gated positional attention mixes two softmaxes",
        "CrossVit": "two branches with different patch sizes exchange class tokens, so there is no single token grid",
        "TNT": "two nested transformers, over pixels and over patches, so there is no single token grid",
        "NaFlexVit": _FLEXIBLE,
    },
    "torchvision": {"SwinTransformer": _WINDOWED, "MaxVit": _HIERARCHICAL},
    "open_clip": {
        "ModifiedResNet": "it is a convolutional network with one attention pool at its end, so there is no rollout",
    },
    "transformers": {
        **dict.fromkeys(("SwinModel", "SwinBackbone", "Swinv2Model", "Swinv2Backbone", "Swin2SRModel"), _WINDOWED),
        **dict.fromkeys(("DonutSwinModel", "MaskFormerSwinModel", "MaskFormerSwinBackbone"), _WINDOWED),
        **dict.fromkeys(("VitDetModel", "VitDetBackbone", "SamVisionEncoder", "DinatModel"), _WINDOWED),
        **dict.fromkeys(("SegformerModel", "PvtModel", "PvtV2Model", "HieraModel", "CvtModel"), _HIERARCHICAL),
        **dict.fromkeys(("MobileViTModel", "MobileViTV2Model", "LevitModel", "SwiftFormerModel"), _HIERARCHICAL),
        **dict.fromkeys(("FocalNetModel", "GroupViTVisionTransformer", "PoolFormerModel"), _HIERARCHICAL),
        **dict.fromkeys(("TimesformerModel", "VivitModel", "VideoMAEModel"), _VIDEO),
        **dict.fromkeys(("ViTForMaskedImageModeling", "DeiTForMaskedImageModeling"), _NO_LOGITS),
        **dict.fromkeys(("Dinov2Backbone", "Dinov2WithRegistersBackbone", "DINOv3ViTBackbone"), _NO_LOGITS),
        "ViTMAEModel": (
            "it shuffles the patches at random in every forward pass, at mask_ratio=0 too, so a token's place in the "
            "image is not known; load its weights into ViTModel or ViTForImageClassification, which have the same "
            "encoder: ViTModel.from_pretrained(checkpoint), or vit.load_state_dict(mae.state_dict())"
        ),
        "Siglip2VisionModel": _FLEXIBLE,
        "Siglip2VisionTransformer": _FLEXIBLE,
    },
}

# Class of a part of a tower -> reason: it makes two attention calls, or subtracts one attention map from another.
REFUSED_PARTS: dict[str, str] = {
    "DiffAttention": "differential attention subtracts two softmax maps, so the relevance of a map is not defined",
    "DiffParallelScalingBlock": "differential attention subtracts two softmax maps, so relevance is not defined",
    "ParallelThingsBlock": "each block holds several attentions side by side; one attention a block is expected",
}

# Wrapper around a model -> reason.
_COPIES = "it runs copies of the model in threads, each with a part of the batch; pass the model inside, model.module"

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def reason(module: nn.Module) -> str | None:
    """Why `module` itself, apart from its submodules, cannot be explained, or None."""
    for cls in type(module).__mro__:
        found = REFUSED.get(cls.__module__.split(".")[0], {}).get(cls.__name__)
        if found is not None:
            return found
    return opaque(module)


def wrapper(module: nn.Module) -> str | None:
    """Why a model inside of `module` cannot be explained, or None."""
    return _COPIES if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 else None


def opaque(module: nn.Module) -> str | None:
    """Why the calls that `module` makes cannot be followed or differentiated from outside, or None."""
    if hasattr(module, "_orig_mod"):  # a module from torch.compile()
        return "it is compiled by torch.compile, whose graph hides its attention; pass the model that was compiled"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "it was compiled in place by module.compile(), which hides its attention; build the model without it"
    forward = getattr(module, "forward", None)
    if hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False):
        return "its forward is compiled by torch.compile, which hides its attention; give it back its own forward"
    names = [cls.__name__ for cls in type(module).__mro__]
    if "FullyShardedDataParallel" in names:
        return (
            "FullyShardedDataParallel gathers its weights for whole training steps only; shard the model with "
            "torch.distributed.fsdp.fully_shard, or explain it before it is wrapped"
        )
    if "ScriptModule" in names:
        return "TorchScript modules hide their attention calls; pass the eager model"
    if "GraphModule" in names:
        return "a traced or exported graph no longer has blocks; pass the model that was traced"
    return None


def check_inside(tower: nn.Module) -> None:
    """Refuses a tower with a part that cannot be tapped or differentiated."""
    for name, module in tower.named_modules():
        found = opaque(module) or _part(module)
        if found is not None:
            where = f"'{name}' is a {type(module).__name__}: " if name else ""
            raise ValueError(f"model: {type(tower).__name__} cannot be explained: {where}{found}")


def _part(module: nn.Module) -> str | None:
    for cls in type(module).__mro__:
        if cls.__name__ in REFUSED_PARTS:
            return REFUSED_PARTS[cls.__name__]
        if cls.__module__.startswith(_QUANTIZED):
            return "quantized modules compute with integers and have no gradient; use the float model"
    # timm and open_clip recompute blocks in any mode, Hugging Face only while training.
    if getattr(module, "grad_checkpointing", False) is True or (
        module.training and getattr(module, "gradient_checkpointing", False) is True
    ):
        return (
            "gradient checkpointing runs every block twice; switch it off before explaining "
            "(timm, open_clip: set_grad_checkpointing(False); transformers: gradient_checkpointing_disable())"
        )
    return None
