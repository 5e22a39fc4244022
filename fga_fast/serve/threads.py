"""Threads of a service: only the one that explains computes on several processors.

OpenMP gives each thread that computes a team of its own. When all teams together have more threads than the machine has
processors, GNU's OpenMP lets them sleep whenever they wait for each other: with two teams on two processors the demo's
explanation took 42 ms instead of 28 (AMD EPYC, commit 5f769c9).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
from typing import TypeVar

import torch

Result = TypeVar("Result")


def apart(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises, from a thread that ends after it, and its team with it."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # the caller's, whatever it is
            future.set_exception(error)

    thread = Thread(target=run, daemon=True)  # so that Ctrl-C need not wait for it
    thread.start()
    result = future.result()
    thread.join()
    return result


def loners(count: int, name: str) -> ThreadPoolExecutor:
    """Threads without teams: what torch does in them, it does on one processor; but MKL's products may take more.

    While such a thread starts, torch's default for new threads is 1 for a moment. So start the others before.
    """
    default = torch.get_num_threads()

    def alone() -> None:
        torch.get_num_threads()  # a thread takes torch's number when it first needs it; now, not after what follows
        torch.set_num_threads(1)  # in this thread, and in all that start from now on
        apart(lambda: torch.set_num_threads(default))  # not in those

    return ThreadPoolExecutor(count, name, initializer=alone)
