"""FGA as a Quantus explanation function, in the real Quantus."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from adapters import images as tensors
from adapters import upsampled
from explaining import Build, sae_for
from torch import nn

from fga_fast import Explainer
from fga_fast.integrations.quantus import explain_func

quantus = pytest.importorskip("quantus")

CLASSES = np.array([4, 1])


@pytest.fixture
def model(tiny_vit: Build) -> nn.Module:
    return tiny_vit()


def images() -> np.ndarray:
    return tensors().numpy()


def test_it_is_the_explainers_relevance_at_every_pixel(model: nn.Module) -> None:
    saes = {1: sae_for(model, activation="relu")}
    found = explain_func(model, images(), CLASSES, saes=saes)
    assert found.shape == (2, 1, 32, 48)
    assert found.dtype == np.float32
    expected = Explainer(model, saes=saes)(torch.from_numpy(images()), torch.from_numpy(CLASSES)).relevance
    np.testing.assert_array_equal(found, upsampled(expected).numpy())
    assert np.abs(found - explain_func(model, images(), CLASSES)).max() > 0


def test_numpy_images_of_any_layout(model: nn.Module) -> None:
    expected = explain_func(model, images(), CLASSES)
    last = images().transpose(0, 2, 3, 1)
    for array in (images().astype(np.float64), last, np.ascontiguousarray(last), images()[::-1][::-1]):
        np.testing.assert_allclose(explain_func(model, array, CLASSES), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(explain_func(model, last, CLASSES, channel_first=False), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        explain_func(model, torch.from_numpy(images()), CLASSES.tolist()), expected, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="images: "):
        explain_func(model, last, CLASSES, channel_first=True)


def test_pixel_flipping(model: nn.Module) -> None:
    metric = quantus.PixelFlipping(
        features_in_step=256, return_auc_per_sample=True, disable_warnings=True, display_progressbar=False
    )

    def score(**explanation: Any) -> list[float]:
        return metric(model=model, x_batch=images(), y_batch=CLASSES, device="cpu", **explanation)

    ours = score(a_batch=None, explain_func=explain_func, explain_func_kwargs={"saes": {}})
    assert np.isfinite(ours).all()
    assert ours == score(a_batch=explain_func(model, images(), CLASSES)), "computed inside or before"


def test_faithfulness_correlation(model: nn.Module) -> None:
    metric = quantus.FaithfulnessCorrelation(
        nr_runs=10, subset_size=128, disable_warnings=True, display_progressbar=False, return_aggregate=False
    )
    np.random.seed(7)  # noqa: NPY002 # Quantus draws from the global generator
    saes = {1: sae_for(model, activation="relu")}
    scores = metric(
        model=model, x_batch=images(), y_batch=CLASSES, device="cpu", explain_func=explain_func,
        explain_func_kwargs={"saes": saes, "top_features": 3},
    )  # fmt: skip
    assert len(scores) == 2
    assert all(-1 <= score <= 1 for score in scores)


def test_max_sensitivity_sees_the_perturbation(model: nn.Module) -> None:
    def scores(bound: float) -> list[float]:
        np.random.seed(7)  # noqa: NPY002
        metric = quantus.MaxSensitivity(
            nr_samples=2, lower_bound=0.0, upper_bound=bound, disable_warnings=True, display_progressbar=False
        )
        return metric(model=model, x_batch=images(), y_batch=CLASSES, device="cpu", explain_func=explain_func)

    assert scores(0.1) == scores(0.1)
    assert min(scores(1e-3)) > 0
    assert max(scores(1e-3)) < min(scores(0.1))


def test_evaluate_passes_its_name_as_method(model: nn.Module) -> None:
    metric = quantus.Sparseness(disable_warnings=True, display_progressbar=False)
    results = quantus.evaluate(
        metrics={"Sparseness": metric}, xai_methods={"rollout": explain_func}, model=model, x_batch=images(),
        y_batch=CLASSES, explain_func_kwargs={}, agg_func=np.mean, verbose=False,
    )  # fmt: skip
    assert 0 < results["rollout"]["Sparseness"] < 1
    with pytest.raises(ValueError, match="passes the key of xai_methods"):
        explain_func(model, images(), CLASSES, method="FGA")


def test_nothing_is_kept_of_a_model_and_a_changed_one_is_seen(tiny_vit: Build) -> None:
    model = tiny_vit()
    before = explain_func(model, images(), CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.blocks[1] = tiny_vit().blocks[1]  # type: ignore[index, operator, union-attr]
    assert np.abs(explain_func(model, images(), CLASSES) - before).max() > 0
    assert all(value.grad is None for value in model.parameters())
    gone = weakref.ref(model)
    del model, parameter
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "device: the model is on cpu, asked for cuda"),
        ({"targets": np.array([[0, 1], [1, 2]])}, "targets: expected one an image"),
        ({"targets": np.array([0.0, 1.0])}, "targets: "),
        ({"targets": np.array([0, 5])}, "targets: "),
        ({"inputs": "cat.jpg"}, "inputs: expected a tensor or a NumPy array"),
        ({"backward": "exakt"}, "backward: "),
    ],
)
def test_errors_name_the_argument(model: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        explain_func(**{"model": model, "inputs": images(), "targets": CLASSES, **settings})
