"""A package of a tiny model for the tests of the C++ runtime; its metadata is written out by hand."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fga_fast import Explanation, ops
from fga_fast.io.images import Preprocess

MARKS = [
    pytest.mark.slow,
    # Without a compiler or CMake there is nothing to test, but CI has both.
    pytest.mark.skipif(shutil.which("cmake") is None and not os.environ.get("CI"), reason="no cmake"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch.export about itself
]
BATCH, CHANNELS, HEIGHT, WIDTH, PATCH, CLASSES, LAYER = 3, 3, 32, 48, 16, 5, 6
GRID, SHAPE = (HEIGHT // PATCH, WIDTH // PATCH), (CHANNELS, HEIGHT, WIDTH)
PREPROCESS = Preprocess((HEIGHT, WIDTH), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), crop_pct=0.875, interpolation="bicubic")


class TinyExplained(nn.Module):
    """One attention block, its logits and something like an explanation, with the package's outputs in their order."""

    def __init__(self, width: int = 16, features: int = 40) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def weight(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator), requires_grad=False)

        self.patches = weight(width, CHANNELS, PATCH, PATCH, scale=0.05)
        self.qkv = weight(width, 3 * width, scale=0.3)
        self.head = weight(CLASSES, width, scale=0.5)
        self.encoder, self.decoder = weight(features, width, scale=1), weight(features, width, scale=1)
        self.bias = weight(features, scale=0.1)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, ...]:
        x = nn.functional.conv2d(images, self.patches, stride=PATCH).flatten(2).transpose(1, 2)  # [B, P, C]
        q, k, v = (x @ self.qkv).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).contiguous()  # [B, 2, P, C/2]
        carrier = x.new_zeros(x.shape[:2])
        attended = torch.ops.fga_fast.attention(q, k, v, carrier, None, 0.35, False, True, False, False)[0]
        x = (x + attended.transpose(1, 2).flatten(2)).contiguous()
        logits = x.mean(1) @ self.head.T
        if targets is None:
            targets = logits.argmax(-1)
        values = logits.gather(1, targets[:, None])[:, 0]
        gradient = self.head[targets][:, None].expand_as(x).contiguous()
        none: Any = None
        scores = torch.ops.fga_fast.score(
            x, gradient, none, self.encoder, self.bias, self.decoder, none, none, none, none, 0, 0, True, 0, 0,
        )[0]  # fmt: skip
        gates = torch.ops.fga_fast.gate(scores, 10.0, 1.0)
        relevance = (gates * (gradient * x).sum(-1)).clamp(min=0)
        blocks = torch.stack([relevance, 2 * relevance], 1)
        return logits, targets, values, relevance, scores, gates, blocks


def metadata(package: Path, given: bool, dtype: str) -> dict[str, Any]:
    """What lies beside the package."""
    maps = [BATCH, GRID[0] * GRID[1]]
    shapes = {"logits": [BATCH, CLASSES], "targets": [BATCH], "values": [BATCH], "relevance": maps}
    shapes |= {f"scores.{LAYER}": maps, f"gates.{LAYER}": maps, "blocks": [BATCH, 2, maps[1]]}
    outputs = [
        {"name": name, "shape": shape, "dtype": "int64" if name == "targets" else dtype}
        for name, shape in shapes.items()
    ]
    names = ("mean", "std", "crop_pct", "interpolation")
    return {
        "format": "fga_fast package", "format_version": 2, "device": "cpu", "dtype": dtype,
        "batch": BATCH, "channels": CHANNELS, "height": HEIGHT, "width": WIDTH, "grid": list(GRID),
        "preprocessing": {name: getattr(PREPROCESS, name) for name in names},
        "classes": CLASSES, "class_names": ["ant", "bee", "cat", "dog", "émeu"],
        "target_mode": "given" if given else "predicted", "layers": [LAYER], "outputs": outputs,
        "backend": "native", "method": "rollout", "backward": "exact",
        "start_layer": 0, "gate": {"mode": "combined", "base": 10.0, "slope": 1.0},
        "versions": {"fga_fast": "0.1.0", "torch": torch.__version__},
        "machine": {"architecture": platform.machine(), "features": []},
        "sha256": hashlib.sha256(package.read_bytes()).hexdigest(),
    }  # fmt: skip


def export(path: Path, given: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Writes path and the .json beside it."""
    ops.load()
    model = TinyExplained().to(dtype)
    inputs: tuple[Tensor, ...] = (torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH, dtype=dtype),)
    if given:
        inputs += (torch.zeros(BATCH, dtype=torch.int64),)
    with torch.no_grad():
        program = torch.export.export(model, inputs)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    about = metadata(path, given, str(dtype).removeprefix("torch."))
    path.with_suffix(".json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    return path


def expected(images: Tensor, targets: Tensor | None = None) -> Explanation:
    """Python's explanation of the same images."""
    model = TinyExplained().to(images.dtype)
    logits, targets, values, relevance, scores, gates, blocks = model(images, targets)
    maps = {LAYER: scores}, {LAYER: gates}
    return Explanation(relevance, logits, targets, GRID, SHAPE[1:], *maps, values=values, blocks=blocks)


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
    np.testing.assert_allclose(found, tensor.numpy(), rtol=1e-5, atol=1e-5)
