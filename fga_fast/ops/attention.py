"""Tapped attention: scaled dot-product attention through whose backward pass relevance travels.

Forward it is ordinary attention with one more input, the carrier, and two more outputs, the carrier for the next block
and the gate port; all three hold zeros. Backward, the *gradient* of the carrier is the relevance row v of TransMM
(Chefer, Gur and Wolf 2021) and the gradient of the port the gate w:

    Cbar = mean_h relu(dA * A),    v <- v + w * (v Cbar)

(`signed`: without the relu). The op passes on w * (v Cbar); whoever taps the model adds v. So one call of
`torch.autograd.grad` explains the whole model, and no [N, N] map is ever kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fga_fast.ops import attention_cuda, library
from fga_fast.precision import relevance_dtype


def attention(
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    carrier: Tensor,  # [B, N]
    *,
    scale: float,
    bias: Tensor | None = None,  # broadcastable to [B, H, Nq, N]
    gated: bool = False,
    signed: bool = False,
    constant_map: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention whose backward pass also moves relevance from queries to keys.

    Args:
        q, k, v: float32, float64, bfloat16 or float16, any strides.
        carrier: float64 for float64 q, else float32.
        scale: factor on q k^T, usually D ** -0.5.
        bias: added to the scaled logits: an additive mask or a position bias, in the dtype of q or of the carrier,
            any strides, also 0. It gets no gradient. Entries may be -inf; a query whose every key is at -inf gives
            NaN, as a softmax does.
        gated: a gate arrives at the port in backward; without it the gate is 1.
        signed: relevance against the target is kept, Cbar = mean_h(dA * A).
        constant_map: the attention map is a constant of the backward pass: v gets its gradient, q and k get none.

    Returns:
        out [B, H, Nq, D] in q's dtype over token-major memory; lse [B, H, Nq], the softmax statistics, without
        gradient; carrier [B, Nq]; port [B, N]. The last two are zeros, see above.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
        ValueError: a gradient is wanted for `bias`.
    """
    library.load()
    library.require_kernel("attention", q)
    out, lse, carried, port = torch.ops.fga_fast.attention(
        q, k, v, carrier, _placed("attention", bias, q), scale, gated, signed, constant_map
    )
    return out, lse, carried, port


