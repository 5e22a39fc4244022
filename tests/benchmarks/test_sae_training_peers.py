"""The benchmark of SAE training: what it times, what it measures, and that every trainer sees the same batches."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import sae_training_peers
from benchmarks.sae_training_peers import Clock, Task, fga_fast, measured

TASK = Task(torch.randn(400, 12, generator=torch.Generator().manual_seed(0)), 24, 3, steps=8, batch=50, lr=1e-2, seed=0)


def test_only_the_trainers_own_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()  # seconds that pass between two looks at the clock
    monkeypatch.setattr(sae_training_peers.time, "perf_counter", lambda: next(now))
    clock = Clock(TASK)
    for at, x in enumerate(clock.plain()):
        assert x.shape == (50, 12)
        for _ in range(at):  # the trainer's work takes longer from step to step
            next(now)
    assert clock.seconds == [1 + at for at in range(TASK.steps)]
    clock.seconds = [9.0, 9.0, 0.5, 0.5, 0.25, 0.25, 1.0, 1.0]
    assert clock.tokens_per_s(chunk=2) == 100.0  # median of 100, 200 and 50, without the first chunk


def test_the_batches_are_those_of_every_run() -> None:
    first, second = (list(Clock(TASK).plain()) for _ in range(2))
    assert len(first) == TASK.steps + 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_measures_against_plain_words() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    codes = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    found = measured(lambda _: (codes, x + torch.tensor([[0.0, 1.0], [0.0, 0.0]])), x)
    # 1 - 1 / 10: the tokens lie (1, 2) to either side of their mean
    assert found == {"explained_variance": 0.9, "l0": 1.5, "dead": pytest.approx(1 / 3, abs=1e-4)}


def test_it_trains() -> None:
    clock = Clock(TASK)
    trained = fga_fast(TASK, clock)
    codes, reconstruction = trained(TASK.tokens)
    assert codes.shape == (400, 24) and reconstruction.shape == (400, 12)
    assert measured(trained, TASK.tokens)["l0"] <= TASK.k
    assert len(clock.seconds) in (TASK.steps - 1, TASK.steps)
