"""Small random models of timm's families."""

from __future__ import annotations

from typing import Any

from families import CLASSES, Family, eager
from torch import nn


def create(name: str, size: tuple[int, int], **settings: Any) -> nn.Module:
    import timm

    sizes = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": CLASSES}
    return timm.create_model(name, img_size=size, **{**sizes, **settings})


def family(
    name: str, model: str, size: tuple[int, int], prefix: int, pooling: str, *,
    pooled: tuple[int, int] | None = None, patch: int = 16, attention: str = "fused", note: str = "",
    resized: tuple[int, int] | None = None, **settings: Any,
) -> Family:  # fmt: skip
    """One family; `pooled` None: the first token, or all patches. `resized`: the size that the model is created for."""
    grid = (size[0] // patch, size[1] // patch)
    if pooled is None:
        pooled = (0, 1) if pooling == "token" else (prefix, prefix + grid[0] * grid[1])

    def make() -> nn.Module:
        built = create(model, resized or size, **settings)
        return eager(built) if attention == "eager" else built

    return Family(
        name, "timm", model, make, size, grid, prefix, pooling, pooled, attention, note, resized=resized is not None
    )


FAMILIES = [
    family("ViT", "vit_tiny_patch16_224", (64, 48), 1, "token"),
    family("ViT", "vit_tiny_patch16_224", (64, 48), 1, "token", attention="eager"),
    family("ViT, patches averaged", "vit_medium_patch16_gap_256", (48, 64), 0, "average"),
    family("ViT, norm after the branch", "vit_base_patch16_rpn_224", (64, 64), 0, "average"),
    family("ViT, class token averaged too", "vit_tiny_patch16_224", (64, 48), 1, "average", pooled=(0, 13),
           global_pool="avg", pool_include_prefix=True),
    family("ViT, rotary", "vit_small_patch16_rope_224", (64, 48), 1, "token"),
    family("ViT, rotary mixed", "vit_small_patch16_rope_mixed_224", (48, 64), 1, "token"),
    family("ViT, rotary, registers", "vit_medium_patch16_rope_reg1_gap_256", (64, 48), 1, "average"),
    family("ViT, relative positions", "vit_relpos_small_patch16_224", (48, 64), 0, "average"),
    family("ViT, relative positions", "vit_relpos_medium_patch16_cls_224", (48, 64), 1, "token", attention="eager"),
    family("DeiT", "deit_tiny_patch16_224", (64, 64), 1, "token"),
    family("DeiT, distilled", "deit_tiny_distilled_patch16_224", (64, 48), 2, "average", pooled=(0, 2), note=(
        "its logits are the mean of two heads, on the class token and on the distillation token")),
    family("DeiT III", "deit3_small_patch16_224", (64, 48), 1, "token"),
    family("DINOv2", "vit_small_patch14_dinov2", (56, 42), 1, "token", patch=14),
    family("DINOv2, registers", "vit_small_patch14_reg4_dinov2", (56, 42), 5, "token", patch=14),
    family("DINOv2 giant, SwiGLU", "vit_giant_patch14_reg4_dinov2", (56, 42), 5, "token", patch=14),
    family("DINOv3", "vit_small_patch16_dinov3", (64, 48), 5, "average"),
    family("DINOv3, class token", "vit_small_patch16_dinov3_qkvb", (64, 48), 5, "token", global_pool="token"),
    family("DINOv3, another image size", "vit_small_plus_patch16_dinov3", (48, 80), 5, "average", resized=(64, 64)),
    family("EVA", "eva_giant_patch14_224", (56, 42), 1, "average", patch=14),
    family("EVA-02", "eva02_tiny_patch14_224", (56, 42), 1, "average", patch=14),
    family("EVA-02", "eva02_tiny_patch14_224", (56, 42), 1, "average", patch=14, attention="eager"),
    family("EVA-02 CLIP tower", "eva02_base_patch16_clip_224", (64, 48), 1, "token"),
    family("Sapiens2, grouped queries", "vit_base_patch16_sapiens2", (64, 48), 9, "token", embed_dim=64, num_heads=4,
           num_kv_heads=2),
    family("BEiT", "beit_base_patch16_224", (64, 48), 1, "average"),
    family("BEiT v2, class token", "beitv2_base_patch16_224", (48, 64), 1, "token", global_pool="token"),
    family("BEiT v2, class token", "beitv2_base_patch16_224", (48, 64), 1, "token", global_pool="token",
           attention="eager"),
    family("BEiT-3", "beit3_base_patch16_224", (64, 48), 1, "average"),
    family("AIMv2", "aimv2_large_patch14_224", (56, 42), 0, "average", patch=14),
    family("RADIO", "vit_base_patch16_radio_v3", (64, 48), 8, "token"),
    family("CLIP tower", "vit_base_patch16_clip_224", (64, 48), 1, "token"),
    family("CLIP tower, QuickGELU", "vit_base_patch16_clip_quickgelu_224", (64, 48), 1, "token"),
    family("SigLIP tower", "vit_base_patch16_siglip_224", (64, 48), 0, "attention"),
    family("SigLIP tower", "vit_base_patch16_siglip_224", (64, 48), 0, "attention", attention="eager"),
    family("SigLIP tower, patches averaged", "vit_base_patch16_siglip_gap_224", (64, 48), 0, "average"),
    family("Perception Encoder", "vit_pe_core_tiny_patch16_384", (64, 48), 1, "attention", pooled=(0, 13)),
    family("Perception Encoder, spatial", "vit_pe_spatial_tiny_patch16_512", (64, 48), 1, "average"),
]  # fmt: skip
