"""Who follows the forward passes of a thread. Threads share a model and its hooks, which act for their own pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Thread(threading.local):
    follower: object | None = None


_thread = _Thread()


def is_following(follower: object) -> bool:
    """Whether what runs now in this thread is for `follower` to see."""
    return _thread.follower is follower


@contextmanager
def followed_by(follower: object | None) -> Iterator[None]:
    """What runs inside is seen by `follower` only; None: by nobody. An explanation may run inside another one."""
    outer, _thread.follower = _thread.follower, follower
    try:
        yield
    finally:
        _thread.follower = outer
