"""Whole explanations in multiples of the model's plain forward pass: ViT-B/16, two SAEs of 49,152 features."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import subjects
import torch
from conftest import Scale
from peak import peak_bytes
from rows import Row
from timing import Race, Timing, Work
from torch import Tensor, nn

from fga_fast import Explainer, SparseAutoencoder

LEVELS = (64, 500, 1700)  # target for active features per token
TOPK = 64


class Subject(NamedTuple):
    """A model and SAEs by name: name -> (block -> SAE, active features per token)."""

    model: nn.Module
    saes: dict[str, tuple[dict[int, SparseAutoencoder], float]]


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    scale = Scale(request.config.getoption("--quick"))
    features, blocks = scale.features, (scale.depth - 3, scale.depth - 2)
    model = subjects.vit(depth=scale.depth)
    found: dict[str, tuple[dict[int, SparseAutoencoder], float]] = {}
    for block, x in subjects.streams(model, blocks, subjects.images(2)).items():
        dictionary = subjects.Dictionary(x, features, seed=block)
        for level in LEVELS:
            sae, active = dictionary.relu(level * features / 49_152)
            others, before = found.get(f"relu {level}", ({}, 0.0))
            found[f"relu {level}"] = ({**others, block: sae}, before + active / len(blocks))
        others, _ = found.get(f"topk {TOPK}", ({}, 0.0))
        found[f"topk {TOPK}"] = ({**others, block: dictionary.topk(TOPK)}, float(TOPK))
        del dictionary
        gc.collect()
    yield Subject(model, found)


def explain(explainer: Explainer, images: Tensor, targets: Tensor | None = None) -> None:
    explanation = explainer(images, targets)
    if not all(bool(scores.any()) for scores in explanation.scores.values()):
        raise RuntimeError("all scores are zero: nothing was measured")


@torch.no_grad()
def forward(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits


@pytest.mark.parametrize("batch", (0, 1), ids=("batch-small", "batch-large"))
def test_explanation(
    batch: int, subject: Subject, scale: Scale, race: Callable[..., Race], record: Callable[[Row], None]
) -> None:
    images = subjects.images(scale.batches[batch])
    plain = partial(forward, subject.model, images)
    native: dict[str, Work] = {
        "TransMM": partial(explain, Explainer(subject.model, backend="native", preset="published"), images)
    }
    levels: dict[str, float] = {}
    for name, (saes, active) in subject.saes.items():
        native[f"FGA {name}"] = partial(
            explain, Explainer(subject.model, saes, backend="native", preset="published"), images
        )
        native[f"FGA {name}, dense encoder"] = subjects.dense_encoder(native[f"FGA {name}"])
        levels |= {f"FGA {name}": active, f"FGA {name}, dense encoder": active}
    dense, _ = subject.saes[f"relu {LEVELS[-1]}"]
    sparse, active = subject.saes[f"topk {TOPK}"]
    native["default"] = partial(explain, Explainer(subject.model, backend="native"), images)
    native[f"default topk {TOPK}"] = partial(explain, Explainer(subject.model, sparse, backend="native"), images)
    levels[f"default topk {TOPK}"] = active
    reference: dict[str, Work] = {
        "default": partial(explain, Explainer(subject.model, backend="reference"), images),
        f"default topk {TOPK}": partial(explain, Explainer(subject.model, sparse, backend="reference"), images),
        "TransMM": partial(explain, Explainer(subject.model, backend="reference", preset="published"), images),
        f"FGA relu {LEVELS[-1]}": partial(
            explain, Explainer(subject.model, dense, backend="reference", preset="published"), images
        ),
        f"FGA topk {TOPK}": partial(
            explain, Explainer(subject.model, sparse, backend="reference", preset="published"), images
        ),
    }
    fast = race(plain, native, seconds=40.0 if batch == 0 else 60.0)
    slow = race(plain, reference, seconds=6.0, least=1)

    blank = Row("explainer", "", len(images), 197, threads=torch.get_num_threads())
    record(replace(timed(blank, "forward", fast.baseline()), peak_bytes=peak_bytes(plain)))
    for name, work in native.items():
        row = timed(blank, name, fast.result(name), levels.get(name))
        # The reference computes dense codes, so it takes the same time at any L0.
        beside = name if name in reference else f"FGA relu {LEVELS[-1]}"
        ratio = fast.result(name).ratio / slow.result(beside).ratio
        record(replace(row, ratio_to_reference=ratio, peak_bytes=peak_bytes(work)))
    for name, work in reference.items():
        row = timed(blank, f"reference {name}", slow.result(name), levels.get(name))
        record(replace(row, ratio_to_reference=1.0, peak_bytes=peak_bytes(work)))


def test_settings(subject: Subject, scale: Scale, race: Callable[..., Race], record: Callable[[Row], None]) -> None:
    """Several targets of one image, another method and the other backward rule."""
    images, targets = subjects.images(1), torch.arange(8)[None]
    plain = partial(forward, subject.model, images)
    saes, active = subject.saes[f"relu {LEVELS[0]}"]
    model = partial(Explainer, subject.model, backend="native", preset="published")
    conservative = partial(model, backward="conservative")
    works: dict[str, Work] = {
        "TransMM, 8 targets": partial(explain, model(), images, targets),
        f"FGA relu {LEVELS[0]}, 8 targets": partial(explain, model(saes), images, targets),
        "TransMM, conservative": partial(explain, conservative(), images),
        "input x gradient, exact": partial(explain, model(method="input_x_gradient"), images),
        "input x gradient, conservative": partial(explain, conservative(method="input_x_gradient"), images),
    }
    fast = race(plain, works, seconds=30.0)
    blank = Row("explainer", "", 1, 197, threads=torch.get_num_threads())
    for name, work in works.items():
        row = timed(blank, name, fast.result(name), active if "FGA" in name else None)
        record(replace(row, peak_bytes=peak_bytes(work)))


def timed(blank: Row, name: str, timing: Timing, L0: float | None = None) -> Row:
    return replace(
        blank, name=name, L0=L0, rounds=timing.rounds, median_s=timing.median, min_s=timing.minimum,
        ratio_to_forward=timing.ratio, min_ratio_to_forward=timing.best_ratio,
    )  # fmt: skip
