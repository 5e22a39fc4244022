"""Dense route of the score: two tensor-core products a tile, multiplied and reduced over features. Has never run on a
device.

A program takes a tile of tokens and a tile of features. It makes the codes f = act(x E + b) of the tile in registers,
then for each target of these images the feature gradients h = g D^T, multiplies, sums over its features, and writes the
sum to a workspace [feature tiles, M, P]; a second reduction adds the feature tiles up in fixed order, so that the same
input gives the same bits. Codes are made once for all targets of an image.

Programs are numbered so that those running together share a few tiles of weights, which are read from memory once, and
a group of token tiles that stays in the L2 cache. Cost: `tiling.dense_cost`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .device import (
    INTERPRETED,
    activate,
    capability,
    device_name,
    lanewise,
    on,
    ordered,
    product,
    tiles_of,
    two_products,
)


class Problem(NamedTuple):
    """One call, as the kernels want it: every tensor in the dictionary's dtype, rows contiguous."""

    x: Tensor  # [B, P, C], normalised
    g: Tensor | None  # [M, P, C]; None scores the codes alone, one row an image
    start: Tensor | None  # [B + 1] int64, where the rows of an image begin in `order`; None: row m is image m
    order: Tensor | None  # [M] int64, rows of g by image
    W_enc_t: Tensor  # [F, C]
    bias: Tensor  # [F]
    W_dec: Tensor  # [F, C]
    theta: Tensor | None  # [F]
    gate_scale: Tensor | None  # [F]
    mag_bias: Tensor | None  # [F]
    permutation: Tensor | None  # [F] int64
    kind: str  # "relu", "threshold", "gated" or "select"

    @property
    def rows(self) -> int:
        """M, the rows of the result."""
        return len(self.x) if self.g is None else len(self.g)


@triton.jit
def _emit(
    contribution,  # [T, F] float32, 0 beyond the dictionary
    m, p, inside, feature, feature_tile, first_feature, token_tile, M, P, F, tiles, top,
    partial, top_value, top_index, totals, TOP: tl.constexpr,
):  # fmt: skip
    """Writes the sums of one tile, and its strongest features."""
    row = m * P + p
    tl.store(partial + feature_tile.to(tl.int64) * M * P + row, tl.sum(contribution, axis=1), mask=inside)
    if TOP:
        column = feature - first_feature
        total = tl.sum(tl.where(inside[:, None], contribution, 0.0), axis=0)
        where = (token_tile.to(tl.int64) * M + tl.max(tl.where(inside, m, 0), axis=0)) * F
        tl.store(totals + where + column, total, mask=column < F)
        size = tl.where(contribution != contribution, float("inf"), tl.abs(contribution))  # NaN is not nothing
        # The next strongest is the largest behind the last in the order (size falling, feature rising).
        last_size = tl.full((size.shape[0],), float("inf"), tl.float32)
        last_feature = tl.full((size.shape[0],), -1, tl.int32)
        for i in range(top):
            behind = (size < last_size[:, None]) | ((size == last_size[:, None]) & (feature > last_feature[:, None]))
            last_size = tl.max(tl.where(behind, size, -1.0), axis=1)
            chosen = behind & (size == last_size[:, None])
            last_feature = tl.min(tl.where(chosen, feature, 0x7FFFFFFF), axis=1)
            value = tl.sum(tl.where(chosen & (feature == last_feature[:, None]), contribution, 0.0), axis=1)
            at = (row * tiles + feature_tile) * top + i
            tl.store(top_value + at, value, mask=inside)
            tl.store(top_index + at, last_feature, mask=inside)


