"""One picture's way through the service: decode, queue, explain, pack; with places, deadlines and times."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fga_fast.serve.answers import Form, Packed, pack
from fga_fast.serve.batcher import Batcher
from fga_fast.serve.counters import Counters
from fga_fast.serve.engine import Answered, Engine, Picture
from fga_fast.serve.limits import Limits, Refused
from fga_fast.serve.questions import Question
from fga_fast.serve.threads import loners

logger = logging.getLogger(__name__)

_THREADS = 4  # that decode and pack; PIL's decoders release Python's lock

Result = TypeVar("Result")


class Service:
    """What the routes share. To be used within one event loop, after `start`.

    Args:
        engine: explains.
        limits: what requests may cost.
        token: what clients have to show; None: nothing.
        hosts: names by which clients without a token may call the server, besides localhost and addresses.
        samples: pictures to try, by name.
        cards: address of the page of features that `fga-fast features` wrote; None: there is none.

    Raises:
        ValueError: a token that is empty or holds characters that a header cannot.
    """

    def __init__(
        self, engine: Engine, limits: Limits | None = None, *, token: str | None = None,
        hosts: Sequence[str] = (), samples: Mapping[str, Path] | None = None, cards: str | None = None,
    ) -> None:  # fmt: skip
        if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token):
            raise ValueError("token: expected at least 8 printable ASCII characters without spaces; make a longer one")
        self.engine, self.limits, self.token = engine, limits or Limits(), token
        self.hosts = tuple(hosts)
        self.samples, self.cards = dict(samples or {}), cards
        self.counters = Counters()
        self.stopping = False
        self.trouble = ""  # why it will never be ready
        self.readers = Places(self.limits.queue, "senders")
        self.streams = Places(self.limits.queue, "streams")

    async def start(self) -> None:
        """Begins to warm up; `ready` is set when that is done."""
        limits = self.limits
        self.batcher: Batcher[tuple[Picture, Question], Answered] = Batcher(
            self.engine.explain, max_batch=limits.max_batch, max_wait=limits.max_wait, limit=limits.queue,
            watch=self.counters.batch.observe,
        )  # fmt: skip
        self._pool = loners(_THREADS, "fga-fast decode")
        self.ready = asyncio.Event()
        self._warming = asyncio.create_task(self._warm_up())

    async def _warm_up(self) -> None:
        sizes = [2**power for power in range(self.limits.max_batch.bit_length())]
        try:
            for size in dict.fromkeys([*sizes, self.limits.max_batch]):
                await self.batcher.in_thread(partial(self.engine.warm_up, size))
        except Exception as error:
            self.trouble = f"the warm-up failed: {error}"
            logger.exception("the warm-up failed; the service takes no requests")
        else:
            self.ready.set()

    async def stop(self) -> None:
        """Answers what is inside, within the deadline, and ends the threads."""
        self.stopping = True
        self._warming.cancel()
        await self.batcher.close(self.limits.deadline)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def check_ready(self) -> None:
        """Raises Refused unless the service takes requests."""
        if self.stopping:
            raise Refused("stopping", "the server is stopping; ask another one")
        if not self.ready.is_set():
            raise Refused("starting", self.trouble or "the server is warming up; try again soon")

    def metrics(self) -> bytes:
        """The counters in Prometheus's text format."""
        self.counters.queue.set(self.batcher.waiting)
        self.counters.inside.set(self.batcher.inside)
        self.counters.streams.set(self.streams.taken)
        self.counters.ready.set(self.ready.is_set() and not self.stopping)
        return self.counters.text()

    def question(
        self, targets: Sequence[int | str], rather_than: int | str | None, prompts: Sequence[str], top_features: int
    ) -> Question:  # fmt: skip
        """A question within the limits.

        Raises:
            Refused: it is not, or the model cannot be asked it.
        """
        limits = self.limits
        asked = max(len(targets), len(prompts))
        if asked > limits.targets:
            raise Refused("bad_target", f"target, prompt: expected at most {limits.targets}, got {asked}")
        if any(len(prompt) > limits.prompt_chars for prompt in prompts):
            raise Refused("bad_target", f"prompt: expected at most {limits.prompt_chars} characters")
        return self.engine.question(targets, rather_than, prompts, top_features)

    async def answer(
        self, data: bytes, question: Question, form: Form, kind: str, extra: dict[str, Any], began: float
    ) -> Packed:  # fmt: skip
        """The answer to a question about an encoded image. If the caller is cancelled, the work is dropped.

        Args:
            kind: "http" or "frame", for the counters.
            extra: entries to add to JSON.
            began: `time.perf_counter()` at the start of the request.

        Raises:
            Refused: the image, the deadline or the service does not allow an answer.
        """
        self.check_ready()
        try:
            packed = await asyncio.wait_for(self._stages(data, question, form, extra, began), self.limits.deadline)
        except asyncio.TimeoutError:
            raise Refused("deadline", f"no answer within {self.limits.deadline:g} s; try again later") from None
        except (Refused, asyncio.CancelledError):
            raise
        except Exception as error:
            logger.exception("a request failed")
            raise Refused("internal", "the request failed; the server's log says why") from error
        self.counters.answered(kind, packed.milliseconds)
        return packed

    async def _stages(
        self, data: bytes, question: Question, form: Form, extra: dict[str, Any], began: float
    ) -> Packed:  # fmt: skip
        with self.batcher.enter():
            start = time.perf_counter()
            picture = await self._in_pool(lambda: self.engine.decode(data))
            decoded = time.perf_counter()
            done = await self.batcher.submit((picture, question))
            seconds = {"decode": decoded - start, "queue": done.waited, "explain": done.worked}
            taken = {name: 1000 * value for name, value in seconds.items()}
            return await self._in_pool(
                lambda: pack(done.result, picture, question, self.engine.facts, form, taken, began, extra)
            )

    async def _in_pool(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


class Places:
    """A number of places that are taken for a while.

    Args:
        limit: how many there are.
        what: takes them, for messages.
    """

    def __init__(self, limit: int, what: str) -> None:
        self._limit, self._what, self.taken = limit, what, 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Takes a place; raises Refused if there is none."""
        if self.taken >= self._limit:
            raise Refused("busy", f"the server has {self._limit} {self._what} already; try again later")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
