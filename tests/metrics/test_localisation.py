"""Localisation, by hand."""

from __future__ import annotations

import pytest
import torch

from fga_fast.metrics import localisation

RELEVANCE = torch.tensor([[4.0, 1.0, 3.0, 2.0], [-1.0, 2.0, 0.0, 2.0], [-1.0, 0.0, -2.0, 0.0]])  # grid (2, 2)


def test_masks_and_boxes() -> None:
    mask = torch.zeros(3, 4, 8, dtype=torch.bool)
    mask[:, :3, :4] = True  # patch 0, and half of patch 2
    boxes = torch.tensor([[0, 0, 4, 3]] * 3)
    for where in ({"mask": mask}, {"mask": boxes, "image_size": (4, 8)}):
        found = localisation(RELEVANCE, **where)
        assert found.inside[:2].tolist() == pytest.approx([5.5 / 10, 0.0])
        assert bool(found.inside[2].isnan())
        assert found.pointing.tolist() == [1.0, 0.0, 0.0]
        assert found.inside.dtype == found.pointing.dtype == torch.float64


def test_the_middle_of_the_patch_is_what_points() -> None:
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[0, 1, 2] = True  # of the 2 x 4 pixels of patch 0
    assert localisation(RELEVANCE[:1], mask).pointing.tolist() == [1.0]
    assert localisation(RELEVANCE[:1], mask.roll(1, 2)).pointing.tolist() == [0.0]


def test_methods_and_grids() -> None:
    mask = torch.rand(3, 6, 4) < 0.5
    several = torch.randn(5, 3, 6)
    together = localisation(several, mask, grid=(3, 2))
    for method in range(5):
        alone = localisation(several[method], mask, grid=(3, 2))
        assert all(torch.equal(a[method], b) for a, b in zip(together, alone, strict=True))
    everything = localisation(several, torch.ones_like(mask), grid=(3, 2))
    torch.testing.assert_close(everything.inside, torch.ones(5, 3, dtype=torch.float64))
    assert bool((everything.pointing == 1).all())


def test_errors() -> None:
    mask = torch.ones(3, 4, 8, dtype=torch.bool)
    for kind, message, where in (
        (TypeError, "mask: expected a tensor", {"mask": 3}),
        (TypeError, "mask: expected bool", {"mask": mask.int()}),
        (ValueError, r"mask: expected \[B, H, W\] or boxes", {"mask": mask[:, 0]}),
        (ValueError, "image_size: expected", {"mask": torch.ones(3, 4)}),
        (ValueError, "left < right", {"mask": torch.ones(3, 4), "image_size": (4, 8)}),
        (ValueError, "relevance: expected .*B = 2", {"mask": mask[:2]}),
        (ValueError, "grid: expected patches that tile", {"mask": mask[:, :3]}),
    ):
        with pytest.raises(kind, match=message):
            localisation(RELEVANCE, **where)
