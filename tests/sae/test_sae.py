"""SparseAutoencoder: codes against hand-written formulas, dtype moves, memory layout, refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fga_fast.sae import SparseAutoencoder, denormalise, normalise

C, F = 12, 40
GATED = ("b_gate", "r_mag", "b_mag")


def parameters(
    activation: str = "relu", dtype: torch.dtype = torch.float64, c: int = C, f: int = F, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    values: dict[str, Any] = {"W_enc": draw(c, f), "b_enc": draw(f), "W_dec": draw(f, c), "b_dec": draw(c)}
    values["activation"] = activation
    if activation == "gated":
        values |= {"b_gate": draw(f), "r_mag": draw(f) * 0.3, "b_mag": draw(f)}
    if activation in ("topk", "topk_signed"):
        values["k"] = 5
    if activation in ("jumprelu", "batch_topk"):
        values["threshold"] = draw(f).abs() if activation == "jumprelu" else 0.75
    return values


def tokens(dtype: torch.dtype = torch.float64, c: int = C) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(2, 3, c, generator=generator, dtype=torch.float64) * 2 + 0.5).to(dtype)


def formula(x: Tensor, p: dict[str, Any]) -> Tensor:
    """Codes of one token [C] after normalisation, feature by feature, b_dec subtracted as trained (not folded)."""
    u = x - p["b_dec"]
    pre = [sum(float(u[c]) * float(p["W_enc"][c, f]) for c in range(len(u))) for f in range(p["W_enc"].shape[1])]
    codes = torch.zeros(len(pre), dtype=torch.float64)
    z = [value + float(p["b_enc"][f]) for f, value in enumerate(pre)]
    order = sorted(range(len(z)), key=lambda f: (-z[f], f))  # equal values: lowest index first
    for f, value in enumerate(z):
        match p["activation"]:
            case "relu":
                codes[f] = max(value, 0.0)
            case "topk":
                codes[f] = max(value, 0.0) if f in order[: p["k"]] else 0.0
            case "topk_signed":
                codes[f] = value if f in order[: p["k"]] else 0.0
            case "jumprelu":
                codes[f] = max(value, 0.0) if value > float(p["threshold"][f]) else 0.0
            case "batch_topk":
                codes[f] = max(value, 0.0) if value > p["threshold"] else 0.0
            case "gated":
                magnitude = pre[f] * float(p["r_mag"][f].exp()) + float(p["b_mag"][f])
                codes[f] = max(magnitude, 0.0) if pre[f] + float(p["b_gate"][f]) > 0 else 0.0
    return codes


@pytest.mark.parametrize("normalize", [None, "layer_norm", "constant_norm"])
@pytest.mark.parametrize("activation", ["relu", "topk", "topk_signed", "jumprelu", "batch_topk", "gated"])
def test_encode_is_the_written_formula(activation: str, normalize: str | None) -> None:
    p = parameters(activation)
    x = tokens()
    codes = SparseAutoencoder(**p, normalize=normalize).encode(x)
    assert codes.shape == (2, 3, F)
    for i in range(2):
        for t in range(3):
            row = x[i, t]
            if normalize == "layer_norm":
                mean = row.sum() / C
                row = (row - mean) / ((((row - mean) ** 2).sum() / (C - 1)).sqrt() + 1e-5)
            elif normalize == "constant_norm":
                row = row * C**0.5 / (row**2).sum().sqrt()
            torch.testing.assert_close(codes[i, t], formula(row, p), rtol=1e-11, atol=1e-12)
    assert 0 < int((codes != 0).sum()) < codes.numel()


@pytest.mark.parametrize("activation", ["topk", "topk_signed"])
def test_topk_ties_go_to_the_lowest_index(activation: str) -> None:
    w = torch.ones(1, 8)  # every feature has the same value
    sae = SparseAutoencoder(w, torch.tensor([0.0, 0, 1, 0, 0, 1, 0, 0]), w.t(), torch.zeros(1), activation, k=4)
    active = sae.encode(torch.ones(3, 1)).nonzero()[:, 1].reshape(3, 4)
    assert active.tolist() == [[0, 1, 2, 5]] * 3


@pytest.mark.parametrize("k", [1, F])
def test_topk_keeps_no_negative_value(k: int) -> None:
    p = parameters("topk") | {"k": k}
    codes = SparseAutoencoder(**p).encode(tokens())
    assert bool((codes >= 0).all())
    relu = SparseAutoencoder(**(p | {"activation": "relu", "k": None})).encode(tokens())
    if k == F:
        assert torch.equal(codes, relu)
    else:
        assert torch.equal(codes.amax(-1), relu.amax(-1)) and bool(((codes > 0).sum(-1) <= 1).all())


def test_signed_topk_keeps_negative_values() -> None:
    eye = torch.eye(4)
    sae = SparseAutoencoder(eye, None, eye, torch.zeros(4), "topk_signed", k=2)
    x = torch.tensor([[-1.0, -2.0, -3.0, -0.5], [1.0, -2.0, 0.0, -4.0]])
    assert sae.encode(x).tolist() == [[-1.0, 0.0, 0.0, -0.5], [1.0, 0.0, 0.0, 0.0]]


def test_threshold_is_strict_and_broadcasts() -> None:
    eye = torch.eye(3)
    x = torch.tensor([[0.5, 1.0, 1.5]])
    for threshold in (1.0, torch.tensor(1.0), torch.full((3,), 1.0)):
        sae = SparseAutoencoder(eye, None, eye, torch.zeros(3), "jumprelu", threshold=threshold)
        assert sae.encode(x).tolist() == [[0.0, 0.0, 1.5]]
        assert sae.theta is not None and sae.theta.shape == (3,) and sae.theta.is_contiguous()


@pytest.mark.parametrize("activation", ["relu", "topk", "topk_signed", "jumprelu", "batch_topk", "gated"])
def test_nan_in_tokens_is_not_hidden(activation: str) -> None:
    x = tokens()
    x[1, 2, 0] = float("nan")
    codes = SparseAutoencoder(**parameters(activation)).encode(x)
    assert bool(codes[1, 2].isnan().any()) and not bool(codes[0].isnan().any())


def test_derived_tensors() -> None:
    p = parameters("gated")
    sae = SparseAutoencoder(**p)
    centring = p["b_dec"] @ p["W_enc"]
    expected = {
        "bias": p["b_gate"] - centring,
        "gate_scale": p["r_mag"].exp(),
        "mag_bias": p["b_mag"] - p["r_mag"].exp() * centring,
        "dec_sum": p["W_dec"].sum(0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(sae, name), value, rtol=1e-12, atol=1e-12)
    assert sae.theta is None
    plain = SparseAutoencoder(**parameters("relu"))
    torch.testing.assert_close(plain.bias, parameters()["b_enc"] - centring, rtol=1e-12, atol=1e-12)
    assert plain.gate_scale is None and plain.mag_bias is None and plain.theta is None
    without = SparseAutoencoder(**(parameters("relu") | {"b_enc": None}))
    torch.testing.assert_close(without.bias, -centring, rtol=1e-12, atol=1e-12)
    assert without.b_enc is None


def test_derived_tensors_of_many_features_cross_the_block_size() -> None:
    p = parameters("relu", c=3, f=9001)
    sae = SparseAutoencoder(**p)
    torch.testing.assert_close(sae.bias, p["b_enc"] - p["b_dec"] @ p["W_enc"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.dec_sum, p["W_dec"].sum(0), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "gated"])
def test_double_derives_from_the_parameters(activation: str) -> None:
    # b_dec W_enc in float32 is off by about 1e-7; rounding it and casting it up would keep that error.
    p = parameters(activation, torch.float32)
    raised = SparseAutoencoder(**p).double()
    exact = SparseAutoencoder(**{k: v.double() if isinstance(v, Tensor) else v for k, v in p.items()})
    for name in ("bias", "gate_scale", "mag_bias", "theta", "dec_sum"):
        a, b = getattr(raised, name), getattr(exact, name)
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == torch.float64 and torch.equal(a, b))
    assert torch.equal(raised.encode(tokens()), exact.encode(tokens()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_moves_keep_feature_major_memory(dtype: torch.dtype) -> None:
    sae = SparseAutoencoder(**parameters("gated", torch.float32))
    for moved in (sae.to(dtype), copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert moved.dtype == dtype and moved.W_enc.shape == (C, F)
        assert moved.W_enc.t().is_contiguous() and moved.W_dec.is_contiguous()
        assert {b.dtype for b in moved.buffers()} == {dtype}
        assert moved.encode(tokens(dtype)).dtype == dtype
    assert not list(sae.parameters()) and not any(b.requires_grad for b in sae.buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_derived_tensors_are_rounded_once(dtype: torch.dtype) -> None:
    p = parameters("relu", dtype)
    exact = p["b_enc"].double() - p["b_dec"].double() @ p["W_enc"].double()
    sae = SparseAutoencoder(**p)
    torch.testing.assert_close(sae.bias.double(), exact, rtol=torch.finfo(dtype).eps, atol=0.0)


def test_overflowing_cast_is_refused_and_leaves_the_sae() -> None:
    p = parameters("relu", torch.float32)
    p["W_dec"][3, 4] = 1e6
    sae = SparseAutoencoder(**p)
    with pytest.raises(ValueError, match=r"W_dec: holds NaN or Inf \(1 of 480 elements, first at index \[3, 4\]"):
        sae.half()
    assert sae.dtype == torch.float32 and torch.equal(sae.W_dec, p["W_dec"]) and sae.bias.dtype == torch.float32


def test_unsupported_dtype_is_refused_and_leaves_the_sae() -> None:
    sae = SparseAutoencoder(**parameters("relu", torch.float32))
    with pytest.raises(TypeError, match="dtype: expected one of"):
        sae.to(torch.float8_e4m3fn)
    assert sae.dtype == torch.float32


def test_parameters_are_copied_and_detached() -> None:
    p = parameters("relu")
    p["W_dec"].requires_grad_()
    sae = SparseAutoencoder(**p)
    assert not sae.W_dec.requires_grad
    with torch.no_grad():
        p["W_dec"].zero_()
    assert float(sae.W_dec.abs().sum()) > 0
    x = tokens().requires_grad_()
    sae.encode(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_made_in_inference_mode_still_takes_part_in_autograd() -> None:
    with torch.inference_mode():
        sae = SparseAutoencoder(**parameters("relu"))
        assert not sae.W_dec.is_inference() and not sae.bias.is_inference()
        sae = sae.float().double()
    assert not any(buffer.is_inference() for buffer in sae.buffers())
    x = tokens().requires_grad_()
    sae.encode(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_strided_parameters_are_accepted() -> None:
    p = parameters("relu")
    wide = p | {"W_enc": p["W_enc"].t().contiguous().t(), "W_dec": p["W_dec"].t().contiguous().t()}
    wide["b_dec"] = p["b_dec"].repeat_interleave(2)[::2]
    a, b = SparseAutoencoder(**p), SparseAutoencoder(**wide)
    assert torch.equal(a.encode(tokens()), b.encode(tokens())) and b.W_dec.is_contiguous()


def test_load_state_dict_derives_anew() -> None:
    source, target = SparseAutoencoder(**parameters("relu")), SparseAutoencoder(**parameters("relu", seed=1))
    assert not torch.equal(source.bias, target.bias)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.bias, target.bias) and torch.equal(source.dec_sum, target.dec_sum)


@pytest.mark.parametrize("shape", [(0, C), (C,), (1, C), (2, 0, C)])
def test_encode_any_leading_shape(shape: tuple[int, ...]) -> None:
    sae = SparseAutoencoder(**parameters("topk"))
    codes = sae.encode(torch.zeros(shape, dtype=torch.float64))
    assert codes.shape == (*shape[:-1], F) and sae.decode(codes).shape == shape


@pytest.mark.parametrize("kind", [None, "layer_norm", "constant_norm"])
def test_denormalise_inverts_normalise(kind: str | None) -> None:
    x = tokens()
    torch.testing.assert_close(denormalise(normalise(x, kind), x, kind), x, rtol=1e-4, atol=1e-4)


def test_layer_norm_is_not_torchs() -> None:
    x = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    expected = 1 / (2**0.5 + 1e-5)  # unbiased std of (1, 3) is sqrt(2)
    torch.testing.assert_close(normalise(x, "layer_norm"), torch.tensor([[-expected, expected]], dtype=torch.float64))
    assert float(normalise(torch.full((1, 4), 3.0), "layer_norm").abs().max()) == 0.0


def test_constant_norm_of_a_zero_token_is_zero() -> None:
    x = torch.stack([torch.zeros(4), torch.tensor([3.0, 0, 4, 0])])
    assert normalise(x, "constant_norm").tolist() == [[0, 0, 0, 0], pytest.approx([1.2, 0, 1.6, 0])]
    with pytest.raises(ValueError, match="normalize: expected None or one of 'layer_norm', 'constant_norm', got 'l2'"):
        normalise(x, "l2")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, F), c=st.integers(2, 9))
def test_topk_keeps_the_largest(seed: int, k: int, c: int) -> None:
    p = parameters("relu", c=c, seed=seed)
    relu = SparseAutoencoder(**p).encode(tokens(c=c))
    codes = SparseAutoencoder(**(p | {"activation": "topk", "k": k})).encode(tokens(c=c))
    torch.testing.assert_close(codes.sort(-1, descending=True).values[..., :k], relu.topk(k, -1).values)
    assert int((codes > 0).sum(-1).max()) <= k


def test_decode_needs_the_tokens_with_normalisation() -> None:
    sae = SparseAutoencoder(**parameters(), normalize="layer_norm")
    with pytest.raises(ValueError, match=r"x: an SAE with normalize='layer_norm' needs the encoded tokens"):
        sae.decode(torch.zeros(2, F).double())
    assert torch.equal(sae(tokens()), sae.decode(sae.encode(tokens()), tokens()))


def test_repr() -> None:
    sae = SparseAutoencoder(**parameters("topk"), metadata={"layer": "9"}, expected_l0=5)
    for part in ("d_model=12", "d_sae=40", "activation='topk'", "k=5", "l0=5.0", "torch.float64", "'layer': '9'"):
        assert part in repr(sae)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moves_to_cuda_and_back() -> None:
    sae = SparseAutoencoder(**parameters("gated", torch.float32))
    bias = sae.bias.clone()
    sae.cuda()
    assert sae.device.type == "cuda" and sae.W_enc.t().is_contiguous()
    assert sae.encode(tokens(torch.float32).cuda()).device.type == "cuda"
    assert torch.equal(sae.cpu().bias, bias)
