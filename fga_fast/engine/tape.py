"""Taps a model's attention and residual streams for one call, and leaves the model as it came.

While a `Tape` is attached it sees every function that the model calls. Attention inside a block, however it is written
(scaled_dot_product_attention, nn.MultiheadAttention, or a softmax of the model's own), is answered by a tapped one that
also passes the relevance carrier on; the output of each block with an SAE goes through a tap that in the backward pass
turns the residual stream x_l and its gradient g_l into that block's gate. One `torch.autograd.grad` from (value,
carrier) to the first carrier is then the whole explanation (backward.py).

Nothing is written to the model but forward hooks on its blocks, which are removed at the end and do nothing in other
threads; parameters are used detached, so no weight gradient is computed and no `requires_grad` is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fga_fast import composite, ops
from fga_fast.engine.backward import Graph, differentiate
from fga_fast.engine.conservative import Conservative
from fga_fast.engine.function_mode import FunctionMode
from fga_fast.engine.records import Contribution
from fga_fast.engine.taps import Record, linear_of_few_rows, tap_map, tap_stream
from fga_fast.engine.torch_functions import Function
from fga_fast.models import head
from fga_fast.models.block_io import Arguments, ForwardPass, replace_input
from fga_fast.models.layout import ModelLayout
from fga_fast.models.maps import check_maps, check_paths
from fga_fast.models.reads import Reads, find_reads
from fga_fast.precision import relevance_dtype
from fga_fast.sae.hold import Hold
from fga_fast.settings import Settings

Attention = Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor]]  # see `ops.attention`


class Found(NamedTuple):
    """What a backward pass brought; [B, ...] is [B, K, ...] for K targets an image."""

    rows: dict[int, Tensor]  # block -> [B, N], what the tokens that enter it send on, without the starts
    starts: dict[int, Tensor]  # block -> [B, N], the row that entered after it; empty for an attention pool
    recorded: dict[int, tuple[Tensor, ...]]  # block -> what its record's slots brought
    reads: Reads
    as_laid_out: bool  # the starts are what the layout says
    patches_start: bool  # some of the starts are at patches


class Tape(FunctionMode):
    """Records one forward pass of a model and hands out what its backward pass brings.

    Args:
        layout: where the model's blocks are and which tokens it pools.
        records: for each block with an SAE, what turns (x_l, g_l) into gates.
        attention: the backend's tapped attention.
        settings: method, backward pass, sign, start_block and per_block.
        held: block -> SAE features that are held in the stream after it.

    Use:
        with tape.attached(images): values = ... model(images) ...
        found = tape.backward(values)
    """

    def __init__(
        self, layout: ModelLayout, records: Mapping[int, Record], attention: Attention = ops.attention,
        settings: Settings | None = None, held: Mapping[int, Hold] | None = None,
    ) -> None:  # fmt: skip
        self._settings = Settings() if settings is None else settings
        # attached() says of how many images
        super().__init__(ForwardPass(layout, 0, self._settings.start_block, {} if held is None else held))
        self._layout, self._records, self._attention = layout, records, attention
        self._rollout = self._settings.method == "rollout"
        self._conservative = Conservative(self.passed) if self._settings.backward == "conservative" else None
        if self._conservative is not None:
            self.handlers |= self._conservative.handlers()
        self._ports: dict[int | None, Tensor] = {}  # block, or None for the pooling head -> [B, N]
        self._carried: dict[int | None, Tensor] = {}  # likewise -> [B, Nq], through which a row enters its attention
        self._carrier: Tensor  # [B, N], the sum of all `_carried`; attached() makes the first
        self._rows: dict[int, Tensor] = {}  # block -> [B, N] dummy whose gradient is the relevance that enters it
        self._slots: dict[int, tuple[Tensor, ...]] = {}
        self._scales: list[Tensor] = []  # [B], one for every tap on a residual stream
        self._half = False  # something computes in float16, whose gradients need a loss scale

    @contextmanager
    def attached(self, images: Tensor) -> Iterator[Tape]:
        """Taps the model for calls made in this thread; whatever happens inside, the model is left as it came."""
        self._half = images.dtype == torch.float16
        self.passed.images = len(images)
        self._carrier = images.new_zeros(
            len(images), self._layout.tokens, dtype=relevance_dtype(images.dtype), requires_grad=True
        )
        with self.following():
            yield self

    def backward(
        self, values: Tensor, chunk: int = 8, *, as_laid_out: bool = False, look_at_values: bool = True,
        first: bool = False,
    ) -> Found:  # fmt: skip
        """Differentiates the explained values, to be called after `attached`.

        Args:
            values: [B] or [B, K], one or K explained scalars an image.
            chunk: how many of the K are differentiated together; bounds the memory.
            as_laid_out: start where the layout says, without a look at the gradients; for graphs.
            look_at_values: False while a graph is traced.
            first: also check that blocks, maps and images are read as the method supposes, see `models/maps.py`.

        Raises:
            TapeError: the forward pass was not one that can be explained.
        """
        passed = self.passed
        reads = find_reads(passed, values, self._settings.method, self._records)
        if first:
            head.check_images_apart(passed, reads, values, [*self._ports.values()])
            if self._settings.method != "input_x_gradient":
                check_paths(passed)
            if self._rollout:
                check_maps(passed, values)
        deepest = reads.deepest
        rows = {block: row for block, row in self._rows.items() if block >= passed.first}
        slots = {block: found for block, found in self._slots.items() if block <= deepest}
        ports = {b: port for b, port in self._ports.items() if b not in self._records and (b is None or b <= deepest)}
        carried = {b: end for b, end in self._carried.items() if b is None or passed.first <= b <= deepest}
        graph = Graph(
            passed, reads, [*rows.values(), *(slot for found in slots.values() for slot in found)],
            carried if self._rollout else {}, ports if self._rollout else {}, self._scales, self._half, as_laid_out,
            look_at_values,
        )  # fmt: skip
        given, starts = differentiate(graph, values, chunk)
        found = iter(given)
        other = head.differently(starts, self._layout) if look_at_values else ()
        return Found(
            {block: next(found) for block in rows}, starts,
            {block: tuple(next(found) for _ in slots[block]) for block in slots} | self._unread(values, deepest),
            reads._replace(notices=(*reads.notices, *other, *graph.uneven)),
            as_laid_out or (not other and (reads.pool or reads.blocks == (len(self._layout.blocks) - 1,))),
            self._at_patches(starts, as_laid_out, look_at_values),
        )  # fmt: skip

    def _at_patches(self, starts: dict[int, Tensor], as_laid_out: bool, look_at_values: bool) -> bool:
        """Whether the rollout starts at patches, so that their relevance holds a constant."""
        prefix = self._layout.prefix_tokens
        if not starts or as_laid_out:
            return bool(starts) and self._layout.pooled[1] > prefix
        return not look_at_values or any(bool(row[..., prefix:].any()) for row in starts.values())

    def _unread(self, values: Tensor, deepest: int) -> dict[int, tuple[Tensor, ...]]:
        """What records of blocks that the values do not read bring: no score, so a gate of 1."""
        found = {}
        for block in self._slots.keys() & set(range(deepest + 1, len(self._layout.blocks))):
            scores, gates, *others = (
                torch.zeros_like(slot).expand(*values.shape[1:], *slot.shape) for slot in self._slots[block]
            )
            parts = (scores, torch.ones_like(gates), *others)
            found[block] = tuple(part.movedim(0, 1) if values.dim() == 2 else part for part in parts)
        return found

    # -- what the mode sees ------------------------------------------------------------------------------------

    def tap_linear(self, function: Function, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """In the last block of a model that pools one token, a product that skips the other tokens on the way back."""
        last = self._layout.pooling == "token" and self.passed.block == len(self._layout.blocks) - 1
        if last and not kwargs.keys() - {"input", "weight", "bias"}:
            return linear_of_few_rows(*args, **kwargs)
        return super().tap_linear(function, *args, **kwargs)

    def tap_attention(
        self, function: Function,
        query: Tensor, key: Tensor, value: Tensor,  # [B, H, Nq, D], [B, H, N, D], [B, H, N, Dv]
        mask: Tensor | None, scale: float | None,
    ) -> Tensor:  # fmt: skip
        if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
            low = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(low), key.to(low), value.to(low)
        self._half |= query.dtype == torch.float16
        if not self._rollout and self._conservative is None:
            given = {} if mask is None else {"attn_mask": mask.to(query.dtype)}
            plain: Tensor = function(query, key, value, scale=scale, **given)
            return plain
        # Kernels take one head width and relevance in the attention's own precision, which may not be the model's.
        attention = self._attention if value.shape[-1] == query.shape[-1] else composite.attention
        carrier = self._carrier_in()
        out, _, carried, port = attention(
            query, key, value, carrier.to(relevance_dtype(query.dtype)),
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            **({} if mask is None else {"bias": mask}),
            gated=self._rollout, signed=self._settings.signed, constant_map=self._conservative is not None,
        )  # fmt: skip
        self._carry(carried.to(carrier.dtype), port.to(carrier.dtype))
        return out

    def tap_map(self, maps: Tensor, logits: Tensor) -> Tensor:  # [B, H, Nq, N]
        self._half |= logits.dtype == torch.float16
        if not self._rollout and self._conservative is None:
            return maps
        tapped, carried, port = tap_map(
            maps, self._carrier_in(), gated=self._rollout, signed=self._settings.signed,
            constant_map=self._conservative is not None,
        )  # fmt: skip
        self._carry(carried, port)
        return tapped

    # -- the carrier of relevance ------------------------------------------------------------------------------

    def _carrier_in(self) -> Tensor:
        """The carrier for the attention that runs now; the pooling head sees the pooled tokens only."""
        if self.passed.block is None:
            first, last = self._layout.pooled
            return self._carrier[:, first:last]
        return self._carrier

    def _carry(self, carried: Tensor, port: Tensor) -> None:  # [B, Nq] and [B, N], of the attention that runs now
        """Adds what an attention passes on to the carrier, since the block adds its attention to its input.

        The row that starts the rollout never enters the carrier, where small relevance would drown in it. It enters
        every attention through `carried` (backward.py).
        """
        block = self.passed.block
        self._carried[block], self._ports[block] = carried, port
        if block is not None:
            self._carrier = self._carrier + carried
            if self._carrier.grad_fn is not None:
                self.passed.carriers.add(self._carrier.grad_fn)

    # -- what the hooks see ------------------------------------------------------------------------------------

    def tap_input(self, index: int, arguments: Arguments) -> Arguments | None:
        """Puts the block's tokens through a tap that takes x . g."""
        if self._rollout:
            self._rows[index] = self._carrier
            return None
        if self._rows and not self._settings.at_every_block and index != self.passed.cuts[-1]:
            return None  # only the first block's are wanted
        tokens = self.passed.stream
        x, replaced = replace_input(arguments, tokens, self._layout, self.passed.images, self.passed.where)
        out, (self._rows[index],) = self._tapped(x, None, Contribution())
        return replaced(out)

    def tap_output(self, index: int, x: Tensor) -> Tensor | None:
        """Puts the tokens that leave a block with an SAE through a tap that scores and gates them."""
        if self._conservative is not None:
            self._conservative.forget()
        if index not in self._records:
            return None
        port = self._ports.get(index) if self._rollout else None
        out, self._slots[index] = self._tapped(x, port, self._records[index])
        return out

    def _tapped(self, x: Tensor, port: Tensor | None, record: Record) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The residual stream with a tap on it, and the slots that carry out what `record` brings."""
        slots = tuple(slot.requires_grad_() for slot in record.slots(self._carrier.detach()))
        out, scale = tap_stream(x, port, record, slots, self._layout.tokens_first)
        self._scales.append(scale)
        return out, slots
