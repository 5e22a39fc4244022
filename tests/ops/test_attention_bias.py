"""Attention with an additive mask or position bias, against a softmax written out."""

from __future__ import annotations

import pytest
import torch
from explicit_attention import Problem, Step, explicit, problem, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fga_fast import ops

SCALE = 0.4
CLOSE = {torch.float64: 1e-11, torch.float32: 5e-6}


def native(p: Problem, bias: Tensor | None, scale: float = SCALE, image: Tensor | None = None) -> Step:
    out, lse, _, _ = ops.attention(p.q, p.k, p.v, p.carrier, scale=scale, bias=bias)
    back = ops.attention_backward(
        p.grad_out, p.row, p.gate, p.q, p.k, p.v, out, lse, scale=scale, bias=bias, image=image
    )
    return Step(out, *back)


def check(got: Step, want: Step, close: float = 1e-11) -> None:
    for name, g, w in zip(Step._fields, got, want, strict=True):
        assert relative(g, w) < close or (g - w).abs().max() < 1e-12, name


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    "shape", ((2, 3, 70, 90), (1, 3, 70, 90), (2, 1, 1, 90), (2, 3, 70, 1), (1, 1, 1, 1), (1, 1, 70, 90))
)
def test_bias_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """70 queries are more than one block of rows; neither 70 nor 90 is a whole number of vectors."""
    p, bias = problem(queries=70, keys=90, width=16, dtype=dtype), torch.randn(shape, dtype=dtype) * 2
    check(native(p, bias), explicit(p, SCALE, bias), CLOSE[dtype])


@settings(max_examples=40, deadline=None)
@given(
    full=st.tuples(*[st.booleans()] * 4), expanded=st.booleans(), queries=st.integers(1, 70), keys=st.integers(1, 70),
    targets=st.integers(0, 4), masked=st.sampled_from((0.0, 0.3, 0.95)), dtype=st.sampled_from(tuple(CLOSE)),
)  # fmt: skip
def test_any_bias(
    full: tuple[bool, ...], expanded: bool, queries: int, keys: int, targets: int, masked: float, dtype: torch.dtype
) -> None:
    p = problem(queries=queries, keys=keys, rows=targets, dtype=dtype)
    whole = (2, 3, queries, keys)
    bias = torch.randn([n if wanted else 1 for n, wanted in zip(whole, full, strict=True)], dtype=dtype)
    if full[3]:
        bias[torch.rand(bias.shape) < masked] = -torch.inf
        bias[..., torch.randint(keys, ())] = 1.0  # so that no row is masked as a whole
    image = torch.randint(2, (targets,))
    got = native(p, bias.expand(whole) if expanded else bias, image=image)
    for g, w in zip(got._replace(out=got.out[image]), explicit(p, SCALE, bias, image=image), strict=True):
        assert relative(g, w) < 20 * CLOSE[dtype] or float((g - w).abs().max()) < CLOSE[dtype]


def test_each_image_has_its_own_bias() -> None:
    p, image = problem(rows=5, keys=7), torch.tensor([1, 0, 1, 1, 0])
    bias = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    got = native(p, bias, image=image)
    check(got._replace(out=got.out[image]), explicit(p, SCALE, bias, image=image))


def test_any_strides_of_bias() -> None:
    p = problem()
    bias = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    want = native(p, bias)
    buffer = torch.full((4, 3, 15, 20), float("nan"), dtype=torch.float64)
    buffer[1:3, :, 1:15:2, 1:19:2] = bias
    for strided in (
        buffer[1:3, :, 1:15:2, 1:19:2], bias.transpose(2, 3).contiguous().transpose(2, 3),
        bias.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), torch.stack([bias, bias], -1)[..., 1],
    ):  # fmt: skip
        assert not strided.is_contiguous() and torch.equal(strided, bias)
        for g, w in zip(native(p, strided), want, strict=True):
            assert torch.equal(g, w)


def test_dims_in_front_may_be_left_out() -> None:
    p = problem()
    for shape in ((7, 9), (9,), (1,), (3, 1, 9), ()):
        bias = torch.randn(shape, dtype=torch.float64)
        check(native(p, bias), explicit(p, SCALE, bias))


def test_a_query_that_sees_one_key_only() -> None:
    p = problem(queries=8, keys=8)
    bias = torch.full((8, 8), -torch.inf, dtype=torch.float64).triu(1)
    got = native(p, bias)
    check(got, explicit(p, SCALE, bias))
    assert torch.equal(got.out[:, :, 0], p.v[:, :, 0])
    assert float(got.dq[:, :, 0].abs().max()) < 1e-14


@pytest.mark.parametrize("dtype", CLOSE)
def test_padding_masked_with_the_lowest_number(dtype: torch.dtype) -> None:
    """A row masked as a whole this way is uniform, and has a log-sum-exp that does not say over how many keys."""
    p, bias = problem(queries=20, keys=33, dtype=dtype), torch.zeros(20, 33, dtype=dtype)
    bias[:, 30:] = torch.finfo(dtype).min
    bias[4] = torch.finfo(dtype).min
    check(native(p, bias), explicit(p, SCALE, bias, dtype=dtype), 2 * CLOSE[dtype])
    torch.testing.assert_close(native(p, bias).out[:, :, 4], p.v.mean(2))


def test_a_query_that_sees_no_key_gives_nan_as_a_softmax_does() -> None:
    p, bias = problem(), torch.zeros(7, 9, dtype=torch.float64)
    bias[3] = -torch.inf
    got, want = native(p, bias), explicit(p, SCALE, bias)
    for name, g, w in zip(Step._fields, got, want, strict=True):
        assert torch.equal(g.isnan(), w.isnan()), name
    assert bool(got.out[:, :, 3].isnan().all()) and not bool(got.out[:, :, :3].isnan().any())


