"""One forward pass with its attention maps and residual streams kept, on a model that is left as it came.

Attention is seen in three forms: `scaled_dot_product_attention`, which is computed with explicit probabilities here;
`nn.MultiheadAttention`, which is opened up into that; and attention that the model computes itself, whose probabilities
are what its softmax returns.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fga_fast.engine.function_mode import FunctionMode
from fga_fast.engine.torch_functions import Function
from fga_fast.models.block_io import Arguments, ForwardPass, replace_input
from fga_fast.models.layout import ModelLayout
from fga_fast.precision import relevance_dtype
from fga_fast.reference.attention import attention
from fga_fast.reference.conservative import Conservative
from fga_fast.sae.hold import Hold


@dataclass
class Recording:
    """Tensors of one forward pass, still attached to its graph."""

    passed: ForwardPass
    dtype: torch.dtype  # of relevance
    conservative: bool = False  # attention maps are constants of the backward pass
    wanted: Container[int] = ()  # blocks whose inputs are kept
    uneven: tuple[str, ...] = ()  # a notice, if the head weighs tokens unevenly
    maps: dict[int | None, Tensor] = field(default_factory=dict)  # block -> A [B, H, N, N]; None: the pool's, Nq = 1
    inputs: dict[int, Tensor] = field(default_factory=dict)  # block -> x_{l-1}, its input, [B, N, C] or [N, B, C]
    streams: dict[int, Tensor] = field(default_factory=dict)  # block -> x_l, its output, likewise

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
        if self.conservative:
            probabilities = probabilities.detach()
        if not probabilities.requires_grad:
            probabilities.requires_grad_()
        self.maps[self.passed.block] = probabilities
        return probabilities


class _Mode(FunctionMode):
    """Keeps the probabilities of every attention of the blocks and of the pool, and residual streams."""

    def __init__(self, record: Recording) -> None:
        super().__init__(record.passed)
        self._record = record
        self._rules = Conservative(record.passed) if record.conservative else None
        if self._rules is not None:
            self.handlers |= self._rules.handlers()

    def tap_attention(
        self, _function: Function, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """`out = A v` with `A = softmax(scale * q k^T + mask)`."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        _, probabilities = attention(query, key, value, scale, mask)
        return self._record.keep(probabilities).to(value.dtype) @ value

    def tap_map(self, maps: Tensor, _logits: Tensor) -> Tensor:
        """A itself."""
        return self._record.keep(maps)

    def is_own(self, leaf: Tensor) -> bool:
        """Maps and inputs where the graph begins are leaves."""
        return any(leaf is kept for kept in (*self._record.maps.values(), *self._record.inputs.values()))

    # Streams are kept, and copies of them handed on, so that a model that adds in place changes the copies.

    def tap_input(self, index: int, arguments: Arguments) -> Arguments | None:
        """Keeps x_{l-1} of a block in `wanted`."""
        record, passed = self._record, self.passed
        if index not in record.wanted:
            return None
        x, replaced = replace_input(arguments, passed.stream, passed.layout, passed.images, passed.where)
        record.inputs[index] = x.clone() if record.inputs else x.clone().requires_grad_()
        return replaced(record.inputs[index].clone())

    def tap_output(self, index: int, x: Tensor) -> Tensor:
        """Keeps x_l."""
        if self._rules is not None:
            self._rules.forget()
        self._record.streams[index] = x
        return x.clone()


@contextmanager
def recording(
    layout: ModelLayout, images: Tensor, conservative: bool = False, start: int = 0, wanted: Container[int] = (),
    held: Mapping[int, Hold] | None = None,
) -> Iterator[Recording]:  # fmt: skip
    """Follows one forward pass of the calling thread; hooks and modes are gone afterwards, whatever happens.

    Args:
        layout: where the model's blocks are.
        images: [B, channels, H, W] that the pass is of.
        conservative: the backward pass of what is recorded is the conservative one (reference/conservative.py).
        start: first block that is recorded; its map is, or its input if that is wanted, where the graph begins.
        wanted: blocks whose inputs are recorded too.
        held: block -> SAE features that are held in the stream after it.

    Raises:
        TapeError: the pass is not what the layout promises, or holds what cannot be explained.
    """
    passed = ForwardPass(layout, len(images), start, {} if held is None else held)
    record = Recording(passed, relevance_dtype(images.dtype), conservative, wanted)
    with _Mode(record).following():
        yield record
