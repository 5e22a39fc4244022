"""Rows of compiled explanations on a device: time in multiples of the compiled forward pass, latency, results over many
calls, and the other ways to call an explanation.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import package_rows
import subjects
import torch
from device import Device, Work
from explanation_rows import Saes
from peak import resident_bytes
from rows import Row
from steadiness import PREPARATION, Subject, failed
from torch import Tensor, nn

from fga_fast import Explainer
from fga_fast.engine.backends import Backend

FGA = "FGA relu 1700"
SOAK = 20_000
SOAK_SECONDS = 90.0


def rows(device: Device, built: tuple[nn.Module, Saes], backend: Backend) -> Iterator[Row]:
    """In the model's present dtype; the most important rows come first.

    Batch 1, where overhead counts most: all ways to call an explanation. Then batch 32.
    """
    model, saes = built
    for batch in (1,) if device.small else (1, 32):
        subject, row = _forward(device, model, batch)
        yield row
        explainer = Explainer(model, saes[FGA], backend=backend, preset="published")
        compiled: list[Work] = []
        yield _compiled(subject, FGA, explainer, compiled)
        if batch == 1:
            # On CUDA the native backend scores with Triton kernels, which need Python and so cannot run in the session.
            composite = Explainer(model, saes[FGA], backend="composite", preset="published")
            yield from package_rows.rows(subject, FGA, composite)
            for work in compiled:
                yield _soak(subject, f"{FGA}, compiled, {backend}", work)
            yield _eager(subject, FGA, explainer)
        yield _compiled(subject, "TransMM", Explainer(model, {}, backend=backend, preset="published"), [])
        if batch == 1 and backend != "composite":
            yield from package_rows.rows(subject, FGA, explainer, session=False)


def _forward(device: Device, model: nn.Module, batch: int) -> tuple[Subject, Row]:
    dtype = next(model.parameters()).dtype
    images = subjects.images(batch, device.side).to(device.kind, dtype)
    blank = Row("graph", "", batch, device.tokens, str(dtype).removeprefix("torch."))
    subject = Subject(device, images, blank)
    row = subject.row("forward, compiled", lambda: (torch.no_grad()(partial(torch.compile(model), images)), ""))
    return replace(subject, forward=row.median_s), replace(row, ratio_to_compiled=row.median_s and 1.0)


def _eager(subject: Subject, name: str, explainer: Explainer) -> Row:
    return subject.row(f"{name}, eager, {explainer.backend}", lambda: (partial(explainer, subject.images), ""))


def _compiled(subject: Subject, name: str, explainer: Explainer, works: list[Work]) -> Row:
    """Appends the compiled call to `works`."""

    def prepare() -> tuple[Work, str]:
        start = time.perf_counter()
        works.append(partial(explainer.compile(subject.images), subject.images))
        return works[-1], f"compiled in {time.perf_counter() - start:.0f} s"

    return subject.row(f"{name}, compiled, {explainer.backend}", prepare, PREPARATION)


def _soak(subject: Subject, name: str, work: Work) -> Row:
    """20,000 calls, or as many as there is time for: all bit-equal, and memory does not grow."""
    row = replace(subject.blank, benchmark="soak", name=name)
    try:
        return _soaked(subject.device, row, work)
    except Exception as problem:  # a failure must not end the run
        return failed(row, problem)


def _soaked(device: Device, row: Row, work: Work) -> Row:
    want = _bits(work())
    for _ in range(2 if device.small else 200):
        work()
    before, begin, most = _memory(device), time.perf_counter(), min(SOAK_SECONDS, device.left() / 3)
    count, differing = 0, 0
    while count < (5 if device.small else SOAK) and (count == 0 or time.perf_counter() - begin < most):
        differing += not all(map(torch.equal, _bits(work()), want))
        count += 1
    seconds = time.perf_counter() - begin
    if differing:
        raise RuntimeError(f"{differing} of {count} results differ from the first")
    grown = ", ".join(f"{name} {(bytes_ - before[name]) / 2**20:+.1f} MiB" for name, bytes_ in _memory(device).items())
    note = f"all bit-equal to the first; {grown}"
    return replace(row, rounds=count, images_per_s=row.batch * count / seconds, note=note)


def _bits(explanation: object) -> tuple[Tensor, ...]:
    return explanation.relevance, explanation.logits  # type: ignore[attr-defined]


def _memory(device: Device) -> dict[str, int]:
    gc.collect()
    device.synchronise()
    found = {"resident memory": resident_bytes()}
    if device.kind == "cuda":
        found |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    return found
