"""Metrics that remove patches: against plain loops, against results known by hand, and what must not change them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fga_fast import metrics
from fga_fast.metrics.correlation import pearson, ranks, spearman
from fga_fast.metrics.fills import blurred
from fga_fast.metrics.imputation import impute

GRID, SIZE = (2, 4), (6, 8)  # patches of 3 x 2 pixels
VARIANTS = ("paper", "author")


def case(methods: int = 3, batch: int = 3) -> tuple[oracles.Small, Tensor, Tensor, Tensor]:
    images = torch.randn(batch, 3, *SIZE, dtype=torch.float64) + 0.5
    relevance = torch.randn(methods, batch, 8, dtype=torch.float64)
    return oracles.Small(3 * 48), images, torch.tensor([1, 0, 3])[:batch], relevance


def each(relevance: Tensor, score: Any) -> Tensor:  # score(method, image) -> float
    values = [[score(m, b) for b in range(relevance.shape[1])] for m in range(relevance.shape[0])]
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bins", (2, 3, 8))
def test_saco_is_the_loop(bins: int, variant: Any) -> None:
    model, images, targets, relevance = case()
    found = metrics.saco(model, images, targets, relevance, bins=bins, variant=variant, grid=GRID, batch_size=5)
    close(
        found,
        each(
            relevance,
            lambda m, b: oracles.saco(model, images[b], int(targets[b]), relevance[m, b], GRID, bins, variant),
        ),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_faithfulness_correlation_is_the_loop(variant: Any) -> None:
    model, images, targets, relevance = case()
    subsets = torch.rand(9, 3, 8).argsort(-1)[..., :3]
    found = metrics.faithfulness_correlation(
        model, images, targets, relevance, subsets=subsets, variant=variant, grid=GRID, batch_size=4
    )
    oracle = oracles.faithfulness_correlation
    close(
        found,
        each(
            relevance,
            lambda m, b: oracle(model, images[b], int(targets[b]), relevance[m, b], GRID, subsets[:, b], variant),
        ),
    )


@pytest.mark.parametrize(("variant", "step"), (("paper", 1), ("paper", 3), ("author", 1)))
def test_pixel_flipping_is_the_loop(variant: Any, step: int) -> None:
    model, images, targets, relevance = case()
    found = metrics.pixel_flipping(model, images, targets, relevance, variant=variant, step=step, grid=GRID)
    oracle = oracles.pixel_flipping
    close(
        found,
        each(
            relevance,
            lambda m, b: oracle(
                model, images[b], int(targets[b]), oracles.falling(relevance[m, b]), GRID, variant, step
            ),
        ),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_patches_go_in_the_order_of_reading(variant: Any) -> None:
    model, images, targets, relevance = case()
    relevance = relevance.sign()
    found = metrics.pixel_flipping(model, images, targets, relevance, variant=variant, grid=GRID)
    oracle = oracles.pixel_flipping

    def want(m: int, b: int) -> float:
        order = sorted(range(8), key=lambda patch: -float(relevance[m, b, patch]))
        return oracle(model, images[b], int(targets[b]), order, GRID, variant)

    close(found, each(relevance, want))


@pytest.mark.parametrize("order", ("least", "zero"))
def test_other_orders_of_pixel_flipping(order: Any) -> None:
    model, images, targets, relevance = case()
    key = -relevance if order == "least" else -relevance.abs()
    found, want = (
        metrics.pixel_flipping(model, images, targets, maps, order=by, grid=GRID)
        for maps, by in ((relevance, order), (key, "most"))
    )
    assert torch.equal(found, want)
    assert not torch.equal(found, metrics.pixel_flipping(model, images, targets, relevance, grid=GRID))


def test_insertion_and_deletion_are_the_loop() -> None:
    model, images, targets, relevance = case()
    found = metrics.insertion_deletion(model, images, targets, relevance, deletion_fill=0.25, grid=GRID)
    canvas = blurred(images, (3, 2))

    def oracle(m: int, b: int, part: int) -> float:
        order = oracles.falling(relevance[m, b])
        return oracles.insertion_deletion(model, images[b], int(targets[b]), order, GRID, canvas[b], 0.25)[part]

    close(found.insertion, each(relevance, lambda m, b: oracle(m, b, 0)))
    close(found.deletion, each(relevance, lambda m, b: oracle(m, b, 1)))


def test_road_is_the_loop() -> None:
    model, images, targets, relevance = case()
    found = metrics.road(model, images, targets, relevance, shares=(0.25, 0.6), noise=0.0, grid=GRID)

    def oracle(m: int, b: int, sign: int) -> float:
        values = []
        for count in (2, 5):
            mask = oracles.without(
                torch.zeros(1, *SIZE), oracles.falling(sign * relevance[m, b])[:count].tolist(), 1.0, GRID
            )
            imputed = oracles.imputed(images[b], mask[0] > 0)
            values.append(oracles.softmax(oracles.logits(model, imputed))[int(targets[b])])
        return float(np.mean(values))

    for part, sign in ((found.most_first, 1), (found.least_first, -1)):
        torch.testing.assert_close(part, each(relevance, lambda m, b, s=sign: oracle(m, b, s)), rtol=1e-8, atol=1e-8)


def test_road_noise_lies_on_imputed_pixels_only() -> None:
    model, images, targets, relevance = case(1, 1)
    pictures = []
    for seed in (0, 0, 1):
        watched = oracles.Counting(model)
        metrics.road(watched, images, targets, relevance, shares=(0.5,), noise=0.01, grid=GRID, seed=seed)
        pictures.append(watched.images[1:])  # the first is the clean one
    assert torch.equal(pictures[0], pictures[1])
    changed = pictures[0] != pictures[2]
    assert float(changed.double().mean()) == 0.5
    assert 0.002 < float((pictures[0] - pictures[2])[changed].std()) < 0.03


def test_road_accuracy() -> None:
    model = oracles.Linear(torch.tensor([3.0, 1.0, -1.0, 0.5]), (2, 2))
    images = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64).view(1, 1, 2, 2).repeat(2, 1, 1, 1)
    found = metrics.road(model, images, 0, torch.tensor([[4.0, 3, 2, 1]] * 2), shares=(0.25, 0.75), output="accuracy")
    assert set(torch.cat(found).tolist()) <= {0.0, 0.5, 1.0}


@pytest.mark.parametrize("hole", ("corner", "scattered", "nearly all"))
def test_imputation_solves_its_equations(hole: str) -> None:
    images = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    removed = torch.zeros(2, 1, 9, 7, dtype=torch.bool)
    if hole == "corner":
        removed[:, :, :4, 4:] = True
    elif hole == "scattered":
        removed = torch.rand(2, 1, 9, 7) < 0.4
    else:
        removed[:, :, 1:] = True
    want = torch.stack([oracles.imputed(image, mask[0]) for image, mask in zip(images, removed, strict=True)])
    torch.testing.assert_close(impute(images, removed), want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(impute(images.float(), removed), want.float(), rtol=1e-3, atol=1e-3)
    assert impute(images.half(), removed).dtype == torch.float16


@pytest.mark.parametrize("patch", ((4, 4), (3, 2), (1, 5), (6, 8)))
def test_imputation_of_patches(patch: tuple[int, int]) -> None:
    """Coarser grids change the time and nothing else."""
    images = torch.randn(2, 2, 3 * patch[0], 2 * patch[1], dtype=torch.float64)
    removed = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 1, 0]]).bool().view(2, 1, 3, 2)
    removed = removed.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
    want = torch.stack([oracles.imputed(image, mask[0]) for image, mask in zip(images, removed, strict=True)])
    torch.testing.assert_close(impute(images, removed, patch), want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(impute(images.float(), removed, patch), want.float(), rtol=0, atol=1e-3)


def test_imputation_of_constants_and_of_nothing() -> None:
    flat, removed = torch.full((1, 2, 4, 4), 3.0), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert torch.equal(impute(flat, removed), flat)
    removed[:, :, :2] = True
    torch.testing.assert_close(impute(flat, removed), flat)
    assert torch.equal(impute(flat, torch.ones_like(removed)), torch.zeros_like(flat))


WEIGHT = torch.tensor([2.0, -1.0, 0.5, 3.0])


def linear(fill: float = 0.0) -> tuple[oracles.Linear, Tensor, Tensor]:
    """Model, one image, and what each patch adds to the logit compared with `fill`."""
    images = torch.tensor([1.0, 2.0, -1.0, 0.5]).double().view(1, 1, 2, 2)
    return oracles.Linear(WEIGHT, (2, 2)), images, (WEIGHT * (images.flatten() - fill))[None]


def test_a_true_map_of_a_linear_model_is_perfect_and_its_opposite_the_worst() -> None:
    model, images, truth = linear()
    both = torch.stack([truth, -truth])
    one = torch.ones(1, dtype=torch.float64)
    close(metrics.saco(model, images, 0, both, bins=4, fill=0.0), torch.stack([one, -one]))
    options: dict[str, Any] = {"runs": 10, "subset_size": 2, "fill": 0.0}
    for variant in VARIANTS:
        found = metrics.faithfulness_correlation(model, images, 0, both, variant=variant, **options)
        close(found, torch.stack([one, -one]))


def exactly(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_pixel_flipping_by_hand() -> None:
    model, images, truth = linear()  # truth: 2, -2, -0.5, 1.5, their sum 1
    curve = [sigmoid(logit) for logit in (1, -1, -2.5, -2, 0)]
    want = sum(curve) - (curve[0] + curve[-1]) / 2
    close(metrics.pixel_flipping(model, images, 0, truth, fill=0.0), exactly(want))
    close(metrics.pixel_flipping(model, images, 0, truth, fill=0.0, normalise=True), exactly(want / 4))
    logits = metrics.pixel_flipping(model, images, 0, truth, fill=0.0, output="logit")
    close(logits, exactly(1 / 2 - 1 - 2.5 - 2 + 0))


def test_insertion_and_deletion_by_hand() -> None:
    model, images, truth = linear()
    found = metrics.insertion_deletion(model, images, 0, truth, insertion_fill=0.0, deletion_fill=0.0)
    deletion, insertion = ([sigmoid(x) for x in logits] for logits in ((1, -1, -2.5, -2, 0), (0, 2, 3.5, 3, 1)))
    for part, curve in ((found.deletion, deletion), (found.insertion, insertion)):
        close(part, exactly((sum(curve) - (curve[0] + curve[-1]) / 2) / 4))


def test_saco_by_hand() -> None:
    model, images, truth = linear()
    relevance = torch.tensor([[4.0, 3.0, 2.0, 0.0]]).double()
    # Drops fall in the order of truth: patches 0, 3, 2, 1. Pairs in the order of relevance, and their weights:
    # (0,1) +1, (0,2) +2, (0,3) +4, (1,2) -1, (1,3) -3, (2,3) -2
    assert truth.tolist() == [[2.0, -2.0, -0.5, 1.5]]
    close(metrics.saco(model, images, 0, relevance, bins=4, fill=0.0), exactly(1 / 13))


def test_the_author_takes_the_largest_probability() -> None:
    """Where the class flips, the author's drop is small, and SaCo another one."""
    model, images, truth = linear()
    paper, author = (
        float(metrics.saco(model, images, 0, truth, bins=4, fill=0.0, variant=variant)[0]) for variant in VARIANTS
    )
    assert paper == pytest.approx(1.0)
    assert author < 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_where_there_is_nothing_to_judge(variant: Any) -> None:
    model, images, targets, relevance = case()
    relevance[1, 2] = 0.5
    undefined = torch.zeros(3, 3, dtype=torch.bool)
    undefined[1, 2] = True
    for found in (
        metrics.saco(model, images, targets, relevance, bins=4, variant=variant, grid=GRID),
        metrics.faithfulness_correlation(model, images, targets, relevance, subset_size=3, variant=variant, grid=GRID),
    ):
        if variant == "paper":
            assert torch.equal(found.isnan(), undefined)
        else:
            assert torch.equal(found == 0, undefined)


