"""Tapped attention against the reference: values, gradients, relevance, strides, sharing of images, registration."""

from __future__ import annotations

import pytest
import torch
from explicit_attention import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fga_fast import ops, reference

TOKENS = (1, 2, 17, 50, 197, 201, 257, 577, 1025)
WIDTHS = (32, 48, 64, 80, 128)
EXACT = {torch.float64: 1e-12, torch.float32: 2e-6}


def sample(
    images: int, heads: int, tokens: int, width: int, dtype: torch.dtype, rows: int | None = None
) -> dict[str, Tensor]:
    """q, k, v cut out of one projection as timm does, so none of them is contiguous; row, gate, grad_out for M rows."""
    rows = images if rows is None else rows
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = torch.randn(images, tokens, 3, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    grad_out = torch.randn(rows, tokens, heads, width, dtype=dtype).transpose(1, 2)
    return {
        "q": q, "k": k, "v": v, "grad_out": grad_out,
        "row": torch.rand(rows, tokens, dtype=wide), "gate": torch.rand(rows, tokens, dtype=wide) * 3,
    }  # fmt: skip


def fast(s: dict[str, Tensor], image: Tensor | None = None) -> tuple[Tensor, ...]:
    scale = s["q"].shape[-1] ** -0.5
    wide = torch.float64 if s["q"].dtype == torch.float64 else torch.float32
    carrier = torch.zeros(s["k"].shape[0], s["k"].shape[-2], dtype=wide)
    out, lse, _, _ = ops.attention(s["q"], s["k"], s["v"], carrier, scale=scale)
    back = ops.attention_backward(
        s["grad_out"], s["row"], s["gate"], s["q"], s["k"], s["v"], out, lse, scale=scale, image=image
    )
    return (out, *back)


def slow(s: dict[str, Tensor], dtype: torch.dtype, image: Tensor | None = None) -> list[Tensor]:
    s = {name: t.to(dtype) for name, t in s.items()}
    scale = s["q"].shape[-1] ** -0.5
    out, _ = reference.attention(s["q"], s["k"], s["v"], scale)
    back = reference.attention_backward(s["grad_out"], s["row"], s["gate"], s["q"], s["k"], s["v"], image, scale)
    return [out, *back]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("tokens", TOKENS)
def test_lengths(tokens: int, dtype: torch.dtype) -> None:
    s = sample(1 if tokens > 500 else 2, 2, tokens, 64 if tokens < 500 else 32, dtype)
    for name, got, want in zip(("out", "dq", "dk", "dv", "row"), fast(s), slow(s, torch.float64), strict=True):
        if tokens == 1 and name in ("dq", "dk"):  # exactly zero: one key has probability 1
            assert got.abs().max() < 1e-5
            continue
        assert relative(got, want) < EXACT[dtype], name


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("width", (*WIDTHS, 1, 7, 33))
def test_head_widths(width: int, dtype: torch.dtype) -> None:
    s = sample(2, 3, 37, width, dtype)
    for name, got, want in zip(("out", "dq", "dk", "dv", "row"), fast(s), slow(s, torch.float64), strict=True):
        assert relative(got, want) < EXACT[dtype], name


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("tokens", "width"), ((17, 48), (50, 64), (197, 80), (257, 128)))
def test_sixteen_bits_err_at_most_twice_what_plain_torch_does(tokens: int, width: int, dtype: torch.dtype) -> None:
    s = sample(2, 2, tokens, width, dtype)
    truth = slow(s, torch.float64)
    out, _ = reference.attention(s["q"], s["k"], s["v"], width**-0.5)
    plain = (
        out,
        *reference.attention_backward(s["grad_out"], s["row"], s["gate"], s["q"], s["k"], s["v"], None, width**-0.5),
    )
    for name, got, ours, want in zip(("out", "dq", "dk", "dv", "row"), fast(s), plain, truth, strict=True):
        assert relative(got, want) <= 2 * relative(ours, want), name


