"""16-bit models, autocast, tiny and huge gradients, memory formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explaining import PIXELS, Build, sae_for
from families import error
from torch import Tensor, nn

from fga_fast import Explainer, Explanation, Gate
from fga_fast.integrations import as_images

KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average pooling": {"global_pool": "avg"},
    "attention pooling": {"global_pool": "map", "class_token": False},
}
TARGETS = torch.tensor([[0, 3], [1, 1]])


class Scaled(nn.Module):
    """Logits of a model times a constant: gradients of any size, the same explanation up to it."""

    def __init__(self, tower: nn.Module, factor: float) -> None:
        super().__init__()
        self.tower, self.factor = tower, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x) * self.factor  # type: ignore[no-any-return]


def explain(model: nn.Module, saes: dict[int, Any], images: Tensor, targets: Any, **settings: Any) -> Explanation:
    return Explainer(model, saes, gate=Gate(base=2.0), backend="native", **settings, preset="published")(
        images, targets
    )


@pytest.mark.parametrize("targets", (torch.tensor([2, 0]), TARGETS))
@pytest.mark.parametrize("method", ("rollout", "input_x_gradient", "block_x_gradient"))
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_gradients_do_not_underflow_in_float16(tiny_vit: Build, kind: str, method: Any, targets: Tensor) -> None:
    """Gradients of 1e-6 and less are subnormal or zero in float16, where the model's own backward pass loses them."""
    tower = tiny_vit(**KINDS[kind])
    saes, images = {1: sae_for(tower)}, torch.randn(2, *PIXELS)
    model = Scaled(tower, 1e-6)
    want = explain(model, saes, images, targets, method=method)
    half_images = images.half().requires_grad_()
    half = Scaled(tower.half(), 1e-6)
    naive = torch.autograd.grad(half(half_images)[:, 0].sum(), half_images)[0]
    assert float((naive != 0).float().mean()) < 0.9  # what happens without a loss scale
    got = explain(half, {1: saes[1].half()}, images.half(), targets, method=method)
    assert error(got.relevance, want.relevance) < 0.1
    assert error(got.scores[1], want.scores[1]) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_scale_leaves_float16_explanations_as_they_are(tiny_vit: Build, kind: str) -> None:
    """Where nothing underflows, scaled gradients explain as unscaled ones: powers of two change no digit."""
    tower = tiny_vit(**KINDS[kind])
    saes, images = {1: sae_for(tower)}, torch.randn(2, *PIXELS)
    want = explain(tower, saes, images, TARGETS).relevance
    got = explain(tower.half(), {1: saes[1].half()}, images.half(), TARGETS).relevance
    assert error(got, want) < 0.05


def test_huge_gradients_do_not_overflow_in_float16(tiny_vit: Build) -> None:
    """The loss scale is lowered where it would overflow, for the rows concerned."""
    tower = tiny_vit()
    saes, images = {1: sae_for(tower)}, torch.randn(2, *PIXELS)
    want = explain(Scaled(tower, 3e3), saes, images, TARGETS)
    got = explain(Scaled(tower.half(), 3e3), {1: saes[1].half()}, images.half(), TARGETS)
    assert torch.isfinite(got.relevance).all()
    assert error(got.relevance, want.relevance) < 0.1


def test_rows_of_very_different_size_in_float16(tiny_vit: Build) -> None:
    """Each row of a batch has a loss scale of its own."""
    tower = tiny_vit()
    images = torch.randn(2, *PIXELS)
    factors = torch.tensor([[1.0, 1e-6], [1e-4, 1e2]])

    def scaled(logits: Tensor) -> Tensor:  # [B, classes] -> [B, K]
        return logits.float()[:, :2] * factors

    want = explain(tower, {}, images, scaled, method="input_x_gradient").relevance
    got = explain(tower.half(), {}, images.half(), scaled, method="input_x_gradient").relevance
    for image in range(2):
        for k in range(2):
            assert error(got[image, k], want[image, k]) < 0.05


