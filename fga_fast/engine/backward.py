"""The one call of autograd behind an explanation, for one target per image or K targets together.

Relevance, scores and gates leave as gradients of dummy tensors (taps.py). So K targets are K rows of gradients of the
same graph: one backward pass over [K, B, ...] (`is_grads_batched`), in chunks that limit the memory.

Gradients that are tiny in a float32 model underflow in a float16 model. So for float16 we multiply each row of the
explained values by its own power of two, the loss scale: chosen from the gradient at the last residual stream, and
lowered if the row overflows. Relevance is not linear in the gradient, so the gate ports carry the inverse of the scale.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fga_fast.engine.starts import start_rows
from fga_fast.models.block_io import ForwardPass
from fga_fast.models.head import arriving, laid_out, read_as_laid_out, unevenly
from fga_fast.models.reads import Reads

logger = logging.getLogger(__name__)

_LARGEST = 2.0**14  # first try of a loss scale: the largest power of two with room to spare in float16
_AIM = 2.0**4  # target for the largest gradient at the last residual stream; leaves a factor of 2^11 for growth
_TRIES = 4


@dataclass
class Graph:
    """The ends of a recorded forward pass: the outputs and seeds of the backward pass, and the inputs it stops at."""

    passed: ForwardPass
    reads: Reads
    inputs: list[Tensor]  # dummies whose gradients are wanted, each [B, ...]
    # Block -> [B, N], through which a row of relevance enters its attention; None: [B, 1], the attention pool's. Those
    # that the rollout reaches; none without a rollout.
    carried: dict[int | None, Tensor]
    ports: dict[int | None, Tensor]  # likewise [B, N], gate ports of attentions without an SAE
    scales: list[Tensor]  # [B], ports for the inverse loss scale, one for each stream tap
    half: bool  # something computes in float16, so gradients need a loss scale
    as_laid_out: bool  # start where the layout says, or found to do so
    look_at_values: bool
    uneven: tuple[str, ...] = ()  # a notice, if the head weighs tokens unevenly

    def starts(self, arrived: dict[int, Tensor], rows: tuple[int, ...]) -> dict[int, Tensor]:  # rows: (), or (K,)
        """Block -> [..., B, N], the rows that enter after blocks."""
        if not self.carried or self.reads.pool:
            return {}
        layout, usual = self.passed.layout, self.as_laid_out or not arrived
        if self.look_at_values and not usual:
            usual = read_as_laid_out(arrived, layout)
            if not usual or layout.pooled[1] - layout.pooled[0] > 1:
                self.uneven = self.uneven or unevenly(self.passed, arrived)
        if usual:
            row = laid_out(self.carried[max(block for block in self.carried if block is not None)], layout)
            return {self.reads.blocks[-1]: row.expand(*rows, *row.shape)}
        return start_rows(arrived, layout)

    @property
    def looks(self) -> bool:
        """Whether the gradients tell where the rollout starts."""
        return bool(self.carried) and not self.reads.pool and not self.as_laid_out


def differentiate(graph: Graph, values: Tensor, chunk: int) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Differentiates the explained values, [B] or [B, K], `chunk` of the K at a time.

    Returns:
        Gradients of `graph.inputs`, each [B, ...] or [B, K, ...], zeros where the values do not depend on one; and the
        rows that started the rollout, block -> [B, N] or [B, K, N].
    """
    if values.dim() == 1:
        return _pass(graph, values, torch.ones_like(values), retain=False)
    count = values.shape[1]
    parts: list[list[Tensor]] = []
    rows: list[dict[int, Tensor]] = []
    for first in range(0, count, chunk):
        chosen = torch.arange(first, min(first + chunk, count), device=values.device)
        ones = torch.zeros(len(chosen), *values.shape, dtype=values.dtype, device=values.device)
        ones[torch.arange(len(chosen), device=values.device), :, chosen] = 1
        found, starts = _pass(graph, values, ones, retain=first + chunk < count)
        parts.append(found)
        rows.append(starts)
    together = {block: torch.cat([starts[block] for starts in rows]).movedim(0, 1) for block in rows[0]}
    return [torch.cat(found).movedim(0, 1) for found in zip(*parts, strict=True)], together


def _pass(graph: Graph, values: Tensor, ones: Tensor, retain: bool) -> tuple[list[Tensor], dict[int, Tensor]]:
    """One backward pass; `ones` is [B], or [K, B, K'] for K of the K' values."""
    scale = _choose_scale(graph, values, ones) if graph.half else None  # [B] or [K, B]
    starts = graph.starts(_arrived(graph, values, ones, scale) if graph.looks else {}, ones.shape[: values.dim() - 1])
    if scale is None:
        return _gradients(graph, values, ones, None, starts, retain), starts
    for last_try in (*[False] * (_TRIES - 1), True):
        found = _gradients(graph, values, ones, scale, starts, retain=retain or not last_try)
        overflown = torch.stack([~torch.isfinite(f).flatten(scale.dim()).all(-1) for f in found]).any(0)
        if not bool(overflown.any()):
            break
        scale = torch.where(overflown, scale / 2**6, scale)
    return found, starts


