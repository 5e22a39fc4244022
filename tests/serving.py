"""What the tests of the service share: an engine of a small model, pictures, and a server on a free port."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from packages import NAMES, PREPROCESS, explainer
from PIL import Image

from fga_fast import Explanation
from fga_fast.serve.engine import Engine
from fga_fast.serve.limits import Limits
from fga_fast.serve.server import Server
from fga_fast.serve.service import Service

LISTED = 4  # the most features that can be asked for


def picture(seed: int = 0, size: tuple[int, int] = (30, 20)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str = "PNG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def png(seed: int = 0, size: tuple[int, int] = (30, 20)) -> bytes:
    return encoded(picture(seed, size))


def engine(kind: type[Engine] = Engine, **settings: Any) -> Engine:
    """In float64, so that batches of other sizes give the same numbers."""
    with_names = {"class_names": NAMES, "ungated": True}
    return kind(
        explainer(**with_names), PREPROCESS, listing=explainer(**with_names, top_features=LISTED), name="tiny",
        probability_is="softmax", **settings,
    )  # fmt: skip


def direct(image: Image.Image, targets: Any = None, top_features: int = 0) -> Explanation:
    """What the explainer itself says of a picture."""
    asked = explainer(class_names=NAMES, ungated=True, top_features=top_features)
    return asked(PREPROCESS(image)[None].double(), targets)


class Held(Engine):
    """An engine that waits, before each batch but those of the warm-up, until it is let go."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.go, self.begun = threading.Event(), threading.Semaphore(0)
        self.go.set()

    def explain(self, asked: Any) -> Any:
        self.begun.release()
        assert self.go.wait(20)
        return super().explain(asked)

    def hold(self) -> None:
        self.go.clear()
        while self.begun.acquire(blocking=False):
            pass


@contextmanager
def running(served: Engine, limits: Limits | None = None, **settings: Any) -> Iterator[Server]:
    """A warm server on a free loopback port."""
    ready = threading.Event()
    server = Server(Service(served, limits, **settings), port=0, on_ready=lambda _: ready.set())
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        assert ready.wait(20)
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
