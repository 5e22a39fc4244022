"""What the tests of the C++ session share: when they run, pictures, commands, and how numbers are compared."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_vit import IMAGES
from PIL import Image
from torch import Tensor

from fga_fast import Explanation

ROOT = Path(__file__).resolve().parents[2]
MARKS = [
    pytest.mark.slow,
    # Without a compiler or CMake there is nothing to test, but CI has both.
    pytest.mark.skipif(shutil.which("cmake") is None and not os.environ.get("CI"), reason="no cmake"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch.export about itself
]
SHAPE = IMAGES[1:]
BATCH = 2  # of `predicted_package`


def random_picture(generator: np.random.Generator) -> Image.Image:
    size = generator.choice([1, 2, 31, 32, 48, 64, 100, 257], 2)
    pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels) if generator.random() < 0.7 else Image.fromarray(pixels[..., 0])


def as_array(picture: Image.Image) -> Any:  # -> [H, W, 3] or [H, W, 1]
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def run(*command: str | Path, **settings: Any) -> str:
    """What a command prints; its error output is the failure's message."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, **settings)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
    return result.stdout


def close(found: Any, tensor: Tensor) -> None:
    np.testing.assert_allclose(found, tensor.cpu().numpy(), rtol=1e-5, atol=1e-5)


def written(e: Explanation) -> Tensor:
    """The numbers that the consumer writes, in its order."""
    maps = [part for layer in sorted(e.scores) for part in (e.scores[layer], e.gates[layer])]
    parts: list[Any] = [e.logits, e.targets, e.values, e.relevance, *maps, e.heatmap()]
    return torch.cat([part.double().cpu().flatten() for part in parts])
