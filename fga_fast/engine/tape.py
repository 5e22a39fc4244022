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
from torch.overrides import TorchFunctionMode

from fga_fast import composite, ops
from fga_fast.engine.backward import Graph, differentiate
from fga_fast.engine.conservative import Conservative
from fga_fast.engine.records import Contribution
from fga_fast.engine.taps import Record, linear_of_few_rows, tap_map, tap_stream
from fga_fast.models.block_io import (
    TapeError,
    check_attention,
    replace_input,
    stream_of,
    unseen_attention,
    with_stream,
)  # fmt: skip
from fga_fast.models.layout import ModelLayout
from fga_fast.models.multihead import open_multi_head_attention
from fga_fast.precision import relevance_dtype

Attention = Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor]]  # see `ops.attention`

_thread = threading.local()

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


class Found(NamedTuple):
    """What a backward pass brought; [B, ...] is [B, K, ...] for K targets an image."""

    rows: dict[int, Tensor]  # block -> [B, N], relevance of the tokens that enter it
    recorded: dict[int, tuple[Tensor, ...]]  # block -> what its record's slots brought


class Tape(TorchFunctionMode):
    """Records one forward pass of a model and hands out what its backward pass brings.

    Args:
        layout: where the model's blocks are and which tokens it pools.
        records: for each block with an SAE, what turns (x_l, g_l) into gates.
        attention: the backend's tapped attention.
        method: "rollout", or "input_x_gradient" for x . g at the tokens that enter a block.
        conservative: the model's non-linear factors are constants of the backward pass (conservative.py).
        signed: relevance maps keep their negative part.
        start_layer: first block that is explained; those before it only run.
        per_block: relevance is wanted at every block, not at the first only.

    Use:
        with tape.attached(images): values = ... model(images) ...
        found = tape.backward(values)
    """

    def __init__(
        self, layout: ModelLayout, records: Mapping[int, Record], attention: Attention = ops.attention, *,
        method: str = "rollout",
        conservative: bool = False, signed: bool = False, start_layer: int = 0, per_block: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._layout, self._records, self._attention = layout, records, attention
        self._rollout, self._signed, self._start_layer, self._per_block = (
            method == "rollout", signed, start_layer, per_block,
        )  # fmt: skip
        self._last_block = len(layout.blocks) - 1
        self._conservative = Conservative() if conservative else None
        self._handlers: dict[Callable[..., Any], Callable[..., Any]] = {
            F.scaled_dot_product_attention: self._attend,
            F.multi_head_attention_forward: self._open,
            **dict.fromkeys(_SOFTMAX, self._softmax),
        }
        self._block: int | None = None  # block that is running; None between and after blocks
        self._ports: dict[int | None, Tensor] = {}  # block, or None for the pooling head -> [B, N]
        self._finished = 0  # blocks that have run
        # id of a parameter -> the parameter, which keeps the id taken, and its values without a gradient
        self._detached: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._start: Tensor | None = None  # [B, N] first carrier
        self._carrier: Tensor | None = None  # [B, N] carrier after the last attention seen
        self._rows: dict[int, Tensor] = {}  # block -> [B, N] dummy whose gradient is the relevance that enters it
        self._slots: dict[int, tuple[Tensor, ...]] = {}
        self._scales: list[Tensor] = []  # [B], one for every tap on a residual stream
        self.last_stream: Tensor | None = None  # [B, N, C] last residual stream
        self.outside: list[Tensor] = []  # outputs of attention after the blocks that is not the layout's pool
        self._half = False  # something computes in float16, whose gradients need a loss scale

    @contextmanager
    def attached(self, images: Tensor) -> Iterator[Tape]:
        """Taps the model for calls made in this thread; whatever happens inside, the model is left as it came."""
        dtype = relevance_dtype(images.dtype)
        self._half = images.dtype == torch.float16
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
            self._detached.clear()
            self._handlers.clear()  # bound methods, which would keep the tape and its graph in a cycle
            if self._conservative is not None:
                self._conservative.forget()
            self._conservative = None

    def backward(self, values: Tensor, chunk: int = 8) -> Found:
        """Differentiates the explained values, to be called after `attached`.

        Args:
            values: [B] or [B, K], one or K explained scalars an image.
            chunk: how many of the K are differentiated together; bounds the memory.
        """
        self._check_complete(values)
        inputs = [*self._rows.values(), *(slot for slots in self._slots.values() for slot in slots)]
        ports = {block: port for block, port in self._ports.items() if self._rollout and block not in self._records}
        graph = Graph(*self._ends(), inputs, list(ports.values()))
        if self._half:
            graph.pool = ports.get(None)
            graph.last, graph.tokens_first, graph.scales = self.last_stream, self._layout.tokens_first, self._scales
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
        first, last = self._pooled
        pooled = self._carrier.new_full((len(self._carrier), last - first), 1.0 / (last - first))
        return self._carrier, F.pad(pooled, (first, self._carrier.shape[1] - last))

    @property
    def _pooled(self) -> tuple[int, int]:
        assert self._layout.pooled is not None  # the layout fills it in
        return self._layout.pooled

    # -- what the mode sees ------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for a in args:
            if type(a) is nn.Parameter:
                args = tuple(self._detach(a) if type(a) is nn.Parameter else a for a in args)
                break
        for name, value in kwargs.items():
            if type(value) is nn.Parameter:
                kwargs = {**kwargs, name: self._detach(value)}
        if func is F.dropout:
            return self._dropout(func, *args, **kwargs)
        if not self._explaining():
            return func(*args, **kwargs)
        if func is F.linear and self._block == self._last_block and self._layout.pooling == "token":
            return linear_of_few_rows(*args, **kwargs)
        if func in self._handlers and (self._block is not None or self._at_pool()):
            return self._handlers[func](func, *args, **kwargs)
        if func in _ATTENTION:
            return self._outside(func(*args, **kwargs))
        if self._conservative is not None and func in self._conservative.handlers:
            self._conservative.in_block = self._block is not None
            return self._conservative.handlers[func](func, *args, **kwargs)
        return func(*args, **kwargs)

    def _detach(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's values without its gradient; one tensor a parameter, so the cost is paid once a call."""
        if id(parameter) not in self._detached:
            self._detached[id(parameter)] = parameter, parameter.detach()
        return self._detached[id(parameter)][1]

    def _explaining(self) -> bool:
        """Whether what runs now is differentiated: from the first explained block to the model's end."""
        return self._finished > self._start_layer or self._block == self._start_layer

    def _at_pool(self) -> bool:
        pooling = self._layout.pooling == "attention"
        return pooling and self._finished == len(self._layout.blocks) and None not in self._ports

    def _attend(
        self, function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
        attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Answers one scaled_dot_product_attention call by the tapped op."""
        where = self._where()
        if dropout_p > 0:
            raise TapeError(f"model: attention in {where} has dropout {dropout_p} active; call model.eval() first")
        if is_causal or (attn_mask is not None and not attn_mask.is_floating_point()):
            what = "causal" if attn_mask is None else f"masked (attn_mask {tuple(attn_mask.shape)}, {attn_mask.dtype})"
            raise TapeError(f"model: attention in {where} is {what}; only additive masks can be explained")
        if enable_gqa and key.shape[1] and query.shape[1] % key.shape[1] == 0:  # heads that share keys and values
            shared = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        self._check_shapes(query.shape, key.shape)
        if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
            low = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(low), key.to(low), value.to(low)
        self._half |= query.dtype == torch.float16
        if not self._rollout and self._conservative is None:
            self._ports[self._block] = self._start_of_relevance()
            mask = {} if attn_mask is None else {"attn_mask": attn_mask.to(query.dtype)}
            return function(query, key, value, scale=scale, **mask)
        # Kernels take one head width and relevance in the attention's own precision, which may not be the model's.
        attention = self._attention if value.shape[-1] == query.shape[-1] else composite.attention
        carrier = self._carrier_in()
        out, _, carried, port = attention(
            query, key, value, carrier.to(relevance_dtype(query.dtype)),
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            **({} if attn_mask is None else {"bias": attn_mask}),
            gated=self._rollout, residual=self._block is not None,
            signed=self._signed, constant_map=self._conservative is not None,
        )  # fmt: skip
        self._pass_on(carried.to(carrier.dtype), port.to(carrier.dtype))
        return out

    def _softmax(self, function: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Taps the attention maps of a model that computes them itself; other softmaxes pass."""
        maps: Tensor = function(input, *args, **kwargs)
        if not torch.is_grad_enabled():  # a look at the maps, for a log
            return maps
        assert self._start is not None
        images, tokens = len(self._start), self._keys()
        dim = kwargs.get("dim", args[0] if args else None)
        if dim not in (-1, maps.dim() - 1) or maps.dim() not in (3, 4) or maps.shape[-1] != tokens:
            return maps
        if maps.shape[-2] != self._queries() or maps.shape[0] == 0 or maps.shape[0] % images:
            return maps
        by_head = maps if maps.dim() == 4 else maps.view(images, -1, *maps.shape[1:])
        self._check_shapes(by_head.shape, (*by_head.shape[:2], tokens))
        self._half |= input.dtype == torch.float16
        if not self._rollout and self._conservative is None:
            self._ports[self._block] = self._start_of_relevance()
            return maps
        tapped, carrier, port = tap_map(
            by_head, self._carrier_in(), gated=self._rollout, residual=self._block is not None,
            signed=self._signed, constant_map=self._conservative is not None,
        )  # fmt: skip
        self._pass_on(carrier, port)
        return tapped if maps.dim() == 4 else tapped.flatten(0, 1)

    def _open(self, _function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self:  # its projections and its attention are to be seen
            return open_multi_head_attention(*args, **kwargs)

    def _outside(self, output: Any) -> Any:
        """Attention that the layout does not know of: wrong between blocks, after them a matter of who reads it."""
        if self._finished < len(self._layout.blocks):
            raise TapeError(
                f"model: attention runs between block {self._finished - 1} and block {self._finished} of the layout, "
                "where relevance would pass it by; list all blocks, in forward order"
            )
        self.outside.append(output[0] if isinstance(output, tuple) else output)
        return output

    def _dropout(self, function: Callable[..., Any], input: Tensor, p: float = 0.5, training: bool = True,
                 inplace: bool = False) -> Any:  # fmt: skip
        if training and p > 0:
            raise TapeError(f"model: dropout {p} is active in {self._where()}; call model.eval() first")
        return function(input, p, training, inplace)

    # -- the carrier of relevance ------------------------------------------------------------------------------

    def _start_of_relevance(self) -> Tensor:
        assert self._start is not None  # attached() has set it
        return self._start

    def _carrier_in(self) -> Tensor:
        """The carrier for the attention that runs now; the pooling head sees the pooled tokens only."""
        assert self._carrier is not None
        if self._block is None:
            first, last = self._pooled
            return self._carrier[:, first:last]
        if self._rollout and (self._per_block or self._block == self._start_layer):
            self._rows[self._block] = self._carrier
        return self._carrier

    def _pass_on(self, carrier: Tensor, port: Tensor) -> None:
        self._carrier, self._ports[self._block] = carrier, port

    # -- what the hooks see ------------------------------------------------------------------------------------

    def _entering(self, index: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if getattr(_thread, "tape", None) is not self:
                return None
            if index != self._finished:
                raise TapeError(
                    f"model: block {index} runs where block {self._finished} was expected; each must run once, in order"
                )
            self._block = index
            if self._rollout or not (index == self._start_layer or (self._per_block and index > self._start_layer)):
                return None
            return self._tap_input(index, args, kwargs or {})

        return hook

    def _tap_input(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's arguments, with its tokens through a tap that takes x . g."""
        start, record = self._start_of_relevance(), Contribution()
        x, replaced = replace_input((args, kwargs), self.last_stream, self._layout, len(start), self._where())
        slots = tuple(slot.requires_grad_() for slot in record.slots(start.detach()))
        out, scale = tap_stream(x, None, record, slots, self._layout.tokens_first)
        self._scales.append(scale)
        self._rows[index] = slots[0]
        return replaced(out)

    def _leaving(self, index: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> Any:
            if getattr(_thread, "tape", None) is not self:
                return None
            self._block, self._finished = None, index + 1
            if self._conservative is not None:
                self._conservative.forget()
            if index < self._start_layer:
                self.last_stream = output[0] if isinstance(output, tuple) else output
                return None
            if index not in self._ports:
                raise TapeError(unseen_attention(f"block {index} ({type(module).__name__})", self._layout))
            x = stream_of(output, f"block {index} ({type(module).__name__})")
            self.last_stream = self._tap_output(index, x) if index in self._records else x
            return None if self.last_stream is x else with_stream(output, self.last_stream)

        return hook

    def _tap_output(self, index: int, x: Tensor) -> Tensor:
        record = self._records[index]
        slots = tuple(slot.requires_grad_() for slot in record.slots(self._start_of_relevance().detach()))
        self._slots[index] = slots
        port = self._ports[index] if self._rollout else None
        out, scale = tap_stream(x, port, record, slots, self._layout.tokens_first)
        self._scales.append(scale)
        return out

    # -- checks ------------------------------------------------------------------------------------------------

    def _where(self) -> str:
        return "the pooling head" if self._block is None else f"block {self._block}"

    def _keys(self) -> int:
        return self._layout.tokens if self._block is not None else self._pooled[1] - self._pooled[0]

    def _queries(self) -> int:
        return self._layout.tokens if self._block is not None else 1

    def _check_shapes(self, query: tuple[int, ...], key: tuple[int, ...]) -> None:  # [B, H, Nq, ...], [B, H, N, ...]
        where = self._where()
        if self._block in self._ports:
            raise TapeError(f"model: {where} calls attention more than once; expected one call a block")
        check_attention(
            query, key, (len(self._start_of_relevance()), self._queries(), self._keys()), self._layout, where
        )

    def _check_complete(self, values: Tensor) -> None:
        if self._finished != len(self._layout.blocks):
            raise TapeError(f"model: {self._finished} of {len(self._layout.blocks)} blocks ran; call the tower once")
        if self._layout.pooling == "attention" and None not in self._ports:
            raise TapeError("model: the pooling head ran without an attention that could be seen")
        carriers = [self._carrier] if self._rollout else []
        if not (values.requires_grad and all(c is not None and c.requires_grad for c in carriers)):
            raise TapeError(
                "model: its logits carry no gradient to the tower; its forward must not run under torch.no_grad(), "
                "torch.inference_mode() or detach the tower's output"
            )
