"""Groups single requests into batches for one worker thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from fga_fast.serve.limits import Refused

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Done(Generic[Result]):
    """What came of an item."""

    result: Result
    waited: float  # seconds in the queue
    worked: float  # seconds that its batch took


@dataclass(frozen=True)
class _Job(Generic[Item, Result]):
    item: Item
    since: float
    future: asyncio.Future[Done[Result]]


class Batcher(Generic[Item, Result]):
    """Hands items to a function in batches, from one thread, so that a GPU has one user.

    A batch starts when it is full, when its first item has waited `max_wait`, or when nobody else is on the way. Items
    whose waiter has given up are dropped before they are worked on. All methods are for the event loop's thread.

    Args:
        work: from items to as many results; a result that is an exception is raised for its item alone. What `work`
            raises fails its batch, and no other.
        max_batch: items in a batch.
        max_wait: seconds.
        limit: items that may be inside at once.
        watch: called with the size of each batch.
    """

    def __init__(
        self, work: Callable[[Sequence[Item]], Sequence[Result | Exception]], *, max_batch: int, max_wait: float,
        limit: int, watch: Callable[[int], object] = lambda size: None,
    ) -> None:  # fmt: skip
        self._work, self._watch = work, watch
        self._max_batch, self._max_wait, self._limit = max_batch, max_wait, limit
        self._waiting: deque[_Job[Item, Result]] = deque()
        self._news = asyncio.Event()
        self._closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fga-fast model")
        self._task: asyncio.Task[None] | None = None
        self.inside = 0  # requests that have entered, and not left

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._waiting)

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Takes a place; to be held from before an item is made until its result is used.

        Raises:
            Refused: there is no place, or the batcher closes.
        """
        if self._closing:
            raise Refused("stopping", "the server is stopping; ask another one")
        if self.inside >= self._limit:
            raise Refused("busy", f"the server has {self.inside} requests to answer already; try again later")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            self._news.set()  # perhaps the others need not wait any more

    async def submit(self, item: Item) -> Done[Result]:
        """The result for an item. If the caller is cancelled, the item is dropped."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        loop = asyncio.get_running_loop()
        job = _Job[Item, Result](item, loop.time(), loop.create_future())
        self._waiting.append(job)
        self._news.set()
        return await job.future

    async def in_thread(self, work: Callable[[], Other]) -> Other:
        """Runs something else in the worker's thread, between batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def close(self, seconds: float) -> None:
        """Takes nothing more, finishes what waits, and fails what is not finished in time."""
        self._closing = True
        self._news.set()
        if self._task is not None:
            _, late = await asyncio.wait({self._task}, timeout=seconds)
            for task in late:
                task.cancel()
        while self._waiting:
            future = self._waiting.popleft().future
            if not future.done():
                future.set_exception(Refused("stopping", "the server stopped before it came to this request"))
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := await self._collect():
            began = loop.time()
            self._watch(len(batch))
            try:
                results = await loop.run_in_executor(self._thread, self._work, [job.item for job in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"work: expected {len(batch)} results, got {len(results)}")
            except asyncio.CancelledError:
                _fail(batch, Refused("stopping", "the server stopped while it explained this"))
                raise
            except Exception as error:
                logger.exception("a batch of %d failed", len(batch))
                _fail(batch, error)
                continue
            worked = loop.time() - began
            for job, result in zip(batch, results, strict=True):
                if job.future.done():
                    continue
                if isinstance(result, Exception):
                    job.future.set_exception(result)
                else:
                    job.future.set_result(Done(result, began - job.since, worked))

    async def _collect(self) -> list[_Job[Item, Result]]:
        """The next batch; none when the batcher is closed and empty."""
        loop = asyncio.get_running_loop()
        while True:
            self._waiting = deque(job for job in self._waiting if not job.future.done())
            if not self._waiting and self._closing:
                return []
            left = self._waiting[0].since + self._max_wait - loop.time() if self._waiting else None
            alone = self.inside <= len(self._waiting) or self._closing
            if left is not None and (left <= 0 or alone or len(self._waiting) >= self._max_batch):
                return [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
            self._news.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)


def _fail(batch: Sequence[_Job[Item, Result]], error: Exception) -> None:
    for job in batch:
        if not job.future.done():
            job.future.set_exception(error)
