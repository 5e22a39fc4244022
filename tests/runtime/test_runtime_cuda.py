"""The C++ session on a CUDA device: images in host memory and in device memory give Python's numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import packages
import pytest
import torch
from session_case import MARKS, close, run, written

pytestmark = [*MARKS]
# Where a device is required, a missing one is a failure.
if os.environ.get("FGA_FAST_REQUIRE_CUDA") != "1":
    pytestmark.append(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def test_images_in_host_and_in_device_memory(consumer: Path, tmp_path: Path) -> None:
    """Five images in batches of two. In float64, where convolutions are not rounded to TF32."""
    explainer: Any = packages.explainer(torch.float64, "cuda", backend="composite")
    package = explainer.export(tmp_path / "x.pt2", packages.images(2).cuda())
    images = packages.images(5, torch.float32)
    images.numpy().tofile(tmp_path / "images")
    found = {}
    for memory in ("host", "device"):
        out = tmp_path / memory
        run(consumer, memory, "1", tmp_path / "images", *map(str, images.shape), out, package)
        found[memory] = np.fromfile(out)
    expected = written(explainer(images.double().cuda()))
    close(found["host"], expected)
    close(found["device"], expected)
