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

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fga_fast import composite, ops
from fga_fast.engine.backward import Graph, differentiate
from fga_fast.engine.conservative import Conservative
from fga_fast.engine.records import Contribution
from fga_fast.engine.taps import Record, linear_of_few_rows, tap_map, tap_stream
from fga_fast.engine.torch_functions import Function, FunctionMode, Kind, Operation
from fga_fast.models.block_io import ForwardPass, replace_input, with_stream
from fga_fast.models.layout import ModelLayout
from fga_fast.models.multihead import open_multi_head_attention
from fga_fast.precision import relevance_dtype

Attention = Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor]]  # see `ops.attention`

_thread = threading.local()


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
        method: "rollout", or "input_x_gradient" for x . g at the tokens that enter a block.
        conservative: the model's non-linear factors are constants of the backward pass (conservative.py).
        signed: relevance maps keep their negative part.
        start_block: first block that is explained; those before it only run.
        per_block: relevance is wanted at every block, not at the first only.

    Use:
        with tape.attached(images): values = ... model(images) ...
        found = tape.backward(values)
    """

    def __init__(
        self, layout: ModelLayout, records: Mapping[int, Record], attention: Attention = ops.attention, *,
        method: str = "rollout",
        conservative: bool = False, signed: bool = False, start_block: int = 0, per_block: bool = False,
    ) -> None:  # fmt: skip
        self.passed = ForwardPass(layout, 0, start_block)  # attached() says of how many images
        super().__init__(self.passed)
        self._layout, self._records, self._attention = layout, records, attention
        self._rollout, self._signed, self._start_block, self._per_block = (
            method == "rollout", signed, start_block, per_block,
        )  # fmt: skip
        self._last_block = len(layout.blocks) - 1
        self._conservative = Conservative(self.passed) if conservative else None
        self.handlers |= {
            Kind.ATTENTION: self._attend,
            Kind.MULTI_HEAD_ATTENTION: self._open,
            Kind.SOFTMAX: self._softmax,
        }
        if layout.pooling == "token":
            self.handlers[Kind.LINEAR] = self._linear
        if self._conservative is not None:
            self.handlers |= self._conservative.handlers
        self._ports: dict[int | None, Tensor] = {}  # block, or None for the pooling head -> [B, N]
        self._start: Tensor | None = None  # [B, N] first carrier
        self._carrier: Tensor | None = None  # [B, N] carrier after the last attention seen
        self._rows: dict[int, Tensor] = {}  # block -> [B, N] dummy whose gradient is the relevance that enters it
        self._slots: dict[int, tuple[Tensor, ...]] = {}
        self._scales: list[Tensor] = []  # [B], one for every tap on a residual stream
        self._half = False  # something computes in float16, whose gradients need a loss scale

    @contextmanager
    def attached(self, images: Tensor) -> Iterator[Tape]:
        """Taps the model for calls made in this thread; whatever happens inside, the model is left as it came."""
        dtype = relevance_dtype(images.dtype)
        self._half = images.dtype == torch.float16
        self.passed.images = len(images)
        self._start = images.new_zeros(len(images), self._layout.tokens, dtype=dtype).requires_grad_()
        self._carrier = self._start
        outer = getattr(_thread, "tape", None)
        handles = []
        try:
            _thread.tape = self
            for index, block in enumerate(self._layout.blocks):
                handles.append(block.register_forward_pre_hook(self._entering(index), with_kwargs=True))
                handles.append(block.register_forward_hook(self._leaving(index)))
            with torch.enable_grad(), self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            _thread.tape = outer
            self.clear()
            if self._conservative is not None:
                self._conservative.forget()
            self._conservative = None

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
        assert self._carrier is not None  # attached() has set it
        if self._layout.pooling == "attention":
            return self._carrier, torch.ones_like(self._carrier)
        first, last = self._layout.pooled
        pooled = self._carrier.new_full((len(self._carrier), last - first), 1.0 / (last - first))
        return self._carrier, F.pad(pooled, (first, self._carrier.shape[1] - last))

    # -- what the mode sees ------------------------------------------------------------------------------------

    def _linear(self, _operation: Operation, function: Function, *args: Any, **kwargs: Any) -> Tensor:
        if self.passed.block == self._last_block and not kwargs.keys() - {"input", "weight", "bias"}:
            return linear_of_few_rows(*args, **kwargs)
        out: Tensor = function(*args, **kwargs)
        return out

    def _attend(
        self, _operation: Operation, function: Function, query: Tensor, key: Tensor, value: Tensor,
        attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Answers one scaled_dot_product_attention call by the tapped op."""
        passed = self.passed
        if not passed.is_tapped(query.shape[-2], key.shape[-2]):
            settings = {"scale": scale, "enable_gqa": enable_gqa}
            outside: Tensor = function(query, key, value, attn_mask, dropout_p, is_causal, **settings)
            passed.pass_by(outside, query.shape[-2], key.shape[-2])
            return outside
        passed.check_call(attn_mask, dropout_p, is_causal)
        if enable_gqa:
            key, value = passed.share_heads(query, key, value)
        passed.attend(query.shape, key.shape)
        out = self._tapped(function, query, key, value, attn_mask, scale)
        if passed.block is None:
            passed.pool = out
        return out

    def _tapped(
        self, function: Function,
        query: Tensor, key: Tensor, value: Tensor,  # [B, H, Nq, D], [B, H, N, D], [B, H, N, Dv]
        attn_mask: Tensor | None, scale: float | None,
    ) -> Tensor:  # fmt: skip
        if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
            low = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(low), key.to(low), value.to(low)
        self._half |= query.dtype == torch.float16
        if not self._rollout and self._conservative is None:
            self._ports[self.passed.block] = self._start_of_relevance()
            mask = {} if attn_mask is None else {"attn_mask": attn_mask.to(query.dtype)}
            plain: Tensor = function(query, key, value, scale=scale, **mask)
            return plain
        # Kernels take one head width and relevance in the attention's own precision, which may not be the model's.
        attention = self._attention if value.shape[-1] == query.shape[-1] else composite.attention
        carrier = self._carrier_in()
        out, _, carried, port = attention(
            query, key, value, carrier.to(relevance_dtype(query.dtype)),
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            **({} if attn_mask is None else {"bias": attn_mask}),
            gated=self._rollout, residual=self.passed.block is not None,
            signed=self._signed, constant_map=self._conservative is not None,
        )  # fmt: skip
        self._pass_on(carried.to(carrier.dtype), port.to(carrier.dtype))
        return out

    def _softmax(self, _operation: Operation, function: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Taps the attention maps of a model that computes them itself; other softmaxes pass."""
        maps: Tensor = function(input, *args, **kwargs)
        by_head = self.passed.map_of(maps, kwargs.get("dim", args[0] if args else None))
        if by_head is None:
            return maps
        self._half |= input.dtype == torch.float16
        tapped = self._tapped_map(by_head)
        if self.passed.block is None:
            self.passed.pool = tapped
        return tapped if maps.dim() == 4 else tapped.flatten(0, 1)

    def _tapped_map(self, maps: Tensor) -> Tensor:  # [B, H, Nq, N]
        if not self._rollout and self._conservative is None:
            self._ports[self.passed.block] = self._start_of_relevance()
            return maps
        tapped, carrier, port = tap_map(
            maps, self._carrier_in(), gated=self._rollout, residual=self.passed.block is not None,
            signed=self._signed, constant_map=self._conservative is not None,
        )  # fmt: skip
        self._pass_on(carrier, port)
        return tapped

    def _open(
        self, _operation: Operation, function: Function, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self.passed.is_tapped(len(query), len(key)):
            with self:  # its projections and its attention are to be seen
                return open_multi_head_attention(query, key, *args, **kwargs)
        found = function(query, key, *args, **kwargs)
        self.passed.pass_by(found[0], len(query), len(key))
        return found

    # -- the carrier of relevance ------------------------------------------------------------------------------

    def _start_of_relevance(self) -> Tensor:
        assert self._start is not None  # attached() has set it
        return self._start

    def _carrier_in(self) -> Tensor:
        """The carrier for the attention that runs now; the pooling head sees the pooled tokens only."""
        assert self._carrier is not None
        block = self.passed.block
        if block is None:
            first, last = self._layout.pooled
            return self._carrier[:, first:last]
        if self._rollout and (self._per_block or block == self._start_block):
            self._rows[block] = self._carrier
        return self._carrier

    def _pass_on(self, carrier: Tensor, port: Tensor) -> None:
        self._carrier, self._ports[self.passed.block] = carrier, port

    # -- what the hooks see ------------------------------------------------------------------------------------

    def _entering(self, index: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if getattr(_thread, "tape", None) is not self:
                return None
            self.passed.enter(index)
            if self._rollout or not (index == self._start_block or (self._per_block and index > self._start_block)):
                return None
            return self._tap_input(index, args, kwargs or {})

        return hook

    def _tap_input(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's arguments, with its tokens through a tap that takes x . g."""
        start, record = self._start_of_relevance(), Contribution()
        x, replaced = replace_input((args, kwargs), self.passed.stream, self._layout, len(start), self.passed.where)
        slots = tuple(slot.requires_grad_() for slot in record.slots(start.detach()))
        out, scale = tap_stream(x, None, record, slots, self._layout.tokens_first)
        self._scales.append(scale)
        self._rows[index] = slots[0]
        return replaced(out)

    def _leaving(self, index: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if getattr(_thread, "tape", None) is not self:
                return None
            if self._conservative is not None:
                self._conservative.forget()
            x = self.passed.leave(index, output)
            if x is None or index not in self._records:
                return None
            self.passed.stream = self._tap_output(index, x)
            return with_stream(output, self.passed.stream)

        return hook

    def _tap_output(self, index: int, x: Tensor) -> Tensor:
        record = self._records[index]
        slots = tuple(slot.requires_grad_() for slot in record.slots(self._start_of_relevance().detach()))
        self._slots[index] = slots
        port = self._ports[index] if self._rollout else None
        out, scale = tap_stream(x, port, record, slots, self._layout.tokens_first)
        self._scales.append(scale)
        return out