@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits_err_at_most_twice_what_plain_torch_does(dtype: torch.dtype, wide: bool) -> None:
    """A bias in float32 is not rounded on its way."""
    p = problem(queries=50, keys=50, width=32, dtype=dtype)
    bias = torch.randn(1, 3, 50, 50)
    bias = bias if wide else bias.to(dtype)
    bias[..., 40:] = -torch.inf
    truth, plain = explicit(p, SCALE, bias), explicit(p, SCALE, bias, dtype=dtype)
    for name, g, w, ours in zip(Step._fields, native(p, bias), truth, plain, strict=True):
        assert relative(g, w) <= 2 * relative(ours, w), name


def test_a_bias_in_float32_keeps_its_digits() -> None:
    p = problem(dtype=torch.bfloat16)
    bias = torch.full((7, 9), 100.0)
    bias[:, ::2] += 0.3  # rounded to bfloat16 this would be 100.5
    got = native(p, bias).row.double()
    assert relative(got, explicit(p, SCALE, bias).row) < 0.01
    assert relative(got, explicit(p, SCALE, bias.bfloat16()).row) > 0.02


@pytest.mark.parametrize("images", (0, 1))
def test_no_images_and_one(images: int) -> None:
    p = problem(images=images)
    for shape in ((1, 3, 7, 9), (images, 1, 7, 9)):
        bias = torch.randn(shape, dtype=torch.float64)
        check(native(p, bias), explicit(p, SCALE, bias))


def test_zero_bias_changes_nothing() -> None:
    p = problem(dtype=torch.float32)
    for g, w in zip(native(p, torch.zeros(1, 1, 7, 9)), native(p, None), strict=True):
        assert torch.equal(g, w)


def test_autograd() -> None:
    p = problem(keys=7)
    bias = torch.randn(1, 3, 7, 7, dtype=torch.float64)
    q, k, v = (t.detach().requires_grad_() for t in p[:3])
    carrier = p.carrier.requires_grad_()
    out, _, carried, port = ops.attention(q, k, v, carrier, scale=SCALE, bias=bias, gated=True)
    got = torch.autograd.grad([out, carried, port], [q, k, v, carrier], [p.grad_out, p.row, p.gate])
    check(Step(out.detach(), *got), explicit(p, SCALE, bias))


def test_a_gradient_for_the_bias_is_refused() -> None:
    p = problem()
    bias = torch.zeros(7, 9, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"bias requires a gradient.*pass bias\.detach\(\)"):
        native(p, bias)
    with torch.no_grad():
        got = native(p, bias)
    check(got, explicit(p, SCALE))


@pytest.mark.parametrize(
    ("bias", "message"),
    (
        (torch.zeros(1, 2, 3, 7, 9).double(), r"bias must be broadcastable to \[B, H, Nq, N\], got shape \[1, 2, 3, 7"),
        (torch.zeros(7, 8).double(), r"bias must be broadcastable to \[2, 3, 7, 9\], got shape \[1, 1, 7, 8\]"),
        (torch.zeros(2, 2, 7, 9).double(), r"bias must be broadcastable to \[2, 3, 7, 9\], got shape \[2, 2, 7, 9\]"),
        (torch.zeros(3, 1, 1, 9).double(), r"bias must be broadcastable to \[2, 3, 7, 9\], got shape \[3, 1, 1, 9\]"),
        (torch.zeros(0, 1, 1, 9).double(), r"bias must be broadcastable to \[2, 3, 7, 9\], got shape \[0, 1, 1, 9\]"),
        (torch.zeros(7, 9), "bias must be float64, got float32"),
        (torch.zeros(7, 9, dtype=torch.bool), "bias must be float64, got Bool"),
        (torch.zeros(7, 9, dtype=torch.int64), "bias must be float64, got int64"),
    ),
)
def test_bad_bias_is_named(bias: Tensor, message: str) -> None:
    p = problem()
    with pytest.raises(RuntimeError, match=f"attention: {message}"):
        native(p, bias)
    out, lse, _, _ = ops.attention(p.q, p.k, p.v, p.carrier, scale=SCALE)
    with pytest.raises(RuntimeError, match=f"attention_backward: {message}"):
        ops.attention_backward(p.grad_out, p.row, p.gate, p.q, p.k, p.v, out, lse, scale=SCALE, bias=bias)


def test_dtypes_of_bias_for_sixteen_bits_are_named() -> None:
    p = problem(dtype=torch.float16)
    with pytest.raises(RuntimeError, match="bias must be float16 or float32, got bfloat16"):
        native(p, torch.zeros(7, 9, dtype=torch.bfloat16))


def test_bias_on_another_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match="attention: bias is on meta, expected cpu like q"):
        native(problem(), torch.zeros(7, 9, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("shape", ((2, 3, 7, 9), (1, 3, 1, 9), (2, 1, 7, 1)))
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = problem(dtype=dtype)
    bias = torch.randn(shape).to(p.row.dtype).expand(2, 3, 7, 9)
    q, k, v = (t.detach().requires_grad_() for t in p[:3])
    carrier = p.carrier.requires_grad_()
    operators = torch.ops.fga_fast
    torch.library.opcheck(operators.attention, (q, k, v, carrier, bias, 0.5, False, False, False))
    out, lse, _, _ = ops.attention(p.q, p.k, p.v, p.carrier, scale=0.5, bias=bias)
    arguments = (p.grad_out, p.row, p.gate, p.q, p.k, p.v, bias, out, lse, None, 0.5, False, True, True)
    torch.library.opcheck(operators.attention_backward, arguments)
