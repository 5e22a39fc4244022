"""Layouts of timm's VisionTransformer in all its settings, and towers inside wrappers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fga_fast.models.find import active_randomness, find_layout
from fga_fast.models.layout import ModelLayout

timm = pytest.importorskip("timm")
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)

Build = Callable[..., nn.Module]


def summary(layout: ModelLayout) -> tuple[int, str, tuple[int, int]]:
    return layout.prefix_tokens, layout.pooling, layout.pooled


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({}, (1, "token", (0, 1)), id="vit"),
        pytest.param({"no_embed_class": True, "init_values": 1e-5}, (1, "token", (0, 1)), id="deit3"),
        pytest.param({"init_values": 1e-5}, (1, "token", (0, 1)), id="dinov2"),
        pytest.param({"reg_tokens": 4, "no_embed_class": True}, (5, "token", (0, 1)), id="dinov2-registers"),
        pytest.param({"pre_norm": True, "norm_layer": nn.LayerNorm}, (1, "token", (0, 1)), id="clip"),
        pytest.param({"class_token": False, "global_pool": "map"}, (0, "attention", (0, 6)), id="siglip"),
        pytest.param({"global_pool": "map"}, (1, "attention", (1, 7)), id="map-with-class-token"),
        pytest.param(
            {"global_pool": "map", "pool_include_prefix": True}, (1, "attention", (0, 7)), id="map-over-all-tokens"
        ),
        pytest.param({"class_token": False, "global_pool": "avg"}, (0, "average", (0, 6)), id="siglip-gap"),
        pytest.param({"global_pool": "avg"}, (1, "average", (1, 7)), id="avg-without-class-token"),
        pytest.param({"global_pool": "avg", "reg_tokens": 2}, (3, "average", (3, 9)), id="avg-without-registers"),
        pytest.param(
            {"global_pool": "avg", "pool_include_prefix": True}, (1, "average", (0, 7)), id="avg-over-all-tokens"
        ),
        pytest.param({"block_fn": ParallelScalingBlock}, (1, "token", (0, 1)), id="parallel-mlp"),
        pytest.param({"dynamic_img_size": True}, (1, "token", (0, 1)), id="several-image-sizes"),
        pytest.param({"dynamic_img_size": True, "dynamic_img_pad": True}, (1, "token", (0, 1)), id="padded-images"),
        pytest.param({"block_fn": ResPostBlock}, (1, "token", (0, 1)), id="post-norm"),
    ],
)
def test_layout(tiny_vit: Build, settings: dict[str, object], expected: tuple[int, str, tuple[int, int]]) -> None:
    model = tiny_vit(**settings)
    layout = find_layout(model)
    assert summary(layout) == expected
    assert layout.tower is model
    assert layout.blocks == tuple(model.blocks)
    assert (layout.grid, layout.image_size, layout.in_chans, layout.d_model) == ((2, 3), (32, 48), 3, 16)
    assert layout.patches == 6
    assert layout.tokens == model.forward_features(torch.randn(1, 3, 32, 48)).shape[1]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("pool", ["avg", "map", "token"])
def test_the_logits_read_the_pooled_tokens_and_no_others(tiny_vit: Build, pool: str, prefix: bool) -> None:
    """Held against timm's own forward_head: changing a token changes the logits if and only if it is pooled."""
    model = tiny_vit(global_pool=pool, reg_tokens=2, pool_include_prefix=prefix)
    layout = find_layout(model)
    tokens = torch.randn(1, layout.tokens, layout.d_model)
    before = model.forward_head(tokens)
    start, stop = layout.pooled
    for token in range(layout.tokens):
        changed = tokens.clone()
        changed[:, token] = torch.randn(layout.d_model)
        assert torch.equal(model.forward_head(changed), before) is not (start <= token < stop), token


def test_average_pooling_has_equal_weights(tiny_vit: Build) -> None:
    model = tiny_vit(global_pool="avg", fc_norm=False, reg_tokens=1)
    start, stop = find_layout(model).pooled
    tokens = torch.randn(1, 8, 16)
    assert torch.allclose(model.forward_head(tokens), model.head(tokens[:, start:stop].mean(dim=1)))


def test_distilled_deit_averages_its_two_heads(tiny_vit: Build) -> None:
    model = tiny_vit(VisionTransformerDistilled)
    layout = find_layout(model)
    assert summary(layout) == (2, "average", (0, 2))
    tokens = torch.randn(1, layout.tokens, 16)
    want = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    assert torch.allclose(model.forward_head(tokens), want)


def test_other_channels_and_a_hybrid_stem() -> None:
    model = VisionTransformer(img_size=32, in_chans=1, embed_dim=16, depth=1, num_heads=2)
    assert find_layout(model).in_chans == 1
    with torch.device("meta"):
        hybrid = timm.create_model("vit_tiny_r_s16_p8_224", depth=2)
    layout = find_layout(hybrid)
    assert (layout.grid, layout.image_size, len(layout.blocks)) == ((7, 7), (224, 224), 2)


class Wrapper(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({f"part{index}": part for index, part in enumerate(parts)})

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W]
        return self.inner["part0"](images)


def test_a_tower_anywhere_in_a_wrapper(tiny_vit: Build) -> None:
    """Registered twice it is one tower, and a wrapper may be called like a refused class."""
    tower = tiny_vit()
    twins = type("Twins", (Wrapper,), {})
    for wrapper in (Wrapper(nn.Sequential(nn.Identity(), tower)), Wrapper(tower, tower), twins(tower)):
        assert find_layout(wrapper).tower is tower


def test_two_towers(tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match=r"exactly one vision transformer, found 2: 'inner.part0'.*'inner.part1'"):
        find_layout(Wrapper(tiny_vit(), tiny_vit()))


def test_a_tower_beside_a_refused_one(tiny_vit: Build) -> None:
    with torch.device("meta"):
        swin = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match=r"SwinTransformer \(at 'inner.part1'\).*windowed attention"):
        find_layout(Wrapper(tiny_vit(), swin))


def test_looking_changes_nothing(tiny_vit: Build) -> None:
    model = tiny_vit(global_pool="map").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_layout(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_active_randomness(tiny_vit: Build) -> None:
    model = tiny_vit(attn_drop_rate=0.1, drop_path_rate=0.2, patch_drop_rate=0.3, drop_rate=0.0)
    assert active_randomness(model) == []
    found = active_randomness(model.train())
    assert "blocks.0.attn.attn_drop" in found
    assert "blocks.2.drop_path2" in found
    assert "patch_drop" in found
    assert "head_drop" not in found
    assert active_randomness(nn.Dropout(0.5)) == ["Dropout"]
    assert active_randomness(nn.MultiheadAttention(4, 2, dropout=0.1)) == ["MultiheadAttention"]
    assert active_randomness(nn.MultiheadAttention(4, 2)) == []


def test_rotary_embeddings_that_are_shifted_in_training_are_random() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_dinov3", depth=1, rope_shift_coords=0.5)
    assert active_randomness(model.train()) == ["rope"]
    assert active_randomness(model.eval()) == []
