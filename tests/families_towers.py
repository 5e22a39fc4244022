"""Small random models of open_clip and torchvision, whose blocks hold nn.MultiheadAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from families import CLASSES, Family
from torch import nn


def open_clip_tower(**settings: Any) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    sizes = {"patch_size": 16, "width": 48, "layers": 3, "heads": 3, "mlp_ratio": 2.0, "output_dim": 24}
    return VisionTransformer(image_size=(48, 64), **{**sizes, **settings})  # type: ignore[arg-type]


def sequence_first() -> nn.Module:
    """A tower whose blocks hand over [N, B, C], as all of them did before open_clip had batch_first."""
    from open_clip.transformer import Transformer

    tower: Any = open_clip_tower()
    tower.transformer = Transformer(48, 3, 3, mlp_ratio=2.0, batch_first=False)
    return tower


def open_clip_model(kind: str, vision: dict[str, Any]) -> nn.Module:
    import open_clip.model as models

    text = models.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    made = models.CLIPVisionCfg(**vision)
    return getattr(models, kind)(24, made, text)


def open_clip_vit(kind: str = "CLIP", **settings: Any) -> nn.Module:
    sizes = {"layers": 3, "width": 48, "head_width": 16, "patch_size": 16, "image_size": (48, 64)}
    return open_clip_model(kind, {**sizes, **settings})


def open_clip_timm() -> nn.Module:
    return open_clip_model(
        "CustomTextCLIP", {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    )


def torchvision_vit(**settings: Any) -> nn.Module:
    from torchvision.models import VisionTransformer

    sizes = {"image_size": 48, "patch_size": 16, "num_layers": 3, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 80}
    return VisionTransformer(**{**sizes, "num_classes": CLASSES, **settings})


def torchvision_stem() -> nn.Module:
    from torchvision.models.vision_transformer import ConvStemConfig

    return torchvision_vit(conv_stem_configs=[ConvStemConfig(8, 3, 4), ConvStemConfig(12, 3, 4)])


def family(
    library: str, name: str, model: str, make: Callable[[], nn.Module], pooling: str = "token",
    pooled: tuple[int, int] = (0, 1), attention: str = "MultiheadAttention", *, size: tuple[int, int] = (48, 64),
    prompts: bool = False,
) -> Family:  # fmt: skip
    grid = (size[0] // 16, size[1] // 16)
    asked = ("a cat", "a dog") if prompts else ()
    return Family(name, library, model, make, size, grid, 1, pooling, pooled, attention, prompts=asked)


def tower(
    name: str, pooling: str, pooled: tuple[int, int], attention: str = "MultiheadAttention", **settings: Any
) -> Family:
    make = functools.partial(open_clip_tower, **settings)
    return family("open_clip", name, "VisionTransformer", make, pooling, pooled, attention)


FAMILIES = [
    family("open_clip", "CLIP with text", "CLIP", open_clip_vit, prompts=True),
    family("open_clip", "CLIP with text, patches averaged", "CustomTextCLIP",
           lambda: open_clip_vit("CustomTextCLIP", pool_type="avg"), "average", (1, 13), prompts=True),
    family("open_clip", "CLIP with text, timm tower", "CustomTextCLIP, TimmModel", open_clip_timm, attention="fused",
           size=(160, 160), prompts=True),
    tower("CLIP tower", "token", (0, 1)),
    tower("CLIP tower, patches averaged", "average", (1, 13), pool_type="avg", final_ln_after_pool=True),
    tower("CLIP tower, attention pool", "attention", (0, 13), attentional_pool=True, attn_pooler_queries=1,
          attn_pooler_heads=2),
    tower("CLIP tower, q/k norm", "token", (0, 1), "fused", qk_norm=True, scale_heads=True),
    family("open_clip", "CLIP tower, sequence first", "VisionTransformer", sequence_first),
    family("torchvision", "ViT", "vit_b_16, vit_l_32, ...", torchvision_vit, size=(48, 48)),
    family("torchvision", "ViT, convolutional stem", "VisionTransformer", torchvision_stem, size=(48, 48)),
]  # fmt: skip
