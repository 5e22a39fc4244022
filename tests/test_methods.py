"""Methods and backward rules of the native path against the reference, for every pooling and kind of block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explaining import PIXELS, Build, agree, sae_for
from torch import Tensor, nn

from fga_fast import Explainer, Gate

BLOCKS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average pooling, layer scale": {"global_pool": "avg", "fc_norm": True, "init_values": 0.5},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "registers, q/k norm": {"reg_tokens": 4, "qk_norm": True, "pre_norm": True},
}
GATED = ("silu", "gelu", "method", "relu gate", "glu", "scaled", "written out", "in place", "into the other")
PARTS = ("quick", "tanh", "relu", "rms", "rms module", *GATED)
METHODS = [(m, b) for m in ("rollout", "input_x_gradient", "block_x_gradient") for b in ("exact", "conservative")]


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TanhGELU(nn.Module):
    """As older transformers write it."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


class WrittenOutRMSNorm(nn.Module):
    def __init__(self, width: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Gated(nn.Module):
    """A gated MLP, act(a) * b."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.inner, self.out, self.kind = nn.Linear(width, 4 * width), nn.Linear(2 * width, width), kind

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        a, b = x.chunk(2, dim=-1)
        hidden = {
            "silu": lambda: F.silu(a) * b,
            "gelu": lambda: b * F.gelu(a),
            "method": lambda: F.silu(a).mul(b),
            "relu gate": lambda: a.relu() * b,
            "glu": lambda: F.glu(x, -1),
            "scaled": lambda: 2 * F.silu(a) * b,
            "written out": lambda: a * torch.sigmoid(1.702 * a) * b,
            "in place": lambda: F.silu(a).mul_(b),
            "into the other": lambda: b.clone().mul_(F.silu(a)),
        }[self.kind]()
        return self.out(hidden)  # type: ignore[no-any-return]


def same(model: nn.Module, saes: dict[int, Any], images: Tensor, **settings: Any) -> None:
    targets = torch.tensor([[0, 3], [1, 1]])
    got, want = (
        Explainer(model, saes, gate=Gate(base=3.0), backend=backend, per_block=True, **settings, preset="published")(
            images, targets
        )
        for backend in ("native", "reference")
    )
    assert float(want.relevance.norm()) > 0
    agree(got, want, 1e-9)
    assert got.blocks is not None and torch.equal(got.blocks[:, :, 0], got.relevance)


@pytest.mark.parametrize(("method", "backward"), METHODS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_poolings(tiny_vit: Build, kind: str, method: Any, backward: Any) -> None:
    model = tiny_vit(**BLOCKS[kind]).double()
    images = torch.randn(2, *PIXELS, dtype=torch.float64)
    same(model, {1: sae_for(model), 2: sae_for(model)}, images, method=method, backward=backward)


@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize("start_block", (0, 1, 2))
@pytest.mark.parametrize(("method", "backward"), METHODS)
def test_depth_and_sign(tiny_vit: Build, method: Any, backward: Any, start_block: int, signed: bool) -> None:
    model = tiny_vit(global_pool="avg").double()
    images = torch.randn(2, *PIXELS, dtype=torch.float64)
    settings: dict[str, Any] = {"method": method, "backward": backward, "start_block": start_block, "signed": signed}
    same(model, {2: sae_for(model)}, images, **settings)


@pytest.mark.parametrize("method", ("rollout", "input_x_gradient"))
@pytest.mark.parametrize("part", PARTS)
def test_conservative_parts(tiny_vit: Build, part: str, method: Any) -> None:
    model = tiny_vit()
    for block in model.blocks:  # type: ignore[union-attr]
        if part in ("quick", "tanh", "relu"):
            block.mlp.act = {"quick": QuickGELU, "tanh": TanhGELU, "relu": nn.ReLU}[part]()
        elif part == "rms":
            block.norm1, block.norm2 = WrittenOutRMSNorm(16), WrittenOutRMSNorm(16)
        elif part == "rms module":
            block.norm1, block.norm2 = nn.RMSNorm(16, eps=1e-6), nn.RMSNorm(16)
        else:
            block.mlp = Gated(16, part)
    model = model.double().eval()
    images = torch.randn(2, *PIXELS, dtype=torch.float64)
    same(model, {1: sae_for(model)}, images, method=method, backward="conservative")


class Head(nn.Module):
    """Cosines of the tower's output with fixed vectors, as zero-shot heads have it; or probabilities."""

    def __init__(self, tower: nn.Module, how: str) -> None:
        super().__init__()
        self.tower, self.how = tower, how
        self.register_buffer("text", F.normalize(torch.randn(5, 5, dtype=torch.float64), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.tower(x)
        if self.how == "sigmoid":
            return y.sigmoid()  # type: ignore[no-any-return]
        if self.how == "cosine":
            return F.cosine_similarity(y[:, None], self.text[None], dim=-1)  # type: ignore[index]
        y = F.normalize(y, dim=-1) if self.how == "normalize" else y / y.norm(dim=-1, keepdim=True)
        return 10 * y @ self.text.t()  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize("how", ("normalize", "norm", "cosine", "sigmoid"))
def test_conservative_heads(tiny_vit: Build, how: str) -> None:
    images = torch.randn(2, *PIXELS, dtype=torch.float64)
    model = Head(tiny_vit().double(), how)
    same(model, {}, images, method="input_x_gradient", backward="conservative")


@pytest.mark.parametrize("kind", (None, *GATED))
def test_contributions_add_up_to_the_logit(tiny_vit: Build, kind: str | None) -> None:
    """Of a model without biases and prefix tokens, whose logit has nowhere else to come from, at every block."""
    model = tiny_vit(qkv_bias=False, class_token=False, global_pool="avg")
    for block in model.blocks if kind else ():  # type: ignore[union-attr]
        block.mlp = Gated(16, kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("patch", "pos")) and name.endswith("bias"):
                parameter.zero_()
    model, images = model.double().eval(), torch.randn(2, *PIXELS, dtype=torch.float64)
    settings: dict[str, Any] = {"method": "input_x_gradient", "backend": "native", "per_block": True}
    for backward in ("conservative", "exact"):
        e = Explainer(model, backward=backward, **settings, preset="published")(images, [[2, 0], [1, 3]])  # type: ignore[arg-type]
        assert e.blocks is not None and e.values is not None
        sums, values = e.blocks.sum(-1), e.values[..., None].expand(2, 2, 3)  # [B, K, L]
        if backward == "conservative":
            torch.testing.assert_close(sums, values, rtol=1e-9, atol=1e-12)
        else:
            assert float((sums - values).norm()) > 1e-3 * float(values.norm())


def test_gates_multiply_the_map(tiny_vit: Build) -> None:
    model = tiny_vit(global_pool="avg").double()
    images = torch.randn(2, *PIXELS, dtype=torch.float64)
    settings: dict[str, Any] = {"method": "input_x_gradient", "backend": "native", "per_block": True}
    plain = Explainer(model, **settings, preset="published")(images, 1)
    gated = Explainer(model, {0: sae_for(model), 1: sae_for(model)}, **settings, preset="published")(images, 1)
    assert plain.blocks is not None and gated.blocks is not None
    first, second = gated.gates[0], gated.gates[1]
    for block, factor in enumerate((first * second, second, torch.ones_like(first))):
        torch.testing.assert_close(gated.blocks[:, block], plain.blocks[:, block] * factor)


def test_relevance_that_keeps_its_sign(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    assert bool((Explainer(model, backend="native", preset="published")(images, 1).relevance >= 0).all())
    assert bool((Explainer(model, backend="native", signed=True, preset="published")(images, 1).relevance < 0).any())


def test_blocks_before_the_start_are_not_tapped(tiny_vit: Build) -> None:
    """What runs before the first explained block may be anything, and only runs."""
    model = tiny_vit()
    sdpa = F.scaled_dot_product_attention
    block = model.blocks[0]  # type: ignore[index]
    original = block.attn.forward  # type: ignore[union-attr]

    def windowed(x: Tensor, **kwargs: Any) -> Tensor:
        sdpa(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), is_causal=True)
        return original(x, **kwargs)  # type: ignore[no-any-return]

    block.attn.forward = windowed  # type: ignore[union-attr]
    images = torch.randn(2, *PIXELS)
    assert Explainer(model, backend="native", start_block=1, preset="published")(images).relevance.shape == (2, 6)
    with pytest.raises(ValueError, match="causal"):
        Explainer(model, backend="native", preset="published")(images)
