"""A server with a small model, for the tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import serving
from serving import client_of

from fga_fast.serve.limits import Limits
from fga_fast.serve.server import Server


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
