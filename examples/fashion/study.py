"""Measure which explanation of the demo model is the most faithful: all methods, all metrics, with statistics.

    python -m examples.fashion.study --split tune --limit 120 --out docs/studies/fashion/tune
    python -m examples.fashion.study --split report --out docs/studies/fashion/report

Explains every garment of scenes made of test garments, which neither trained nor chose the model. Half of the scenes
are for choosing ("tune": all candidates), the other half for what is published ("report": what won, with its baselines
and controls). A run that was stopped goes on when it is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.fashion.data import load_garments, make_scenes
from fga_fast import metrics
from fga_fast.assets import fashion_config, fashion_model, fashion_saes
from fga_fast.dataset.items import Item
from fga_fast.evaluation import report
from fga_fast.evaluation.measures import MEASURES, Batch, Measure
from fga_fast.evaluation.methods import METHODS
from fga_fast.evaluation.run import evaluate
from fga_fast.evaluation.subject import Method, Subject
from fga_fast.settings import Gate

SEED = 3_000_003
STEPS = {"tune": 4, "report": 8}  # patches flipped at a time
GROUPS = 10  # of patches, for SaCo
SUBSETS, SUBSET = 50, 20  # subsets of patches an image, and patches in each
REPORTED = (
    "transmm", "fga", "fga_base2", "fga_no_sae", "fga_shuffled", "input_x_gradient_conservative", "block_x_gradient",
    "block_x_gradient_gated", "block_x_gradient_gated_no_sae", "block_x_gradient_gated_shuffled", "random",
)  # fmt: skip
TUNED = ("fga_no_sae_centred", "fga_random_gates", "transmm_conservative", "legrad")  # not in the report, besides


def blocks(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:  # -> [B, L, P]
    """Conservative x . g at the tokens that enter each block."""
    explainer = subject.explainer(method="input_x_gradient", backward="conservative", per_block=True)
    found = explainer(images, targets).blocks
    assert found is not None
    return found


def weighted(*weights: float) -> Method:
    """A mean over blocks with weights."""

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        found = blocks(subject, images, targets)
        return (found * found.new_tensor(weights).view(1, -1, 1)).sum(1) / sum(weights)

    return method


def with_scores(share: float, mode: str = "combined") -> Method:
    """The mean over blocks, and a share of the scores of the SAEs (or of their controls) at their blocks."""

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        gate = Gate(mode=mode, base=2.0, seed=subject.seed)  # type: ignore[arg-type]
        scores = subject.explainer(gate, "block_x_gradient", "conservative")(images, targets).scores.values()
        mean = blocks(subject, images, targets).mean(1)
        return (1 - share) * mean + share * torch.stack([*scores]).mean(0)

    return method


def gated(base: float, mode: str = "combined") -> Method:
    """Block x gradient with gates of another base."""

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        gate = Gate(mode=mode, base=base, seed=subject.seed)  # type: ignore[arg-type]
        return subject.explainer(gate, "block_x_gradient", "conservative")(images, targets).relevance

    return method


def times_transmm(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    """The mean over blocks times conservative TransMM."""
    rollout = subject.explainer(backward="conservative")(images, targets).relevance
    return blocks(subject, images, targets).mean(1) * (rollout - rollout.amin(1, keepdim=True))


def smoothed(weight: float) -> Method:
    """The mean over blocks, mixed with the mean of the eight neighbours."""

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        mean = blocks(subject, images, targets).mean(1)
        grid = mean.view(-1, 1, 8, 8)
        around = torch.nn.functional.avg_pool2d(grid, 3, 1, 1, count_include_pad=False)
        return ((1 - weight) * grid + weight * around).flatten(1)

    return method


CANDIDATES: Mapping[str, Method] = {
    "weights rising": weighted(1, 2, 3, 4, 5),
    "weights falling": weighted(5, 4, 3, 2, 1),
    "without the last block": weighted(1, 1, 1, 1, 0),
    "middle blocks": weighted(0, 0, 1, 1, 0),
    "mean + 0.3 scores": with_scores(0.3),
    "mean + 0.3 scores, no SAE": with_scores(0.3, "no_sae"),
    "mean + 0.3 scores, shuffled": with_scores(0.3, "shuffled"),
    "gates of base 1.4": gated(1.4),
    "gates of base 1.4, no SAE": gated(1.4, "no_sae"),
    "mean x TransMM": times_transmm,
    "smoothed by 0.2": smoothed(0.2),
}
WON = ("weights rising", "mean x TransMM")  # on the tuning half, beside methods of the library


def scenes(count: int) -> list[Item]:
    """Every garment of scenes of test garments; those of a scene belong together."""
    config = fashion_config()
    drawn = make_scenes(load_garments("test", config.class_names), count, torch.Generator().manual_seed(SEED))
    images = (drawn.images - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]
    return [
        Item(
            f"scene {scene} {config.class_names[drawn.classes[scene, slot]]}", images[scene],
            int(drawn.classes[scene, slot]), mask=drawn.masks[scene, slot], group=f"scene {scene}",
        )
        for scene, slot in (drawn.classes >= 0).nonzero().tolist()
    ]  # fmt: skip


def flipping(step: int) -> Measure:
    def measure(batch: Batch) -> dict[str, Tensor]:
        found = metrics.pixel_flipping(**asked(batch), step=step, normalise=True, probability=batch.probability)
        return {"pixel_flipping": found}

    return Measure(measure, {"pixel_flipping": False})


def asked(batch: Batch) -> dict[str, Any]:
    """What all metrics of the study take."""
    return {
        "model": batch.model, "images": batch.images, "targets": batch.targets, "relevance": batch.maps,
        "grid": batch.grid, "batch_size": batch.batch_size,
    }  # fmt: skip


def saco(batch: Batch) -> dict[str, Tensor]:
    return {"saco": metrics.saco(**asked(batch), bins=GROUPS, probability=batch.probability)}


def correlation(batch: Batch) -> dict[str, Tensor]:
    found = metrics.faithfulness_correlation(**asked(batch), runs=SUBSETS, subset_size=SUBSET, seed=batch.seed)
    return {"faithfulness_correlation": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("tune", "report"), required=True)
    parser.add_argument("--scenes", type=int, default=1700, help="of both halves (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="at most so many scenes of the half")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    methods: dict[str, Method] = {name: METHODS[name] for name in REPORTED}
    if arguments.split == "tune":
        methods |= {name: METHODS[name] for name in TUNED} | dict(CANDIDATES)
    else:
        methods |= {name: CANDIDATES[name] for name in WON}
    measured = {
        "saco": Measure(saco, {"saco": True}),
        "faithfulness_correlation": Measure(correlation, {"faithfulness_correlation": True}),
        "pixel_flipping": flipping(STEPS[arguments.split]),
        "localisation": MEASURES["localisation"],
    }
    evaluate(
        Subject(fashion_model(), fashion_saes()), scenes(arguments.scenes), methods, measured, out=arguments.out,
        batch_size=32, split=arguments.split, limit=arguments.limit, probability="sigmoid", perturbed=128,
    )  # fmt: skip
    limit = "" if arguments.limit is None else f" --limit {arguments.limit}"
    command = f"python -m examples.fashion.study --split {arguments.split}{limit} --out {arguments.out}"
    written = report.write(arguments.out, baselines=("transmm", "fga", "block_x_gradient"), command=command)
    print(written.markdown.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
