"""Gate: lower median, MAD and factor of every row in one launch, without a sort. Has never run on a device.

    z = (s - med) / (1.4826 (MAD + 1e-8)),   w = base ** tanh(slope z)            (fga_fast/reference/gate.py)

One program a row, which stays in registers. An order statistic is found bit by bit: 32 counts over the row give the
largest key below which at most `rank` keys lie, exactly, ties and all. Nothing is read back by the host.

Cost: 8 bytes a score (one read, one write) and 64 counts a row; bound by the latency of the counts, a few microseconds.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fga_fast.ops.gate import register_gate_rules

from .device import INTERPRETED, check_device, on, ordered, unordered

MAX_PATCHES = 16384  # a row in the registers of one program


@triton.jit
def _order_statistic(key, rank):
    """The key of that rank, counted from 0 upwards."""
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        below = tl.sum((key < (found | bit)).to(tl.int32), axis=0)
        found = tl.where(below <= rank, found | bit, found)
        bit = bit >> 1
    return found


@triton.jit(do_not_specialize=["P"])
def _gate(scores, gates, P, row_stride, column_stride, slope, log2_base, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < P
    score = tl.load(scores + row * row_stride + column * column_stride, mask=inside, other=0.0)
    rank = (P - 1) // 2
    key = tl.where(inside, ordered(score), 0xFFFFFFFF)
    deviation = score - unordered(_order_statistic(key, rank))
    undefined = tl.max((inside & (deviation != deviation)).to(tl.int32), axis=0)
    key = tl.where(inside, ordered(tl.abs(deviation)), 0xFFFFFFFF)
    mad = unordered(_order_statistic(key, rank))
    z = deviation / (1.4826 * (mad + 1e-8))
    # tanh from one exponential that cannot overflow: exact at 0, saturates to +-1, keeps NaN.
    power = tl.exp(-2.0 * tl.abs(slope * z))
    size = (1.0 - power) / (1.0 + power)
    exponent = tl.where(slope * z < 0, -size, size)
    gate = tl.where(undefined != 0, float("nan"), tl.exp2(log2_base * exponent))
    tl.store(gates + row * P + column, gate, mask=inside)


def gate(
    scores: Tensor,  # [M, P]
    base: float = 10.0,
    slope: float = 1.0,
) -> Tensor:
    """Gates [M, P] float32 in [1/base, base], as `ops.gate`. A row with a NaN gives a row of NaN.

    Raises:
        RuntimeError: not float32 [M, P] on a CUDA device, more than 16,384 patches, or base not positive.
    """
    check_device("gate", scores)
    gates: Tensor = torch.ops.fga_fast.triton_gate(scores, base, slope)
    return gates


def _run(scores: Tensor, base: float, slope: float) -> Tensor:
    if scores.ndim != 2:
        raise RuntimeError(f"gate: scores must be [M, P], got shape {list(scores.shape)}")
    if scores.dtype != torch.float32:
        raise RuntimeError(
            f"gate: scores must be float32 in Triton kernels, got {str(scores.dtype).removeprefix('torch.')}; "
            'use backend="composite" for float64'
        )
    if not base > 0:
        raise RuntimeError(f"gate: base must be positive, got {base}")
    rows, patches = scores.shape
    if patches > MAX_PATCHES:
        raise RuntimeError(
            f"gate: scores may have at most {MAX_PATCHES} patches in Triton kernels, got {patches}; "
            'use backend="composite"'
        )
    gates = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    if gates.numel():
        block = triton.next_power_of_2(patches)
        with on(scores):
            _gate[(rows,)](
                scores, gates, patches, *scores.stride(), float(slope), math.log2(base), BLOCK=block,
                num_warps=min(16, max(1, block // 256)),
            )  # fmt: skip
    return gates


torch.library.define("fga_fast::triton_gate", "(Tensor scores, float base, float slope) -> Tensor")
torch.library.impl("fga_fast::triton_gate", ("cpu", "cuda") if INTERPRETED else "cuda", _run)
register_gate_rules("triton_gate")
