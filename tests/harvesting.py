"""What the tests of harvests share: a small model, its images, what its blocks return, the run that a test kills."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from own_vit import GRID, WIDTH, own_vit
from PIL import Image
from torch import Tensor, nn

from fga_fast import Preprocess
from fga_fast.dataset.items import Item
from fga_fast.harvest import run as module
from fga_fast.harvest.activations import Activations
from fga_fast.harvest.run import harvest

PATCHES = GRID[0] * GRID[1]
SIZE = (16, 24)
PREPROCESS = Preprocess(SIZE, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
SHARD = 4 * PATCHES * WIDTH * 4  # bytes: four images of one block in float32


def model(**settings: Any) -> Any:
    return own_vit(**settings).float()


def items(count: int) -> list[Item]:
    generator = torch.Generator().manual_seed(4)
    return [Item(f"image {n}", torch.randn(3, *SIZE, generator=generator), n % 5) for n in range(count)]


def picture(number: int, pause: float = 0) -> Image.Image:
    time.sleep(pause)
    values = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return Image.fromarray(values)


def small(out: Path, given: Sequence[Item], blocks: Sequence[int] = (0, 2), **settings: Any) -> Activations:
    """A harvest of the small model, two images in a batch."""
    usual: dict[str, Any] = {"batch_size": 2, "progress": False, "preprocess": PREPROCESS}
    own = settings.pop("model", None) or model()
    usual["layout"] = own.layout() if hasattr(own, "layout") else None
    return Activations(harvest(own, given, blocks, out=out, **(usual | settings)))


def run(out: Path, pause: float = 0) -> Path:
    """Twelve shards of two images from a model that is run on pictures."""
    given = [Item(f"image {n}", partial(picture, n, pause)) for n in range(24)]
    with mock.patch.object(module, "SHARD_BYTES", 1):
        return small(out, given, class_token=True).folder


def returned(own: Any, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """What blocks return for images, by the textbook: a forward hook on each; block -> [B, N, C]."""
    found: dict[int, Tensor] = {}

    def keep(block: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            found[block] = x.detach().clone()

        return hook

    handles = [own.layers[block].register_forward_hook(keep(block)) for block in blocks]
    with torch.no_grad():
        own(images)
    for handle in handles:
        handle.remove()
    first = own.returns == "tokens first"
    return {block: x.transpose(0, 1) if first else x for block, x in found.items()}
