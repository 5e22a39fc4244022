"""SparseAutoencoder refuses wrong tensors and settings: the message names the argument, what was expected and got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_sae import C, F, parameters
from torch import Tensor

from fga_fast.sae import SparseAutoencoder


def changed(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda p: p | {name: change(p[name])}


SHAPE_CASES = [
    ("W_enc", lambda w: w[0], ValueError, "W_enc: expected a non-empty matrix, got shape [40]"),
    ("W_enc", lambda w: w[:, :0], ValueError, "W_enc: expected a non-empty matrix, got shape [12, 0]"),
    (
        "W_dec",
        lambda w: w.t(),
        ValueError,
        "W_dec: expected shape [40, 12] ([F, C], from W_enc [C, F] = [12, 40]), got",
    ),
    ("W_dec", lambda w: w.t(), ValueError, "it looks transposed: pass W_dec.t()"),
    ("W_dec", lambda w: w[:-1], ValueError, "W_dec: expected shape [40, 12]"),
    ("b_enc", lambda b: b[:-1], ValueError, "b_enc: expected shape [40], got [39]"),
    ("b_dec", lambda b: b[None], ValueError, "b_dec: expected shape [12], got [1, 12]"),
    ("b_dec", lambda b: b.float(), TypeError, "b_dec: expected dtype torch.float64 (that of W_enc), got torch.float32"),
    ("W_dec", lambda w: w.float(), TypeError, "W_dec: expected dtype torch.float64 (that of W_enc), got torch.float32"),
    ("b_enc", lambda b: b.to("meta"), ValueError, "b_enc: expected device cpu (that of W_enc), got meta"),
    ("W_enc", lambda w: w.int(), TypeError, "W_enc: expected a dtype of torch.float64"),
    ("W_enc", lambda w: w.tolist(), TypeError, "W_enc: expected a torch.Tensor, got list"),
    ("W_dec", lambda w: w.to_sparse(), ValueError, "W_dec: expected a dense tensor, got layout torch.sparse_coo"),
    ("b_dec", lambda b: None, TypeError, "b_dec: expected a torch.Tensor, got NoneType"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), SHAPE_CASES)
def test_wrong_tensors(name: str, change: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        SparseAutoencoder(**changed(name, change)(parameters()))
    assert message in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "b_gate", "r_mag", "b_mag"])
def test_nan_and_inf_name_the_tensor(name: str, bad: float) -> None:
    p = parameters("gated")
    p[name].view(-1)[-1] = bad
    with pytest.raises(ValueError, match=rf"^{name}: holds NaN or Inf \(1 of "):
        SparseAutoencoder(**p)


def test_nan_threshold_and_overflowing_scale() -> None:
    with pytest.raises(ValueError, match="threshold: holds NaN or Inf"):
        SparseAutoencoder(**(parameters("batch_topk") | {"threshold": float("nan")}))
    p = parameters("gated", torch.float32)
    p["r_mag"][0] = 100.0  # finite, but exp(100) is not in float32
    with pytest.raises(ValueError, match=r"gate_scale \(derived from the parameters\): holds NaN or Inf"):
        SparseAutoencoder(**p)


SETTING_CASES = [
    ("relu", {"activation": "gelu"}, ValueError, "activation: expected one of 'relu', 'topk'"),
    ("relu", {"normalize": "batch_norm"}, ValueError, "normalize: expected None or one of"),
    ("topk", {"k": None}, ValueError, "k: activation 'topk' needs the number of features"),
    ("topk_signed", {"k": None}, ValueError, "k: activation 'topk_signed' needs the number of features"),
    ("topk", {"k": 0}, ValueError, "k: expected 1 <= k <= 40 (the SAE's features), got 0"),
    ("topk", {"k": F + 1}, ValueError, "k: expected 1 <= k <= 40 (the SAE's features), got 41"),
    ("topk", {"k": 3.0}, TypeError, "k: expected an int or None, got float"),
    ("topk", {"k": True}, TypeError, "k: expected an int or None, got bool"),
    ("relu", {"k": 3}, ValueError, "k: only 'topk', 'topk_signed' and 'batch_topk' take k"),
    ("jumprelu", {"threshold": None}, ValueError, "threshold: activation 'jumprelu' needs one"),
    ("batch_topk", {"threshold": None}, ValueError, "threshold: activation 'batch_topk' needs one"),
    ("relu", {"threshold": 1.0}, ValueError, "threshold: only 'jumprelu' and 'batch_topk' take one"),
    ("jumprelu", {"threshold": torch.zeros(3).double()}, ValueError, "threshold: expected shape [40], got [3]"),
    ("jumprelu", {"threshold": torch.zeros(F)}, TypeError, "threshold: expected dtype torch.float64"),
    ("jumprelu", {"threshold": "1"}, TypeError, "threshold: expected a number or a tensor"),
    ("gated", {"r_mag": None}, ValueError, "r_mag: is needed by activation 'gated'"),
    ("relu", {"b_gate": torch.zeros(F).double()}, ValueError, "b_gate: belongs to activation 'gated'"),
    ("relu", {"expected_l0": "12"}, TypeError, "expected_l0: expected a number or None, got str"),
    ("relu", {"expected_l0": True}, TypeError, "expected_l0: expected a number or None, got bool"),
    ("relu", {"expected_l0": 0}, ValueError, "expected_l0: expected 0 < expected_l0 <= 40 (the SAE's features), got 0"),
    ("relu", {"expected_l0": F + 1}, ValueError, "expected_l0: expected 0 < expected_l0 <= 40"),
    ("relu", {"expected_l0": float("nan")}, ValueError, "(the SAE's features), got nan"),
    ("relu", {"metadata": {"layer": 9}}, TypeError, "metadata['layer']: expected str keys and values, got int"),
    ("relu", {"metadata": "layer 9"}, TypeError, "metadata: expected a mapping"),
]


@pytest.mark.parametrize(("activation", "change", "error", "message"), SETTING_CASES)
def test_wrong_settings(activation: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        SparseAutoencoder(**(parameters(activation) | change))
    assert message in str(caught.value)


def test_layer_norm_of_width_one_is_refused() -> None:
    with pytest.raises(ValueError, match="'layer_norm' needs a width of at least 2"):
        SparseAutoencoder(**parameters(c=1), normalize="layer_norm")


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, C + 1).double(), ValueError, r"x: expected shape \[\.\.\., 12\], got \[2, 13\]"),
        (torch.zeros(()).double(), ValueError, r"x: expected shape \[\.\.\., 12\], got \[\]"),
        (torch.zeros(2, C), TypeError, r"x: expected dtype torch.float64 \(that of the SAE\), got torch.float32"),
        (
            torch.zeros(2, C, device="meta").double(),
            ValueError,
            r"x: expected device cpu \(that of the SAE\), got meta",
        ),
        ([[0.0] * C], TypeError, "x: expected a torch.Tensor, got list"),
    ],
)
def test_wrong_tokens(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparseAutoencoder(**parameters()).encode(x)
