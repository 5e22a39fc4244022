"""Measure which explanation of the demo model is the most faithful: all methods, all metrics, with statistics.

    python -m examples.fashion.study --split tune --limit 120 --out docs/studies/fashion/tune
    python -m examples.fashion.study --split report --tuned docs/studies/fashion/tune --out docs/studies/fashion/report
    python -m examples.fashion.study --split report --tuned docs/studies/fashion/tune --others --limit 100 \
        --out docs/studies/fashion/others

Explains every garment of scenes made of test garments, which neither trained nor chose the model. Half of the garments
are for choosing ("tune"), the other half for what is published ("report"). Both compare all methods and controls of the
library; the first also all candidates, the second those that won. A candidate has won if it was better than its
baseline `block_x_gradient` under at least two of the four metrics, after Holm's correction. A run that was stopped goes
on when it is given again.

`--others` measures the metrics that choose nothing: insertion and deletion, ROAD, sensitivity and randomisation. Some
explain each image again and again, so it is meant for fewer scenes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from examples.fashion.data import Garments, load_garments, make_scenes
from examples.measured import measured, others
from fga_fast.assets import fashion_config, fashion_model, fashion_saes
from fga_fast.dataset.items import Half, Item, half_of
from fga_fast.evaluation import report, store
from fga_fast.evaluation.measures import MEASURES, flat
from fga_fast.evaluation.methods import METHODS
from fga_fast.evaluation.run import evaluate
from fga_fast.evaluation.statistics import analyse
from fga_fast.evaluation.subject import Method, Subject
from fga_fast.settings import Gate

SEED = 3_000_003
STEPS = {"tune": 4, "report": 8}  # patches flipped at a time
METRICS = ("saco", "faithfulness_correlation", "pixel_flipping", "inside")  # what a candidate must win under
BASELINES = ("transmm", "fga", "block_x_gradient", "block_x_gradient_gated")


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


def scenes(half: Half, count: int) -> list[Item]:
    """Every garment of scenes of the half's own test garments; those of a scene belong together."""
    config = fashion_config()
    garments = load_garments("test", config.class_names)
    own = tuple(member[half == "report" :: 2] for member in garments.members)
    generator = torch.Generator().manual_seed(SEED + (half == "report"))
    drawn = make_scenes(Garments(garments.images, own, garments.class_names), count, generator)
    images = (drawn.images - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]
    # evaluate() knows the half of a scene by its name.
    names = [name for number in range(3 * count) if half_of(name := f"scene {number}") == half]
    return [
        Item(
            f"{names[scene]} {config.class_names[drawn.classes[scene, slot]]}", images[scene],
            int(drawn.classes[scene, slot]), mask=drawn.masks[scene, slot], group=names[scene],
        )
        for scene, slot in (drawn.classes >= 0).nonzero().tolist()
    ]  # fmt: skip


def won(tuned: Path) -> list[str]:
    """The candidates that won in a complete run on the tuning half."""
    analysis = analyse(store.read(tuned), flat(store.settings(tuned)["metrics"]), BASELINES, resamples=0)
    wins = Counter(
        one.method
        for one in analysis.comparisons
        if one.baseline == "block_x_gradient" and one.metric in METRICS and one.verdict == "better"
    )
    return [name for name in CANDIDATES if wins[name] >= 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("tune", "report"), required=True)
    parser.add_argument("--tuned", type=Path, help="the run on the tuning half; --split report needs it")
    parser.add_argument("--scenes", type=int, default=850, help="(default: %(default)s)")
    parser.add_argument("--others", action="store_true", help="measure the other metrics")
    parser.add_argument("--limit", type=int, help="at most so many scenes")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if (arguments.split == "report") != (arguments.tuned is not None):
        parser.error("--tuned: expected the folder of the tuning half with --split report, and nothing with tune")
    added = CANDIDATES if arguments.split == "tune" else won(arguments.tuned)
    methods = {**METHODS, **{name: CANDIDATES[name] for name in added}}
    main_metrics = {**measured(STEPS[arguments.split]), "localisation": MEASURES["localisation"]}
    asked = others(STEPS[arguments.split]) if arguments.others else main_metrics
    items = scenes(arguments.split, arguments.scenes)
    evaluate(
        Subject(fashion_model(), fashion_saes()), items, methods, asked, out=arguments.out,
        batch_size=32, split=arguments.split, limit=arguments.limit, probability="sigmoid", perturbed=128,
    )  # fmt: skip
    command = f"python -m examples.fashion.study {' '.join(sys.argv[1:])}"
    written = report.write(arguments.out, baselines=BASELINES, command=command)
    print(written.markdown.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