def test_a_target_without_gradient_has_no_relevance_in_float16(tiny_vit: Build) -> None:
    model, images = tiny_vit().half(), torch.randn(2, *PIXELS).half()
    e = explain(model, {1: sae_for(model)}, images, lambda logits: logits.sum(-1) * 0)
    assert torch.equal(e.relevance, torch.zeros_like(e.relevance))


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("settings", ({}, {"method": "input_x_gradient", "backward": "conservative"}))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(tiny_vit: Build, dtype: torch.dtype, settings: dict[str, Any], backend: Any) -> None:
    """Under autocast the model computes in 16 bits; relevance stays float32 and near that without autocast."""
    model = tiny_vit(qk_norm=True, init_values=0.5)
    saes, images = {1: sae_for(model)}, torch.randn(2, *PIXELS)
    explainer = Explainer(model, saes, gate=Gate(base=2.0), backend=backend, **settings, preset="published")
    want = explainer(images, TARGETS)
    with torch.autocast("cpu", dtype=dtype):
        plain = model(images)
        got = explainer(images, TARGETS)
    assert plain.dtype == dtype
    torch.testing.assert_close(got.logits.float(), plain.detach().float(), rtol=2e-2, atol=2e-2)
    assert got.relevance.dtype == got.scores[1].dtype == torch.float32
    assert 0 < error(got.relevance, want.relevance) < 0.2
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_channels_last_images(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    saes = {1: sae_for(model)}
    want = explain(model, saes, images, TARGETS).relevance
    formatted = images.to(memory_format=torch.channels_last)
    assert not formatted.is_contiguous()
    torch.testing.assert_close(explain(model, saes, formatted, TARGETS).relevance, want, rtol=1e-4, atol=1e-6)
    last = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(explain(last, saes, formatted, TARGETS).relevance, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("gated", "settings"),
    ((True, {}), (False, {}), (False, {"backward": "conservative"}), (False, {"method": "input_x_gradient"})),
)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits(tiny_vit: Build, dtype: torch.dtype, gated: bool, settings: dict[str, Any]) -> None:
    """Against float32, at most twice the error of the reference run in the same dtype."""
    model, images = tiny_vit(global_pool="token" if gated else "avg"), torch.randn(8, *PIXELS)
    saes = {1: sae_for(model)} if gated else {}

    def explained(dtype: torch.dtype, backend: Any) -> Explanation:
        low = {block: sae.to(dtype) for block, sae in saes.items()}
        return Explainer(model.to(dtype), low, backend=backend, **settings, preset="published")(images.to(dtype), 1)

    want = explained(torch.float32, "reference").relevance
    plain, fast = explained(dtype, "reference").relevance, explained(dtype, "native")
    assert {t.dtype for t in (fast.relevance, *fast.scores.values())} == {torch.float32}
    assert float((fast.relevance - want).norm()) <= 2 * float((plain - want).norm())


class WideNorm(nn.LayerNorm):
    """A norm whose weights stay in float32, as open_clip and others have in 16-bit models."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class WideAdapter(nn.Module):
    """A linear layer with a low-rank adapter in float32, as peft makes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x.float())).to(x.dtype)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("settings", ({}, {"method": "input_x_gradient", "backward": "conservative"}))
def test_some_weights_of_a_16_bit_model_may_be_float32(
    tiny_vit: Build, dtype: torch.dtype, backend: Any, settings: dict[str, Any]
) -> None:
    model = tiny_vit(norm_layer=WideNorm)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.qkv = WideAdapter(block.attn.qkv)  # type: ignore[union-attr,arg-type]
    sae, images = sae_for(model), torch.randn(2, *PIXELS)
    want = Explainer(model, {1: sae}, gate=Gate(base=2.0), backend="reference", **settings, preset="published")(
        images, TARGETS
    )
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, WideNorm):
            module.float()
        elif isinstance(module, WideAdapter):
            module.down.float(), module.up.float()
    explainer = Explainer(
        model, {1: sae.to(dtype)}, gate=Gate(base=2.0), backend=backend, **settings, preset="published"
    )
    got = explainer(images.to(dtype), TARGETS)
    assert got.relevance.dtype == torch.float32
    assert error(got.relevance, want.relevance) < 0.1
    with pytest.raises(ValueError, match=rf"images: expected dtype {dtype} like the model, got torch.float32"):
        explainer(images, TARGETS)


def test_images_of_adapters_take_the_dtype_of_the_blocks(tiny_vit: Build) -> None:
    numpy_images = torch.randn(1, *PIXELS).numpy()
    model = tiny_vit().half()
    model.cls_token.data = model.cls_token.data.float()  # type: ignore[union-attr,operator]
    assert as_images(numpy_images, Explainer(model, preset="published").plan.parameter, 3).dtype == torch.float16


@pytest.mark.parametrize("targets", (2, [[1, 2]]))
def test_relevance_is_not_computed_under_the_callers_autocast(tiny_vit: Build, targets: Any) -> None:
    """With the model's maps written out both backends see the same 16-bit gradients, so they agree in float32."""
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (
            Explainer(model, backend=backend, preset="published")(images, targets)
            for backend in ("native", "reference")
        )  # type: ignore[arg-type]
    assert error(got.relevance, want.relevance) < 1e-5
    assert got.notices == ()
