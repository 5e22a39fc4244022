"""What the tests of all adapters share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from explaining import PIXELS
from torch import Tensor, nn
from torch.nn import functional


def images(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, *PIXELS, generator=torch.Generator().manual_seed(seed))


def upsampled(relevance: Tensor) -> Tensor:  # [B, 6] -> [B, 1, 32, 48]
    maps = relevance.reshape(-1, 1, 2, 3)
    return functional.interpolate(maps, size=PIXELS[1:], mode="bilinear", align_corners=False)


def assert_shared(model: nn.Module, explain: Callable[[Tensor], Any]) -> None:
    """Threads get what one alone gets, and the model stays as it came."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [images(seed=seed) for seed in range(4)]
    expected = [np.asarray(explain(batch)) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = [np.asarray(maps) for maps in pool.map(explain, batches)]
    np.testing.assert_array_equal(found, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
