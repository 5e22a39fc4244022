"""One forward pass with its attention maps and residual streams kept, on a model that is left as it came.

Attention is seen in three forms: `scaled_dot_product_attention`, which is computed with explicit probabilities here;
`nn.MultiheadAttention`, which is opened up into that; and attention that the model computes itself, whose probabilities
are what its softmax returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fga_fast.models.block_io import TapeError, replace_input, stream_of, with_stream
from fga_fast.models.layout import ModelLayout
from fga_fast.models.multihead import open_multi_head_attention
from fga_fast.precision import relevance_dtype
from fga_fast.reference.attention import attention
from fga_fast.reference.conservative import ConservativeMode

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_DROPOUT = (F.dropout, torch.dropout)


@dataclass
class Recording:
    """Tensors of one forward pass, still attached to its graph."""

    layout: ModelLayout
    images: int  # B
    dtype: torch.dtype  # of relevance
    constant_maps: bool = False  # attention maps are constants of the backward pass (conservative)
    maps: dict[int, Tensor] = field(default_factory=dict)  # block -> A [B, H, N, N]
    inputs: dict[int, Tensor] = field(default_factory=dict)  # block -> x_{l-1}, its input, [B, N, C] or [N, B, C]
    streams: dict[int, Tensor] = field(default_factory=dict)  # block -> x_l, its output, likewise
    pool: Tensor | None = None  # [B, H, 1, tokens], the attention pool's A
    unknown_inputs: dict[int, str] = field(default_factory=dict)  # block -> why its input could not be told
    last: Tensor | None = None  # what the block that ended last handed on
    block: int | None = None  # block that is running; None between, before and after blocks
    finished: int = 0  # blocks that have run

    def batch_first(self, stream: Tensor) -> Tensor:  # [B, N, C] or [N, B, C] -> [B, N, C]
        return stream.transpose(0, 1) if self.layout.tokens_first else stream

    def at_pool(self, queries: int, keys: int) -> bool:
        """Whether attention of this size is the pool's: after the blocks, one query over the tokens that are pooled."""
        start, stop = self.layout.pooled
        after = self.finished == len(self.layout.blocks)
        return after and queries == 1 and keys > 1 and keys in (stop - start, self.layout.tokens)

    def where(self) -> str:
        """What is running, for error messages."""
        if self.block is None:
            return "the pooling head"
        return f"block {self.block} ({type(self.layout.blocks[self.block]).__name__})"

    def keep(self, probabilities: Tensor) -> Tensor:  # [B, H, Nq, N] -> the same, to go on with
        """Keep A of the block that is running, or of the pool.

        A constant A is a leaf of the graph: nothing goes through it to q and k, and its own gradient is still
        `dA = dO v^T`.
        """
        if self.constant_maps:
            probabilities = probabilities.detach().requires_grad_()
        if self.block is None:
            if self.pool is not None:
                raise TapeError("model: expected at most one attention call outside the blocks, got a second one")
            self.pool = probabilities
        elif self.block in self.maps:
            raise TapeError(f"model: expected one attention call in block {self.block}, got a second one")
        else:
            self.maps[self.block] = probabilities
        return probabilities


