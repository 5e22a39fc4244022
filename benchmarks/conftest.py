"""Options and fixtures of the benchmarks. `make bench` runs all of them; see benchmarks/run.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import RESULTS, Row, cpu_name, environment, slug, table, write_csv
from timing import Race, Work

COLLECTED = pytest.StashKey[list[Row]]()
ENVIRONMENT = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fga_fast")
    group.addoption("--quick", action="store_true", help="small sizes and few rounds: only check that it runs")
    group.addoption("--rows", metavar="FILE", type=Path, help="write the rows as CSV to FILE")
    group.addoption("--keep-rows", action="store_true", help="write the rows to benchmarks/results/cpu-<model>.csv")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COLLECTED] = []
    config.stash[ENVIRONMENT] = environment()  # now, because the column `load` must not count ours


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    rows, config = session.config.stash[COLLECTED], session.config
    path = config.getoption("--rows")
    if path is None and config.getoption("--keep-rows") and exitstatus == 0:
        path = RESULTS / f"cpu-{slug(cpu_name())}.csv"
    if path is not None and rows:
        write_csv(path, rows, config.stash[ENVIRONMENT])


def pytest_unconfigure(config: pytest.Config) -> None:
    rows = config.stash[COLLECTED]
    if rows:
        common = config.stash[ENVIRONMENT]
        print("\n" + ", ".join(f"{name} {value}" for name, value in common.items()))
        print(table(rows))


@dataclass(frozen=True)
class Scale:
    """How much to measure."""

    quick: bool

    @property
    def features(self) -> int:
        return 4096 if self.quick else 49_152

    @property
    def depth(self) -> int:
        return 4 if self.quick else 12

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 2) if self.quick else (1, 8)

    def rounds(self, seconds_a_round: float, seconds: float, least: int = 3, most: int = 200) -> int:
        """Number of rounds that take about `seconds`."""
        return 1 if self.quick else max(least, min(most, round(seconds / max(seconds_a_round, 1e-6))))


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    return Scale(request.config.getoption("--quick"))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Adds a row to the results; its name says if the process keeps freed memory (run.py)."""
    rows: list[Row] = request.config.stash[COLLECTED]
    kept = ", memory kept" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else ""
    return lambda row: rows.append(replace(row, name=row.name + kept))


@pytest.fixture
def race(benchmark: Any, scale: Scale) -> Callable[..., Race]:
    """Alternates contestants with a baseline for about `seconds`; pytest-benchmark counts whole rounds."""
    used = False

    def run(baseline: Work, contestants: Mapping[str, Work], seconds: float, least: int = 3) -> Race:
        nonlocal used
        runner = Race(baseline, contestants)
        rounds = scale.rounds(runner.warm_up(), seconds, least)
        if used:  # the fixture `benchmark` takes one function per test
            for _ in range(rounds):
                runner.round()
        else:
            benchmark.pedantic(runner.round, rounds=rounds, iterations=1)
            used = True
        for name in contestants:
            benchmark.extra_info[name] = vars(runner.result(name))
        return runner

    return run


@pytest.fixture
def one_thread() -> Any:
    """torch with a single thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
