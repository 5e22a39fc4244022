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
import torch.nn.functional as F
from torch import Tensor

from fga_fast import composite, ops
from fga_fast.engine.backward import Graph, differentiate
from fga_fast.engine.conservative import Conservative
from fga_fast.engine.records import Contribution
from fga_fast.engine.taps import Record, linear_of_few_rows, tap_map, tap_stream
from fga_fast.engine.torch_functions import Function, FunctionMode
from fga_fast.models.block_io import Arguments, ForwardPass, replace_input
from fga_fast.models.layout import ModelLayout
from fga_fast.precision import relevance_dtype
from fga_fast.settings import Settings

Attention = Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor]]  # see `ops.attention`


class Found(NamedTuple):
    """What a backward pass brought; [B, ...] is [B, K, ...] for K targets an image."""

    rows: dict[int, Tensor]  # block -> [B, N], relevance of the tokens that enter it
    recorded: dict[int, tuple[Tensor, ...]]  # block -> what its record's slots brought


class Tape(FunctionMode):
    """Records one forward pass of a model and hands out what its backward pass brings.

    Args:
        layout: where the model's blocks are and which tokens it pools.
        records: for each block with an SAE, what turns (x_l, g_l) into gates.
        attention: the backend's tapped attention.
        settings: method, backward pass, sign, start_block and per_block.

    Use:
        with tape.attached(images): values = ... model(images) ...
        found = tape.backward(values)
    """

    def __init__(
        self, layout: ModelLayout, records: Mapping[int, Record], attention: Attention = ops.attention,
        settings: Settings | None = None,
    ) -> None:  # fmt: skip
        self._settings = Settings() if settings is None else settings
        super().__init__(ForwardPass(layout, 0, self._settings.start_block))  # attached() says of how many images
        self._layout, self._records, self._attention = layout, records, attention
        self._rollout = self._settings.method == "rollout"
        self._conservative = Conservative(self.passed) if self._settings.backward == "conservative" else None
        if self._conservative is not None:
            self.handlers |= self._conservative.handlers()
        self._ports: dict[int | None, Tensor] = {}  # block, or None for the pooling head -> [B, N]
        self._start: Tensor  # [B, N] first carrier; attached() sets both
        self._carrier: Tensor  # [B, N] carrier after the last attention seen
        self._rows: dict[int, Tensor] = {}  # block -> [B, N] dummy whose gradient is the relevance that enters it
        self._slots: dict[int, tuple[Tensor, ...]] = {}
        self._scales: list[Tensor] = []  # [B], one for every tap on a residual stream
        self._half = False  # something computes in float16, whose gradients need a loss scale

    @contextmanager
    def attached(self, images: Tensor) -> Iterator[Tape]:
        """Taps the model for calls made in this thread; whatever happens inside, the model is left as it came."""
        self._half = images.dtype == torch.float16
        self.passed.images = len(images)
        self._carrier = self._start = images.new_zeros(
            len(images), self._layout.tokens, dtype=relevance_dtype(images.dtype), requires_grad=True
        )
        with self.following():
            yield self

    def backward(self, values: Tensor, chunk: int = 8) -> Found:
        """Differentiates the explained values, to be called after `attached`.

        Args:
            values: [B] or [B, K], one or K explained scalars an image.
            chunk: how many of the K are differentiated together; bounds the memory.
        """
        self.passed.check_complete(values)
        inputs = [*self._rows.values(), *(slot for slots in self._slots.values() for slot in slots)]
        ports = {block: port for block, port in self._ports.items() if self._rollout and block not in self._records}
        graph = Graph(*self._ends(), inputs, list(ports.values()))
        if self._half:
            graph.pool = ports.get(None)
            graph.last, graph.tokens_first, graph.scales = self.passed.stream, self._layout.tokens_first, self._scales
        found = iter(differentiate(graph, values, chunk))
        rows = {block: next(found) for block in self._rows}
        recorded = {block: tuple(next(found) for _ in slots) for block, slots in self._slots.items()}
        return Found(rows, recorded)

    def _ends(self) -> tuple[Tensor | None, Tensor | None]:
        """The last carrier and the row of relevance that enters it."""
        if not self._rollout:
            return None, None
        if self._layout.pooling == "attention":
            return self._carrier, torch.ones_like(self._carrier)
        first, last = self._layout.pooled
        pooled = self._carrier.new_full((len(self._carrier), last - first), 1.0 / (last - first))
        return self._carrier, F.pad(pooled, (first, self._carrier.shape[1] - last))

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
            gated=self._rollout, residual=self.passed.block is not None,
            signed=self._settings.signed, constant_map=self._conservative is not None,
        )  # fmt: skip
        self._carrier, self._ports[self.passed.block] = carried.to(carrier.dtype), port.to(carrier.dtype)
        return out

    def tap_map(self, maps: Tensor, logits: Tensor) -> Tensor:  # [B, H, Nq, N]
        self._half |= logits.dtype == torch.float16
        if not self._rollout and self._conservative is None:
            return maps
        tapped, self._carrier, self._ports[self.passed.block] = tap_map(
            maps, self._carrier_in(), gated=self._rollout, residual=self.passed.block is not None,
            signed=self._settings.signed, constant_map=self._conservative is not None,
        )  # fmt: skip
        return tapped

    # -- the carrier of relevance ------------------------------------------------------------------------------

    def _carrier_in(self) -> Tensor:
        """The carrier for the attention that runs now; the pooling head sees the pooled tokens only."""
        block = self.passed.block
        if block is None:
            first, last = self._layout.pooled
            return self._carrier[:, first:last]
        if self._rollout and self._wants(block):
            self._rows[block] = self._carrier
        return self._carrier

    def _wants(self, block: int) -> bool:
        """Whether relevance is wanted of the tokens that enter this block."""
        start = self._settings.start_block
        return block == start or (self._settings.per_block and block > start)

    # -- what the hooks see ------------------------------------------------------------------------------------

    def tap_input(self, index: int, arguments: Arguments) -> Arguments | None:
        """Puts the block's tokens through a tap that takes x . g."""
        if self._rollout or not self._wants(index):
            return None
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
        port = self._ports[index] if self._rollout else None
        out, self._slots[index] = self._tapped(x, port, self._records[index])
        return out

    def _tapped(self, x: Tensor, port: Tensor | None, record: Record) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The residual stream with a tap on it, and the slots that carry out what `record` brings."""
        slots = tuple(slot.requires_grad_() for slot in record.slots(self._start.detach()))
        out, scale = tap_stream(x, port, record, slots, self._layout.tokens_first)
        self._scales.append(scale)
        return out, slots