class _AttentionMode(TorchFunctionMode):
    """Sees every attention of the blocks and of the pool, and keeps its probabilities."""

    def __init__(self, record: Recording) -> None:
        super().__init__()
        self.record = record
        self._explicit: set[int] = set()  # blocks whose attention was a scaled_dot_product_attention

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        record = self.record
        if record.block is None and record.finished < len(record.layout.blocks):
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward and self._is_seen(*args, **kwargs):
            with self:
                return open_multi_head_attention(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func in _DROPOUT and record.block is not None:
            self._check_dropout(*args, **kwargs)
        out = func(*args, **kwargs)
        return self._softmax(out, *args, **kwargs) if func in _SOFTMAX else out

    def _is_seen(self, query: Tensor, key: Tensor, *_rest: Any, **_more: Any) -> bool:  # [Nq, B, C] [N, B, C]
        return self.record.block is not None or self.record.at_pool(len(query), len(key))

    def _attend(
        self,
        query: Tensor,  # [B, H, Nq, D]
        key: Tensor,  # [B, H, N, D], with enable_gqa fewer heads
        value: Tensor,  # [B, H, N, Dv], likewise
        attn_mask: Tensor | None = None,  # broadcastable to [B, H, Nq, N]
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`out = A v` with `A = softmax(scale * q k^T + mask)`; grouped queries share repeated keys and values."""
        record = self.record
        if record.block is None and not record.at_pool(query.shape[-2], key.shape[-2]):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        where = record.where()
        if is_causal or (attn_mask is not None and not attn_mask.is_floating_point()):
            what = "causal" if is_causal else f"masked by {attn_mask.dtype}"  # type: ignore[union-attr]
            raise TapeError(f"model: attention in {where} is {what}; only masks that are added can be explained")
        if dropout_p > 0:
            raise TapeError(f"model: attention in {where} has dropout {dropout_p} active; call model.eval() first")
        if query.dim() != 4 or key.dim() != 4:
            raise TapeError(
                f"model: attention in {where}: expected queries and keys [B, H, N, D], got {tuple(query.shape)} and "
                f"{tuple(key.shape)}"
            )
        if enable_gqa:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, probabilities = attention(query, key, value, scale, attn_mask)
        kept = record.keep(probabilities)
        if record.block is not None:
            self._explicit.add(record.block)
        return kept.to(value.dtype) @ value if record.constant_maps else out

    def _softmax(self, out: Tensor, input: Tensor, dim: int | None = None, *_rest: Any, **_more: Any) -> Tensor:
        """Keeps `out` if it is the attention of a block that computes it itself: [B, H, Nq, N] or [B H, Nq, N]."""
        record, tokens = self.record, self.record.layout.tokens
        if out.dim() not in (3, 4) or dim not in (-1, out.dim() - 1) or record.block in self._explicit:
            return out
        queries, keys = out.shape[-2:]
        if not (record.at_pool(queries, keys) if record.block is None else queries == keys == tokens):
            return out
        if out.dim() == 4:
            return record.keep(out)
        if not record.images or len(out) % record.images:
            return out
        return record.keep(out.view(record.images, -1, queries, keys)).flatten(0, 1)

    def _check_dropout(self, input: Tensor, p: float = 0.5, training: bool = True, *_rest: Any, **_more: Any) -> None:
        train = _more.get("train", training)  # its name in torch.dropout
        if train and p > 0:
            raise TapeError(f"model: dropout {p} is active in {self.record.where()}; call model.eval() first")


def _hooks(record: Recording, index: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What happens before and after a block.

    Its input and output are kept, and copies of them handed on, so that a model that adds in place changes the copies.
    """
    owner = threading.get_ident()  # the hooks are on a shared model; in other threads they must do nothing

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if threading.get_ident() != owner:
            return None
        record.block = index
        try:
            x, replaced = replace_input((args, kwargs or {}), record.last, record.layout, record.images, record.where())
        except TapeError as error:  # which matters to those who ask for the inputs only
            record.unknown_inputs[index] = str(error)
            return None
        record.inputs[index] = x.clone()
        return replaced(record.inputs[index].clone())

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        record.block, record.finished = None, index + 1
        record.streams[index] = stream_of(output, f"block {index} ({type(module).__name__})")
        record.last = record.streams[index].clone()
        return with_stream(output, record.last)

    return enter, leave


@contextmanager
def recording(layout: ModelLayout, images: Tensor, conservative: bool = False) -> Iterator[Recording]:
    """Follows one forward pass of the calling thread; hooks and modes are gone afterwards, whatever happens.

    Args:
        layout: where the model's blocks are.
        images: [B, channels, H, W] that the pass is of.
        conservative: the backward pass of what is recorded is the conservative one (reference/conservative.py).
    """
    record = Recording(layout, len(images), relevance_dtype(images.dtype), constant_maps=conservative)
    handles = []
    try:
        for index, block in enumerate(layout.blocks):
            enter, leave = _hooks(record, index)
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
        with torch.enable_grad():
            if conservative:
                with ConservativeMode(record), _AttentionMode(record):
                    yield record
            else:
                with _AttentionMode(record):
                    yield record
    finally:
        for handle in handles:
            handle.remove()


def check_recording(record: Recording) -> None:
    """The forward pass must have been the one that the layout promised.

    Raises:
        TapeError: a block that did not run or without attention, or attention over other tokens.
    """
    layout = record.layout
    for index, block in enumerate(layout.blocks):
        name = f"block {index} ({type(block).__name__})"
        if index not in record.streams:
            raise TapeError(f"model: {name} did not run; each block must run once")
        if index not in record.maps:
            raise TapeError(
                f"model: expected one attention over {layout.tokens} tokens in {name}, got none: neither a "
                "scaled_dot_product_attention, nor an nn.MultiheadAttention, nor a softmax over [B, H, N, N]"
            )
        shape = record.maps[index].shape
        if shape[0] != record.images or shape[-2:] != (layout.tokens, layout.tokens):
            raise TapeError(
                f"model: expected attention over {layout.tokens} tokens of {record.images} images in {name}, got a map "
                f"of shape {list(shape)}"
            )


def check_pool(record: Recording, values: Tensor) -> None:  # values [B] or [B, K]
    """What `values` were pooled by must be what the layout says.

    Raises:
        TapeError: no attention pool was seen where one is expected, or the values read one where none is.
    """
    pooling, used = record.layout.pooling, False
    if record.pool is not None:  # some models run a pool that their classifier does not read
        gradients = torch.autograd.grad(values.sum(), record.pool, retain_graph=True, allow_unused=True)
        used = gradients[0] is not None
    if used != (pooling == "attention"):
        found = "one was found" if used else "none was found"
        raise TapeError(
            f"model: '{pooling}' pooling, but {found} of an attention with one query over the pooled tokens after the "
            "blocks; check the layout's pooling and pooled"
        )
