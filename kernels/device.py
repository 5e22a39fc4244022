"""What kernels share: device functions, and how a kernel reaches its device. Has never run on a device.

Triton compiles a kernel anew when an integer argument becomes 1 or a multiple of 16. Kernels allow this for widths and
strides only, which decide how rows are read. Counts are `do_not_specialize`, so another batch size compiles nothing.
"""

from __future__ import annotations

import contextlib
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiling

# Triton decides when it decorates a kernel, so the variable must be set before this module is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_device(op: str, tensor: Tensor) -> None:
    """Raises RuntimeError for a tensor that no kernel can reach from here."""
    if not (tensor.is_cuda or tensor.device.type == "meta" or (INTERPRETED and tensor.device.type == "cpu")):
        raise RuntimeError(
            f"{op}: Triton kernels run on CUDA devices, got a tensor on {tensor.device}; move it there or use another "
            "backend"
        )


def on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches inside run on the tensor's device, in its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's device; that of a Hopper GPU in the interpreter."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


def device_name(tensor: Tensor) -> str:
    """Name of the tensor's device, under which measured tiles are kept; "" in the interpreter."""
    return torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else ""


def lanewise(tensor: Tensor) -> Tensor:  # [., P, C]
    """The tensor in the layout that `product` reads fastest: a copy with the tokens of a column side by side for plain
    float32 products, else the tensor itself.

    Plain float32 products run on the ordinary cores, where 16 lanes of a warp read rows of one factor, 4 apart. Rows of
    a tile lie 64 bytes apart in shared memory, so all 16 would wait for the same banks. Tokens side by side are read at
    once.
    """
    if tiling.product_kind(tensor.dtype) == "ieee":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor


@triton.jit
def tiles_of(program, token_tiles, feature_tiles, GROUP: tl.constexpr):
    """The token tile and the feature tile of a program. Programs finish GROUP token tiles before they go on."""
    first = program // (GROUP * feature_tiles) * GROUP
    group = tl.minimum(token_tiles - first, GROUP)
    within = program % (GROUP * feature_tiles)
    return first + within % group, within // group


@triton.jit
def product(
    a,  # [A] pointers to rows of C elements, `a_step` apart
    b,  # [B] pointers to rows of C contiguous elements
    C, a_step,
    A: tl.constexpr, B: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Inner products of every row of a with every row of b, float32 [A, B]. See `lanewise` for plain float32."""
    column = tl.arange(0, BLOCK_C)
    if PRECISION == "ieee" and a.dtype.element_ty == tl.float32:
        a_at = a[:, None] + (column * a_step)[None, :]
        b_at = b[:, None] + column[None, :]
        flipped = tl.zeros((B, A), dtype=tl.float32)
        for c in range(0, C, BLOCK_C):
            if EVEN_C:
                left = tl.load(b_at)
                right = tl.trans(tl.load(a_at))
            else:
                left = tl.load(b_at, mask=column[None, :] < C - c, other=0.0)
                right = tl.trans(tl.load(a_at, mask=column[None, :] < C - c, other=0.0))
            flipped = tl.dot(left, right, flipped, input_precision=PRECISION)
            a_at += BLOCK_C * a_step
            b_at += BLOCK_C
        return tl.trans(flipped)
    a_at = a[:, None] + column[None, :]
    b_at = b[None, :] + column[:, None]
    sums = tl.zeros((A, B), dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        if EVEN_C:
            left = tl.load(a_at)
            right = tl.load(b_at)
        else:
            left = tl.load(a_at, mask=column[None, :] < C - c, other=0.0)
            right = tl.load(b_at, mask=column[:, None] < C - c, other=0.0)
        if INTERPRET:  # the interpreter's product of bfloat16 is wrong
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
        a_at += BLOCK_C
        b_at += BLOCK_C
    return sums


@triton.jit
def two_products(
    a, b, c, d,  # pointers to rows of C contiguous elements: [A], [B], [A], [B]
    C,
    A: tl.constexpr, B: tl.constexpr, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """`product` of a with b and of c with d in one loop: half the barriers, one start of the pipeline."""
    column = tl.arange(0, BLOCK_C)
    a_at = a[:, None] + column[None, :]
    b_at = b[None, :] + column[:, None]
    c_at = c[:, None] + column[None, :]
    d_at = d[None, :] + column[:, None]
    first = tl.zeros((A, B), dtype=tl.float32)
    second = tl.zeros((A, B), dtype=tl.float32)
    for done in range(0, C, BLOCK_C):
        if EVEN_C:
            left, right, left2, right2 = tl.load(a_at), tl.load(b_at), tl.load(c_at), tl.load(d_at)
        else:
            across = column[None, :] < C - done
            down = column[:, None] < C - done
            left = tl.load(a_at, mask=across, other=0.0)
            right = tl.load(b_at, mask=down, other=0.0)
            left2 = tl.load(c_at, mask=across, other=0.0)
            right2 = tl.load(d_at, mask=down, other=0.0)
        if INTERPRET:
            left, right, left2, right2 = (
                left.to(tl.float32), right.to(tl.float32), left2.to(tl.float32), right2.to(tl.float32)
            )  # fmt: skip
        first = tl.dot(left, right, first, input_precision=PRECISION)
        second = tl.dot(left2, right2, second, input_precision=PRECISION)
        a_at += BLOCK_C
        b_at += BLOCK_C
        c_at += BLOCK_C
        d_at += BLOCK_C
    return first, second


@triton.jit
def activate(pre, feature, bias, theta, scale, mag_bias, ACTIVATION: tl.constexpr):
    """Products [A, B] of tokens and encoder columns to codes; "select" leaves pre-activations. NaN stays NaN.

    Written as "zero where not above" so that NaN, which compares false, is not taken for an inactive feature.
    """
    z = pre + tl.load(bias + feature).to(tl.float32)[None, :]
    if ACTIVATION == "gated":
        magnitude = pre * tl.load(scale + feature).to(tl.float32)[None, :]
        magnitude += tl.load(mag_bias + feature).to(tl.float32)[None, :]
        z = tl.where(z <= 0, 0.0, tl.where(magnitude <= 0, 0.0, magnitude))
    elif ACTIVATION == "threshold":
        least = tl.load(theta + feature).to(tl.float32)
        z = tl.where(z <= tl.where(least > 0, least, 0.0)[None, :], 0.0, z)
    elif ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    return z


@triton.jit
def ordered(value):
    """uint32 keys in the order of float32 values: -0 equals 0, NaN is the largest, no key is 0."""
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(value != value, 0xFFFFFFFF, key)


@triton.jit
def unordered(key):
    """The float32 value of a key of `ordered`."""
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)