@settings(max_examples=40, deadline=None)
@given(
    images=st.integers(1, 3), heads=st.integers(1, 4), tokens=st.integers(1, 70), width=st.integers(1, 70),
    targets=st.integers(0, 4), magnitude=st.sampled_from((1e-3, 1.0, 30.0)),
)  # fmt: skip
def test_any_shape(images: int, heads: int, tokens: int, width: int, targets: int, magnitude: float) -> None:
    image = torch.randint(images, (targets,))
    s = sample(images, heads, tokens, width, torch.float64, rows=targets)
    s["q"] = s["q"] * magnitude
    for got, want in zip(fast(s, image), slow(s, torch.float64, image), strict=True):
        assert got.shape == want.shape
        assert relative(got, want) < 1e-9 or (got - want).abs().max() < 1e-9


def test_several_targets_share_an_image() -> None:
    image = torch.tensor([1, 0, 1, 1, 0])
    s = sample(2, 3, 29, 16, torch.float64, rows=5)
    shared = fast(s, image)
    alone = fast({n: t[image] if n in "qkv" else t for n, t in s.items()})
    for got, want in zip(shared[1:], alone[1:], strict=True):
        assert torch.equal(got, want)


def test_pooling_query_starts_its_own_row() -> None:
    s = sample(2, 2, 21, 8, torch.float64)
    s["q"], s["grad_out"], s["row"] = s["q"][:, :, :1], s["grad_out"][:, :, :1], torch.ones(2, 1, dtype=torch.float64)
    for got, want in zip(fast(s), slow(s, torch.float64), strict=True):
        assert relative(got, want) < 1e-12


def test_any_strides() -> None:
    s = sample(2, 2, 33, 24, torch.float64)
    strided = dict(s)
    for name in ("q", "k", "v", "grad_out"):
        buffer = torch.full((4, 2, 70, 50), float("nan"), dtype=torch.float64)
        view = buffer[1:3, :, 2:68:2, 1:49:2]
        view.copy_(s[name])
        strided[name] = view
    strided["row"] = s["row"].t().contiguous().t()
    strided["gate"] = torch.stack([s["gate"], s["gate"]], dim=-1)[..., 1]
    for got, want in zip(fast(strided), fast(s), strict=True):
        assert torch.equal(got, want)


def test_zero_gradients_send_nothing() -> None:
    s = sample(2, 2, 40, 16, torch.float32)
    s["grad_out"] = torch.zeros_like(s["grad_out"])
    assert all(bool((t == 0).all()) for t in fast(s)[1:])


def test_gradient_at_one_row_only() -> None:
    """The last block of a class-token model: the kernel skips the other blocks of rows."""
    s = sample(1, 2, 200, 16, torch.float64)
    s["grad_out"] = s["grad_out"].clone()
    s["grad_out"][:, :, 1:] = 0
    for got, want in zip(fast(s), slow(s, torch.float64), strict=True):
        assert relative(got, want) < 1e-12


def test_extreme_logits_stay_finite() -> None:
    s = sample(1, 2, 50, 32, torch.float32)
    s["q"] = s["q"] * 100
    for got, want in zip(fast(s), slow(s, torch.float64), strict=True):
        assert relative(got, want) < 1e-4


def test_nan_is_not_taken_for_no_relevance() -> None:
    s = sample(1, 2, 9, 8, torch.float32)
    s["grad_out"] = s["grad_out"].clone()
    s["grad_out"][0, 1, 4, 3] = float("nan")
    scale = 8**-0.5
    out, lse, _, _ = ops.attention(s["q"], s["k"], s["v"], torch.zeros(1, 9), scale=scale)
    row = ops.attention_backward(s["grad_out"], s["row"], None, s["q"], s["k"], s["v"], out, lse, scale=scale)[3]
    assert bool(row.isnan().all())


def test_no_images() -> None:
    s = sample(0, 2, 5, 4, torch.float32)
    assert [tuple(t.shape) for t in fast(s)] == [(0, 2, 5, 4)] * 4 + [(0, 5)]


