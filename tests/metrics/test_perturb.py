"""The engine of all metrics that remove patches: what it runs, what replaces patches, what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

from fga_fast import metrics
from fga_fast.metrics.fills import blurred, fill_images
from fga_fast.metrics.perturb import prepare

SIZE = (4, 6)


def images(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 2, *SIZE).to(dtype)


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, 6, dtype=torch.float64)


def model(dtype: torch.dtype = torch.float64) -> oracles.Small:
    return oracles.Small(2 * 24, dtype=dtype)


def flip(module: Any, pictures: Tensor, relevance: Tensor, **options: Any) -> Tensor:
    return metrics.pixel_flipping(module, pictures, None, relevance, grid=(2, 3), **options)


@pytest.mark.parametrize("batch_size", (1, 3, 64))
def test_each_distinct_image_is_run_once(batch_size: int) -> None:
    relevance = maps(2)
    several = torch.stack([relevance, relevance * 2, -relevance, relevance.exp(), maps(2)])
    watched = oracles.Counting(model())
    flip(watched, images(), several, batch_size=batch_size)
    wanted = 0
    for image in range(2):
        orders = [oracles.falling(relevance) for relevance in several[:, image]]
        wanted += len({frozenset(order[:count]) for order in orders for count in range(7)})
    assert len(watched.images) == wanted
    assert len(watched.images.flatten(1).unique(dim=0)) == wanted
    assert max(map(len, watched.seen)) <= batch_size


def test_methods_with_one_order_cost_one() -> None:
    relevance = maps(2)
    for variant, runs in (("paper", 2 * 7), ("author", 2 + 3 * 2 * 6)):  # the author's fill belongs to the map
        watched = oracles.Counting(model())
        flip(watched, images(), relevance.expand(3, -1, -1), variant=variant)
        assert len(watched.images) == runs


def test_subsets_are_the_same_for_all_methods() -> None:
    watched = oracles.Counting(model())
    asked = (images(), 0, maps(4, 2))
    found = metrics.faithfulness_correlation(watched, *asked, runs=9, subset_size=2, grid=(2, 3))
    assert len(watched.images) <= 2 * (1 + 9)
    again = metrics.faithfulness_correlation(model(), *asked, runs=9, subset_size=2, grid=(2, 3))
    assert torch.equal(found, again)
    other = metrics.faithfulness_correlation(model(), *asked, runs=9, subset_size=2, grid=(2, 3), seed=1)
    assert not torch.equal(found, other)


def test_more_patches_than_bits_in_a_word() -> None:
    """Subsets that differ in a late patch only are different ones."""
    pictures = torch.randn(1, 1, 10, 20, dtype=torch.float64)
    subset = torch.tensor([[0, 198], [0, 199], [0, 63], [0, 64], [0, 127]])[:, None]
    watched = oracles.Counting(oracles.Small(200))
    metrics.faithfulness_correlation(watched, pictures, 0, torch.rand(1, 200), subsets=subset, grid=(10, 20))
    assert len(watched.images) == 1 + 5
    changed = (watched.images[1:] != pictures).flatten(1)
    assert {tuple(row.nonzero()[:, 0].tolist()) for row in changed} == {tuple(row[0].tolist()) for row in subset}


FILLS: dict[str, Any] = {
    "mean": lambda x: x.mean((1, 2, 3), keepdim=True),
    "channel_mean": lambda x: x.mean((2, 3), keepdim=True),
    "black": lambda x: x.amin((1, 2, 3), keepdim=True),
    "blur": lambda x: blurred(x, (2, 2)),
}


@pytest.mark.parametrize("name", FILLS)
def test_named_fills(name: str) -> None:
    pictures, watched = images(), oracles.Counting(model())
    relevance = torch.tensor([[5.0, 0, 1, 2, 3, 4]] * 2)
    flip(watched, pictures, relevance, fill=name)
    filled = FILLS[name](pictures).expand_as(pictures)
    for image in range(2):
        first = oracles.without(pictures[image], [0], filled[image], (2, 3))
        assert torch.isclose(watched.images, first).flatten(1).all(1).sum() == 1
        assert torch.isclose(watched.images, filled[image]).flatten(1).all(1).sum() == 1  # all removed


def test_noise_has_the_statistics_of_the_image_and_a_seed() -> None:
    pictures = 3 + 0.5 * torch.randn(2, 3, 64, 64)
    found = fill_images("noise", pictures, (8, 8), 0)
    torch.testing.assert_close(found.mean((2, 3)), pictures.mean((2, 3)), atol=0.1, rtol=0)
    torch.testing.assert_close(found.std((2, 3)), pictures.std((2, 3)), atol=0.1, rtol=0)
    assert torch.equal(found, fill_images("noise", pictures, (8, 8), 0))
    assert not torch.equal(found, fill_images("noise", pictures, (8, 8), 1))


def test_given_fills() -> None:
    pictures = images()
    full = torch.randn_like(pictures)
    for fill, want in (
        (0.5, torch.tensor(0.5)),
        (torch.tensor(2.0), torch.tensor(2.0)),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)),
        (full, full),
        (full[:1], full[:1]),
    ):
        watched = oracles.Counting(model())
        flip(watched, pictures, maps(2), fill=fill)
        for one in want.double().expand_as(pictures):
            assert (watched.images == one).flatten(1).all(1).any()


def test_blur_keeps_constants_and_smooths() -> None:
    assert torch.allclose(blurred(torch.full((1, 2, 5, 7), 2.0), (3, 1)), torch.tensor(2.0))
    dot = torch.zeros(1, 1, 9, 9)
    dot[..., 4, 4] = 1
    spread = blurred(dot, (1, 1))[0, 0]
    assert torch.equal(spread, spread.t())
    assert float(spread[4, 5] / spread[4, 4]) == pytest.approx(torch.tensor(-0.5).exp().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_narrow_models(dtype: torch.dtype) -> None:
    """Statistics are float64; only the model and its images are narrow."""
    pictures, relevance = images(dtype=dtype), maps(2)
    watched = oracles.Counting(model(dtype))
    found = flip(watched, pictures, relevance)
    assert found.dtype == torch.float64
    assert watched.images.dtype == dtype
    want = flip(model(), pictures.double(), relevance)
    torch.testing.assert_close(found, want, rtol=1e-5 if dtype == torch.float32 else 0.05, atol=1e-5)
    assert metrics.road(model(dtype), pictures, 0, relevance, grid=(2, 3)).most_first.dtype == torch.float64


@pytest.mark.parametrize("targets", (None, 2, [2, 1], torch.tensor([2, 1], dtype=torch.int32)))
def test_targets(targets: Any) -> None:
    pictures = images()
    classes = model()(pictures).argmax(1) if targets is None else torch.as_tensor(targets).long().expand(2)
    trial = prepare(model(), pictures, targets, maps(2), (2, 3), 64)
    assert torch.equal(trial.targets, classes)
    want = model()(pictures).softmax(1).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(trial.clean.probability, want)


def test_functions_and_objects_with_logits() -> None:
    pictures, relevance = images(), maps(2)
    want = flip(model(), pictures, relevance)
    assert torch.equal(flip(lambda x: SimpleNamespace(logits=model()(x)), pictures, relevance), want)


def test_no_images() -> None:
    assert flip(model(), images(0), maps(0)).shape == (0,)
    for targets in (None, 3, []):
        assert metrics.saco(model(), images(0), targets, maps(2, 0), bins=3, grid=(2, 3)).shape == (2, 0)
    assert metrics.road(model(), images(0), 0, maps(2, 0), grid=(2, 3), seed=[]).most_first.shape == (2, 0)
    mask = torch.zeros(0, *images(0).shape[2:], dtype=torch.bool)
    assert metrics.localisation(maps(2, 0), mask, grid=(2, 3)).inside.shape == (2, 0)


def test_noise_of_an_image_may_be_its_own() -> None:
    """Whatever its place in the batch."""
    pictures, relevance = images(), maps(2)
    together = metrics.road(model(), pictures, 0, relevance, grid=(2, 3), seed=[7, 8])
    alone = metrics.road(model(), pictures[1:], 0, relevance[1:], grid=(2, 3), seed=[8])
    torch.testing.assert_close(together.most_first[1:], alone.most_first)
    other = metrics.road(model(), pictures, 0, relevance, grid=(2, 3), seed=[8, 7])
    assert not torch.equal(together.most_first, other.most_first)
    with pytest.raises(ValueError, match="seed: expected one, or one for each of the 2 images, got 1"):
        metrics.road(model(), pictures, 0, relevance, grid=(2, 3), seed=[7])


def test_nothing_is_changed() -> None:
    watched, pictures, relevance = model(), images(), maps(2).requires_grad_()
    state = {name: weight.clone() for name, weight in watched.state_dict().items()}
    copies = pictures.clone(), relevance.detach().clone()
    with torch.enable_grad():
        found = flip(watched, pictures.requires_grad_(), relevance)
    assert not found.requires_grad
    assert torch.equal(pictures, copies[0]) and torch.equal(relevance, copies[1])
    assert all(torch.equal(weight, state[name]) for name, weight in watched.state_dict().items())
    assert not any(module.training for module in watched.modules())
    assert pictures.grad is None and all(weight.grad is None for weight in watched.parameters())


def test_strided_images_and_another_default_device() -> None:
    pictures, relevance = images(), maps(2)
    want = flip(model(), pictures, relevance)
    torch.testing.assert_close(flip(model(), pictures.to(memory_format=torch.channels_last), relevance), want)
    with torch.device("meta"):
        assert torch.equal(flip(model_on_cpu := MODEL, pictures, relevance), flip(model_on_cpu, pictures, relevance))


MODEL = model()
NAN = torch.tensor([[float("nan")] * 6] * 2)
WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "model": (TypeError, "model: expected a module or function", {"model": 3}),
    "train": (ValueError, r"model: expected eval mode.*call model\.eval", {"model": nn.Sequential(model()).train()}),
    "part": (ValueError, "model: expected eval mode, but its part '0'", {"model": "part"}),
    "features": (ValueError, r"model: expected logits \[2, classes\], got \[2, 2, 4, 6\]", {"model": lambda x: x}),
    "tuple": (TypeError, "model: expected logits.*tuple", {"model": lambda x: (x, x)}),
    "overflow": (ValueError, "model: gave NaN", {"model": lambda x: model()(x) * torch.inf}),
    "images": (TypeError, "images: expected a tensor", {"images": [1]}),
    "one image": (ValueError, r"images: expected shape.*images\[None\]", {"images": torch.zeros(2, 4, 6)}),
    "pixels": (ValueError, "images: expected floats", {"images": torch.zeros(2, 2, 4, 6, dtype=torch.uint8)}),
    "nan image": (ValueError, "images: expected finite", {"images": torch.full((2, 2, 4, 6), torch.nan)}),
    "relevance": (TypeError, "relevance: expected a tensor", {"relevance": [1]}),
    "flat": (ValueError, r"relevance: expected \[B, P\].*B = 2.*got \[6\]", {"relevance": torch.zeros(6)}),
    "count": (ValueError, "relevance.*B = 2 images, got", {"relevance": torch.zeros(3, 6)}),
    "nan": (ValueError, "relevance: expected finite", {"relevance": NAN}),
    "no square": (ValueError, "grid: expected .*6 patches make no square", {"grid": None}),
    "grid": (ValueError, r"grid: expected .*of 6 patches.*got \(2, 2\)", {"grid": (2, 2)}),
    "tiles": (ValueError, "grid: expected patches that tile images of 4 x 6.*got 6 x 1", {"grid": (6, 1)}),
    "target": (ValueError, "targets: expected classes 0 to 3, got 7", {"targets": 7}),
    "targets": (ValueError, r"targets: expected .*B = 2 images, got \[3\]", {"targets": [0, 1, 2]}),
    "kind": (TypeError, "targets: expected None, an int", {"targets": 0.5}),
    "batch_size": (ValueError, "batch_size: expected at least 1, got 0", {"batch_size": 0}),
    "count type": (TypeError, "batch_size: expected a whole number", {"batch_size": 0.5}),
    "fill name": (ValueError, "fill: expected one of 'mean'.*got 'grey'", {"fill": "grey"}),
    "fill": (TypeError, "fill: expected one of mean", {"fill": object()}),
    "fill shape": (ValueError, r"fill: expected a number, a tensor \[2\].*got \[3\]", {"fill": torch.zeros(3)}),
    "fill nan": (ValueError, "fill: expected finite", {"fill": float("nan")}),
    "variant": (ValueError, "variant: expected one of 'paper', 'author', got 'other'", {"variant": "other"}),
    "order": (ValueError, "order: expected one of", {"order": "other"}),
    "output": (ValueError, "output: expected one of", {"output": "other"}),
    "step": (ValueError, "step: expected 1 to 6, got 7", {"step": 7}),
    "author": (ValueError, 'step, fill: variant="author" is defined for', {"variant": "author", "step": 2}),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_and_why(name: str) -> None:
    kind, message, change = WRONG[name]
    asked: dict[str, Any] = {"model": MODEL, "images": images(), "targets": 0, "relevance": maps(2), "grid": (2, 3)}
    asked |= change
    if asked["model"] == "part":
        asked["model"] = nn.Sequential(model()).eval()
        asked["model"][0].train()
    with pytest.raises(kind, match=message):
        metrics.pixel_flipping(**asked)


def test_errors_of_single_metrics() -> None:
    asked = (MODEL, images(), 0, maps(2))
    correlation, two = metrics.faithfulness_correlation, torch.zeros(2, 2, 3, dtype=torch.int64)
    for kind, message, call in (
        (ValueError, "bins: expected 2 to 6, got 7", lambda: metrics.saco(*asked, bins=7, grid=(2, 3))),
        (ValueError, "runs: expected at least 2", lambda: correlation(*asked, runs=1, grid=(2, 3))),
        (ValueError, "subset_size: expected 1 to 6, got 20", lambda: correlation(*asked, grid=(2, 3))),
        (ValueError, "subsets: expected distinct", lambda: correlation(*asked, subsets=two, grid=(2, 3))),
        (ValueError, r"subsets: expected \[runs", lambda: correlation(*asked, subsets=two[:, :1], grid=(2, 3))),
        (ValueError, "subsets: expected patches 0 to 5", lambda: correlation(*asked, subsets=two + 9, grid=(2, 3))),
        (TypeError, "subsets: expected int64", lambda: correlation(*asked, subsets=two.int(), grid=(2, 3))),
        (ValueError, "shares: expected numbers", lambda: metrics.road(*asked, shares=(1.0,), grid=(2, 3))),
        (ValueError, "noise: expected", lambda: metrics.road(*asked, noise=-1, grid=(2, 3))),
    ):
        with pytest.raises(kind, match=message):
            call()