def _arrived(graph: Graph, values: Tensor, ones: Tensor, scale: Tensor | None) -> dict[int, Tensor]:
    """Block -> [..., B, N, C], the gradients that enter at outputs of blocks; a backward pass through the head."""
    outputs, seeds = [values], [ones if scale is None else _scaled(ones, scale)]
    if len(graph.reads.blocks) > 1:  # autograd runs the blocks between, with zeros, and attention wants a gate
        outputs += graph.ports.values()
        leading = ones.shape[: values.dim() - 1]
        seeds += [torch.ones_like(port).expand(*leading, *port.shape) for port in graph.ports.values()]
    return arriving(
        graph.passed, graph.reads.blocks,
        lambda edges: _grad(outputs, edges, seeds, values.dim() == 2, retain=True),
    )  # fmt: skip


def _gradients(
    graph: Graph, values: Tensor, ones: Tensor, scale: Tensor | None, starts: dict[int, Tensor], retain: bool
) -> list[Tensor]:
    batched = values.dim() == 2
    leading = ones.shape[:1] if batched else ()
    outputs, seeds = [values], [ones if scale is None else _scaled(ones, scale)]
    for block, carried in graph.carried.items():
        entering = [row for start, row in starts.items() if block is not None and start >= block]
        if block is None:
            entering = [torch.ones_like(carried)]
        if entering:
            outputs.append(carried)
            seeds.append(sum(entering[1:], entering[0]).expand(*leading, *carried.shape))
    for port in graph.ports.values():
        inverse = port.new_ones(1) if scale is None else (1 / scale).to(port.dtype).unsqueeze(-1)
        outputs.append(port)
        seeds.append(inverse.expand(*leading, *port.shape))
    if scale is not None:
        outputs += graph.scales
        seeds += [(1 / scale).to(port.dtype) for port in graph.scales]
    found = _grad(outputs, graph.inputs, seeds, batched, retain)
    return [
        torch.zeros_like(to).expand(*leading, *to.shape) if g is None else g
        for to, g in zip(graph.inputs, found, strict=True)
    ]


def _grad(
    outputs: list[Tensor],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    seeds: list[Tensor],
    batched: bool,
    retain: bool,
) -> list[Tensor | None]:
    """`torch.autograd.grad`; `batched`: with K seeds for each output. It takes the seeds one by one if the model cannot
    be batched, because its hooks or autograd functions look at values.
    """
    if not batched:
        return list(torch.autograd.grad(outputs, inputs, seeds, retain_graph=retain, allow_unused=True))
    try:
        # Keep the graph for the fallback below; it is freed with the last reference to it.
        return list(
            torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, is_grads_batched=True, allow_unused=True)
        )
    except RuntimeError as error:
        if "vmap" not in str(error) and "atching rule" not in str(error):
            raise
        logger.warning("targets are differentiated one by one, because the model's gradients do not batch: %s", error)
    rows = [
        torch.autograd.grad(outputs, inputs, [seed[k] for seed in seeds], retain_graph=True, allow_unused=True)
        for k in range(len(seeds[0]))
    ]
    return [None if found[0] is None else torch.stack(found) for found in zip(*rows, strict=True)]


def _scaled(ones: Tensor, scale: Tensor) -> Tensor:
    wide = scale if ones.dim() == 1 else scale.unsqueeze(-1)
    return (ones.to(wide.dtype) * wide).to(ones.dtype)


def _choose_scale(graph: Graph, values: Tensor, ones: Tensor) -> Tensor:
    """Loss scale of each row, [B] or [K, B]: a power of two that brings the gradient at the last residual stream that
    is read to about `_AIM`.
    """
    passed, reads = graph.passed, graph.reads
    edge = passed.streams[reads.deepest]
    rows = ones.shape[:1] if values.dim() == 1 else ones.shape[:2]
    scale = torch.full(rows, _LARGEST, dtype=torch.float32, device=values.device)
    for _ in range(_TRIES):
        outputs, seeds = [values], [_scaled(ones, scale)]
        if None in graph.ports:
            port = graph.ports[None]
            outputs.append(port)
            seeds.append(torch.ones_like(port).expand(*rows[:-1], *port.shape))
        (g,) = _grad(outputs, [edge], seeds, values.dim() == 2, retain=True)
        if g is None:
            return torch.ones_like(scale)
        largest = g.float().abs().amax((-1, -3 if passed.layout.tokens_first else -2))
        if bool(torch.isfinite(largest).all()):
            break
        scale = torch.where(torch.isfinite(largest), scale, scale / 2**6)
    factor = torch.where(largest > 0, _AIM / largest.clamp_min(1e-30), torch.ones_like(largest))
    # At most `_LARGEST`, because the scaled seed itself must fit into the dtype of the values.
    return (scale * 2.0 ** factor.log2().floor()).clamp(2.0**-14, _LARGEST)
