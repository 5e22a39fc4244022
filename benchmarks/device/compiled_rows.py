"""Rows of compiled explanations on a device: multiples of the compiled forward pass, and how steady they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import subjects
import torch
from device import Device, Work
from explanation_rows import Saes
from rows import Row
from torch import nn

from fga_fast import Explainer
from fga_fast.backends import Backend

NAMES = ("TransMM", "FGA relu 1700")
CALLS = 2_000


def rows(device: Device, built: tuple[nn.Module, Saes], backend: Backend) -> Iterator[Row]:
    """In the dtype that the model was left in: batch 1, call by call, then batch 32."""
    model, saes = built
    dtype = next(model.parameters()).dtype
    for batch in (1,) if device.small else (1, 32):
        images = subjects.images(batch).to(device.kind, dtype)
        forward = torch.no_grad()(partial(torch.compile(model), images))
        against = _steadiness(device, forward)
        blank = Row("graph", "", batch, 197, str(dtype).removeprefix("torch."))
        yield replace(_row(replace(blank, name="forward, compiled"), against), ratio_to_compiled=1.0)
        for name in NAMES:
            row = replace(blank, name=f"{name}, compiled, {backend}")
            try:
                start = time.perf_counter()
                compiled = Explainer(model, saes.get(name, {}), backend=backend).compile(images)
                seconds = time.perf_counter() - start
                work = partial(compiled, images)
                times = _steadiness(device, work)
                ratio = float(np.median(times) / np.median(against))
                row = replace(_row(row, times), ratio_to_compiled=ratio, peak_bytes=device.peak_bytes(work))
                yield replace(row, note=f"compiled in {seconds:.0f} s")
            except Exception as problem:  # one that fails must not end the run
                yield replace(row, note=f"FAILED: {type(problem).__name__}: {str(problem)[:120]}")


def _steadiness(device: Device, work: Work) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Seconds of each of many calls, from the host's call to the device's end."""
    times = []
    for call in range(-1 if device.small else -20, 3 if device.small else CALLS):
        start = time.perf_counter()
        work()
        device.synchronise()
        if call >= 0:
            times.append(time.perf_counter() - start)
    return np.array(times)


def _row(blank: Row, times: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Row:
    p50, p99, p999 = (float(np.quantile(times, q)) for q in (0.5, 0.99, 0.999))
    return replace(
        blank, rounds=len(times), median_s=p50, min_s=float(times.min()), p99_s=p99, p999_s=p999,
        images_per_s=blank.batch / float(times.mean()),
    )  # fmt: skip
