"""What the studies measure: the paper's definitions, at the price that a study can pay."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fga_fast import metrics
from fga_fast.evaluation.measures import MEASURES, Batch, Measure, subsets

SUBSETS, SUBSET = 50, 20  # subsets of patches an image, and patches in each


def measured(step: int) -> dict[str, Measure]:
    """The metrics of both studies, for grids of 8 x 8; patches are flipped `step` at a time."""
    return {
        "saco": MEASURES["saco"],
        "faithfulness_correlation": Measure(_correlation, {"faithfulness_correlation": True}),
        "pixel_flipping": _flipping(step),
    }


def others(step: int) -> dict[str, Measure]:
    """The library's other metrics that need no mask; patches are inserted and deleted `step` at a time."""
    return {
        "insertion_deletion": _insertion_deletion(step),
        "road": MEASURES["road"],
        "sensitivity": MEASURES["sensitivity"],
        "randomisation": MEASURES["randomisation"],
    }


def _insertion_deletion(step: int) -> Measure:
    def measure(batch: Batch) -> dict[str, Tensor]:
        # Deletion fills with 0, as the library's measure of this name does.
        found = metrics.insertion_deletion(**_asked(batch), step=step, deletion_fill=0.0, probability=batch.probability)
        return {"insertion": found.insertion, "deletion": found.deletion}

    return Measure(measure, {"insertion": True, "deletion": False})


def _flipping(step: int) -> Measure:
    def measure(batch: Batch) -> dict[str, Tensor]:
        found = metrics.pixel_flipping(**_asked(batch), step=step, normalise=True, probability=batch.probability)
        return {"pixel_flipping": found}

    return Measure(measure, {"pixel_flipping": False})


def _correlation(batch: Batch) -> dict[str, Tensor]:
    found = metrics.faithfulness_correlation(**_asked(batch), subsets=subsets(batch, SUBSETS, SUBSET))
    return {"faithfulness_correlation": found}


def _asked(batch: Batch) -> dict[str, Any]:
    """What all metrics take."""
    return {
        "model": batch.model, "images": batch.images, "targets": batch.targets, "relevance": batch.maps,
        "grid": batch.grid, "batch_size": batch.batch_size,
    }  # fmt: skip