def test_result_does_not_depend_on_threads() -> None:
    s = sample(2, 3, 70, 32, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(fast(s))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("gated", (False, True))
def test_autograd_carries_relevance_as_the_gradient_of_the_carrier(gated: bool) -> None:
    s = sample(2, 2, 19, 8, torch.float64)
    q, k, v = (s[n].detach().requires_grad_() for n in "qkv")
    carrier = torch.zeros(2, 19, dtype=torch.float64, requires_grad=True)
    out, _, carried, port = ops.attention(q, k, v, carrier, scale=0.3, gated=gated)
    outputs, seeds = [out, carried], [s["grad_out"], s["row"]]
    if gated:
        outputs, seeds = [*outputs, port], [*seeds, s["gate"]]
    got = torch.autograd.grad(outputs, [q, k, v, carrier], seeds)
    want = reference.attention_backward(
        s["grad_out"], s["row"], s["gate"] if gated else None, s["q"], s["k"], s["v"], None, 0.3
    )
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 1e-12


def test_gradients_of_inputs_that_need_none_are_not_computed() -> None:
    s = sample(1, 2, 9, 8, torch.float64)
    carrier = torch.zeros(1, 9, dtype=torch.float64, requires_grad=True)
    out, _, carried, _ = ops.attention(s["q"], s["k"], s["v"], carrier, scale=0.3)
    (row,) = torch.autograd.grad([out, carried], [carrier], [s["grad_out"], s["row"]])
    want = reference.attention_backward(s["grad_out"], s["row"], None, s["q"], s["k"], s["v"], None, 0.3)[3]
    assert relative(row, want) < 1e-12


def test_a_gated_port_without_gate_is_an_error() -> None:
    s = sample(1, 1, 4, 4, torch.float64)
    carrier = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    _, _, carried, _ = ops.attention(s["q"], s["k"], s["v"], carrier, scale=1.0, gated=True)
    with pytest.raises(RuntimeError, match="no gate arrived"):
        torch.autograd.grad([carried], [carrier], [s["row"]])


def test_backward_op_refuses_to_be_differentiated() -> None:
    s = sample(1, 1, 4, 4, torch.float64)
    s["row"].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        fast(s)[4].sum().backward()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_opcheck(dtype: torch.dtype) -> None:
    s = sample(2, 2, 5, 4, dtype)
    q, k, v = (s[n].detach().requires_grad_() for n in "qkv")
    carrier = torch.zeros_like(s["row"], requires_grad=True)
    torch.library.opcheck(torch.ops.fga_fast.attention, (q, k, v, carrier, None, 0.5, False, False, False))
    out, lse, _, _ = ops.attention(s["q"], s["k"], s["v"], carrier.detach(), scale=0.5)
    several, image = sample(2, 2, 5, 4, dtype, rows=3), torch.tensor([0, 1, 1])
    for of, extra in (
        (s, (None, 0.5, False, True, True)),
        (several, (image, 0.5, False, False, False)),
        (several, (image, 0.5, True, True, True)),
    ):
        arguments = (of["grad_out"], of["row"], of["gate"], s["q"], s["k"], s["v"], None, out, lse, *extra)
        torch.library.opcheck(torch.ops.fga_fast.attention_backward, arguments)


def changed(s: dict[str, Tensor], name: str, value: Tensor) -> dict[str, Tensor]:
    return {**s, name: value}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    (
        ("k", lambda t: t[:, :1], r"k must have shape \[2, 2, 6, 8\], got \[2, 1, 6, 8\]"),
        ("v", lambda t: t.float(), "v must be float64, got float32"),
        ("q", lambda t: t[0], r"q must be \[B, H, Nq, D\], got shape \[2, 6, 8\]"),
        ("row", lambda t: t[:, :5], r"row must have shape \[2, 6\], got \[2, 5\]"),
        ("row", lambda t: t.float(), "row must be float64, got float32"),
        ("gate", lambda t: t[:1], r"gate must have shape \[2, 6\], got \[1, 6\]"),
        ("grad_out", lambda t: t[:, :, :2], r"grad_out must have shape \[2, 2, 6, 8\]"),
    ),
)
def test_bad_arguments_are_named(name: str, change: object, message: str) -> None:
    s = sample(2, 2, 6, 8, torch.float64)
    with pytest.raises(RuntimeError, match=message):
        fast(changed(s, name, change(s[name])))  # type: ignore[operator]


def test_an_image_index_out_of_range_is_refused() -> None:
    s = sample(2, 2, 6, 8, torch.float64)
    with pytest.raises(RuntimeError, match=r"image\[1\] is 2, expected 0 to 1"):
        fast(s, torch.tensor([0, 2]))


def test_integers_are_refused() -> None:
    s = sample(2, 2, 6, 8, torch.float64)
    with pytest.raises(RuntimeError, match="must be float32, float64, bfloat16 or float16"):
        fast({n: t.long() for n, t in s.items()})
