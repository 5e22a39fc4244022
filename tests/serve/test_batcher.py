"""Batches of the right items, in order, and what happens to those that nobody waits for any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from fga_fast.serve.batcher import Batcher
from fga_fast.serve.limits import Refused

Tens = Batcher[int, int]


class Worker:
    """Multiplies by ten; fails a batch with a 13, and the item 7 alone. Waits to be let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.go = threading.Event()
        self.go.set()

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        assert self.go.wait(10)
        if 13 in items:
            raise RuntimeError("thirteen")
        return [ValueError("seven") if item == 7 else 10 * item for item in items]


def run(test: Callable[[Tens, Worker], Awaitable[None]], **settings: Any) -> Worker:
    worker = Worker()

    async def whole() -> None:
        batcher = Tens(worker, **{"max_batch": 4, "max_wait": 0.2, "limit": 100, **settings})
        try:
            await test(batcher, worker)
        finally:
            worker.go.set()
            await batcher.close(5)

    asyncio.run(asyncio.wait_for(whole(), 20))
    return worker


async def ask(batcher: Tens, item: int) -> int:
    with batcher.enter():
        return (await batcher.submit(item)).result


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)


def test_everybody_gets_the_own_result_from_one_thread() -> None:
    async def test(batcher: Tens, worker: Worker) -> None:
        assert await asyncio.gather(*(ask(batcher, item) for item in range(20, 30))) == list(range(200, 300, 10))

    worker = run(test)
    assert [item for batch in worker.batches for item in batch] == list(range(20, 30))
    assert max(map(len, worker.batches)) == 4
    assert len(worker.threads) == 1


def test_one_alone_does_not_wait() -> None:
    async def test(batcher: Tens, _: Worker) -> None:
        await asyncio.wait_for(ask(batcher, 1), 5)

    run(test, max_wait=1000)


def test_waits_for_those_on_the_way_and_no_longer_than_that() -> None:
    async def test(batcher: Tens, worker: Worker) -> None:
        with batcher.enter():  # one that is being decoded
            first = asyncio.create_task(ask(batcher, 1))
            second = asyncio.create_task(ask(batcher, 2))
            await asyncio.sleep(0.05)
            assert not worker.batches
        assert await asyncio.gather(first, second) == [10, 20]
        assert worker.batches == [[1, 2]]

    run(test, max_wait=1000)


def test_max_wait_ends_the_wait() -> None:
    async def test(batcher: Tens, worker: Worker) -> None:
        with batcher.enter():
            assert await ask(batcher, 1) == 10

    run(test, max_wait=0.05)


def test_those_who_gave_up_cost_nothing() -> None:
    async def test(batcher: Tens, worker: Worker) -> None:
        worker.go.clear()
        first = asyncio.create_task(ask(batcher, 1))
        await until(lambda: bool(worker.batches))
        others = [asyncio.create_task(ask(batcher, item)) for item in (2, 3, 4)]
        await until(lambda: batcher.waiting == 3)
        others[1].cancel()
        await asyncio.wait({others[1]})
        worker.go.set()
        assert await asyncio.gather(first, others[0], others[2]) == [10, 20, 40]
        assert worker.batches == [[1], [2, 4]]
        assert batcher.inside == 0

    run(test)


def test_failures_hit_the_own_batch_or_item_only() -> None:
    async def test(batcher: Tens, worker: Worker) -> None:
        found = await asyncio.gather(*(ask(batcher, item) for item in (1, 13, 7, 2, 8, 7)), return_exceptions=True)
        assert worker.batches == [[1, 13, 7, 2], [8, 7]]
        assert [str(error) for error in found[:4]] == ["thirteen"] * 4
        assert found[4] == 80 and str(found[5]) == "seven"
        assert await ask(batcher, 5) == 50

    run(test)


def test_wrong_number_of_results() -> None:
    async def test() -> None:
        batcher = Tens(lambda items: [1, 2, 3], max_batch=2, max_wait=0, limit=4)
        with pytest.raises(RuntimeError, match="expected 1 results, got 3"):
            await ask(batcher, 1)
        await batcher.close(5)

    asyncio.run(test())


def test_too_many() -> None:
    async def test(batcher: Tens, worker: Worker) -> None:
        worker.go.clear()
        tasks = [asyncio.create_task(ask(batcher, item)) for item in range(3)]
        await until(lambda: batcher.inside == 3)
        with pytest.raises(Refused) as refused:
            await ask(batcher, 9)
        assert refused.value.code == "busy"
        worker.go.set()
        assert await asyncio.gather(*tasks) == [0, 10, 20]
        assert await ask(batcher, 9) == 90

    run(test, limit=3)


def test_closing_answers_what_is_inside_and_takes_nothing_more() -> None:
    async def test(batcher: Tens, worker: Worker) -> None:
        worker.go.clear()
        tasks = [asyncio.create_task(ask(batcher, item)) for item in range(6)]
        await until(lambda: bool(worker.batches))
        closing = asyncio.create_task(batcher.close(10))
        await asyncio.sleep(0)
        with pytest.raises(Refused) as refused:
            await ask(batcher, 9)
        assert refused.value.code == "stopping"
        worker.go.set()
        assert await asyncio.gather(*tasks) == [0, 10, 20, 30, 40, 50]
        await closing

    run(test)


def test_closing_does_not_wait_for_ever() -> None:
    async def test(batcher: Tens, worker: Worker) -> None:
        worker.go.clear()
        tasks = [asyncio.create_task(ask(batcher, item)) for item in range(6)]
        await until(lambda: bool(worker.batches))
        await batcher.close(0.05)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, Refused) and error.code == "stopping" for error in found)

    run(test)
