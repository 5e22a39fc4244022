"""Results of a replayed graph, which are moved together."""

from __future__ import annotations

import torch

from fga_fast.graph.outputs import packed, unpacked


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
