"""The gate: the native kernel compared with the reference and with two full sorts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from rows import Row
from timing import Race
from torch import Tensor

from fga_fast import ops, reference

REPEATS = 20  # calls per timing, because one call takes microseconds


def by_sorting(scores: Tensor) -> Tensor:  # [M, P]
    """The gate by sorting, without a function for order statistics."""
    middle = (scores.shape[1] - 1) // 2
    deviation = scores - scores.sort(dim=1).values[:, middle : middle + 1]
    spread = deviation.abs().sort(dim=1).values[:, middle : middle + 1]
    return torch.pow(10.0, (deviation / (1.4826 * (spread + 1e-8))).tanh())


def repeat(work: Callable[[Tensor], Tensor], scores: Tensor) -> None:
    for _ in range(REPEATS):
        work(scores)


@pytest.mark.parametrize(("images", "patches"), ((1, 196), (8, 196), (8, 4096)))
def test_gate(images: int, patches: int, race: Callable[..., Race], record: Callable[[Row], None]) -> None:
    scores = torch.randn(images, patches)
    ways = {
        "native": lambda s: ops.gate(s, 10.0, 1.0),
        "reference": lambda s: reference.gate(s, 10.0, 1.0),
        "plain: two sorts": by_sorting,
    }
    for way in ways.values():
        torch.testing.assert_close(way(scores), reference.gate(scores, 10.0, 1.0))
    found = race(
        partial(repeat, ways["native"], scores), {name: partial(repeat, way, scores) for name, way in ways.items()}, 2.0
    )
    timings = {name: found.result(name) for name in ways}
    for name, timing in timings.items():
        record(
            Row(
                "gate", name, images, patches, threads=torch.get_num_threads(), rounds=timing.rounds,
                median_s=timing.median / REPEATS, min_s=timing.minimum / REPEATS,
                ratio_to_plain=timing.ratio / timings["plain: two sorts"].ratio,
                ratio_to_reference=timing.ratio / timings["reference"].ratio,
            )
        )  # fmt: skip
