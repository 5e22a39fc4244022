"""Where training takes its tokens from: the same batch for the same step, in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fga_fast.io.digest import bytes_of


class Tokens(Protocol):
    """Residual-stream tokens of one model after some blocks, without end.

    Attributes:
        blocks: numbers of the blocks, from 0.
        d_model: width C of the stream.
        about: what the tokens depend on, as JSON can hold it (model, checksum, transform, seed, ...). A run that goes
            on compares it, and SAEs keep it in their metadata.
    """

    blocks: tuple[int, ...]
    d_model: int
    about: Mapping[str, Any]

    def sample(self, count: int) -> dict[int, Tensor]:
        """Block -> about `count` tokens [T, C] float32, the same in every call, for scales and starting points."""

    def batches(self, size: int, start: int = 0) -> Iterator[dict[int, Tensor]]:
        """Batches of step `start` and on: block -> [T, C] float32, T near `size`; row t is the same token for all.

        Batch s is the same whatever the step that the iterator starts at.
        """


class TensorTokens:
    """Tokens that are in memory, in a new random order each time that all were seen.

    Args:
        streams: block -> [T, C], the same tokens for each.
        seed: of the order.
        about: see `Tokens`; the seed and a checksum of the streams are added.

    Raises:
        ValueError: no block, shapes that differ, or fewer than two tokens.
    """

    def __init__(self, streams: Mapping[int, Tensor], *, seed: int = 0, about: Mapping[str, Any] | None = None) -> None:
        shapes = {tuple(x.shape) for x in streams.values()}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or shape[0] < 2:
            found = {block: list(x.shape) for block, x in streams.items()}
            raise ValueError(f"streams: expected the same shape [T, C] with T > 1 for every block, got {found}")
        self._streams, self._seed = dict(streams), seed
        self._count, self.d_model = shape
        self.blocks = tuple(streams)
        digest = hashlib.sha256()
        for block, x in self._streams.items():
            digest.update(f"{block} {x.dtype}".encode())
            digest.update(bytes_of(x))
        own = {"tokens": self._count, "seed": seed, "sha256": digest.hexdigest()}
        self.about: Mapping[str, Any] = {**(about or {}), **own}

    def sample(self, count: int) -> dict[int, Tensor]:
        """See `Tokens`."""
        rows = self._order(0)[:count]
        return {block: x[rows].float() for block, x in self._streams.items()}

    def batches(self, size: int, start: int = 0) -> Iterator[dict[int, Tensor]]:
        """See `Tokens`; of `size` tokens each, or of all of them if there are fewer."""
        size = min(size, self._count)
        each = self._count // size  # batches an epoch; the rest of an epoch's tokens are left out
        step = start
        while True:
            order = self._order(step // each)
            for place in range(step % each, each):
                rows = order[place * size : (place + 1) * size]
                yield {block: x[rows].float() for block, x in self._streams.items()}
            step = (step // each + 1) * each

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(self._count, generator=torch.Generator().manual_seed(self._seed * 1_000_003 + epoch))