@triton.jit(
    do_not_specialize=["P", "M", "span", "tiles_per_span", "token_tiles", "feature_tiles", "first_feature", "top"]
)
def _dense(
    x, g, start, order, encoder, decoder, bias, theta, scale, mag_bias, permutation,
    partial, top_value, top_index, totals,
    P, C, F, M, x_image, x_patch, x_column, g_row, g_patch, g_column,
    span, tiles_per_span, token_tiles, feature_tiles, first_feature, top,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, GROUPED: tl.constexpr, SHUFFLED: tl.constexpr, TOP: tl.constexpr,
    FUSED: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of tokens, all in one span of `span` tokens (the batch, or an image), and one tile of features."""
    token_tile, feature_tile = tiles_of(tl.program_id(0), token_tiles, feature_tiles, GROUP)
    # Rows beyond the span or the dictionary read the last one again and are not counted.
    t = token_tile % tiles_per_span * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < span
    token = token_tile // tiles_per_span * span + tl.minimum(t, span - 1)
    b = (token // P).to(tl.int64)
    p = (token % P).to(tl.int64)
    feature = first_feature + feature_tile * BLOCK_F + tl.arange(0, BLOCK_F)
    known = tl.minimum(feature, F - 1)
    x += b * x_image + p * x_patch
    encoder += known.to(tl.int64) * C
    rows = known.to(tl.int64)
    if SHUFFLED:
        rows = tl.load(permutation + known)
    decoder += rows * C
    if FUSED:
        pre, h = two_products(x, encoder, g + b * g_row + p * g_patch, decoder, C,
                              BLOCK_T, BLOCK_F, BLOCK_C, EVEN_C, PRECISION, INTERPRET)  # fmt: skip
    else:
        pre = product(x, encoder, C, x_column, BLOCK_T, BLOCK_F, BLOCK_C, EVEN_C, PRECISION, INTERPRET)
    codes = activate(pre, known, bias, theta, scale, mag_bias, ACTIVATION)
    codes = tl.where((feature < F)[None, :], codes, 0.0)
    if not GROUPED:
        if FUSED:
            codes *= h
        elif GRADIENT:
            codes *= product(g + b * g_row + p * g_patch, decoder, C, g_column,
                             BLOCK_T, BLOCK_F, BLOCK_C, EVEN_C, PRECISION, INTERPRET)  # fmt: skip
        _emit(codes, b, p, inside, feature, feature_tile, first_feature, token_tile % tiles_per_span, M, P,
              feature_tiles * BLOCK_F, feature_tiles, top, partial, top_value, top_index, totals, TOP)  # fmt: skip
    else:
        begin = tl.load(start + b)
        count = tl.load(start + b + 1) - begin
        for j in range(tl.max(tl.where(inside, count, 0), axis=0)):
            mine = inside & (j < count)
            m = tl.load(order + begin + j, mask=mine, other=0)
            h = product(g + m * g_row + p * g_patch, decoder, C, g_column,
                        BLOCK_T, BLOCK_F, BLOCK_C, EVEN_C, PRECISION, INTERPRET)  # fmt: skip
            _emit(codes * h, m, p, mine, feature, feature_tile, first_feature, token_tile % tiles_per_span, M, P,
                  feature_tiles * BLOCK_F, feature_tiles, top, partial, top_value, top_index, totals, TOP)  # fmt: skip


def dense(problem: Problem, top: int) -> tuple[Tensor, ...]:
    """Scores [M, P], and for top > 0 index and contribution of the strongest features, [M, P, top] and [M, top]."""
    images, patches, _ = problem.x.shape
    features, rows = len(problem.W_enc_t), problem.rows
    use = "top" if top else "dense" if problem.start is None else "targets"
    tile = tiling.tile(use, problem.x.dtype, capability(problem.x), problem.x.shape[2], device_name(problem.x))
    if not _fused(problem, tile):
        problem = problem._replace(x=lanewise(problem.x), g=None if problem.g is None else lanewise(problem.g))
    span = patches if top else images * patches
    per_span = triton.cdiv(span, tile.tokens)
    feature_tiles = triton.cdiv(features, tile.features)
    step = tiling.tiles_a_launch(tile, feature_tiles, rows * patches, per_span * rows, top)
    new = problem.x.new_empty
    scores = None
    found = new((rows, patches, 0), dtype=torch.int32), new((rows, patches, 0), dtype=torch.float32)
    totals = []
    for first in range(0, feature_tiles, step):
        count = min(step, feature_tiles - first)
        partial = new((count, rows, patches), dtype=torch.float32)
        value = new((rows, patches, count * top), dtype=torch.float32)
        index = torch.empty_like(value, dtype=torch.int32)
        total = new((per_span if top else 0, rows, count * tile.features), dtype=torch.float32)
        _launch(problem, tile, span, first * tile.features, count, top, (partial, value, index, total))
        scores = partial.sum(0) if scores is None else scores + partial.sum(0)
        if top:
            if first:
                index, value = torch.cat((found[0], index), -1), torch.cat((found[1], value), -1)
            found = strongest(index, value, top)
            totals.append(total.sum(0))
    if scores is None:  # cannot be: a dictionary has features
        raise ValueError("dense: expected a dictionary with features, got one without")
    if not top:
        return (scores,)
    total = torch.cat(totals, -1)[:, :features]
    every = torch.arange(features, dtype=torch.int32, device=total.device).expand(total.shape)
    of_image = strongest(every, total, top)
    return (scores, found[0].long(), found[1], of_image[0].long(), of_image[1])


def _fused(problem: Problem, tile: tiling.Tile) -> bool:
    return tile.fused and problem.g is not None and problem.start is None


@triton.jit(do_not_specialize=["n", "index_row", "top"])
def _strongest(value, index, to_value, to_index, n, index_row, top, BLOCK: tl.constexpr):
    """The entries of one row that are largest in magnitude, one after the other; no row is kept or sorted."""
    row = tl.program_id(0).to(tl.int64)
    value += row * n
    index += row * index_row
    last_key = tl.full((), 0xFFFFFFFF, tl.uint32)
    last_place = tl.full((), -1, tl.int32)
    for i in range(top):
        best_key = tl.full((), 0, tl.uint32)
        best_place = tl.full((), 0, tl.int32)
        for first in range(0, n, BLOCK):
            place = first + tl.arange(0, BLOCK)
            key = tl.where(place < n, ordered(tl.abs(tl.load(value + place, mask=place < n, other=0.0))), 0)
            behind = (key < last_key) | ((key == last_key) & (place > last_place))
            key = tl.where(behind, key, 0)
            largest = tl.max(key, axis=0)
            at = tl.min(tl.where(key == largest, place, 0x7FFFFFFF), axis=0)
            best_place = tl.where(largest > best_key, at, best_place)
            best_key = tl.maximum(best_key, largest)
        found = tl.load(value + best_place, mask=best_key != 0, other=0.0)
        tl.store(to_value + row * top + i, found)
        tl.store(to_index + row * top + i, tl.where(found == 0, -1, tl.load(index + best_place)))
        last_key = best_key
        last_place = best_place


def strongest(index: Tensor, value: Tensor, top: int) -> tuple[Tensor, Tensor]:  # [..., n] twice -> [..., top] twice
    """The entries largest in magnitude, equal ones in the order they came in; index -1 where nothing contributes."""
    n = value.shape[-1]
    if top <= tiling.FEW:  # a sort of all would need several times their memory
        value, index = value.contiguous(), index.reshape(-1, n)
        to_value, to_index = (t.new_empty((*value.shape[:-1], top)) for t in (value, index))
        block = min(4096, max(16, triton.next_power_of_2(n)))
        with on(value):
            _strongest[(len(index),)](
                value, index, to_value, to_index, n, index.stride(0), top, BLOCK=block,
                num_warps=tiling.select_warps(block),
            )  # fmt: skip
        return to_index, to_value
    order = value.abs().sort(dim=-1, descending=True, stable=True).indices[..., :top]
    value = value.gather(-1, order)
    return torch.where(value == 0, -1, index.gather(-1, order)), value


def _launch(
    problem: Problem, tile: tiling.Tile, span: int, first_feature: int, feature_tiles: int, top: int,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    x, g, W = problem.x, problem.g, problem.W_enc_t
    per_span = triton.cdiv(span, tile.tokens)
    token_tiles = per_span * (x.shape[0] * x.shape[1] // span)
    unused = problem.bias  # a pointer for arguments that the compiled variant does not read

    def given(tensor: Tensor | None) -> Tensor:
        return unused if tensor is None else tensor

    with on(x):
        _dense[(token_tiles * feature_tiles,)](
            x, given(g), given(problem.start), given(problem.order), W, problem.W_dec, problem.bias,
            given(problem.theta), given(problem.gate_scale), given(problem.mag_bias), given(problem.permutation),
            *outputs,
            x.shape[1], x.shape[2], len(W), problem.rows, *x.stride(), *((0, 0, 1) if g is None else g.stride()),
            span, per_span, token_tiles, feature_tiles, first_feature, top,
            ACTIVATION=problem.kind, GRADIENT=g is not None, GROUPED=problem.start is not None,
            SHUFFLED=problem.permutation is not None, TOP=top > 0,
            FUSED=_fused(problem, tile), EVEN_C=x.shape[2] % tile.width == 0,
            PRECISION=tiling.precision(x.dtype), INTERPRET=INTERPRETED,
            BLOCK_T=tile.tokens, BLOCK_F=tile.features, BLOCK_C=tile.width, GROUP=tiling.GROUP,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