def all_metrics(model: Any, images: Tensor, targets: Any, relevance: Tensor, **options: Any) -> dict[str, Tensor]:
    asked = (model, images, targets, relevance)
    found = {
        "saco": metrics.saco(*asked, bins=4, **options),
        "saco author": metrics.saco(*asked, bins=4, variant="author", **options),
        "correlation": metrics.faithfulness_correlation(*asked, runs=6, subset_size=3, **options),
        "flipping": metrics.pixel_flipping(*asked, **options),
        "flipping author": metrics.pixel_flipping(*asked, variant="author", **options),
    }
    moved = metrics.insertion_deletion(*asked, **options)
    found |= {"insertion": moved.insertion, "deletion": moved.deletion}
    without = metrics.road(*asked, shares=(0.3,), **options)
    return found | {"most": without.most_first, "least": without.least_first}


def test_methods_at_once_are_methods_one_by_one_in_any_batch() -> None:
    model, images, targets, relevance = case()
    together = all_metrics(model, images, targets, relevance, grid=GRID)
    for m in range(3):
        alone = all_metrics(model, images, targets, relevance[m], grid=GRID, batch_size=2)
        for name, found in alone.items():
            assert found.shape == (3,)
            assert found.dtype == torch.float64
            close(together[name][m], found)


