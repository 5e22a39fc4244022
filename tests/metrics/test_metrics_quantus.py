"""Against Quantus, where definitions meet: patches of one pixel, one channel, and its own settings spelled out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from fga_fast import metrics
from fga_fast.metrics.imputation import impute

quantus = pytest.importorskip("quantus")
SIDE = 6


@pytest.fixture
def case() -> tuple[oracles.Small, Tensor, Tensor, Tensor]:
    model = oracles.Small(SIDE * SIDE, dtype=torch.float32)
    images = torch.randn(3, 1, SIDE, SIDE)
    return model, images, model(images).argmax(1), torch.randn(3, SIDE * SIDE).abs()


def asked(model: Any, images: Tensor, targets: Tensor, relevance: Tensor) -> dict[str, Any]:
    return {
        "model": model,
        "x_batch": images.numpy(),
        "y_batch": targets.numpy(),
        "a_batch": relevance.view_as(images).numpy(),
        "device": "cpu",
        "channel_first": True,
    }


def test_pixel_flipping(case: Any) -> None:
    """Its curve starts after the first flip. Black is the smallest value, so recomputing it changes nothing."""
    model, images, targets, relevance = case
    quiet = {"disable_warnings": True, "display_progressbar": False}
    curves = quantus.PixelFlipping(perturb_baseline="black", **quiet)(**asked(*case), softmax=True)
    clean = model(images).softmax(1).gather(1, targets[:, None]).detach().double()
    want = torch.trapezoid(torch.cat([clean, torch.tensor(np.array(curves)).double().view(3, -1)], 1))
    found = metrics.pixel_flipping(model, images, targets, relevance, fill="black")
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_faithfulness_correlation(case: Any) -> None:
    replace, subsets = quantus.functions.perturb_func.batch_baseline_replacement_by_indices, []

    def recorded(arr: Any, indices: Any, **options: Any) -> Any:
        subsets.append(torch.from_numpy(indices))
        return replace(arr=arr, indices=indices, **options)

    metric = quantus.FaithfulnessCorrelation(
        nr_runs=12, subset_size=5, perturb_func=recorded, perturb_baseline="black", return_aggregate=False,
        disable_warnings=True,
    )  # fmt: skip
    want = metric(**asked(*case), softmax=False)
    found = metrics.faithfulness_correlation(*case, subsets=torch.stack(subsets), fill="black")
    torch.testing.assert_close(found, torch.tensor(np.array(want)).double(), rtol=1e-4, atol=1e-4)


def test_imputation() -> None:
    image, removed = torch.randn(3, 8, 8, dtype=torch.float64), torch.rand(8, 8) < 0.4
    at = removed.flatten().nonzero()[:, 0].numpy()
    want = quantus.functions.perturb_func.noisy_linear_imputation(image.numpy(), at, noise=0.0)
    found = impute(image[None], removed[None, None])[0]
    torch.testing.assert_close(found, torch.from_numpy(want).view_as(found), rtol=1e-8, atol=1e-8)


def test_pointing_and_relevance_mass(case: Any) -> None:
    model, images, targets, relevance = case
    mask = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    mask[:, 1:4, 2:5] = True
    found = metrics.localisation(relevance, mask)
    options = asked(model, images, targets, relevance) | {"s_batch": mask[:, None].numpy()}
    quiet = {"disable_warnings": True, "return_aggregate": False}
    pointing = quantus.PointingGame(**quiet)(**options)
    inside = quantus.RelevanceMassAccuracy(**quiet)(**options)
    assert found.pointing.tolist() == [float(value) for value in pointing]
    torch.testing.assert_close(found.inside, torch.tensor(np.array(inside)).double(), rtol=1e-5, atol=1e-5)
