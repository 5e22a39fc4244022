"""Training straight from a model: its residual streams are computed for each step and never stored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from fga_fast.dataset.items import Item, check_items, load, stable_number
from fga_fast.harvest.checksum import model_checksum
from fga_fast.harvest.source import source_of
from fga_fast.io.images import Preprocess
from fga_fast.io.window import Window
from fga_fast.models.layout import ModelLayout

logger = logging.getLogger(__name__)


class LiveTokens:
    """Patch tokens of a model that runs on a batch of images for each step; implements `Tokens`.

    A batch holds all B x P patches of the step's images, whatever `size` is asked for: choose the number of images.
    Tokens stay on the model's device. Every epoch runs the model again, so a harvest is faster from the second on.

    Args:
        model: any model that `Explainer` takes, in eval mode. Not changed.
        layout: where its blocks and tokens are; None: `find_layout(model)`.
        blocks: numbers of the blocks, from 0.
        images: step -> [B, channels, H, W] as the model takes them, the same in every call, such as `ImageBatches`.
        about: what else the tokens depend on, as JSON can hold it: which images, their transform and order. "model"
            is the model's name for the reader, by default that of its class.

    Raises:
        TypeError, ValueError: the model, its mode, the layout or a block does not fit; the message says what to do.
    """

    def __init__(
        self, model: nn.Module, layout: ModelLayout | None, blocks: Sequence[int], images: Callable[[int], Tensor],
        about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        first = images(0)
        if not isinstance(first, Tensor) or first.dim() != 4 or not len(first):
            got = [*first.shape] if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(f"images: expected a tensor [B, channels, H, W] for step 0, got {got}")
        self._source, self._images = source_of(model, blocks, layout, (first.shape[2], first.shape[3])), images
        self.blocks, self.d_model = self._source.blocks, self._source.d_model
        self.about: Mapping[str, Any] = {
            "model": type(model).__name__,
            **(about or {}),
            "model_checksum": model_checksum(model),
            "blocks": [*self.blocks],
        }

    def sample(self, count: int) -> dict[int, Tensor]:
        """See `Tokens`; the tokens of steps 0, 1, ..., as many as are needed, cut to `count`."""
        parts: list[dict[int, Tensor]] = []
        for part in self.batches(count):
            parts.append(part)
            count -= len(part[self.blocks[0]])
            if count <= 0:
                break
        found = {block: torch.cat([part[block] for part in parts]) for block in self.blocks}
        return {block: x[: len(x) + min(count, 0)] for block, x in found.items()}

    def batches(self, size: int, start: int = 0) -> Iterator[dict[int, Tensor]]:
        """See `Tokens`; `size` counts for nothing, a batch has the B x P patches of its images.

        Raises:
            ValueError: a stream holds NaN or Inf, or images of another size; the message names the step.
        """
        step = start
        while True:
            yield self._batch(step)
            step += 1

    def _batch(self, step: int) -> dict[int, Tensor]:
        images, layout = self._images(step), self._source.layout
        if tuple(images.shape[1:]) != (layout.in_chans, *self._source.image_size):
            raise ValueError(f"images: expected the size of step 0 for step {step}, got {[*images.shape]}")
        streams, _ = self._source.run(images)
        names = [f"{row} of step {step}" for row in range(len(images))]
        for block, x in streams.items():
            self._source.check_finite(block, x, names)
        return {block: x[:, layout.prefix_tokens :].flatten(0, 1).float() for block, x in streams.items()}


class ImageBatches:
    """The images of a data set as batches for `LiveTokens`, in a new random order in each epoch.

    While a batch is used, threads read the next. An image that cannot be read is left out of its batch, and logged.

    Args:
        items: the images; masks and boxes are not read.
        preprocess: how pictures become the model's input; tensors are taken as they are.
        batch_size: images of a batch, at most as many as there are; the rest of an epoch's images are left out.
        seed: of the order.
        window: how values of more than 8 bits are read, see `load_image`.
        workers: threads.

    Raises:
        ValueError: no items, or a number out of its range.
    """

    def __init__(
        self, items: Sequence[Item], preprocess: Preprocess | None = None, *, batch_size: int = 8, seed: int = 0,
        window: Window | None = None, workers: int = 2,
    ) -> None:  # fmt: skip
        check_items(list(items))
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch_size, seed: expected at least 1 and 0, got {batch_size} and {seed}")
        self._items, self._size, self._seed = list(items), min(batch_size, len(items)), seed
        self._preprocess, self._window = preprocess, window
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fga-fast reads")
        self._coming: dict[int, list[Future[Tensor | None]]] = {}  # step -> its images

    def __call__(self, step: int) -> Tensor:
        """The images [B, channels, H, W] of a step.

        Raises:
            ValueError: none of them could be read.
        """
        coming = self._coming.pop(step, None) or self._submit(step)
        self._coming = {step + 1: self._submit(step + 1)}
        found = [image for one in coming if (image := one.result()) is not None]
        if not found:
            raise ValueError(f"items: no image of step {step} could be read; the log says why")
        return torch.stack(found)

    def _submit(self, step: int) -> list[Future[Tensor | None]]:
        each = len(self._items) // self._size
        generator = torch.Generator().manual_seed(stable_number("live", self._seed, step // each))
        place = step % each * self._size
        rows = torch.randperm(len(self._items), generator=generator)[place : place + self._size].tolist()
        return [self._pool.submit(self._load, self._items[row]) for row in rows]

    def _load(self, item: Item) -> Tensor | None:
        try:
            return load(item, self._preprocess, self._window).image
        except Exception as error:  # whatever a file, or a user's function, does
            logger.warning("left out %s: %s: %s", item.key, type(error).__name__, error)
            return None
