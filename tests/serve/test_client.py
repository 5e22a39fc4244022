"""The Python client against the real server: answers, refusals, and trying again."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import serving
from explaining import agree

from fga_fast import Explanation
from fga_fast.serve import AsyncClient, Client
from fga_fast.serve.client import ServeError
from fga_fast.serve.limits import Limits
from fga_fast.serve.server import Server
from fga_fast.serve.service import Service

TOKEN = "a-long-token"


def test_answers_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(serving.png(2))
    with serving.running(serving.engine(), token=TOKEN) as server, Client(server.url + "/", token=TOKEN) as client:
        by_path, by_bytes = client.explain(path, [2, "ant"], top_features=1), client.explain(serving.png(2), [2, 0])
        want = serving.direct(serving.picture(2), [[2, 0]], 1)
        assert by_path["targets"] == by_bytes["targets"] == [2, 0]
        for answer in (by_path, by_bytes):
            assert answer["relevance"][1] == pytest.approx(want.relevance[0, 1].tolist())
        assert "features" in by_path and "features" not in by_bytes
        assert client.explain(path, "cat", rather_than=0)["rather_than"] == 0
        response = client.fetch(path, "application/x-safetensors", target=[2, 0], top_features=1)
        (tmp_path / "saved.safetensors").write_bytes(response.content)
        agree(Explanation.load(tmp_path / "saved.safetensors"), want, 1e-9)
        with pytest.raises(ServeError, match=r"bad_target: .*owl") as refused:
            client.explain(path, "owl")
        assert (refused.value.status, refused.value.code) == (422, "bad_target")
        with Client(server.url) as other, pytest.raises(ServeError) as refused:
            other.explain(path)
        assert (refused.value.status, refused.value.code) == (401, "unauthorised")
        with pytest.raises(FileNotFoundError):
            client.explain(tmp_path / "none.png")

        async def several() -> list[int]:
            async with AsyncClient(server.url, token=TOKEN) as many:
                found = await asyncio.gather(*(many.explain(path, target) for target in range(5)))
            return [answer["targets"][0] for answer in found]

        assert asyncio.run(several()) == [0, 1, 2, 3, 4]


def test_tries_again_when_busy() -> None:
    engine = serving.engine(serving.Held)
    with serving.running(engine, Limits(queue=1)) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        engine.hold()
        first = threading.Thread(target=http.post, args=["/v1/explain"], kwargs={"content": serving.png()})
        first.start()
        assert engine.begun.acquire(timeout=10)
        with Client(server.url, tries=1) as client, pytest.raises(ServeError) as refused:
            client.explain(serving.png())
        assert refused.value.code == "busy"
        threading.Timer(0.3, engine.go.set).start()
        began = time.monotonic()
        with Client(server.url) as client:
            assert client.explain(serving.png(), 1)["targets"] == [1]
        assert time.monotonic() - began >= 1  # as Retry-After said
        first.join(20)


def test_tries_again_when_nobody_listens_yet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", tries=2) as client, pytest.raises(httpx.ConnectError):
        client.explain(serving.png())
    served = Service(serving.engine())
    servers: list[Server] = []

    def late() -> None:
        servers.append(Server(served, port=port))
        servers[0].run()

    timer = threading.Timer(0.3, late)
    timer.start()
    try:
        with Client(f"http://127.0.0.1:{port}", tries=8) as client:
            assert client.explain(serving.png(), 1)["targets"] == [1]
    finally:
        servers[0].stop()
        timer.join(20)


def test_wrong_tries() -> None:
    with pytest.raises(ValueError, match="tries: expected at least 1, got 0"):
        Client("http://127.0.0.1:1", tries=0)
