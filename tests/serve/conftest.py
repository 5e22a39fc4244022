"""Servers on loopback ports, and a browser for the page of `fga-fast serve`.

The browser needs playwright and a Chromium: /usr/bin/chromium, or what FGA_FAST_CHROMIUM names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import serving
from page_visits import LIMITS, Visit, demo_explainer, preprocess, served
from serving import client_of

from fga_fast import Explainer
from fga_fast.assets import fashion_model, fashion_scenes
from fga_fast.serve.engine import Engine
from fga_fast.serve.limits import Limits
from fga_fast.serve.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path(os.environ.get("FGA_FAST_CHROMIUM", "/usr/bin/chromium"))
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    sample = tmp_path_factory.mktemp("samples") / "one.png"
    sample.write_bytes(serving.png(1))
    limits = Limits(body_bytes=100_000, pixels=1_000_000, targets=4)
    with serving.running(serving.engine(max_pixels=limits.pixels), limits, samples={"one.png": sample}) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")  # while it is there, other tests of the thread cannot run an event loop
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}; FGA_FAST_CHROMIUM names one")
    playwright.expect.set_options(timeout=20_000)
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="session")
def demo() -> Iterator[str]:
    listing = demo_explainer(top_features=3)
    engine = Engine(
        demo_explainer(), preprocess(), listing=listing, name="demo", probability_is="sigmoid", max_pixels=LIMITS.pixels
    )
    with served(engine, samples={path.name: path for path in fashion_scenes()[:3]}, cards="/cards.html") as url:
        yield url


@pytest.fixture(scope="session")
def plain() -> Iterator[str]:
    """Signed relevance of a model without SAEs, names and probabilities, which sees the middle of a picture only."""
    with served(
        Engine(Explainer(fashion_model(), signed=True, preset="published"), preprocess(crop_pct=0.5), name="plain")
    ) as url:
        yield url


@pytest.fixture
def visit(browser: Browser) -> Visit:
    """Opens a page, and checks at the end that nothing was said on its console and nobody else was asked."""

    @contextmanager
    def opened(url: str, refusals: bool = False, **settings: Any) -> Iterator[Page]:
        context = browser.new_context(**settings)
        page = context.new_page()
        faults: list[str] = []
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        ours = (url, "blob:", "data:", url.replace("http", "ws", 1))
        page.on("request", lambda request: None if request.url.startswith(ours) else faults.append(request.url))
        page.on("websocket", lambda socket: None if socket.url.startswith(ours) else faults.append(socket.url))
        response = page.goto(url)
        assert response is not None
        assert response.headers["content-security-policy"] == "default-src 'self'; img-src 'self' blob: data:"
        yield page
        context.close()
        assert faults == []
        # Chromium itself writes of each answer with an error.
        assert [text for text in said if not (refusals and "Failed to load resource" in text)] == []

    return opened
