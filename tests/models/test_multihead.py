"""nn.MultiheadAttention opened up: the same numbers as PyTorch's own, and a tape that sees inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explaining import agree, sae_for
from own_vit import IMAGES, own_vit
from torch import nn
from torch.overrides import TorchFunctionMode

from fga_fast import Explainer
from fga_fast.models.multihead import open_multi_head_attention


class Opening(TorchFunctionMode):
    """Answers every nn.MultiheadAttention by the opened one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.multi_head_attention_forward:
            self.calls += 1
            return open_multi_head_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


FORMS: dict[str, dict[str, Any]] = {
    "packed": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other key and value widths": {"kdim": 6, "vdim": 10},
}


@pytest.mark.parametrize("need_weights", (False, True))
@pytest.mark.parametrize("mask", (None, "additive", "per head", "padding"))
@pytest.mark.parametrize("form", FORMS)
def test_equals_pytorchs_own(form: str, mask: str | None, need_weights: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, **FORMS[form]).double().eval()
    widths = (8, FORMS[form].get("kdim", 8), FORMS[form].get("vdim", 8))
    sizes = ((3, 4), (3, 5), (3, 5))  # [B, N]
    q, k, v = (torch.randn(*size, width).double() for size, width in zip(sizes, widths, strict=True))
    if not FORMS[form].get("batch_first"):
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    settings: dict[str, Any] = {"need_weights": need_weights}
    if mask == "padding":
        settings["key_padding_mask"] = torch.tensor([[False] * 4 + [True]] * 3)
    elif mask:
        settings["attn_mask"] = torch.randn((4, 5) if mask == "additive" else (6, 4, 5)).double()
    want, want_weights = attention(q, k, v, **settings)
    with Opening() as mode:
        got, weights = attention(q, k, v, **settings)
    assert mode.calls == 1
    torch.testing.assert_close(got, want)
    assert (weights is None) == (want_weights is None)
    if need_weights:
        torch.testing.assert_close(weights, want_weights)
        with Opening():
            by_head = attention(q, k, v, average_attn_weights=False, **settings)[1]
        torch.testing.assert_close(by_head, attention(q, k, v, average_attn_weights=False, **settings)[1])


@pytest.mark.parametrize("settings", ({"add_bias_kv": True}, {"add_zero_attn": True}))
def test_keys_that_belong_to_no_token_are_refused(settings: dict[str, Any]) -> None:
    attention, x = nn.MultiheadAttention(8, 2, **settings), torch.randn(4, 3, 8)
    with Opening(), pytest.raises(ValueError, match="keys that belong to no token"):
        attention(x, x, x)


def test_a_call_without_a_batch_is_refused() -> None:
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(4, 8)
    with Opening(), pytest.raises(ValueError, match="without a batch"):
        attention(x, x, x)


@pytest.mark.parametrize("pool", (None, "mha"))
@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("batch_first", (False, True))
def test_a_users_own_model(batch_first: bool, norm_first: bool, pool: str | None) -> None:
    """Of PyTorch's own encoder layers."""
    model = own_vit(returns="tensor" if batch_first else "tokens first", pool=pool)
    model.layers = nn.ModuleList(
        nn.TransformerEncoderLayer(16, 2, 32, 0.1, "gelu", batch_first=batch_first, norm_first=norm_first)
        for _ in range(3)
    )
    model, layout = model.double().eval(), model.layout()
    images, targets = torch.randn(IMAGES).double(), [[0, 3], [1, 1]]
    plain = model(images).detach()
    for settings in (
        {}, {"backward": "conservative"}, {"method": "input_x_gradient"},
        {"method": "input_x_gradient", "backward": "conservative", "per_block": True, "start_block": 1},
    ):  # fmt: skip
        saes = {1: sae_for(model), 2: sae_for(model)}
        got, want = (
            Explainer(model, saes, backend=backend, layout=layout, **settings, preset="published")(images, targets)  # type: ignore[arg-type]
            for backend in ("native", "reference")
        )
        torch.testing.assert_close(got.logits, plain)
        assert float(want.relevance.norm()) > 0
        agree(got, want, 1e-9)
    half = model.half()
    got = Explainer(half, layout=layout, backend="native", preset="published")(images.half(), targets)
    exact = Explainer(half.double(), layout=layout, backend="native", preset="published")(images, targets)
    assert float((got.relevance - exact.relevance).norm() / exact.relevance.norm()) < 0.05
