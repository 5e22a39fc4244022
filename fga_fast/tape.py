"""Taps a model's attention and residual streams for one call, and leaves the model as it came.

While a `Tape` is attached, every `scaled_dot_product_attention` inside a block is answered by the tapped op of
`ops/attention.py`, which also passes the relevance carrier on, and the output of each block with an SAE goes through a
tap that in the backward pass turns the residual stream x_l and its gradient g_l into that block's gate.
One `torch.autograd.grad` from (logit, carrier) to the first carrier is then the whole explanation.

Nothing is written to the model but forward hooks on its blocks, which are removed at the end and do nothing in other
threads; parameters are used detached, so no weight gradient is computed and no `requires_grad` is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fga_fast import ops
from fga_fast.models.layout import ModelLayout

# From x_l and g_l at one block to the gate of every token: [B, N, C], [B, N, C] -> [B, N].
Gating = Callable[[Tensor, Tensor], Tensor]

_thread = threading.local()


class TapeError(ValueError):
    """The model's attention cannot be tapped; the message says what was found and what to do."""


class _Tap(torch.autograd.Function):
    """Identity on the residual stream; in backward, sends the gate through the port of the block's attention."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, port: Tensor, gating: Gating) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gating = gating
        return x.clone()  # a copy, so that a model that adds in place does not overwrite the x_l that is scored

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        (g,) = grads
        return g, ctx.gating(x, g), None


class _LinearOfFewRows(torch.autograd.Function):
    """A linear layer of the last block, whose gradient is zero at most tokens when one token is pooled.

    The products with zero rows are left out: for a class-token model three quarters of that block's backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [rows, in] [out, in] [out]
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (g,) = grads  # [rows, out]
        weight = ctx.saved_tensors[0].to(g.dtype)  # they differ under autocast
        rows = (g != 0).any(-1).nonzero()[:, 0]
        if 2 * len(rows) > len(g):
            return g @ weight, None, None
        grad = g.new_zeros(len(g), weight.shape[1])
        grad[rows] = g[rows] @ weight
        return grad, None, None


