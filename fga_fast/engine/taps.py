"""The taps that a tape puts into a model's graph: identities in the forward pass that do work in the backward pass.

All use the same trick: a dummy tensor of zeros, whose *gradient* is the result. So relevance, gates, scores and
contributions all come out of one call of `torch.autograd.grad`, also with K targets at once (`is_grads_batched`), and
no tap writes to anything outside of the graph.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fga_fast.ops.few_rows import few_rows_product


class Record(Protocol):
    """What to compute at one place of the residual stream when its gradient arrives (records.py)."""

    def slots(self, carrier: Tensor) -> tuple[Tensor, ...]:
        """Dummies of zeros for the B images of `carrier` [B, N]; their gradients carry the results out."""
        ...

    def __call__(
        self,
        x: Tensor,  # [B, N, C]
        g: Tensor,  # [B, N, C], the gradient times the loss scale
        inverse: Tensor | None,  # [B], the inverse of the loss scale; None: 1
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """The gate of every token [B, N], or None, and the gradients of the slots."""
        ...


class _StreamTap(torch.autograd.Function):
    """Identity on the residual stream; in backward, scores it, gates the block before it and fills the slots."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, port: Tensor | None, record: Record, transposed: bool, *slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.record, ctx.transposed, ctx.gates, ctx.slots = record, transposed, port is not None, len(slots)
        ctx.set_materialize_grads(False)
        images = x.shape[1 if transposed else 0]
        # A copy: otherwise a model that adds in place would overwrite the x_l that we score.
        return x.clone(), x.new_zeros(images, dtype=slots[0].dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        g, inverse = grads
        if g is None and inverse is None:  # a backward pass that ends above
            nothing: tuple[None, ...] = (None,) * (4 + ctx.slots)
            return nothing
        if g is None:
            g = torch.zeros_like(x)
        turned = (x.transpose(0, 1), g.transpose(0, 1)) if ctx.transposed else (x, g)
        gate, recorded = ctx.record(*turned, inverse)
        if gate is not None and inverse is not None:
            gate = gate * inverse.unsqueeze(-1)
        return g, gate if ctx.gates else None, None, None, *recorded


def tap_stream(
    x: Tensor,  # [B, N, C], or [N, B, C] if `transposed`
    port: Tensor | None,  # [B, N]
    record: Record,
    slots: tuple[Tensor, ...],
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Passes the residual stream on. In backward, calls `record` with the stream and its gradient. The gate that it
    returns becomes the gradient of `port`, and its other results become the gradients of `slots`.

    Returns:
        x, and a port [B]: seed it with the inverse of the loss scale; without a seed the scale is 1.
    """
    out: tuple[Tensor, Tensor] = _StreamTap.apply(x, port, record, transposed, *slots)  # type: ignore[no-untyped-call]
    return out


class _MapTap(torch.autograd.Function):
    """Identity on explicit attention probabilities; in backward, one step of the rollout."""

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, carrier: Tensor, gated: bool, signed: bool, constant_map: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(maps)
        ctx.gated, ctx.signed, ctx.constant_map = gated, signed, constant_map
        ctx.set_materialize_grads(False)
        images, _, queries, keys = maps.shape
        return maps.view_as(maps), carrier.new_zeros(images, queries), carrier.new_zeros(images, keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (maps,) = ctx.saved_tensors
        d_maps, row, gate = grads
        if row is None or d_maps is None:
            return None if ctx.constant_map else d_maps, None, None, None, None
        if ctx.gated and gate is None:
            raise RuntimeError("attention: no gate arrived at the port of an attention called with gated=True")
        weighted = maps.to(row.dtype) * d_maps.to(row.dtype)  # [B, H, Nq, N]
        if not ctx.signed:
            weighted = weighted.clamp(min=0)
        message = (row.unsqueeze(-2) @ weighted.mean(dim=-3)).squeeze(-2)  # [B, N]
        if gate is not None:
            message = gate * message
        return None if ctx.constant_map else d_maps, message, None, None, None


def tap_map(
    maps: Tensor,  # [B, H, Nq, N]
    carrier: Tensor,  # [B, N]
    *,
    gated: bool,
    signed: bool,
    constant_map: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tap for a model that writes out its attention: placed after the softmax; see `ops.attention`.

    It takes no extra memory, because the model keeps its maps for its own backward pass anyway.

    Returns:
        The maps, the carrier [B, Nq] through which a row of relevance enters, and the gate port [B, N].
    """
    settings = (gated, signed, constant_map)
    out: tuple[Tensor, Tensor, Tensor] = _MapTap.apply(maps, carrier, *settings)  # type: ignore[no-untyped-call]
    return out


_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # a fake one is a plain one while a graph is traced


class _LinearOfFewRows(torch.autograd.Function):
    """A linear layer of the last block. If the model pools one token, its gradient is zero at nearly all tokens.

    It skips products with rows of zeros: for a class-token model three quarters of this block's backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [rows, in] [out, in] [out]
        ctx.save_for_backward(weight)
        ctx.set_materialize_grads(False)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (g,) = grads  # [rows, out]
        if g is None:
            return None, None, None
        (weight,) = ctx.saved_tensors
        return few_rows_product(g, weight.to(g.dtype)), None, None  # the two differ under autocast


def linear_of_few_rows(
    input: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None = None,  # [out]
) -> Tensor:
    """`F.linear` with a backward pass that skips rows of zero gradient."""
    computed = weight.requires_grad or (bias is not None and bias.requires_grad)  # by the model, from the input
    if computed or type(weight) not in _PLAIN:  # other classes, such as quantised weights, have products of their own
        return F.linear(input, weight, bias)
    # Flatten before the call, so that its output is no view and the model may change it in place.
    out: Tensor = _LinearOfFewRows.apply(input.reshape(-1, input.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*input.shape[:-1], out.shape[-1])
