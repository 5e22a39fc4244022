"""Sparse route of the score: encode, choose the active features of a token, gather their decoder rows. Has never run on
a device.

For top-k codes, and for codes of which few are active (`tiling.route`). Three kernels, over as many tokens at a time
as the workspace holds:
  _encode   pre-activations [T, F] float32, and for long dictionaries the largest of each group of features
  _select   the k largest of a token exactly, equal ones by the lowest feature, in the order of features: a threshold is
            found bit by bit in registers. Of a long dictionary first the k groups with the largest maxima are chosen,
            equal ones by the lowest group: whatever lies outside these has k features before it.
  _compact  instead of _select where no k is given: the active features of a token, in order
  _gather   y = sum_k f_k D_k once a token, then y . g for each of its targets
Costs: `tiling.encode_cost`, `tiling.gather_cost`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiling
from .device import INTERPRETED, activate, capability, device_name, lanewise, on, ordered, product, tiles_of
from .score_dense import Problem, strongest


@triton.jit(do_not_specialize=["P", "first_token", "tokens", "token_tiles", "feature_tiles", "group_count"])
def _encode(
    x, encoder, bias, theta, scale, mag_bias, codes, maxima,
    P, C, F, x_image, x_patch, x_column, first_token, tokens, token_tiles, feature_tiles, group_count,
    ACTIVATION: tl.constexpr, GROUP_SIZE: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Codes of a tile of tokens from `first_token` on, and with GROUP_SIZE the largest of each group of features."""
    token_tile, feature_tile = tiles_of(tl.program_id(0), token_tiles, feature_tiles, GROUP)
    t = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    token = first_token + tl.minimum(t, tokens - 1)
    feature = feature_tile * BLOCK_F + tl.arange(0, BLOCK_F)
    known = tl.minimum(feature, F - 1)
    x += (token // P).to(tl.int64) * x_image + (token % P).to(tl.int64) * x_patch
    pre = product(x, encoder + known.to(tl.int64) * C, C, x_column,
                  BLOCK_T, BLOCK_F, BLOCK_C, EVEN_C, PRECISION, INTERPRET)  # fmt: skip
    z = activate(pre, known, bias, theta, scale, mag_bias, ACTIVATION)
    row = t.to(tl.int64)
    tl.store(codes + row[:, None] * F + feature[None, :], z, mask=(t < tokens)[:, None] & (feature < F)[None, :])
    if GROUP_SIZE:
        # Columns beyond the dictionary repeat its last feature, whose group is the last that is kept.
        largest = tl.max(tl.reshape(z, (BLOCK_T, BLOCK_F // GROUP_SIZE, GROUP_SIZE)), axis=2)
        column = feature_tile * (BLOCK_F // GROUP_SIZE) + tl.arange(0, BLOCK_F // GROUP_SIZE)
        mask = (t < tokens)[:, None] & (column < group_count)[None, :]
        tl.store(maxima + row[:, None] * group_count + column[None, :], largest, mask=mask)


@triton.jit(do_not_specialize=["k", "candidates"])
def _select(
    values,  # [T, F]
    groups,  # [T, k] groups of features to choose from; not read without GROUP_SIZE
    kept_value, kept_index, F, k, candidates,
    GROUP_SIZE: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The k largest of one token, in the order of features; at least k of the candidates are features."""
    token = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, BLOCK)
    column = candidate
    inside = candidate < candidates
    if GROUP_SIZE:
        column = tl.load(groups + token * k + candidate // GROUP_SIZE, mask=inside, other=0) * GROUP_SIZE
        column += candidate % GROUP_SIZE
        inside = inside & (column < F)
    value = tl.load(values + token * F + column, mask=inside, other=0.0)
    key = tl.where(inside, ordered(value), 0)
    least = tl.full((), 0, tl.uint32)  # the k-th largest key: the largest that k keys reach
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        reach = tl.sum((key >= (least | bit)).to(tl.int32), axis=0)
        least = tl.where(reach >= k, least | bit, least)
        bit = bit >> 1
    above = key > least
    equal = inside & (key == least)
    room = k - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= room))
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    if RELU:
        value = tl.where(value <= 0, 0.0, value)
    tl.store(kept_value + token * k + place, value, mask=chosen)
    tl.store(kept_index + token * k + place, column, mask=chosen)


@triton.jit
def _compact(codes, index, count, F, BLOCK: tl.constexpr):
    """The active features of one token, in order, and how many they are. NaN is active."""
    token = tl.program_id(0).to(tl.int64)
    found = 0
    for first in range(0, F, BLOCK):
        feature = first + tl.arange(0, BLOCK)
        code = tl.load(codes + token * F + feature, mask=feature < F, other=0.0)
        active = (code != 0).to(tl.int32)
        place = found + tl.cumsum(active, axis=0) - 1
        tl.store(index + token * F + place, feature, mask=active != 0)
        found += tl.sum(active, axis=0)
    tl.store(count + token, found)


@triton.jit
def _some_rows(
    codes, index, counted, decoder, permutation, first, C, column,
    COMPACTED: tl.constexpr, SHUFFLED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes [K] and decoder rows [K, C] of a token's next active features. Features of code 0 are not read."""
    place = first + tl.arange(0, BLOCK_K)
    feature = tl.load(index + place, mask=place < counted, other=0)
    at = place
    if COMPACTED:
        at = feature
    code = tl.load(codes + at, mask=place < counted, other=0.0)
    row = feature.to(tl.int64)
    if SHUFFLED:
        row = tl.load(permutation + feature)
    mask = (code != 0)[:, None] & (column < C)[None, :]
    return code, tl.load(decoder + row[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["P", "kept", "first_token"])
def _gather(
    codes, index, count, g, start, order, decoder, permutation, scores, contributions,
    P, C, kept, g_row, g_patch, first_token,
    COMPACTED: tl.constexpr, GROUPED: tl.constexpr, SHUFFLED: tl.constexpr, TOP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Scores of one token for all its targets; with TOP also the contribution of each of its features.

    `kept` is k, the length of the lists; COMPACTED lists have that stride, their own counts, and codes that are dense.
    """
    listed = tl.program_id(0).to(tl.int64)
    b = (first_token + listed) // P
    p = (first_token + listed) % P
    codes += listed * kept
    index += listed * kept
    column = tl.arange(0, BLOCK_C)
    counted = kept
    if COMPACTED:
        counted = tl.load(count + listed)
    begin = b
    targets = b * 0 + 1
    if GROUPED:
        begin = tl.load(start + b)
        targets = tl.load(start + b + 1) - begin
    y = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    if not TOP:
        for first in range(0, counted, BLOCK_K):
            code, rows = _some_rows(codes, index, counted, decoder, permutation, first, C, column,
                                    COMPACTED, SHUFFLED, BLOCK_K)  # fmt: skip
            y += code[:, None] * rows
    for j in range(targets):
        m = begin
        if GROUPED:
            m = tl.load(order + begin + j)
        gradient = tl.load(g + m * g_row + p * g_patch + column, mask=column < C, other=0.0).to(tl.float32)
        if TOP:
            total = tl.zeros((BLOCK_K,), dtype=tl.float32)
            for first in range(0, counted, BLOCK_K):
                code, rows = _some_rows(codes, index, counted, decoder, permutation, first, C, column,
                                        COMPACTED, SHUFFLED, BLOCK_K)  # fmt: skip
                each = code * tl.sum(rows * gradient[None, :], axis=1)
                place = first + tl.arange(0, BLOCK_K)
                tl.store(contributions + (m * P + p) * kept + place, each, mask=place < counted)
                total += each
            tl.store(scores + m * P + p, tl.sum(total, axis=0))
        else:
            tl.store(scores + m * P + p, tl.sum(tl.sum(y, axis=0) * gradient, axis=0))


def sparse(problem: Problem, k: int, signed: bool, top: int) -> tuple[Tensor, ...]:
    """As `dense`: with k the k largest pre-activations of a token, any sign if `signed`; without k all active ones."""
    x, rows = problem.x, problem.rows
    images, patches, _ = x.shape
    features, tokens = len(problem.W_enc_t), images * patches
    tile = tiling.tile("encode", x.dtype, capability(x), x.shape[2], device_name(x))
    group = tiling.group_size(features, k) if k else 0
    step = tiling.tokens_a_launch(tile, features, group, tokens)
    scores = x.new_empty((rows, patches), dtype=torch.float32)
    contributions = x.new_empty((rows, patches, k if top else 0), dtype=torch.float32)
    kept = x.new_empty((tokens, k), dtype=torch.float32)
    index = x.new_empty((tokens, k), dtype=torch.int32)
    read = problem._replace(x=lanewise(x))
    for first in range(0, tokens, step):
        codes, maxima = _launch_encode(read, tile, group, first, min(step, tokens - first))
        if k:
            part = slice(first, first + step)
            kept[part], index[part] = select(codes, maxima, group, k, not signed)
        else:
            active = torch.empty_like(codes, dtype=torch.int32)
            count = active.new_empty(len(codes))
            with on(x):
                _compact[(len(codes),)](codes, active, count, features, BLOCK=2048, num_warps=8)
            _launch_gather(problem, codes, active, count, first, scores, contributions)
    if k and problem.g is not None:
        _launch_gather(problem, kept, index, None, 0, scores, contributions)
    elif k:
        contributions = kept.view(images, patches, k)
        scores = contributions.sum(-1)
    return (scores, *_top(problem, index.view(images, patches, k), contributions, top)) if top else (scores,)


def _top(problem: Problem, index: Tensor, contributions: Tensor, top: int) -> tuple[Tensor, ...]:  # [., P, k]
    features, rows = len(problem.W_enc_t), problem.rows
    if problem.order is not None and problem.start is not None:
        # Rows in the order of their images, back to the order they came in.
        image = torch.empty_like(problem.order)
        place = torch.arange(rows, device=image.device)
        image[problem.order] = torch.searchsorted(problem.start, place, right=True) - 1
        index = index[image]
    totals = contributions.new_zeros(rows, features)
    row = torch.arange(rows, device=index.device).view(-1, 1, 1).expand(index.shape)
    # On a CUDA device this sorts the places and adds in that order: the same bits every time.
    totals.index_put_((row, index.long()), contributions, accumulate=True)
    every = torch.arange(features, device=index.device).expand(totals.shape)
    missing = max(0, top - index.shape[-1])
    index = torch.nn.functional.pad(index, (0, missing), value=-1).long()
    contributions = torch.nn.functional.pad(contributions, (0, missing))
    return (*strongest(index, contributions, top), *strongest(every, totals, top))


def select(codes: Tensor, maxima: Tensor, group: int, k: int, relu: bool) -> tuple[Tensor, Tensor]:  # [T, F], [T, G]
    """Values float32 and features int32 [T, k] of the k largest, in the order of features."""
    if group < 0:  # too many for the registers of a program
        index = codes.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values
        value = codes.gather(-1, index)
        return torch.relu(value) if relu else value, index.int()
    groups = codes
    if group:
        groups = _launch_select(maxima, maxima, k, 0, False)[1]
    return _launch_select(codes, groups, k, group, relu)


def _launch_select(values: Tensor, groups: Tensor, k: int, group: int, relu: bool) -> tuple[Tensor, Tensor]:
    kept = values.new_empty((len(values), k))
    index = torch.empty_like(kept, dtype=torch.int32)
    candidates = k * group if group else values.shape[1]
    block = triton.next_power_of_2(candidates)
    with on(values):
        _select[(len(values),)](
            values, groups, kept, index, values.shape[1], k, candidates, GROUP_SIZE=group, RELU=relu, BLOCK=block,
            num_warps=tiling.select_warps(block),
        )  # fmt: skip
    return kept, index


def _launch_encode(
    problem: Problem, tile: tiling.Tile, group: int, first: int, tokens: int
) -> tuple[Tensor, Tensor]:  # [T, F], [T, G]
    x, features = problem.x, len(problem.W_enc_t)
    groups = triton.cdiv(features, group) if group > 0 else 0
    codes = x.new_empty((tokens, features), dtype=torch.float32)
    maxima = x.new_empty((tokens, groups), dtype=torch.float32)
    token_tiles, feature_tiles = triton.cdiv(tokens, tile.tokens), triton.cdiv(features, tile.features)
    theta, scale, mag = (
        problem.bias if t is None else t for t in (problem.theta, problem.gate_scale, problem.mag_bias)
    )
    with on(x):
        _encode[(token_tiles * feature_tiles,)](
            x, problem.W_enc_t, problem.bias, theta, scale, mag, codes, maxima,
            x.shape[1], x.shape[2], features, *x.stride(), first, tokens, token_tiles, feature_tiles,
            groups, ACTIVATION=problem.kind, GROUP_SIZE=max(0, group), EVEN_C=x.shape[2] % tile.width == 0,
            PRECISION=tiling.precision(x.dtype), INTERPRET=INTERPRETED, BLOCK_T=tile.tokens, BLOCK_F=tile.features,
            BLOCK_C=tile.width, GROUP=tiling.GROUP, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return codes, maxima


def _launch_gather(
    problem: Problem, codes: Tensor, index: Tensor, count: Tensor | None, first: int, scores: Tensor,
    contributions: Tensor,
) -> None:  # fmt: skip
    x, g = problem.x, problem.g
    if g is None:
        raise ValueError("gather: needs gradients")
    start, order, permutation = (
        problem.bias if t is None else t for t in (problem.start, problem.order, problem.permutation)
    )
    block = triton.next_power_of_2(x.shape[2])
    with on(x):
        _gather[(len(codes),)](
            codes, index, index if count is None else count, g, start, order, problem.W_dec, permutation, scores,
            contributions, x.shape[1], x.shape[2], index.shape[1], g.stride(0), g.stride(1), first,
            COMPACTED=count is not None, GROUPED=problem.start is not None,
            SHUFFLED=problem.permutation is not None, TOP=contributions.shape[-1] > 0,
            BLOCK_K=tiling.gathered_rows(block), BLOCK_C=block, num_warps=tiling.gather_warps(block),
        )  # fmt: skip
