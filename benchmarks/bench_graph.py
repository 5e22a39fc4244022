"""Compiled explanations: time in multiples of the compiled forward pass, latency, and results over many calls."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import subjects
import torch
from bench_explainer import forward, timed
from conftest import Scale
from peak import peak_bytes, resident_bytes
from rows import Row
from timing import Race, Work
from torch import Tensor

from fga_fast import Explainer, SparseAutoencoder, load_package
from fga_fast.assets import fashion_model, fashion_saes
from fga_fast.graph.trace import flatten

LEVEL = 1700  # active features per token, of 49,152


def saes(model: torch.nn.Module, scale: Scale) -> dict[str, dict[int, SparseAutoencoder]]:
    """Two dictionaries of each kind, for the third-last and the second-last block."""
    found: dict[str, dict[int, SparseAutoencoder]] = {"TransMM": {}}
    blocks = (scale.depth - 3, scale.depth - 2)
    for block, x in subjects.streams(model, blocks, subjects.images(2)).items():
        dictionary = subjects.Dictionary(x, scale.features, seed=block)
        found.setdefault(f"FGA relu {LEVEL}", {})[block] = dictionary.relu(LEVEL * scale.features / 49_152)[0]
        found.setdefault("FGA topk 64", {})[block] = dictionary.topk(64)
        del dictionary
        gc.collect()
    return found


Ways = dict[str, tuple[Callable[[], object], float]]  # name -> a call, seconds to prepare it


def packaged(explainer: Explainer, images: Tensor, folder: Path) -> Ways:
    """The exported explanation: called from Python, and by the C++ session if its module was built."""
    path = explainer.export(folder / f"{len(images)}.pt2", images)
    start = time.perf_counter()
    ways: Ways = {"package": (partial(load_package(path), images), time.perf_counter() - start)}
    built = os.environ.get("FGA_FAST_CMAKE_BUILD")
    if built:
        sys.path.insert(0, str(next(Path(built).rglob("fga_runtime*.so")).parent))
        module: Any = importlib.import_module("fga_runtime")
        start = time.perf_counter()
        call = partial(module.Session(path).explain, images.numpy())
        ways["package, C++ session"] = call, time.perf_counter() - start
    return ways


def test_compiled(
    scale: Scale, race: Callable[..., Race], record: Callable[[Row], None], one_thread: None, tmp_path: Path
) -> None:
    """With one thread; other benchmarks use all cores."""
    model = subjects.vit(depth=scale.depth)
    for batch in scale.batches:
        images = subjects.images(batch)
        compiled = partial(forward, torch.compile(model), images)
        works: dict[str, Work] = {"forward": partial(forward, model, images)}
        seconds: dict[str, float] = {}
        for name, layers in saes(model, scale).items():
            explainer = Explainer(model, layers, backend="native", preset="published")
            start = time.perf_counter()
            works[f"{name}, compiled"] = partial(explainer.compile(images), images)
            seconds[f"{name}, compiled"] = time.perf_counter() - start
            works[f"{name}, eager"] = partial(explainer, images)
            if batch == 1 and "relu" in name:
                for way, (work, ready) in packaged(explainer, images, tmp_path).items():
                    works[f"{name}, {way}"], seconds[f"{name}, {way}"] = work, ready
        found = race(compiled, works, seconds=60.0 if batch == 1 else 90.0)
        blank = Row("graph", "", batch, 197, threads=1)
        record(
            replace(timed(blank, "forward, compiled", found.baseline()), ratio_to_forward=None, ratio_to_compiled=1.0)
        )
        plain = found.result("forward").ratio
        for name, work in works.items():
            row = timed(blank, name, found.result(name))
            note = f"ready after {seconds[name]:.3g} s" if name in seconds else ""
            ratio = found.result(name).ratio
            record(
                replace(
                    row, ratio_to_forward=ratio / plain, ratio_to_compiled=ratio, min_ratio_to_forward=None,
                    peak_bytes=peak_bytes(work), note=note,
                )
            )  # fmt: skip


def test_pruning(scale: Scale, race: Callable[..., Race], record: Callable[[Row], None], one_thread: None) -> None:
    """The gain from computing the last block for the pooled token only."""
    model = subjects.vit(depth=scale.depth)
    for batch in scale.batches:
        images = subjects.images(batch)
        explainer = Explainer(model, backend="native", preset="published")
        works: dict[str, Work] = {"TransMM, pruned": partial(explainer.compile(images), images)}
        with mock.patch("fga_fast.graph.compiled.flatten", partial(flatten, prune=False)):
            works["TransMM, last block whole"] = partial(explainer.compile(images), images)
        found = race(partial(forward, torch.compile(model), images), works, seconds=40.0)
        for name in works:
            row = timed(Row("pruning", "", batch, 197, threads=1), name, found.result(name))
            ratio = found.result(name).ratio
            record(replace(row, ratio_to_forward=None, min_ratio_to_forward=None, ratio_to_compiled=ratio))


def small() -> tuple[Explainer, Tensor]:
    """The demo model with its two SAEs, and one image."""
    model = fashion_model()
    explainer = Explainer(model, fashion_saes(), backend="native", preset="published")
    height, width = explainer.layout.image_size or (0, 0)
    return explainer, torch.randn(
        1, explainer.layout.in_chans, height, width, generator=torch.Generator().manual_seed(1)
    )


def test_latency(scale: Scale, record: Callable[[Row], None], one_thread: None, tmp_path: Path) -> None:
    """2,000 calls of a small model at batch 1, where overhead counts most."""
    explainer, images = small()
    start = time.perf_counter()
    compiled = partial(explainer.compile(images), images)
    seconds = time.perf_counter() - start
    ways: Ways = {
        "eager": (partial(explainer, images), 0.0),
        "compiled": (compiled, seconds),
        **packaged(explainer, images, tmp_path),
    }
    for name, (work, ready) in ways.items():
        times = np.array([_seconds(work) for _ in range(20 if scale.quick else 2_000)])
        p50, p99, p999 = (float(np.quantile(times, q)) for q in (0.5, 0.99, 0.999))
        blank = Row("latency", f"FGA, demo model, {name}", 1, explainer.layout.tokens, threads=1, rounds=len(times))
        record(
            replace(
                blank, median_s=p50, min_s=float(times.min()), p99_s=p99, p999_s=p999,
                images_per_s=1 / float(times.mean()), peak_bytes=peak_bytes(work), note=f"ready after {ready:.3g} s",
            )
        )  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_soak(scale: Scale, record: Callable[[Row], None], one_thread: None) -> None:
    """20,000 explanations: all bit-equal, and memory does not grow."""
    explainer, images = small()
    compiled = explainer.compile(images)
    want = compiled(images)
    count, differing = (50 if scale.quick else 20_000), 0
    for _ in range(200):
        compiled(images)
    gc.collect()
    before = resident_bytes()
    for _ in range(count):
        got = compiled(images)
        differing += not (torch.equal(got.relevance, want.relevance) and torch.equal(got.logits, want.logits))
    gc.collect()
    grown = resident_bytes() - before
    if differing:
        raise RuntimeError(f"{differing} of {count} results differ from the first")
    note = f"all bit-equal to the first; resident memory grew by {grown / 2**20:.1f} MiB"
    record(Row("soak", "FGA, demo model, compiled", 1, explainer.layout.tokens, threads=1, rounds=count, note=note))
