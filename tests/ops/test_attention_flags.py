"""Signed relevance, an attention map that is a constant, and gradients that nobody needs, against a softmax written
out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from explicit_attention import Problem, Step, explicit, problem, relative
from torch import Tensor

from fga_fast import ops

SCALE = 0.4
CLOSE = {torch.float64: 1e-11, torch.float32: 5e-6}
DTYPES = (*CLOSE, torch.bfloat16, torch.float16)


def native(p: Problem, **more: Any) -> Step:
    out, lse, _, _ = ops.attention(p.q, p.k, p.v, p.carrier, scale=SCALE, bias=more.get("bias"))
    return Step(out, *ops.attention_backward(p.grad_out, p.row, p.gate, p.q, p.k, p.v, out, lse, scale=SCALE, **more))


@pytest.mark.parametrize("dtype", CLOSE)
def test_signed(dtype: torch.dtype) -> None:
    p = problem(queries=70, keys=70, width=16, dtype=dtype)
    got, want = native(p, signed=True), explicit(p, SCALE, signed=True)
    for name, g, w in zip(Step._fields, got, want, strict=True):
        assert relative(g, w) < CLOSE[dtype], name
    assert bool((got.row < 0).any()) and bool((native(p).row >= 0).all())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_signed_in_sixteen_bits(dtype: torch.dtype) -> None:
    p = problem(queries=50, keys=50, width=32, dtype=dtype)
    truth, plain = explicit(p, SCALE, signed=True), explicit(p, SCALE, signed=True, dtype=dtype)
    for name, g, w, ours in zip(Step._fields, native(p, signed=True), truth, plain, strict=True):
        assert relative(g, w) <= 2 * relative(ours, w), name


def test_signed_keeps_nan() -> None:
    p = problem(dtype=torch.float32)
    p.grad_out[0, 1, 4, 3] = float("nan")
    row = native(p, signed=True).row
    assert bool(row[0].isnan().all()) and bool(row[1].isfinite().all())


def test_signed_relevance_sums_to_output_times_gradient() -> None:
    """Without relu, head average and gate, sum_j A_ij dA_ij = dO_i . O_i, which needs no map at all."""
    p = problem(heads=1)._replace(gate=torch.ones(2, 9, dtype=torch.float64))
    got = native(p, signed=True)
    want = (p.row * (p.grad_out * got.out).sum(-1)[:, 0]).sum(-1)
    torch.testing.assert_close(got.row.sum(-1), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_needed_is_empty_and_the_rest_the_same(dtype: torch.dtype, with_bias: bool, signed: bool) -> None:
    p = problem(queries=70, dtype=dtype)
    bias = torch.randn(1, 3, 70, 9).to(dtype) if with_bias else None
    whole = native(p, bias=bias, signed=signed)
    for need_qk, need_v in itertools.product((False, True), repeat=2):
        got = native(p, bias=bias, signed=signed, need_qk=need_qk, need_v=need_v)
        for name, needed in (("dq", need_qk), ("dk", need_qk), ("dv", need_v), ("row", True)):
            g, w = getattr(got, name), getattr(whole, name)
            assert torch.equal(g, w) if needed else g.shape == (0,), name
            assert g.dtype == w.dtype and g.device == w.device
            assert not needed or g.stride() == w.stride()


@pytest.mark.parametrize("need_qk", (False, True))
def test_rows_without_gradient_give_zero_however_little_is_needed(need_qk: bool) -> None:
    """Blocks of query rows that get no gradient are left out: their dq is zero, and nothing is left from before."""
    p = problem(images=1, queries=200)
    p.grad_out[:, :, 1:] = 0
    got, want = native(p, need_qk=need_qk, need_v=not need_qk), explicit(p, SCALE)
    for name in ("dq", "dk") if need_qk else ("dv",):
        assert relative(getattr(got, name), getattr(want, name)) < 1e-11
    assert relative(got.row, want.row) < 1e-11


def leaves(p: Problem) -> tuple[Tensor, ...]:
    return (*(t.detach().requires_grad_() for t in p[:3]), p.carrier.requires_grad_())


@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize("gated", (False, True))
def test_constant_map_sends_gradient_through_v_only(gated: bool, signed: bool) -> None:
    """The map is a constant of the backward pass; relevance still reads its gradient."""
    p = problem(keys=7)
    bias = torch.randn(3, 7, 7, dtype=torch.float64)
    q, k, v, carrier = leaves(p)
    out, _, carried, port = ops.attention(
        q, k, v, carrier, scale=SCALE, bias=bias, gated=gated, signed=signed, constant_map=True
    )
    ends, seeds = [out, carried, port], [p.grad_out, p.row, p.gate]
    ends, seeds = (ends, seeds) if gated else (ends[:2], seeds[:2])
    dq, dk, dv, row = torch.autograd.grad(ends, [q, k, v, carrier], seeds, allow_unused=True)
    assert dq is None and dk is None
    p = p if gated else p._replace(gate=torch.ones_like(p.gate))
    want = explicit(p, SCALE, bias, signed=signed)
    assert relative(dv, want.dv) < 1e-12 and relative(row, want.row) < 1e-12
    attention = (q.detach() @ k.detach().mT * SCALE + bias).softmax(-1)
    (of_constant,) = torch.autograd.grad(attention @ v, [v], [p.grad_out])
    assert relative(dv, of_constant) < 1e-12


def test_constant_map_before_a_projection() -> None:
    """q, k and v come from one x, as in a model: only v's share arrives there."""
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    weight, grad_out = torch.randn(24, 8, dtype=torch.float64), torch.randn(2, 2, 7, 4, dtype=torch.float64)
    q, k, v = (x @ weight.t()).view(2, 7, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    carrier = torch.zeros(2, 7, dtype=torch.float64)
    out, _, _, _ = ops.attention(q, k, v, carrier, scale=SCALE, constant_map=True)
    (got,) = torch.autograd.grad(out, x, grad_out, retain_graph=True)
    (want,) = torch.autograd.grad((q @ k.mT * SCALE).softmax(-1).detach() @ v, x, grad_out)
    assert relative(got, want) < 1e-12


@pytest.mark.parametrize("wanted", ("q", "k", "v", "qk", "qv", "qkv"))
@pytest.mark.parametrize("signed", (False, True))
def test_only_some_inputs_need_a_gradient(wanted: str, signed: bool) -> None:
    p = problem(keys=7)
    carrier = p.carrier.requires_grad_()
    inputs = {n: getattr(p, n).detach().requires_grad_(n in wanted) for n in "qkv"}
    out, _, carried, _ = ops.attention(*inputs.values(), carrier, scale=SCALE, signed=signed)
    of = [inputs[n] for n in wanted]
    got = torch.autograd.grad([out, carried], [*of, carrier], [p.grad_out, p.row])
    want = explicit(p._replace(gate=torch.ones_like(p.gate)), SCALE, signed=signed)
    for g, w in zip(got, [*(getattr(want, f"d{n}") for n in wanted), want.row], strict=True):
        assert relative(g, w) < 1e-12


@pytest.mark.parametrize("flags", tuple(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("with_bias", (False, True))
def test_opcheck(with_bias: bool, flags: tuple[bool, ...]) -> None:
    """Shapes and strides of the fake kernel are those of the native one, whatever is left out."""
    p = problem(rows=3)
    bias = torch.randn(1, 3, 7, 9, dtype=torch.float64) if with_bias else None
    out, lse, _, _ = ops.attention(p.q, p.k, p.v, p.carrier, scale=SCALE, bias=bias)
    arguments = (p.grad_out, p.row, p.gate, p.q, p.k, p.v, bias, out, lse, torch.tensor([1, 0, 1]), SCALE)
    operators = torch.ops.fga_fast
    torch.library.opcheck(
        operators.attention_backward, (*arguments, *flags), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("flags", ((True, True, True), (False, False, True)))
def test_opcheck_of_the_differentiable_op(flags: tuple[bool, ...]) -> None:
    p = problem(keys=7)
    torch.library.opcheck(torch.ops.fga_fast.attention, (*leaves(p), None, SCALE, *flags))