def test_images_do_not_see_each_other() -> None:
    model, images, targets, relevance = case()
    together = all_metrics(model, images, targets, relevance, grid=GRID)
    last = all_metrics(model, images[:1], targets[:1], relevance[:, :1], grid=GRID)
    for name in together:
        if name not in ("correlation", "most", "least"):  # their draws belong to the batch
            close(together[name][:, :1], last[name])


relevances = st.lists(st.integers(-50, 50), min_size=8, max_size=8, unique=True)


@settings(max_examples=15, deadline=None)
@given(values=relevances, scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_what_changes_of_a_map_do_not_matter(values: list[int], scale: float, shift: float) -> None:
    torch.manual_seed(1)
    model, images, targets, _ = case(1, 1)
    relevance = torch.tensor([values], dtype=torch.float64)
    maps = torch.stack([relevance, scale * relevance + shift, relevance**3])
    flipped = metrics.pixel_flipping(model, images, targets, maps, grid=GRID)
    assert torch.equal(flipped[0], flipped[1])  # an order and nothing else
    assert torch.equal(flipped[0], flipped[2])
    found = metrics.faithfulness_correlation(model, images, targets, maps[:2], runs=6, subset_size=3, grid=GRID)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)  # subsets of one size
    found = metrics.saco(model, images, targets, torch.stack([relevance, scale * relevance]), bins=4, grid=GRID)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    assert bool((found.abs() <= 1).all())


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(8)))
def test_where_patches_lie_does_not_matter(order: list[int]) -> None:
    torch.manual_seed(2)
    images, weight = torch.randn(2, 1, 2, 4, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    relevance = torch.randn(2, 8, dtype=torch.float64)
    results = []
    for at in (list(range(8)), order):
        model = oracles.Linear(weight[at], GRID)
        moved = (model, images.flatten(2)[..., at].view_as(images), 0, relevance[:, at])
        results.append([metrics.saco(*moved, bins=4, grid=GRID), metrics.pixel_flipping(*moved, grid=GRID)])
        results[-1].append(metrics.pixel_flipping(*moved, grid=GRID, variant="author"))
    for found, want in zip(*results, strict=True):
        close(found, want)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_correlations_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import pearsonr, rankdata, spearmanr

    a, b = torch.tensor(pairs, dtype=torch.float64).t()
    assert ranks(a).tolist() == rankdata(a.numpy()).tolist()
    if len(a.unique()) == 1 or len(b.unique()) == 1:
        assert bool(pearson(a, b).isnan()) and bool(spearman(a, b).isnan())
    else:
        assert float(pearson(a, b)) == pytest.approx(pearsonr(a.numpy(), b.numpy())[0], abs=1e-12)
        assert float(spearman(a, b)) == pytest.approx(spearmanr(a.numpy(), b.numpy())[0], abs=1e-12)


def test_sigmoid_probabilities() -> None:
    """Of the logits (z, 0), softmax gives the first class what the sigmoid gives it; of others, something else."""
    model, images, targets, relevance = case()
    two = oracles.Linear(torch.randn(8), GRID)
    for metric, options in (
        (metrics.saco, {"bins": 4}), (metrics.pixel_flipping, {}), (metrics.insertion_deletion, {}), (metrics.road, {})
    ):  # fmt: skip

        def found(m: Any, t: Any, probability: str, metric: Any = metric, options: Any = options) -> Tensor:
            values = metric(m, images, t, relevance, grid=GRID, probability=probability, **options)
            return values if isinstance(values, Tensor) else torch.cat(values)

        close(found(two, 0, "sigmoid"), found(two, 0, "softmax"))
        assert not torch.allclose(found(model, targets, "sigmoid"), found(model, targets, "softmax"))
    with pytest.raises(ValueError, match="probability: expected one of 'softmax', 'sigmoid', got 'tanh'"):
        metrics.saco(model, images, targets, relevance, grid=GRID, probability="tanh")  # type: ignore[arg-type]
