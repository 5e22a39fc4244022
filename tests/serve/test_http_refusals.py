"""What the real server refuses, and what hostile, slow and lost clients cost."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import serving
from PIL import Image
from serving import ask, client_of, code_of, count, until

from fga_fast.serve.limits import Limits
from fga_fast.serve.server import Server


@pytest.mark.parametrize(
    ("data", "query", "expected"),
    [
        (b"no image", {}, (400, "bad_image")),
        (b"", {}, (400, "bad_image")),
        (serving.png()[:200], {}, (400, "bad_image")),
        (serving.encoded(Image.new("1", (1001, 1000))), {}, (413, "too_large")),
        (bytes(100_001), {}, (413, "too_large")),
        (serving.png(), {"target": "owl"}, (422, "bad_target")),
        (serving.png(), {"target": "7"}, (422, "bad_target")),
        (serving.png(), {"target": "9" * 5000}, (422, "bad_target")),
        (serving.png(), {"target": ["1"] * 5}, (422, "bad_target")),
        (serving.png(), {"prompt": "an owl"}, (422, "bad_target")),
        (serving.png(), {"rather_than": "1"}, (422, "bad_target")),
        (serving.png(), {"top_features": "9"}, (422, "bad_parameter")),
        (serving.png(), {"top_features": "x"}, (422, "bad_parameter")),
        (serving.png(), {"opacity": "2"}, (422, "bad_parameter")),
        (serving.png(), {"opacity": "nan"}, (422, "bad_parameter")),
        (serving.png(), {"colormap": "red"}, (422, "bad_parameter")),
    ],
    ids=[
        "no image", "empty", "truncated", "pixels", "bytes", "name", "number", "long number", "targets", "prompt",
        "rather_than", "features", "features no number", "opacity", "opacity nan", "colormap",
    ],
)  # fmt: skip
def test_refusals(http: httpx.Client, data: bytes, query: dict[str, Any], expected: tuple[int, str]) -> None:
    before = count(http, expected[1])
    assert code_of(ask(http, data, **query)) == expected
    assert count(http, expected[1]) == before + 1
    assert ask(http, serving.png()).status_code == 200


def test_other_refusals(http: httpx.Client) -> None:
    response = http.post("/v1/explain", content=b"x", headers={"Content-Type": "text/plain"})
    assert code_of(response) == (415, "unsupported_type")
    assert code_of(http.get("/v1/explain")) == (405, "method")
    assert code_of(http.get("/v1/nothing")) == (404, "not_found")
    assert code_of(http.get("/static/%2e%2e/app.py")) == (404, "not_found")
    response = http.post("/v1/explain", content=serving.png(), headers={"Origin": "http://evil.example"})
    assert code_of(response) == (403, "cross_origin")
    response = http.post("/v1/explain", content=serving.png(), headers={"Origin": "http://["})
    assert code_of(response) == (403, "cross_origin")
    for name, status in (
        ("evil.example:80", 403),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("x]", 403),
    ):
        response = http.post("/v1/explain", content=serving.png(), headers={"Host": name})
        assert response.status_code == status and (status == 200 or code_of(response) == (403, "wrong_host"))
    assert http.get("/healthz", headers={"Host": "evil.example"}).status_code == 200
    own = str(http.base_url).rstrip("/")
    assert http.post("/v1/explain", content=serving.png(), headers={"Origin": own}).status_code == 200


class Raw:
    """A connection that says what it is told to."""

    def __init__(self, server: Server, *sent: bytes) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        for part in sent:
            self.socket.sendall(part)

    def rest(self) -> bytes:
        """All that comes until the server closes."""
        parts = []
        try:
            while part := self.socket.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        self.socket.close()
        return b"".join(parts)


HEAD = b"POST /v1/explain HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"


def test_too_long_without_a_length(server: Server, http: httpx.Client) -> None:
    """The server keeps nothing of it, but lets the client finish, so that the answer arrives."""
    chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
    for parts in ((200 * chunk, b"0\r\n\r\n"), (11 * chunk,), (b"186a1\r\n" + bytes(100_001) + b"\r\n",)):
        raw = Raw(server, HEAD, b"Transfer-Encoding: chunked\r\n\r\n", *parts)
        assert raw.socket.recv(65536).startswith(b"HTTP/1.1 413 ")
        raw.socket.close()
    raw = Raw(server, HEAD, b"Content-Length: 99999999999\r\n\r\n")
    assert raw.socket.recv(65536).startswith(b"HTTP/1.1 413 ")
    raw.socket.close()
    for size in (100_001, 3_000_000):
        assert code_of(ask(http, bytes(size))) == (413, "too_large")
    assert ask(http, serving.png()).status_code == 200


def test_chunked_within_the_limit(http: httpx.Client) -> None:
    data = serving.png(4)
    parts = (data[start : start + 100] for start in range(0, len(data), 100))
    response = http.post("/v1/explain", content=parts, headers={"Content-Type": "image/png"})
    assert response.json()["relevance"] == ask(http, data).json()["relevance"]


def test_slow_clients_are_let_go() -> None:
    """They send a body, headers or nothing, and never finish."""
    with serving.running(serving.engine(), Limits(body_seconds=0.3)) as server:
        raws = [
            Raw(server, HEAD, b"Content-Length: 100\r\n\r\n", b"x"),
            Raw(server, HEAD),
            Raw(server),
        ]
        refused = Raw(server, HEAD, b"Content-Length: 99999999999\r\n\r\n")
        assert refused.socket.recv(65536).startswith(b"HTTP/1.1 413 ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(100):
                refused.socket.sendall(b"more")
                time.sleep(0.05)
        again = Raw(server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while not found.endswith(b'{"status":"ok"}'):
            found += again.socket.recv(65536)
        again.socket.sendall(b"GET /heal")
        body, *others = [raw.rest() for raw in (*raws, again)]
        assert body.startswith(b"HTTP/1.1 408 ") and b'"slow_body"' in body
        assert others == [b"", b"", b""]
        assert httpx.post(f"{server.url}/v1/explain", content=serving.png(), trust_env=False).status_code == 200


def test_headers_that_are_too_long_or_no_http(server: Server) -> None:
    assert Raw(server, b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000).rest()[:13] in (b"", b"HTTP/1.1 400 ")
    assert Raw(server, b"\x16\x03\x01 no http\r\n\r\n").rest().startswith(b"HTTP/1.1 400 ")


def test_who_goes_away_costs_nothing() -> None:
    engine = serving.engine(serving.Held)
    with serving.running(engine) as server, client_of(server) as http:
        engine.hold()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, http, serving.png())
            assert engine.begun.acquire(timeout=10)
            data = serving.png(1)
            raws = [Raw(server, HEAD, b"Content-Length: %d\r\n\r\n" % len(data), data) for _ in range(3)]
            until(lambda: b"fga_fast_queue_length 3.0" in http.get("/metrics").content)
            for raw in raws:
                raw.socket.close()
            until(lambda: count(http, "gone") == 3)
            Raw(server, HEAD, b"Content-Length: 1000\r\n\r\n", b"only this").socket.close()
            until(lambda: count(http, "gone") == 4)
            last = pool.submit(ask, http, serving.png(2))
            until(lambda: b"fga_fast_requests_inside 2.0" in http.get("/metrics").content)
            engine.go.set()
            assert first.result().status_code == last.result().status_code == 200
            assert last.result().json()["batch"] == 1
        assert b"fga_fast_requests_inside 0.0" in http.get("/metrics").content


def test_busy_and_late() -> None:
    """Two places: the third request is told to come again. Those inside wait for their deadline."""
    engine = serving.engine(serving.Held)
    with (
        serving.running(engine, Limits(queue=2, deadline=0.6, max_batch=1)) as server,
        client_of(server) as http,
        ThreadPoolExecutor(2) as pool,
    ):
        engine.hold()
        inside = [pool.submit(ask, http, serving.png()) for _ in range(2)]
        until(lambda: b"fga_fast_requests_inside 2.0" in http.get("/metrics").content)
        response = ask(http, serving.png())
        assert code_of(response) == (503, "busy")
        assert int(response.headers["retry-after"]) >= 1
        assert [code_of(one.result()) for one in inside] == [(504, "deadline")] * 2
        engine.go.set()
        until(lambda: ask(http, serving.png()).status_code == 200)
        assert (count(http, "deadline"), count(http, "busy")) == (2, 1)


class Failing(serving.Held):
    """Fails as a whole where a picture has a white corner."""

    def explain(self, asked: Any) -> Any:
        if any(picture.view.getpixel((0, 0)) == (255, 255, 255) for picture, _ in asked):
            raise MemoryError("a secret of the server")
        return super().explain(asked)


def test_failure_of_a_whole_batch(caplog: pytest.LogCaptureFixture) -> None:
    with serving.running(serving.engine(Failing)) as server, client_of(server) as http:
        response = ask(http, serving.encoded(Image.new("RGB", (30, 20), "white")))
        assert code_of(response) == (500, "internal")
        assert "secret" not in response.text and "a secret" in caplog.text
        assert ask(http, serving.png()).status_code == 200
        assert "fga_fast_internal_errors_total 1.0" in http.get("/metrics").text
