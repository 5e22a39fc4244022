"""A tensor's bytes, for checksums."""

from __future__ import annotations

from typing import Any

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The values' bytes in order, whatever the tensor's device, strides and dtype."""
    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)
