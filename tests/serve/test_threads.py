"""Threads of a service: teams of OpenMP's threads are where they should be, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from fga_fast.serve.threads import apart

COUNTED = """
import os
import threading
import time
import torch
from fga_fast.serve.threads import apart, loners

def compute(*_):
    return float(torch.ones(2**20).exp().sum())

def threads():
    time.sleep(0.2)  # some are about to end
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)  # also where there are fewer processors
"""


def counted(code: str) -> list[int]:
    """The numbers that a new process prints, in which a thread that computes takes two more."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTED + textwrap.dedent(code)], capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    return [int(word) for word in done.stdout.split()]


def test_a_thread_that_computes_gets_a_team() -> None:
    """What the others would get too; without this the next tests would show nothing."""
    before, after = counted("print(threads()); compute(); print(threads())")
    assert after == before + 2


def test_the_team_of_a_thread_apart_ends_with_it() -> None:
    before, within, after = counted("print(threads(), apart(lambda: compute() and threads()), threads())")
    assert within == before + 3
    assert after == before


def test_loners_have_no_teams_and_leave_the_others_theirs() -> None:
    before, after, main, new = counted(
        """
        before = threads()
        both = threading.Barrier(2)  # so that both threads start
        with loners(2, "test") as pool:
            list(pool.map(lambda _: both.wait() and compute(), range(2)))
            list(pool.map(compute, range(8)))
            print(before, threads(), torch.get_num_threads(), apart(torch.get_num_threads))
        """
    )
    assert after == before + 2
    assert main == new == 3


def test_what_is_raised_apart_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 / 0)
