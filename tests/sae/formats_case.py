"""One SAE file made by a test: where it is, and what its format's own words say it computes."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fga_fast.sae import SparseAutoencoder

C, F, T = 6, 10, 40
DTYPE = torch.float64


@dataclass
class Case:
    path: Path
    codes: Callable[[Tensor], Tensor]  # [T, C] -> [T, F]
    decoder: Tensor  # [F, C]: a feature's code times this row is its share of the reconstruction
    reconstruct: Callable[[Tensor], Tensor]  # [T, C] -> [T, C], in the space of its argument
    metadata: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)


def draw(*shape: int, seed: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def changed(entries: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with these changes; a change to `...` leaves the entry out."""
    return {name: value for name, value in (entries | changes).items() if value is not ...}


def store(path: Path, state: dict[str, Tensor]) -> Path:
    """``state`` as a safetensors file, whose folder is made if it is missing."""
    path.parent.mkdir(exist_ok=True, parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def refused(path: Path, message: str = "", **options: Any) -> str:
    """The error of a file that is refused without allocating anything large."""
    with bounded_memory(), pytest.raises(ValueError) as caught:
        SparseAutoencoder.from_pretrained(path, **options)
    assert message in str(caught.value) and "allocate" not in str(caught.value)
    return str(caught.value)


def activations() -> Tensor:
    return draw(T, C, seed=99) * 1.5 + 0.3


def largest(z: Tensor, k: int) -> Tensor:
    """True at the k largest of each row, found one after another."""
    kept = torch.zeros_like(z, dtype=torch.bool)
    for row, mask in zip(z, kept, strict=True):
        for _ in range(k):
            best = max((f for f in range(len(row)) if not mask[f]), key=lambda f: float(row[f]))
            mask[best] = True
    return kept


@contextlib.contextmanager
def bounded_memory(more: int = 2 << 30) -> Iterator[None]:
    """Let the process take at most ``more`` bytes beyond what it has: allocating what a file announces would fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
