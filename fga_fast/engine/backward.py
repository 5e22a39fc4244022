"""The one call of autograd behind an explanation, for one target per image or K targets together.

Relevance, scores and gates leave as gradients of dummy tensors (taps.py). So K targets are K rows of gradients of the
same graph: one backward pass over [K, B, ...] (`is_grads_batched`), in chunks that limit the memory.

Gradients that are tiny in a float32 model underflow in a float16 model. So for float16 we multiply each row of the
explained values by its own power of two, the loss scale: chosen from the gradient at the last residual stream, and
lowered if the row overflows. Relevance is not linear in the gradient, so the gate ports carry the inverse of the scale.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_LARGEST = 2.0**14  # first try of a loss scale: the largest power of two with room to spare in float16
_AIM = 2.0**4  # target for the largest gradient at the last residual stream; leaves a factor of 2^11 for growth
_TRIES = 4


@dataclass
class Graph:
    """The ends of a recorded forward pass: the outputs and seeds of the backward pass, and the inputs it stops at."""

    end: Tensor | None  # [B, N] last carrier, or [B, 1] after an attention pool; None without a rollout
    seed: Tensor | None  # like `end`: the row of relevance that enters there
    inputs: list[Tensor]  # dummies whose gradients are wanted, each [B, ...]
    ports: list[Tensor]  # [B, N], gate ports of attentions without an SAE
    scales: list[Tensor] = field(default_factory=list)  # [B], ports for the inverse loss scale, one for each stream tap
    last: Tensor | None = None  # [B, N, C] last residual stream; None: no loss scale
    tokens_first: bool = False  # `last` is [N, B, C]
    pool: Tensor | None = None  # [B, N], the port, one of `ports`, of an attention between `last` and the values


def differentiate(graph: Graph, values: Tensor, chunk: int) -> list[Tensor]:  # values [B] or [B, K]
    """Gradients for `graph.inputs`, each [B, ...], or [B, K, ...] for K values per image, `chunk` values at a time."""
    if values.dim() == 1:
        return _pass(graph, values, torch.ones_like(values), retain=False)
    count = values.shape[1]
    parts: list[list[Tensor]] = []
    for first in range(0, count, chunk):
        chosen = torch.arange(first, min(first + chunk, count), device=values.device)
        ones = torch.zeros(len(chosen), *values.shape, dtype=values.dtype, device=values.device)
        ones[torch.arange(len(chosen), device=values.device), :, chosen] = 1
        parts.append(_pass(graph, values, ones, retain=first + chunk < count))
    return [torch.cat(found).movedim(0, 1) for found in zip(*parts, strict=True)]


def _pass(graph: Graph, values: Tensor, ones: Tensor, retain: bool) -> list[Tensor]:
    """One backward pass; `ones` is [B], or [K, B, K'] for K of the K' values."""
    if graph.last is None:
        return _gradients(graph, values, ones, None, retain)
    scale = _choose_scale(graph, graph.last, values, ones)  # [B] or [K, B]
    for last_try in (*[False] * (_TRIES - 1), True):
        found = _gradients(graph, values, ones, scale, retain=retain or not last_try)
        overflown = torch.stack([~torch.isfinite(f).flatten(scale.dim()).all(-1) for f in found]).any(0)
        if not bool(overflown.any()):
            break
        scale = torch.where(overflown, scale / 2**6, scale)
    return found


def _gradients(graph: Graph, values: Tensor, ones: Tensor, scale: Tensor | None, retain: bool) -> list[Tensor]:
    batched = values.dim() == 2
    leading = ones.shape[:1] if batched else ()
    outputs, seeds = [values], [ones if scale is None else _scaled(ones, scale)]
    if graph.end is not None and graph.seed is not None:
        outputs.append(graph.end)
        seeds.append(graph.seed.expand(*leading, *graph.seed.shape))
    for port in graph.ports:
        inverse = port.new_ones(1) if scale is None else (1 / scale).to(port.dtype).unsqueeze(-1)
        outputs.append(port)
        seeds.append(inverse.expand(*leading, *port.shape))
    if scale is not None:
        outputs += graph.scales
        seeds += [(1 / scale).to(port.dtype) for port in graph.scales]
    return _grad(outputs, graph.inputs, seeds, batched, retain)


def _grad(
    outputs: list[Tensor], inputs: list[Tensor], seeds: list[Tensor], batched: bool, retain: bool
) -> list[Tensor]:
    """`torch.autograd.grad`; `batched`: with K seeds for each output. It takes the seeds one by one if the model cannot
    be batched, because its hooks or autograd functions look at values.
    """
    if not batched:
        return list(torch.autograd.grad(outputs, inputs, seeds, retain_graph=retain))
    try:
        # Keep the graph for the fallback below; it is freed with the last reference to it.
        return list(torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, is_grads_batched=True))
    except RuntimeError as error:
        if "vmap" not in str(error) and "atching rule" not in str(error):
            raise
        logger.warning("targets are differentiated one by one, because the model's gradients do not batch: %s", error)
    rows = [
        torch.autograd.grad(outputs, inputs, [seed[k] for seed in seeds], retain_graph=True)
        for k in range(len(seeds[0]))
    ]
    return [torch.stack(found) for found in zip(*rows, strict=True)]


def _scaled(ones: Tensor, scale: Tensor) -> Tensor:
    wide = scale if ones.dim() == 1 else scale.unsqueeze(-1)
    return (ones.to(wide.dtype) * wide).to(ones.dtype)


def _choose_scale(graph: Graph, last: Tensor, values: Tensor, ones: Tensor) -> Tensor:
    """Loss scale of each row, [B] or [K, B]: a power of two that brings the gradient at `last` to about `_AIM`."""
    rows = ones.shape[:1] if values.dim() == 1 else ones.shape[:2]
    scale = torch.full(rows, _LARGEST, dtype=torch.float32, device=values.device)
    for _ in range(_TRIES):
        outputs, seeds = [values], [_scaled(ones, scale)]
        if graph.pool is not None:
            outputs.append(graph.pool)
            seeds.append(torch.ones_like(graph.pool).expand(*rows[:-1], *graph.pool.shape))
        (g,) = _grad(outputs, [last], seeds, values.dim() == 2, retain=True)
        largest = g.float().abs().amax((-1, -3 if graph.tokens_first else -2))
        if bool(torch.isfinite(largest).all()):
            break
        scale = torch.where(torch.isfinite(largest), scale, scale / 2**6)
    factor = torch.where(largest > 0, _AIM / largest.clamp_min(1e-30), torch.ones_like(largest))
    # At most `_LARGEST`, because the scaled seed itself must fit into the dtype of the values.
    return (scale * 2.0 ** factor.log2().floor()).clamp(2.0**-14, _LARGEST)
