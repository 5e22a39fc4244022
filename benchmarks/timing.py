"""Alternates functions with a baseline, so that other load on the machine affects all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """The time of a contestant, also relative to the baseline just before and just after it."""

    rounds: int
    median: float  # seconds
    minimum: float  # seconds
    ratio: float  # median over rounds of time / mean of the two baselines around it
    best_ratio: float  # fastest round / fastest baseline


def nothing() -> None:
    """Waits for queued work on the CPU: there is none."""


class Race:
    """Baseline, contestant, baseline, contestant, ..., baseline: one round.

    Args:
        baseline: the function to compare with.
        contestants: name -> function; every round runs them in this order.
        synchronise: waits for queued work before the clock is read (CUDA).
    """

    def __init__(self, baseline: Work, contestants: Mapping[str, Work], synchronise: Work = nothing) -> None:
        self._baseline = baseline
        self._contestants = dict(contestants)
        self._synchronise = synchronise
        self._rounds: list[tuple[list[float], list[float]]] = []  # baselines (one more than contestants), contestants

    def round(self) -> None:
        """Runs everything once."""
        baselines = [self._seconds(self._baseline)]
        times = []
        for work in self._contestants.values():
            times.append(self._seconds(work))
            baselines.append(self._seconds(self._baseline))
        self._rounds.append((baselines, times))

    def warm_up(self) -> float:
        """Runs one round that does not count; returns its seconds."""
        start = time.perf_counter()
        self.round()
        self._rounds.clear()
        return time.perf_counter() - start

    def baseline(self) -> Timing:
        """The baseline's own times; its ratio is 1 by definition."""
        times = [seconds for baselines, _ in self._rounds for seconds in baselines]
        return Timing(len(times), statistics.median(times), min(times), 1.0, 1.0)

    def result(self, name: str) -> Timing:
        """Times of one contestant."""
        at = list(self._contestants).index(name)
        times = [contestants[at] for _, contestants in self._rounds]
        ratios = [own[at] / ((base[at] + base[at + 1]) / 2) for base, own in self._rounds]
        least, median = min(times), statistics.median(times)
        return Timing(len(times), median, least, statistics.median(ratios), least / self.baseline().minimum)

    def _seconds(self, work: Work) -> float:
        self._synchronise()
        start = time.perf_counter()
        work()
        self._synchronise()
        return time.perf_counter() - start
