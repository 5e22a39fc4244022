"""Small random models of Hugging Face's families, with sdpa and with eager attention."""

from __future__ import annotations

from typing import Any

from families import CLASSES, Family
from torch import nn

_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
}
_TEXT: dict[str, Any] = {**_SMALL, "vocab_size": 50, "max_position_embeddings": 8, "projection_dim": 24}
_IDS: dict[str, int] = {"bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 0}
_BOTH = (
    "its logits read the class token and the mean of the patches, and no single row of the rollout stands for both; "
    "the class token's row is taken, a layout with `pooling=\"average\"` explains the patches' half"
)


def classifier(model: str, config: str, attention: str, **settings: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**{**_SMALL, "num_labels": CLASSES, **settings})
    return load(getattr(transformers, model), made, attention)


def dual(model: str, config: str, attention: str, vision: dict[str, Any], **settings: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(
        text_config={**_TEXT, **_IDS, **settings.pop("text", {})}, vision_config={**_SMALL, **vision}, **settings
    )
    return load(getattr(transformers, model), made, attention)


def load(kind: Any, config: Any, attention: str) -> nn.Module:
    return kind._from_config(config, attn_implementation="eager" if attention == "eager" else "sdpa")


def family(
    name: str, model: str, config: str, size: tuple[int, int], prefix: int, pooling: str, pooled: tuple[int, int], *,
    patch: int = 16, attention: str = "fused", note: str = "", reads_more: bool = False, resized: bool = False,
    prompts: tuple[str, ...] = (), **settings: Any,
) -> Family:  # fmt: skip
    def make() -> nn.Module:
        if config in ("CLIPConfig", "SiglipConfig"):
            extra = {"projection_dim": 24} if config == "CLIPConfig" else {"text": {"projection_size": 48}}
            vision = {"image_size": size[0], "patch_size": patch}
            labels = {} if prompts else {"num_labels": CLASSES}
            return dual(model, config, attention, vision, **extra, **labels)
        return classifier(model, config, attention, **{"image_size": size, "patch_size": patch, **settings})

    grid = (size[0] // patch, size[1] // patch)
    flags = {"note": note, "reads_more": reads_more, "resized": resized, "prompts": prompts}
    return Family(name, "Hugging Face", model, make, size, grid, prefix, pooling, pooled, attention, **flags)


def both(*args: Any, **settings: Any) -> list[Family]:
    return [family(*args, attention=attention, **settings) for attention in ("fused", "eager")]


FAMILIES = [
    *both("ViT", "ViTForImageClassification", "ViTConfig", (64, 48), 1, "token", (0, 1)),
    *both("DeiT", "DeiTForImageClassification", "DeiTConfig", (64, 48), 2, "token", (0, 1)),
    family("DeiT, distilled", "DeiTForImageClassificationWithTeacher", "DeiTConfig", (64, 48), 2, "average", (0, 2),
           note="its logits are the mean of two heads, on the class token and on the distillation token"),
    *both("BEiT", "BeitForImageClassification", "BeitConfig", (64, 48), 1, "average", (1, 13),
          use_relative_position_bias=True),
    family("BEiT, class token, shared positions", "BeitForImageClassification", "BeitConfig", (64, 48), 1, "token",
           (0, 1), use_shared_relative_position_bias=True, use_mean_pooling=False),
    family("Data2Vec", "Data2VecVisionForImageClassification", "Data2VecVisionConfig", (64, 64), 1, "average", (1, 17),
           image_size=64, use_relative_position_bias=True),
    *both("CLIP tower", "CLIPVisionModelWithProjection", "CLIPVisionConfig", (48, 48), 1, "token", (0, 1),
          image_size=48, projection_dim=24),
    *both("CLIP with text", "CLIPModel", "CLIPConfig", (48, 48), 1, "token", (0, 1), prompts=("a cat", "a dog")),
    family("MetaCLIP 2 tower", "MetaClip2VisionModelWithProjection", "MetaClip2VisionConfig", (48, 48), 1, "token",
           (0, 1), image_size=48, projection_dim=24),
    family("Chinese CLIP tower", "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", (48, 48), 1, "token", (0, 1),
           image_size=48),
    family("AltCLIP tower", "AltCLIPVisionModel", "AltCLIPVisionConfig", (48, 48), 1, "token", (0, 1), image_size=48),
    family("CLIP, classifier", "CLIPForImageClassification", "CLIPConfig", (48, 48), 1, "average", (1, 10)),
    *both("SigLIP tower", "SiglipVisionModel", "SiglipVisionConfig", (48, 48), 0, "attention", (0, 9), image_size=48),
    *both("SigLIP with text", "SiglipModel", "SiglipConfig", (48, 48), 0, "attention", (0, 9),
          prompts=("a cat", "a dog")),
    family("SigLIP, classifier", "SiglipForImageClassification", "SiglipConfig", (48, 48), 0, "average", (0, 9)),
    *both("DINOv2", "Dinov2Model", "Dinov2Config", (42, 42), 1, "token", (0, 1), patch=14, image_size=42),
    family("DINOv2, another image size", "Dinov2Model", "Dinov2Config", (28, 56), 1, "token", (0, 1), patch=14,
           image_size=42, resized=True),
    family("DINOv2, classifier", "Dinov2ForImageClassification", "Dinov2Config", (42, 42), 1, "token", (0, 1), patch=14,
           image_size=42, note=_BOTH, reads_more=True),
    *both("DINOv2, registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", (42, 42), 5, "token", (0, 1),
          patch=14, image_size=42, num_register_tokens=4),
    family("DINOv2, registers, classifier", "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
           (42, 42), 5, "token", (0, 1), patch=14, image_size=42, num_register_tokens=4, note=_BOTH, reads_more=True),
    *both("DINOv3", "DINOv3ViTModel", "DINOv3ViTConfig", (64, 64), 5, "token", (0, 1), image_size=64,
          num_register_tokens=4),
    family("DINOv3, gated MLP, another size", "DINOv3ViTModel", "DINOv3ViTConfig", (48, 80), 5, "token", (0, 1),
           image_size=64, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu", resized=True),
    family("ViT MSN", "ViTMSNForImageClassification", "ViTMSNConfig", (64, 64), 1, "token", (0, 1), image_size=64),
]  # fmt: skip
