"""One forward pass with its attention maps and residual streams kept, on a model that is left as it came.

Attention is seen in three forms: `scaled_dot_product_attention`, which is computed with explicit probabilities here;
`nn.MultiheadAttention`, which is opened up into that; and attention that the model computes itself, whose probabilities
are what its softmax returns.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fga_fast.engine.torch_functions import Function, FunctionMode, Kind, Operation
from fga_fast.models.block_io import ForwardPass, replace_input, with_stream
from fga_fast.models.layout import ModelLayout
from fga_fast.models.multihead import open_multi_head_attention
from fga_fast.precision import relevance_dtype
from fga_fast.reference.attention import attention
from fga_fast.reference.conservative import Conservative


@dataclass
class Recording:
    """Tensors of one forward pass, still attached to its graph."""

    passed: ForwardPass
    dtype: torch.dtype  # of relevance
    constant_maps: bool = False  # attention maps are constants of the backward pass (conservative)
    wanted: Container[int] = ()  # blocks whose inputs are kept
    maps: dict[int, Tensor] = field(default_factory=dict)  # block -> A [B, H, N, N]
    inputs: dict[int, Tensor] = field(default_factory=dict)  # block -> x_{l-1}, its input, [B, N, C] or [N, B, C]
    streams: dict[int, Tensor] = field(default_factory=dict)  # block -> x_l, its output, likewise
    pool: Tensor | None = None  # [B, H, 1, tokens], the attention pool's A

    @property
    def layout(self) -> ModelLayout:
        """Of the model."""
        return self.passed.layout

    def batch_first(self, stream: Tensor) -> Tensor:  # [B, N, C] or [N, B, C] -> [B, N, C]
        """A residual stream, images first."""
        return stream.transpose(0, 1) if self.layout.tokens_first else stream

    def keep(self, probabilities: Tensor) -> Tensor:  # [B, H, Nq, N] -> the same, to go on with
        """Keep A of the block that is running, or of the pool.

        A constant A is a leaf of the graph: nothing goes through it to q and k, and its own gradient is still
        `dA = dO v^T`. The first block's A is a leaf in any case, where the graph begins.
        """
        block = self.passed.block
        if self.constant_maps:
            probabilities = probabilities.detach()
        if not probabilities.requires_grad:
            probabilities.requires_grad_()
        if block is None:
            self.pool = probabilities
        else:
            self.maps[block] = probabilities
        return probabilities


class _Mode(FunctionMode):
    """Sees every attention of the blocks and of the pool, and keeps its probabilities."""

    def __init__(self, record: Recording, conservative: Conservative | None) -> None:
        super().__init__(record.passed)
        self._record, self._passed = record, record.passed
        self.handlers |= {
            Kind.ATTENTION: self._attend,
            Kind.MULTI_HEAD_ATTENTION: self._open,
            Kind.SOFTMAX: self._softmax,
            **({} if conservative is None else conservative.handlers),
        }

    def _open(
        self,
        _operation: Operation,
        func: Function,
        query: Tensor,  # [Nq, B, C]
        key: Tensor,  # [N, B, C]
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._passed.is_tapped(len(query), len(key)):
            with self:
                return open_multi_head_attention(query, key, *args, **kwargs)
        found = func(query, key, *args, **kwargs)
        self._passed.pass_by(found[0], len(query), len(key))
        return found

    def _attend(
        self,
        _operation: Operation,
        func: Function,
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
        passed = self._passed
        if not passed.is_tapped(query.shape[-2], key.shape[-2]):
            settings = {"scale": scale, "enable_gqa": enable_gqa}
            outside: Tensor = func(query, key, value, attn_mask, dropout_p, is_causal, **settings)
            passed.pass_by(outside, query.shape[-2], key.shape[-2])
            return outside
        passed.check_call(attn_mask, dropout_p, is_causal)
        if enable_gqa:
            key, value = passed.share_heads(query, key, value)
        passed.attend(query.shape, key.shape)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        _, probabilities = attention(query, key, value, scale, attn_mask)
        out = self._record.keep(probabilities).to(value.dtype) @ value
        if passed.block is None:
            passed.pool = out
        return out

    def _softmax(self, _operation: Operation, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Keeps the attention of a block that computes it itself: [B, H, Nq, N] or [B H, Nq, N]."""
        maps: Tensor = func(input, *args, **kwargs)
        by_head = self._passed.map_of(maps, kwargs.get("dim", args[0] if args else None))
        if by_head is None:
            return maps
        kept = self._record.keep(by_head)
        if self._passed.block is None:
            self._passed.pool = kept
        return kept if maps.dim() == 4 else kept.flatten(0, 1)


def _hooks(record: Recording, index: int, conservative: Conservative | None) -> tuple[Function, Function]:
    """What happens before and after a block.

    Its input and output are kept, and copies of them handed on, so that a model that adds in place changes the copies.
    """
    owner = threading.get_ident()  # the hooks are on a shared model; in other threads they must do nothing
    passed = record.passed

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if threading.get_ident() != owner:
            return None
        passed.enter(index)
        if index not in record.wanted:
            return None
        x, replaced = replace_input((args, kwargs or {}), passed.stream, passed.layout, passed.images, passed.where)
        record.inputs[index] = x.clone() if x.requires_grad else x.clone().requires_grad_(index == passed.start)
        return replaced(record.inputs[index].clone())

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        if conservative is not None:
            conservative.forget()
        x = passed.leave(index, output)
        if x is None:
            return None
        record.streams[index] = x
        passed.stream = x.clone()
        return with_stream(output, passed.stream)

    return enter, leave


@contextmanager
def recording(
    layout: ModelLayout, images: Tensor, conservative: bool = False, start: int = 0, wanted: Container[int] = ()
) -> Iterator[Recording]:
    """Follows one forward pass of the calling thread; hooks and modes are gone afterwards, whatever happens.

    Args:
        layout: where the model's blocks are.
        images: [B, channels, H, W] that the pass is of.
        conservative: the backward pass of what is recorded is the conservative one (reference/conservative.py).
        start: first block that is recorded; its map is, or its input if that is wanted, where the graph begins.
        wanted: blocks whose inputs are recorded too.

    Raises:
        TapeError: the pass is not what the layout promises, or holds what cannot be explained.
    """
    record = Recording(ForwardPass(layout, len(images), start), relevance_dtype(images.dtype), conservative, wanted)
    rules = Conservative(record.passed) if conservative else None
    mode = _Mode(record, rules)
    handles = []
    try:
        for index, block in enumerate(layout.blocks):
            enter, leave = _hooks(record, index, rules)
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
        with torch.enable_grad(), mode:
            yield record
    finally:
        for handle in handles:
            handle.remove()
        mode.clear()