def attention_backward(
    grad_out: Tensor,  # [M, H, Nq, D]
    row: Tensor,  # [M, Nq]
    gate: Tensor | None,  # [M, N]
    q: Tensor,  # [B, H, Nq, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    out: Tensor,  # [B, H, Nq, D]
    lse: Tensor,  # [B, H, Nq]
    *,
    scale: float,
    bias: Tensor | None = None,  # broadcastable to [B, H, Nq, N]
    image: Tensor | None = None,  # [M]
    signed: bool = False,
    need_qk: bool = True,
    need_v: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of the rollout together with the gradients of attention, for M (image, target) pairs.

    Several targets of an image share its q, k, v, bias, out and lse: row m belongs to image `image[m]` (int64), by
    default to image m. Probabilities are rebuilt tile by tile from `lse`; memory is linear in N.

    `scale`, `bias` and `signed` are those of the forward pass. What is not needed is not computed.

    Returns:
        dq [M, H, Nq, D] and dk [M, H, N, D] ([0] unless `need_qk`), dv [M, H, N, D] ([0] unless `need_v`), each over
        token-major memory, and the relevance that leaves, gate * (row Cbar) [M, N], in float64 for float64 models,
        else float32.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    library.load()
    library.require_kernel("attention_backward", q)
    dq, dk, dv, row_out = torch.ops.fga_fast.attention_backward(
        grad_out, row, gate, q, k, v, _placed("attention_backward", bias, q), out, lse, image, scale, signed, need_qk,
        need_v,
    )  # fmt: skip
    return dq, dk, dv, row_out


def _placed(op: str, bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias with four dims: broadcasting adds leading dims of size 1, and the op needs to see them."""
    if bias is None:
        return None
    if bias.device != q.device:
        raise RuntimeError(f"{op}: bias is on {bias.device}, expected {q.device} like q; move it there")
    return bias[(None,) * (4 - bias.dim())]


def _token_major(like: Tensor, shape: tuple[Any, ...]) -> Tensor:
    images, heads, tokens, width = shape
    return like.new_empty(images, tokens, heads, width).transpose(1, 2)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, carrier: Tensor, bias: Tensor | None, scale: float, gated: bool, signed: bool,
    constant_map: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    images, heads, queries, width = q.shape
    lse = q.new_empty(images, heads, queries, dtype=relevance_dtype(q.dtype))
    carried, port = carrier.new_empty(images, queries), carrier.new_empty(images, k.shape[2])
    return _token_major(q, (images, heads, queries, width)), lse, carried, port


def _attention_backward_fake(
    grad_out: Tensor, row: Tensor, gate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    out: Tensor, lse: Tensor, image: Tensor | None, scale: float, signed: bool, need_qk: bool, need_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, heads, queries, width = grad_out.shape
    keys = k.shape[2]

    def gradient(wanted: bool, tokens: int) -> Tensor:
        return _token_major(q, (rows, heads, tokens, width)) if wanted else q.new_empty(0)

    return gradient(need_qk, queries), gradient(need_qk, keys), gradient(need_v, keys), row.new_empty(rows, keys)


def _attention_backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], grad_out: Tensor, row: Tensor, gate: Tensor | None, q: Tensor,
    k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, image: Tensor | None, *flags: Any,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:  # fmt: skip
    """K targets of the same images are one call with K * M rows; what they share is neither copied nor expanded."""
    count = info.batch_size
    of_images = [q, k, v, out, lse]
    dims = [*in_dims[3:6], *in_dims[7:9]]
    apart = in_dims[6] is not None or any(dim is not None for dim in dims)
    if apart:
        of_images = [library.fold(t, dim, count) for t, dim in zip(of_images, dims, strict=True)]
    images = len(of_images[0]) // count if apart else len(q)
    if apart and bias is not None:
        each = bias if in_dims[6] is None else bias.movedim(in_dims[6], 0)
        bias = library.fold(each.expand(count, images, *each.shape[-3:]), 0, count)
    image = library.fold_image(image, in_dims[9], q, count, images, apart)
    outputs = torch.ops.fga_fast.attention_backward(
        library.fold(grad_out, in_dims[0], count), library.fold(row, in_dims[1], count),
        None if gate is None else library.fold(gate, in_dims[2], count),
        *of_images[:3], bias, *of_images[3:], image, *flags,
    )  # fmt: skip
    wanted = [t.dim() > 1 for t in outputs]  # an output that was not wanted is [0] and has no rows
    return (
        tuple(library.unfold(t, count) if given else t for t, given in zip(outputs, wanted, strict=True)),
        tuple(0 if given else None for given in wanted),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, carrier, bias, ctx.scale, ctx.gated, ctx.signed, ctx.constant_map = inputs
    if ctx.needs_input_grad[4]:
        raise ValueError("attention: bias requires a gradient, which this op does not compute; pass bias.detach()")
    ctx.save_for_backward(q, k, v, bias, output[0], output[1])
    ctx.carrier_dtype = carrier.dtype
    ctx.mark_non_differentiable(output[1])
    # A gradient that does not arrive stays None: zeros would be read as a gate of zero.
    ctx.set_materialize_grads(False)


def _attention_grad(
    ctx: Any, grad_out: Tensor | None, _grad_lse: Tensor | None, row: Tensor | None, gate: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, bias, out, lse = ctx.saved_tensors
    if grad_out is None and row is None:  # a backward pass that ends above
        return (None,) * 9
    if ctx.gated and gate is None and row is not None:
        raise RuntimeError("attention: no gate arrived at the port of an attention called with gated=True")
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if row is None:
        row = out.new_zeros(q.shape[0], q.shape[2], dtype=ctx.carrier_dtype)
    need_qk, need_v = any(ctx.needs_input_grad[:2]) and not ctx.constant_map, ctx.needs_input_grad[2]
    dq, dk, dv, row_out = torch.ops.fga_fast.attention_backward(
        grad_out, row, gate if ctx.gated else None, q, k, v, bias, out, lse, None, ctx.scale, ctx.signed, need_qk,
        need_v,
    )  # fmt: skip
    of_map = (dq, dk) if need_qk else (None, None)
    return *of_map, dv if need_v else None, row_out, *([None] * 5)


@library.at_load
def _register() -> None:
    torch.library.register_fake("fga_fast::attention", _attention_fake)
    torch.library.register_autograd("fga_fast::attention", _attention_grad, setup_context=_save)
    library.register_rules("attention_backward", _attention_backward_fake, _attention_backward_vmap)
    attention_cuda.register_fake()
    if library.has_cuda_kernel("attention_relevance"):
        attention_cuda.register()
