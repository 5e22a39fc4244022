"""Latency of single calls one after the other, each from the call on the host until the device has finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from device import Device, Work
from rows import Row
from torch import Tensor

CALLS = 2_000
SECONDS = 45.0  # at most, for one way; the row says how many calls fitted
PREPARATION = 60.0  # a way that compiles needs this much time left to start

Prepare = Callable[[], tuple[Work, str]]  # returns a call to time, and a note about it


class NotRunError(Exception):
    """Something optional that a row needs is missing."""


@dataclass(frozen=True)
class Subject:
    """The images that all ways explain, and the compiled forward pass to compare with.

    Attributes:
        blank: a row with the columns that all ways share.
        forward: median seconds of the compiled forward pass, if known.
    """

    device: Device
    images: Tensor  # [B, channels, H, W]
    blank: Row
    forward: float | None = None

    def row(self, name: str, prepare: Prepare, seconds: float = 0.0) -> Row:
        """Times one way. A failure must not end the run.

        Args:
            seconds: time that must be left in the run.
        """
        row = replace(self.blank, name=name)
        try:
            if self.device.left() < seconds:
                raise NotRunError(f"{max(0.0, self.device.left()):.0f} s left")
            work, note = prepare()
            return self._timed(replace(row, note=note), work)
        except NotRunError as problem:
            return replace(row, note=f"not run: {problem}")
        except Exception as problem:
            return failed(row, problem)

    def _timed(self, row: Row, work: Work) -> Row:
        times = _times(self.device, work)
        p50, p99, p999 = (float(np.quantile(times, q)) for q in (0.5, 0.99, 0.999))
        return replace(
            row, rounds=len(times), median_s=p50, min_s=float(times.min()), p99_s=p99, p999_s=p999,
            images_per_s=row.batch / float(times.mean()), peak_bytes=self.device.peak_bytes(work),
            ratio_to_compiled=p50 / self.forward if self.forward else None,
        )  # fmt: skip


def failed(row: Row, problem: Exception) -> Row:
    return replace(row, note=f"FAILED: {type(problem).__name__}: {str(problem)[:120]}")


def _times(device: Device, work: Work) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Seconds of each call."""
    times: list[float] = []
    for _ in range(1 if device.small else 20):
        work()
    device.synchronise()
    begin, most = time.perf_counter(), min(SECONDS, device.left() / 2)
    while len(times) < (3 if device.small else CALLS):
        start = time.perf_counter()
        work()
        device.synchronise()
        end = time.perf_counter()
        times.append(end - start)
        if end - begin > most:
            break
    return np.array(times)


def table(rows: Sequence[Row]) -> str:
    """The rows with latencies: median and slowest calls."""
    lines = [f"{'p50 ms':>9}{'p99 ms':>9}{'p99.9 ms':>10}{'p99/p50':>9}{'calls':>7}{'images/s':>10}  way"]
    for row in rows:
        if row.median_s and row.p99_s and row.p999_s:
            times = f"{row.median_s * 1e3:9.3f}{row.p99_s * 1e3:9.3f}{row.p999_s * 1e3:10.3f}"
            rates = f"{row.p99_s / row.median_s:9.2f}{row.rounds or 0:7d}{row.images_per_s or 0:10.1f}"
            lines.append(f"{times}{rates}  {row.name}, {row.dtype}, batch {row.batch}")
    return "\n".join(lines)
