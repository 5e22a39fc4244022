"""Reads the items of a data set while those before them are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fga_fast.dataset.items import Item

Read = TypeVar("Read")
READERS = 4  # threads; decoders of images release Python's lock


def read_ahead(
    groups: Iterable[Sequence[Item]], read: Callable[[Item], Read], workers: int = READERS
) -> Iterator[list[Read]]:
    """What `read` makes of each group's items, in order; while one group is used, threads read the next.

    Memory: what was read of two groups. An exception of `read` ends it.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="fga-fast reads") as pool:
        coming: deque[Iterator[Read]] = deque()
        for group in groups:
            coming.append(pool.map(read, group))
            if len(coming) == 2:
                yield list(coming.popleft())
        while coming:
            yield list(coming.popleft())
