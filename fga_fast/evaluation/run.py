"""Runs methods on images and metrics on their maps, and keeps every value on disk.

Images go through in groups of `batch_size`: all maps of a group, then all metrics, which share forward passes between
methods. What fails is tried again image by image, so a bad image costs a row with its error and not the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fga_fast.dataset.ahead import read_ahead
from fga_fast.dataset.items import Item, Loaded, Split, choose, load
from fga_fast.evaluation.group import Failure, Plan, failure_of, grid_of, rows_of
from fga_fast.evaluation.measures import Measure, measures
from fga_fast.evaluation.settings import describe
from fga_fast.evaluation.store import Store
from fga_fast.evaluation.subject import Method, Subject
from fga_fast.io.atomic import check_writable_folder
from fga_fast.io.images import Preprocess
from fga_fast.io.resume import only_writer
from fga_fast.io.window import Window
from fga_fast.metrics.checks import Variant
from fga_fast.metrics.perturb import Probability


def evaluate(
    subject: Subject, items: Sequence[Item], methods: Mapping[str, Method],
    metrics: Sequence[str] | Mapping[str, Measure], *, out: str | Path, preprocess: Preprocess | None = None,
    batch_size: int = 8, split: Split = "report", seed: int | Sequence[int] = 0, limit: int | None = None,
    variant: Variant = "paper", probability: Probability = "softmax", window: Window | None = None,
    perturbed: int = 64, progress: bool = True,
) -> Path:  # fmt: skip
    """Measures the maps of methods, and writes values.parquet and settings.json into `out`.

    A call with the folder of a run that was stopped goes on with it, whatever stopped it. A call with that of a
    complete run returns at once. The columns of values.parquet are those of `store.Row`.

    Args:
        subject: model (in eval mode), SAEs and layout, as methods take it. Its own seed is not used. The metric
            "randomisation" shuffles the model's weights for a while, so nobody else may use it during the run.
        items: what is explained, with keys that stay the same from run to run.
        methods: name -> function from (subject, images [b, channels, H, W], targets [b] int64) to relevance [b, P].
        metrics: names among `measures.MEASURES`, or name -> `Measure`.
        out: folder of the results.
        preprocess: how pictures become the model's input; tensors are taken as they are.
        batch_size: images explained at once.
        split: the half of the images: "report", or "tune" to choose settings with; or "both" where nothing is chosen.
        seed: of methods and metrics that draw numbers. With several, everything is run with each.
        limit: take at most so many images, drawn by their names.
        variant: of saco, faithfulness_correlation and pixel_flipping: as published, or as in the author's runs.
        probability: of logits; "sigmoid" for a model whose classes do not exclude each other.
        window: how values of more than 8 bits are read, see `load_image`.
        perturbed: images in a forward pass of a metric.
        progress: show a bar with rate and time left.

    Returns:
        The path of values.parquet.

    Raises:
        TypeError, ValueError: an argument does not fit, or `out` holds a run with other settings, or one that runs now.
        ImportError: pyarrow is missing.
    """
    plan = _plan(subject, methods, metrics, seed, variant, probability, perturbed, batch_size)
    chosen = choose(items, split, limit)
    _check_masks(plan, chosen)
    settings = describe(plan, chosen, preprocess, batch_size, split, limit, window)
    groups = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]

    def read(item: Item) -> Loaded | Failure:
        try:
            return load(item, preprocess, window)
        except Exception as error:
            return failure_of(error)

    with only_writer(check_writable_folder(out)):
        store = Store(out, settings)
        missing = [number for number in range(len(groups)) if not store.has(number)]
        total, done = len(chosen), len(chosen) - sum(len(groups[number]) for number in missing)
        with tqdm(total=total, initial=done, unit="image", desc="evaluating", disable=not progress) as bar:
            for number, loaded in zip(missing, read_ahead((groups[one] for one in missing), read), strict=True):
                store.write(number, rows_of(plan, groups[number], loaded))
                bar.update(len(loaded))
        return store.finish(len(groups))


def _plan(
    subject: Subject, methods: Mapping[str, Method], metrics: Sequence[str] | Mapping[str, Measure],
    seed: int | Sequence[int], variant: Variant, probability: Probability, perturbed: int, batch_size: int,
) -> Plan:  # fmt: skip
    for name, number in (("batch_size", batch_size), ("perturbed", perturbed)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if not methods or not all(map(callable, methods.values())):
        raise ValueError(f"methods: expected functions by name, got {methods!r}")
    if not isinstance(subject.model, nn.Module) or subject.model.training:
        raise ValueError("subject: expected a model in eval mode; call model.eval() first")
    seeds = (seed,) if isinstance(seed, int) else tuple(seed)
    if not seeds or len({*seeds}) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seed: expected different numbers from 0, got {seeds}")
    if variant not in ("paper", "author"):
        raise ValueError(f"variant: expected 'paper' or 'author', got {variant!r}")
    if probability not in ("softmax", "sigmoid"):
        raise ValueError(f"probability: expected 'softmax' or 'sigmoid', got {probability!r}")
    like = next((one for one in subject.model.parameters() if one.is_floating_point()), torch.zeros(()))
    subjects = {one: dataclasses.replace(subject, seed=one) for one in seeds}
    return Plan(subjects, dict(methods), measures(metrics), grid_of(subject), variant, probability, perturbed, like)


def _check_masks(plan: Plan, chosen: Sequence[Item]) -> None:
    if any(item.mask is not None or item.box is not None for item in chosen):
        return
    names = [name for name, measure in plan.measures.items() if measure.needs_mask]
    if names:
        raise ValueError(
            f"metrics: {', '.join(names)} needs images with a mask or a box, and none of the {len(chosen)} has one; "
            "give a manifest with the columns mask or x0, y0, x1, y1, or leave the metric out"
        )