def _linear_of_few_rows(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.requires_grad or (bias is not None and bias.requires_grad):  # computed from the input: they have a say
        return F.linear(input, weight, bias)
    # Flat rows, so that the function's output is no view and the model may change it in place.
    out: Tensor = _LinearOfFewRows.apply(input.reshape(-1, input.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*input.shape[:-1], out.shape[-1])


class Tape(TorchFunctionMode):
    """Records one forward pass of a model and hands out what starts its backward pass.

    Args:
        layout: where the model's blocks are and which tokens it pools.
        gatings: for each block with an SAE, what turns (x_l, g_l) into gates.

    Use:
        with tape.attached(images): logits = model(images)
        relevance = tape.backward(y)
    """

    def __init__(self, layout: ModelLayout, gatings: Mapping[int, Gating]) -> None:
        super().__init__()
        self._layout = layout
        self._gatings = gatings
        self._last_block = len(layout.blocks) - 1
        self._block: int | None = None  # block that is running; None between and after blocks
        self._ports: dict[int, Tensor] = {}  # block -> [B, N], one for every attention seen
        self._finished = 0  # blocks that have run
        # id of a parameter -> the parameter, which keeps the id taken, and its values without a gradient
        self._detached: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._start: Tensor | None = None  # [B, N] first carrier
        self._carrier: Tensor | None = None  # [B, N] carrier after the last attention seen
        self._pool: Tensor | None = None  # [B, 1] carrier after an attention pool

    @contextmanager
    def attached(self, images: Tensor) -> Iterator[Tape]:
        """Taps the model for calls made in this thread; whatever happens inside, the model is left as it came."""
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        self._start = images.new_zeros(len(images), self._layout.tokens, dtype=dtype).requires_grad_()
        self._carrier = self._start
        outer = getattr(_thread, "tape", None)
        handles = []
        try:
            _thread.tape = self
            for index, block in enumerate(self._layout.blocks):
                handles.append(block.register_forward_pre_hook(self._entering(index)))
                handles.append(block.register_forward_hook(self._leaving(index)))
            with torch.enable_grad(), self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            _thread.tape = outer
            self._detached.clear()

    def backward(self, y: Tensor) -> Tensor:
        """Relevance of every token [B, N] for the sum of `y` over images: the pooled row of R.

        Args:
            y: scalar, the sum of the explained logits.
        """
        self._check_complete(y)
        assert self._carrier is not None and self._start is not None  # attached() has set them
        if self._pool is not None:
            end, seed = self._pool, torch.ones_like(self._pool)
        else:
            end, seed = self._carrier, torch.zeros_like(self._carrier)
            first, last = self._layout.pooled
            seed[:, first:last] = 1.0 / (last - first)
        (row,) = torch.autograd.grad([y, end], [self._start], [torch.ones_like(y), seed])
        return row

    # -- what the mode sees ------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (self._block is not None or self._at_pool()):
            return self._attend(*args, **kwargs)
        for a in args:
            if type(a) is nn.Parameter:
                args = tuple(self._detach(a) if type(a) is nn.Parameter else a for a in args)
                break
        for name, value in kwargs.items():
            if type(value) is nn.Parameter:
                kwargs = {**kwargs, name: self._detach(value)}
        if func is F.linear and self._block == self._last_block:
            return _linear_of_few_rows(*args, **kwargs)
        return func(*args, **kwargs)

    def _detach(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's values without its gradient; one tensor a parameter, so the cost is paid once a call."""
        if id(parameter) not in self._detached:
            self._detached[id(parameter)] = parameter, parameter.detach()
        return self._detached[id(parameter)][1]

    def _at_pool(self) -> bool:
        return self._layout.pooling == "attention" and self._finished == len(self._layout.blocks) and self._pool is None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Answers one scaled_dot_product_attention call by the tapped op."""
        pooling = self._block is None
        where = "the pooling head" if pooling else f"block {self._block}"
        self._check_call(where, query, key, attn_mask, dropout_p, is_causal, enable_gqa)
        if not pooling and self._block in self._ports:
            raise TapeError(f"model: {where} calls attention more than once; expected one call a block")
        assert self._carrier is not None
        first, last = self._layout.pooled
        out, _, carrier, port = ops.attention(
            query, key, value, self._carrier[:, first:last] if pooling else self._carrier,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            gated=self._block in self._gatings, residual=not pooling,
        )  # fmt: skip
        if self._block is None:
            self._pool = carrier
        else:
            self._carrier = carrier
            self._ports[self._block] = port
        return out

    def _check_call(
        self, where: str, query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, causal: bool, gqa: bool
    ) -> None:
        if mask is not None or causal:
            what = "causal" if mask is None else f"masked (attn_mask {tuple(mask.shape)}, {mask.dtype})"
            raise TapeError(f"model: attention in {where} is {what}; only attention without a mask can be explained")
        if dropout > 0:
            raise TapeError(f"model: attention in {where} has dropout {dropout} active; call model.eval() first")
        tokens = queries = self._layout.tokens
        if self._block is None:
            tokens, queries = self._layout.pooled[1] - self._layout.pooled[0], 1
        if gqa or query.dim() != 4 or key.dim() != 4 or query.shape[1] != key.shape[1]:
            raise TapeError(
                f"model: attention in {where} must have queries and keys [B, H, N, D] with as many heads, got "
                f"{tuple(query.shape)} and {tuple(key.shape)}"
            )
        assert self._start is not None
        if len(query) != len(self._start):
            raise TapeError(
                f"model: attention in {where} sees a batch of {len(query)} for {len(self._start)} images; a model that "
                "makes several views of an image cannot be explained as a whole, explain the views one by one"
            )
        if query.shape[2] != queries or key.shape[2] != tokens:
            raise TapeError(
                f"model: attention in {where} has {query.shape[2]} queries and {key.shape[2]} keys, expected {queries} "
                f"and {tokens} ({self._layout.prefix_tokens} prefix tokens and a {self._layout.grid[0]} x "
                f"{self._layout.grid[1]} grid); windowed attention and dropped patches cannot be explained"
            )

    # -- what the hooks see ------------------------------------------------------------------------------------

    def _entering(self, index: int) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            if getattr(_thread, "tape", None) is not self:
                return
            if index != self._finished:
                raise TapeError(
                    f"model: block {index} runs where block {self._finished} was expected; each must run once, in order"
                )
            self._block = index

        return hook

    def _leaving(self, index: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if getattr(_thread, "tape", None) is not self:
                return None
            self._block, self._finished = None, index + 1
            if index not in self._ports:
                raise TapeError(
                    f"model: block {index} ({type(_module).__name__}) ran without calling "
                    "torch.nn.functional.scaled_dot_product_attention, so its attention was not seen; in timm call "
                    "timm.layers.set_fused_attn(True) before creating the model"
                )
            gating = self._gatings.get(index)
            if gating is None:
                return None
            if not isinstance(output, Tensor) or output.dim() != 3:
                raise TapeError(f"model: block {index} returned {type(output).__name__}, expected a tensor [B, N, C]")
            return _Tap.apply(output, self._ports[index], gating)  # type: ignore[no-untyped-call]

        return hook

    def _check_complete(self, y: Tensor) -> None:
        if self._finished != len(self._layout.blocks):
            raise TapeError(f"model: {self._finished} of {len(self._layout.blocks)} blocks ran; call the tower once")
        if self._layout.pooling == "attention" and self._pool is None:
            raise TapeError("model: the pooling head ran without calling scaled_dot_product_attention")
        assert self._carrier is not None
        if not (y.requires_grad and self._carrier.requires_grad):
            raise TapeError(
                "model: its logits carry no gradient to the tower; its forward must not run under torch.no_grad(), "
                "torch.inference_mode() or detach the tower's output"
            )
