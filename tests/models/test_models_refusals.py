"""Models that are refused: each error names the class, the reason and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fga_fast.models.find import find_layout
from fga_fast.models.refused import REFUSED, REFUSED_PARTS

timm = pytest.importorskip("timm")
from timm.layers import AttentionPoolLatent, DiffAttention  # noqa: E402 - after importorskip
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer  # noqa: E402

Build = Callable[..., nn.Module]


@pytest.mark.parametrize(
    ("name", "class_name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer", "windowed attention"),
        ("swinv2_tiny_window8_256", "SwinTransformerV2", "windowed attention"),
        ("twins_svt_small", "Twins", "windowed attention"),
        ("davit_tiny", "DaVit", "windowed attention"),
        ("coatnet_0_rw_224", "MaxxVit", "hierarchical"),
        ("samvit_base_patch16", "VisionTransformerSAM", "windowed attention"),
        ("gcvit_xxtiny", "GlobalContextVit", "windowed attention"),
        ("nest_tiny", "Nest", "windowed attention"),
        ("pvt_v2_b0", "PyramidVisionTransformerV2", "hierarchical"),
        ("mvitv2_tiny", "MultiScaleVit", "hierarchical"),
        ("hiera_tiny_224", "Hiera", "hierarchical"),
        ("pit_ti_224", "PoolingVisionTransformer", "hierarchical"),
        ("levit_128s", "LevitDistilled", "hierarchical"),
        ("coat_tiny", "CoaT", "hierarchical"),
        ("efficientformer_l1", "EfficientFormer", "hierarchical"),
        ("tiny_vit_5m_224", "TinyVit", "hierarchical"),
        ("xcit_nano_12_p16_224", "Xcit", "cross-covariance"),
        ("cait_xxs24_224", "Cait", "talking-heads"),
        ("volo_d1_224", "VOLO", "outlook attention"),
        ("convit_tiny", "ConVit", "gated positional"),
        ("crossvit_tiny_240", "CrossVit", "two branches"),
        ("tnt_s_legacy_patch16_224", "TNT", "nested"),
        ("naflexvit_base_patch16_gap", "NaFlexVit", "boolean padding mask"),
        ("nextvit_small", "NextViT", "hierarchical"),
    ],
)
def test_refused_architecture(name: str, class_name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=f"{class_name} cannot be explained: .*{reason}"):
        find_layout(model)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"global_pool": "max"}, "max pooling"),
        ({"global_pool": "avgmax"}, "maximum"),
        ({"global_pool": ""}, "returns every token"),
        ({"global_pool": "prr"}, "'prr' pooling"),
        ({"img_size": (40, 48), "dynamic_img_size": True}, "no whole number of 16 x 16 patches"),
        ({"attn_layer": DiffAttention}, "'blocks.0.attn' is a DiffAttention"),
        ({"attn_layer": "diff"}, "differential attention"),
        ({"block_fn": ParallelThingsBlock}, "several attentions side by side"),
    ],
)
def test_refused_settings(tiny_vit: Build, settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=f"VisionTransformer cannot be explained: .*{reason}"):
        find_layout(tiny_vit(**settings))


def test_refused_gradient_checkpointing(tiny_vit: Build) -> None:
    model = tiny_vit()
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match=r"gradient checkpointing .*set_grad_checkpointing\(False\)"):
        find_layout(model)


def test_patch_drop_is_refused_only_while_active(tiny_vit: Build) -> None:
    model = tiny_vit(patch_drop_rate=0.5)
    assert find_layout(model).patches == 6
    with pytest.raises(ValueError, match=r"patch drop is active .*model.eval\(\)"):
        find_layout(model.train())


def test_distilled_training_is_refused(tiny_vit: Build) -> None:
    model = tiny_vit(VisionTransformerDistilled).train()
    model.set_distilled_training()
    with pytest.raises(ValueError, match="two logits in distilled training"):
        find_layout(model)


def test_several_latent_queries_are_refused(tiny_vit: Build) -> None:
    model = tiny_vit(global_pool="map")
    model.attn_pool = AttentionPoolLatent(16, num_heads=2, latent_len=3)
    with pytest.raises(ValueError, match="3 latent queries; expected 1"):
        find_layout(model)
    model.attn_pool = AttentionPoolLatent(16, num_heads=2, pool_type="")
    with pytest.raises(ValueError, match="returns a sequence"):
        find_layout(model)
    model.attn_pool = nn.Identity()
    with pytest.raises(ValueError, match="its attention pooling is a Identity"):
        find_layout(model)


class RegistersLast(VisionTransformer):
    def _pos_embed(self, x: Tensor) -> Tensor:  # [B, P, C]
        return super()._pos_embed(x).roll(-1, dims=1)


class Normalised(VisionTransformer):
    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W]
        return super().forward(x * 2 - 1)


def test_a_subclass_may_change_the_input_but_not_the_token_order(tiny_vit: Build) -> None:
    assert find_layout(tiny_vit(Normalised)).prefix_tokens == 1
    with pytest.raises(ValueError, match=r"RegistersLast replaces VisionTransformer._pos_embed.*after the patches"):
        find_layout(tiny_vit(RegistersLast))


HUGGING_FACE: dict[str, tuple[str, dict[str, Any], str]] = {
    "SwinForImageClassification": ("SwinConfig", {"depths": [1, 1]}, r"SwinModel \(at 'swin'\).*windowed attention"),
    "Swinv2Model": ("Swinv2Config", {"depths": [1, 1]}, "windowed attention"),
    "SegformerModel": ("SegformerConfig", {}, "hierarchical"),
    "PvtV2Model": ("PvtV2Config", {}, "hierarchical"),
    "HieraModel": ("HieraConfig", {"depths": [1, 1, 1, 1]}, "hierarchical"),
    "VitDetModel": ("VitDetConfig", {"num_hidden_layers": 1}, "windowed attention"),
    "ViTMAEModel": ("ViTMAEConfig", {"num_hidden_layers": 1}, "shuffles the patches .* weights into ViTModel"),
    "ViTMAEForPreTraining": ("ViTMAEConfig", {"mask_ratio": 0.0, "num_hidden_layers": 1}, "at mask_ratio=0 too"),
    "ViTForMaskedImageModeling": ("ViTConfig", {"num_hidden_layers": 1}, "feature maps or pixels"),
    "Dinov2Backbone": ("Dinov2Config", {"num_hidden_layers": 1}, "feature maps or pixels"),
    "Siglip2VisionModel": ("Siglip2VisionConfig", {"num_hidden_layers": 1}, "boolean padding mask"),
    "VideoMAEModel": ("VideoMAEConfig", {"num_hidden_layers": 1}, "videos"),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_refused_hugging_face_models(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config, settings, reason = HUGGING_FACE[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    with pytest.raises(ValueError, match=f"cannot be explained: .*{reason}|{reason}"):
        find_layout(model)


@pytest.mark.parametrize(
    ("name", "reason"), [("swin_t", "windowed"), ("swin_v2_t", "windowed"), ("maxvit_t", "hierarch")]
)
def test_refused_torchvision_models(name: str, reason: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    with pytest.raises(ValueError, match=f"cannot be explained: {reason}"):
        find_layout(model)


@pytest.mark.parametrize("package", REFUSED)
def test_the_refused_classes_exist(package: str) -> None:
    pytest.importorskip(package)
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    files = Path(spec.origin).parent.rglob("model*.py" if package == "transformers" else "*.py")
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    known = set(re.findall(r"^class (\w+)", text, re.MULTILINE)) | {"Siglip2VisionTransformer"}  # transformers 4
    parts = REFUSED_PARTS if package == "timm" else {}
    assert {*REFUSED[package], *parts} <= known


def test_no_tower_and_no_module_are_refused_with_what_is_supported() -> None:
    with pytest.raises(ValueError, match="no supported vision transformer found in Linear"):
        find_layout(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"found in ConvNeXt; supported are timm.*torchvision.*ModelLayout\(blocks="):
        find_layout(timm.create_model("convnext_atto"))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module .*got function"):
        find_layout(lambda images: images)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"image_size: expected a pair of ints, got \(3,\)"):
        find_layout(nn.Linear(3, 4), image_size=(3,))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_models_whose_calls_cannot_be_seen(tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match="TorchScript"):
        find_layout(torch.jit.trace(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)))
    with pytest.raises(ValueError, match="traced or exported graph"):
        find_layout(torch.fx.symbolic_trace(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"OptimizedModule \(at '1'\) .*pass the model that was compiled"):
        find_layout(nn.Sequential(nn.Identity(), torch.compile(tiny_vit())))
    inside = tiny_vit()
    inside.blocks[1] = torch.compile(inside.blocks[1])
    with pytest.raises(ValueError, match=r"'blocks.1' is a OptimizedModule: it is compiled"):
        find_layout(inside)
    in_place = tiny_vit()
    in_place.compile()
    with pytest.raises(ValueError, match=r"compiled in place by module.compile\(\)"):
        find_layout(in_place)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_modules(tiny_vit: Build) -> None:
    model = tiny_vit()
    model.blocks[0].mlp.fc1 = torch.ao.nn.quantized.Linear(16, 64)
    with pytest.raises(ValueError, match=r"'blocks.0.mlp.fc1' is a Linear: quantized modules .* no gradient"):
        find_layout(model)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_hugging_face_attention_that_cannot_be_tapped(implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1))
    model.config._attn_implementation = implementation  # what from_pretrained(attn_implementation=...) leads to
    with pytest.raises(ValueError, match=rf"'{implementation}' computes .*set_attn_implementation\('sdpa'\)"):
        find_layout(model)


def test_hugging_face_gradient_checkpointing() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1))
    for layer in model.layers:
        layer.gradient_checkpointing = True
    assert find_layout(model.eval()).prefix_tokens == 1  # it does nothing then
    with pytest.raises(ValueError, match=r"gradient checkpointing .*gradient_checkpointing_disable\(\)"):
        find_layout(model.train())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"pool_type": "none"}, "returns every token"),
        ({"attentional_pool": True, "attn_pooler_queries": 2}, "2 queries"),
        ({"attentional_pool": True, "attn_pooler_queries": 1, "pool_type": "avg"}, "pool_type='avg'"),
        ({"attentional_pool": "parallel"}, "two attention pools"),
    ],
)
def test_refused_open_clip_settings(settings: dict[str, Any], reason: str) -> None:
    models = pytest.importorskip("open_clip.transformer")
    tower = models.VisionTransformer(32, 16, 16, 1, 2, 2.0, output_dim=8, **settings)
    with pytest.raises(ValueError, match=f"VisionTransformer cannot be explained: .*{reason}"):
        find_layout(tower)


def test_open_clip_resnet() -> None:
    models = pytest.importorskip("open_clip.modified_resnet")
    with torch.device("meta"):
        model = models.ModifiedResNet([1, 1, 1, 1], 16, 2, image_size=32, width=8)
    with pytest.raises(ValueError, match="ModifiedResNet cannot be explained: it is a convolutional network"):
        find_layout(model)


def test_subclasses_that_replace_the_forward_pass() -> None:
    open_clip, torchvision = pytest.importorskip("open_clip.transformer"), pytest.importorskip("torchvision.models")
    both = [open_clip.VisionTransformer(32, 16, 16, 1, 2, 2.0), torchvision.VisionTransformer(32, 16, 1, 2, 16, 16)]
    for tower in both:
        tower.__class__ = type("Own", (type(tower),), {"forward": lambda self, images: images})
        with pytest.raises(ValueError, match=r"Own replaces VisionTransformer.forward"):
            find_layout(tower)


@pytest.mark.parametrize("library", ["timm", "open_clip", "torchvision"])
def test_another_image_size_where_the_tower_takes_one_only(tiny_vit: Build, library: str) -> None:
    if library == "timm":
        tower = tiny_vit()
    elif library == "open_clip":
        tower = pytest.importorskip("open_clip.transformer").VisionTransformer(32, 16, 16, 1, 2, 2.0)
    else:
        tower = pytest.importorskip("torchvision.models").VisionTransformer(32, 16, 1, 2, 16, 16)
    with pytest.raises(ValueError, match=r"takes images of 32 x (32|48) only, got 64 x 64; "):
        find_layout(tower, image_size=(64, 64))
    assert find_layout(tower, image_size=find_layout(tower).image_size) == find_layout(tower)
