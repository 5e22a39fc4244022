"""Rows of whole explanations on a device, in multiples of the plain forward pass and of the reference."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import subjects
import torch
from device import Device
from rows import Row
from steadiness import failed as failed_row
from timing import Race, Timing
from torch import Tensor, nn

from fga_fast import Explainer, SparseAutoencoder

BLOCKS = (9, 10)
SECONDS = 6.0  # for all ways of one dtype and batch size together
REFERENCE_MOST = 32  # images at once, because the reference keeps all maps and all codes

Saes = dict[str, dict[int, SparseAutoencoder]]


def build(device: Device) -> tuple[nn.Module, Saes]:
    """ViT-B/16 and SAEs of three densities, in float32 on the CPU."""
    model = subjects.vit(device.side, 3 if device.small else 12)
    blocks = (0, 1) if device.small else BLOCKS
    features = 512 if device.small else 49_152
    saes: Saes = {}
    for block, x in subjects.streams(model, blocks, subjects.images(2, device.side)).items():
        dictionary = subjects.Dictionary(x, features, seed=block)
        for level in (1700, 64):
            sae, _ = dictionary.relu(max(1.0, level * features / 49_152))
            saes.setdefault(f"FGA relu {level}", {})[block] = sae
        saes.setdefault("FGA topk 64", {})[block] = dictionary.topk(min(64, features))
        del dictionary
        gc.collect()
    return model, saes


def rows(device: Device, built: tuple[nn.Module, Saes], names: list[str], dtype: torch.dtype) -> Iterator[Row]:
    """All batch sizes; `names`: the backends that run here. Converts the built model and SAEs to `dtype` in place."""
    model, saes = built
    model.to(device.kind, dtype)
    for layers in saes.values():
        for sae in layers.values():
            sae.to(device=device.kind, dtype=dtype)
    compiled = None if device.small else torch.compile(model)
    for batch in (1,) if device.small else (1, 8, 32, 128):
        images = subjects.images(batch, device.side).to(device.kind, dtype)
        yield from _raced(device, model, compiled, saes, images, names)


def _raced(
    device: Device, model: nn.Module, compiled: Callable[..., object] | None, saes: Saes, images: Tensor,
    names: list[str],
) -> Iterator[Row]:  # fmt: skip
    ways: dict[str, Callable[[], object]] = {}
    for backend in (*names, *(["reference"] if len(images) <= REFERENCE_MOST else [])):
        for name, layers in {"TransMM": {}, **saes}.items():
            if backend == "reference" and name == "FGA relu 64":
                continue  # it computes dense codes, which take the same time at any density
            ways[f"{name}, {backend}"] = partial(Explainer(model, layers, backend=backend, preset="published"), images)  # type: ignore[arg-type]
    blank = Row("explainer", "", len(images), device.tokens, str(images.dtype).removeprefix("torch."))
    failed: list[Row] = []
    for name in list(ways):
        try:
            ways[name]()
        except Exception as problem:  # a failure must not end the run
            failed.append(failed_row(replace(blank, name=name), problem))
            del ways[name]
    if compiled is not None:
        ways["forward, compiled"] = torch.no_grad()(partial(compiled, images))
    forward = torch.no_grad()(partial(model, images))
    race = Race(forward, ways, device.synchronise)
    a_round = race.warm_up()
    for _ in range(1 if device.small else max(3, min(30, round(SECONDS / a_round)))):
        race.round()
    yield _timed(replace(blank, name="forward", peak_bytes=device.peak_bytes(forward)), race.baseline(), None)
    against = race.result("forward, compiled").median if compiled is not None else None
    for name, work in ways.items():
        row = _timed(replace(blank, name=name, peak_bytes=device.peak_bytes(work)), race.result(name), against)
        beside = f"{name.split(',')[0].replace('relu 64', 'relu 1700')}, reference"
        if beside in ways:
            row = replace(row, ratio_to_reference=race.result(name).median / race.result(beside).median)
        yield row
    yield from failed


def _timed(blank: Row, timing: Timing, compiled: float | None) -> Row:
    note = "" if compiled is None else f"{timing.median / compiled:.2f} x compiled forward"
    return replace(
        blank, rounds=timing.rounds, median_s=timing.median, min_s=timing.minimum, ratio_to_forward=timing.ratio,
        min_ratio_to_forward=timing.best_ratio, images_per_s=blank.batch / timing.median, note=note,
    )  # fmt: skip


def memory_rows(device: Device, names: list[str]) -> Iterator[Row]:
    """Peak memory at high resolution, compared with plain forward and backward and with the reference."""
    features, dtype = 512 if device.small else 49_152, torch.bfloat16
    weights = [torch.randn(features, subjects.WIDTH).div_(27.7) for _ in range(2)]
    bias, zeros = torch.full((features,), -1.8), torch.zeros(subjects.WIDTH)  # about 1,700 of 49,152 fire
    sae = SparseAutoencoder(weights[0].t(), bias, weights[1], zeros).to(device=device.kind, dtype=dtype)
    for side, patch in ((64, 16),) if device.small else ((518, 14), (1024, 16)):  # 1,370 and 4,097 tokens
        model = subjects.vit(side, 2 if device.small else 12, patch).to(device.kind, dtype)
        images = subjects.images(1, side).to(device.kind, dtype)
        ways: dict[str, Callable[[], object]] = {"forward and backward": partial(_gradient, model, images)}
        for backend in (*names, "reference"):
            for name, saes in (("TransMM", {}), ("FGA", {0: sae})):
                ways[f"{name}, {backend}"] = partial(
                    Explainer(model, saes, backend=backend, preset="published"), images
                )  # type: ignore[arg-type]
        for name, work in ways.items():
            row = Row("memory", name, 1, (side // patch) ** 2 + 1, "bfloat16")
            try:
                peak = device.peak_bytes(work)
                median, _ = device.seconds(work, rounds=3, warm_up=1)
                yield replace(row, median_s=median, peak_bytes=peak)
            except torch.OutOfMemoryError:
                yield replace(row, note="out of memory")
            except Exception as problem:  # a failure must not end the run
                yield failed_row(row, problem)


def _gradient(model: nn.Module, images: Tensor) -> object:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(model(images).amax(dim=1).sum(), images)
