"""What lies between calls and graphs: batches filled up and cut, results moved together."""

from __future__ import annotations

import torch
from torch import Tensor

from fga_fast.graph.outputs import in_batches, packed, unpacked


def test_results_are_moved_together() -> None:
    tensors = [
        torch.randn(3, 5), torch.tensor([[1, 2], [3, 4]]), torch.randn(2, 4).bfloat16().t(), torch.zeros(2, 0, 3),
        torch.tensor([True, False, True]), torch.randn(7, dtype=torch.float64),
    ]  # fmt: skip
    flat = packed(tensors)
    assert flat.dtype == torch.uint8
    found = unpacked(flat.clone(), [torch.empty_like(tensor, device="meta") for tensor in tensors])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, tensors, strict=True))
    assert not any(tensor.storage_offset() * tensor.element_size() % 64 for tensor in found)


def test_batches_are_filled_and_cut() -> None:
    sizes: list[int] = []

    def double(size: int, given: tuple[Tensor, ...]) -> list[Tensor]:
        assert all(len(t) == size for t in given)
        sizes.append(size)
        return [given[0] * 2, given[0] + given[1]]

    x = torch.arange(11.0)
    a, b = in_batches(double, (1, 4), (x, -x))
    assert torch.equal(a, 2 * x) and not b.any() and sizes == [4, 4, 4]
    sizes.clear()
    in_batches(double, (1, 4), (x[:1], x[:1]))
    assert sizes == [1]
