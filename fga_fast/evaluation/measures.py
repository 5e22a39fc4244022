"""The metrics by name: which call gives their values, and which direction is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fga_fast import metrics
from fga_fast.dataset.items import stable_number
from fga_fast.metrics.checks import Variant
from fga_fast.metrics.perturb import Probability

RUNS = {"paper": 100, "author": 20}  # subsets of patches that faithfulness correlation asks about


class Batch(NamedTuple):
    """What metrics are asked about: b images and the maps of M methods."""

    model: nn.Module
    images: Tensor  # [b, channels, H, W]
    targets: Tensor  # [b] int64
    maps: Tensor  # [M, b, P]
    mask: Tensor | None  # [b, H, W] bool
    grid: tuple[int, int]
    keys: Sequence[str]  # b names, which decide what is drawn by chance
    seed: int
    variant: Variant
    probability: Probability
    batch_size: int  # perturbed images in a forward pass
    # Other pixels for the images, [b, channels, H, W] -> maps [M, b, P] float64, finite, by the same methods. Where one
    # fails, its map is that of the clean image, and its error stands in the table in place of the value.
    explain: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Measure:
    """One call that gives the values of one or several metrics.

    Attributes:
        run: values [M, b] float64 of each metric by name.
        higher: whether more is better, for each metric that the call gives.
        needs_mask: whether it is asked only about images with a mask.
        explains: whether it runs the methods again, and so measures the method rather than the map. The command line
            takes such a measure only by its name.
    """

    run: Callable[[Batch], Mapping[str, Tensor]]
    higher: Mapping[str, bool]
    needs_mask: bool = False
    explains: bool = False


def _saco(batch: Batch) -> dict[str, Tensor]:
    patches = batch.maps.shape[2]
    bins = groups_of(patches) if batch.variant == "paper" else math.ceil(patches / 4)
    return {"saco": metrics.saco(*_asked(batch), bins=bins, variant=batch.variant, **_of_probability(batch))}


def groups_of(patches: int) -> int:
    """The number of groups of equal size that is nearest to 10, the smaller of two; see `metrics.saco`."""
    fitting = [count for count in range(2, patches + 1) if patches % count == 0]
    return min(fitting, key=lambda count: abs(count - 10))


def subsets(batch: Batch, runs: int, size: int) -> Tensor:  # -> [runs, b, size] int64
    """Patches drawn by the image's name, so that an image's value does not depend on its neighbours in the batch."""
    patches = batch.maps.shape[2]
    drawn = torch.empty(runs, len(batch.keys), size, dtype=torch.int64)
    for place, key in enumerate(batch.keys):
        generator = torch.Generator("cpu").manual_seed(stable_number(key, "subsets", batch.seed))
        drawn[:, place] = torch.rand(runs, patches, generator=generator).argsort(1)[:, :size]
    return drawn


def _correlation(batch: Batch) -> dict[str, Tensor]:
    size = min(20, math.ceil(batch.maps.shape[2] / 5))  # 20 of 196 and 10 of 49 patches, as in the author's runs
    drawn = subsets(batch, RUNS[batch.variant], size)
    found = metrics.faithfulness_correlation(*_asked(batch), subsets=drawn, variant=batch.variant, **_how(batch))
    return {"faithfulness_correlation": found}


def _pixel_flipping(batch: Batch) -> dict[str, Tensor]:
    found = metrics.pixel_flipping(*_asked(batch), variant=batch.variant, normalise=True, **_of_probability(batch))
    return {"pixel_flipping": found}


def _insertion_deletion(batch: Batch) -> dict[str, Tensor]:
    # Deletion fills with 0, the mean colour of the training data, as published; with the image's own mean it would be
    # pixel flipping again.
    found = metrics.insertion_deletion(*_asked(batch), deletion_fill=0.0, **_of_probability(batch))
    return {"insertion": found.insertion, "deletion": found.deletion}


def _road(batch: Batch) -> dict[str, Tensor]:
    seeds = [stable_number(key, "road", batch.seed) for key in batch.keys]
    found = metrics.road(*_asked(batch), seed=seeds, **_of_probability(batch))
    return {"road_most_first": found.most_first, "road_least_first": found.least_first}


def _localisation(batch: Batch) -> dict[str, Tensor]:
    assert batch.mask is not None  # needs_mask
    found = metrics.localisation(batch.maps, batch.mask, grid=batch.grid)
    return {"inside": found.inside, "pointing": found.pointing}


def _sensitivity(batch: Batch) -> dict[str, Tensor]:
    seeds = [stable_number(key, "sensitivity", batch.seed) for key in batch.keys]
    return {"sensitivity": metrics.sensitivity(batch.explain, batch.images, batch.maps, seed=seeds)}


def _randomisation(batch: Batch) -> dict[str, Tensor]:
    # The seed alone decides how weights are shuffled, so all images meet the same shuffled model. A map that is turned
    # upside down says as much of the old one as an equal one, so the size of the correlation counts.
    found = metrics.randomisation(batch.explain, batch.model, batch.images, batch.maps, stages=(), seed=batch.seed)
    return {"randomisation_whole": found.whole.abs()}


def _asked(batch: Batch) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    return batch.model, batch.images, batch.targets, batch.maps


def _how(batch: Batch) -> dict[str, Any]:
    return {"grid": batch.grid, "batch_size": batch.batch_size}


def _of_probability(batch: Batch) -> dict[str, Any]:
    return {**_how(batch), "probability": batch.probability}


MEASURES: Mapping[str, Measure] = {
    "saco": Measure(_saco, {"saco": True}),
    "faithfulness_correlation": Measure(_correlation, {"faithfulness_correlation": True}),
    "pixel_flipping": Measure(_pixel_flipping, {"pixel_flipping": False}),
    "insertion_deletion": Measure(_insertion_deletion, {"insertion": True, "deletion": False}),
    "road": Measure(_road, {"road_most_first": False, "road_least_first": True}),
    "localisation": Measure(_localisation, {"inside": True, "pointing": True}, needs_mask=True),
    "sensitivity": Measure(_sensitivity, {"sensitivity": False}, explains=True),
    "randomisation": Measure(_randomisation, {"randomisation_whole": False}, explains=True),
}


def measures(asked: Sequence[str] | Mapping[str, Measure]) -> dict[str, Measure]:
    """Measures by name, checked.

    Raises:
        ValueError: none, an unknown name, or two measures that give a metric of one name.
    """
    found = dict(asked) if isinstance(asked, Mapping) else {}
    if not isinstance(asked, Mapping):
        for name in asked:
            if name not in MEASURES:
                raise ValueError(f"metrics: expected some of {', '.join(MEASURES)}, got {name!r}")
            found[name] = MEASURES[name]
    if not found:
        raise ValueError(f"metrics: expected some of {', '.join(MEASURES)}, got none")
    columns = [column for measure in found.values() for column in measure.higher]
    if len({*columns}) < len(columns):
        raise ValueError(f"metrics: expected a name of its own for each metric, got {', '.join(columns)}")
    return found


def flat(metrics: Mapping[str, Mapping[str, bool]]) -> dict[str, bool]:
    """Metric -> whether more is better, from the directions of each measure, as settings.json has them."""
    return {name: higher for of_measure in metrics.values() for name, higher in of_measure.items()}
