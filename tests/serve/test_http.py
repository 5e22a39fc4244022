"""The real server on a loopback port, asked over real connections."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import serving
import torch
from explaining import agree
from packages import NAMES, PREPROCESS
from PIL import Image

from fga_fast import Difference, Explanation
from fga_fast.result.fields import flat
from fga_fast.serve.engine import Engine
from fga_fast.serve.limits import Limits
from fga_fast.serve.server import Server

TOKEN = "a-long-token"
FORMS = ("application/json", "application/x-safetensors", "application/x-npz", "image/png")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    sample = tmp_path_factory.mktemp("samples") / "one.png"
    sample.write_bytes(serving.png(1))
    limits = Limits(body_bytes=100_000, pixels=1_000_000, targets=4)
    with serving.running(serving.engine(max_pixels=limits.pixels), limits, samples={"one.png": sample}) as running:
        yield running


def client_of(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, trust_env=False, timeout=20)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with client_of(server) as client:
        yield client


def ask(http: httpx.Client, data: bytes, accept: str = "*/*", **query: Any) -> httpx.Response:
    headers = {"Content-Type": "application/octet-stream", "Accept": accept}
    return http.post("/v1/explain", content=data, headers=headers, params=query)


def code_of(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert error["message"] and error.keys() == {"code", "message"}
    return response.status_code, error["code"]


def count(http: httpx.Client, outcome: str, kind: str = "http") -> float:
    wanted = f'fga_fast_requests_total{{kind="{kind}",outcome="{outcome}"}} '
    return sum(float(line[len(wanted) :]) for line in http.get("/metrics").text.splitlines() if line.startswith(wanted))


def same_numbers(got: Any, want: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(got, dtype=want.dtype), want, rtol=1e-9, atol=1e-12)


# what it answers


@pytest.mark.parametrize(
    ("query", "targets"),
    [
        ({}, None),
        ({"target": "cat"}, "cat"),
        ({"target": ["4", "0"]}, [[4, 0]]),
        ({"target": "1", "rather_than": "dog"}, Difference(1, 3)),
        ({"target": "1", "top_features": 3}, 1),
    ],
    ids=["predicted", "name", "two", "difference", "features"],
)
def test_json_is_what_the_explainer_says(http: httpx.Client, query: dict[str, Any], targets: Any) -> None:
    response = ask(http, serving.png(5), **query)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    got, want = response.json(), serving.direct(serving.picture(5), targets, query.get("top_features", 0))
    count = want.targets[0].numel()
    assert (got["model"], got["image_size"], got["grid"]) == ("tiny", [16, 24], [2, 3])
    assert (got["probability_is"], got["signed"], got["notices"]) == ("softmax", False, [])
    assert got["targets"] == want.targets[0].reshape(-1).tolist()
    assert got["names"] == [NAMES[target] for target in got["targets"]]
    assert got["rather_than"] == (3 if "rather_than" in query else None)
    assert got["gate"] == {"base": 10.0, "slope": 1.0}
    assert want.values is not None and want.ungated is not None
    same_numbers(got["logits"], want.logits[0])
    same_numbers(got["values"], want.values[0].reshape(count))
    for name in ("relevance", "ungated"):
        same_numbers(got[name], getattr(want, name).reshape(count, 6))
    for name in ("scores", "gates"):
        assert got[name].keys() == {"0", "1"}
        for block, maps in getattr(want, name).items():
            same_numbers(got[name][str(block)], maps.reshape(count, 6))
    assert got["milliseconds"].keys() == {"decode", "queue", "explain", "pack", "total"}
    assert got["milliseconds"]["total"] >= got["milliseconds"]["explain"] > 0
    assert got["batch"] == 1
    if "top_features" not in query:
        assert "features" not in got
        return
    for block in (0, 1):
        for place, found in enumerate(got["features"][str(block)][0]):
            listed = want.top_features(block, patch=divmod(place, 3))[0]
            assert [feature for feature, _ in found] == [feature for feature, _ in listed]
            assert [value for _, value in found] == pytest.approx([value for _, value in listed])
            assert 0 < len(found) <= 3


def test_safetensors_is_a_saved_explanation(http: httpx.Client, tmp_path: Path) -> None:
    for query, targets in (({}, None), ({"target": ["2", "1"], "top_features": 2}, [[2, 1]])):
        response = ask(http, serving.png(6), FORMS[1], **query)
        assert response.headers["content-type"] == FORMS[1]
        path = tmp_path / "answer.safetensors"
        path.write_bytes(response.content)
        want = serving.direct(serving.picture(6), targets, 2 if query else 0)
        agree(Explanation.load(path), want, 1e-9)


def test_npz_has_the_arrays_of_the_explanation(http: httpx.Client) -> None:
    response = ask(http, serving.png(6), FORMS[2], target=["2", "1"], top_features=2)
    want = serving.direct(serving.picture(6), [[2, 1]], 2)
    expected = flat({k: v for k, v in vars(want).items() if isinstance(v, (torch.Tensor, dict))})
    with np.load(io.BytesIO(response.content), allow_pickle=False) as found:
        assert set(found) == {*expected, "grid", "image_size", "names", "notices"}
        for name, tensor in expected.items():
            same_numbers(found[name], tensor)
        assert (found["grid"].tolist(), found["names"].tolist()) == ([2, 3], NAMES)


def test_png_is_the_overlay(http: httpx.Client) -> None:
    query = {"target": ["2", "1"], "colormap": "viridis", "opacity": 0.25}
    response = ask(http, serving.png(6), FORMS[3], **query)
    want = serving.direct(serving.picture(6), [[2, 1]]).overlay(PREPROCESS.view(serving.picture(6)), "viridis", 0.25)
    got = np.asarray(Image.open(io.BytesIO(response.content)))
    assert np.array_equal(got, np.concatenate(list(want[0].numpy()), axis=1))
    assert response.headers["server-timing"].startswith("decode;dur=")


@pytest.mark.parametrize(
    ("accept", "given"),
    [
        ("", FORMS[0]), ("text/html, */*;q=0.1", FORMS[0]), ("application/*", FORMS[0]), ("image/*", FORMS[3]),
        ("application/json;q=0.2, application/x-npz", FORMS[2]), ("text/html", None), ("image/png;q=0", None),
        ("image/png;q=x", None),
    ],
)  # fmt: skip
def test_accept(http: httpx.Client, accept: str, given: str | None) -> None:
    response = ask(http, serving.png(), accept)
    if given is None:
        assert code_of(response) == (406, "not_acceptable")
    else:
        assert (response.status_code, response.headers["content-type"]) == (200, given)


def test_forms(http: httpx.Client) -> None:
    data = serving.png(8)
    want = ask(http, data, target="2").json()["relevance"]
    response = http.post("/v1/explain", files={"image": ("a.png", data, "image/png")}, params={"target": "2"})
    assert response.json()["relevance"] == want
    bad: list[Any] = [
        {"files": {"other": ("a.png", data)}}, {"files": [("image", ("a", data)), ("image", ("b", data))]},
        {"files": {"x": (None, b"text")}}, {"content": b"no form", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"no form", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ]  # fmt: skip
    for given in bad:
        assert code_of(http.post("/v1/explain", **given)) == (400, "bad_request")
    assert code_of(http.post("/v1/explain", files={"image": ("a", b"")})) == (400, "bad_image")
    assert code_of(http.post("/v1/explain", files={"image": ("a", bytes(200_000))})) == (413, "too_large")


def test_many_at_once_each_get_their_own() -> None:
    """Mixed questions are answered in common batches."""
    engine = serving.engine(serving.Held)
    with serving.running(engine) as server, ThreadPoolExecutor(12) as pool, client_of(server) as http:
        engine.hold()
        queries: list[dict[str, Any]] = [{}, {"target": "2"}, {"target": "1", "rather_than": "0"}]
        first = pool.submit(ask, http, serving.png(0))
        assert engine.begun.acquire(timeout=10)
        rest = [pool.submit(ask, http, serving.png(n), **queries[n % 3]) for n in range(1, 12)]
        until(lambda: b"fga_fast_queue_length 11.0" in http.get("/metrics").content)
        engine.go.set()
        batches = list[int]()
        for number, response in enumerate([first, *rest]):
            got = response.result().json()
            targets = (None, 2, Difference(1, 0))[number % 3]
            want = serving.direct(serving.picture(number), targets)
            same_numbers(got["relevance"], want.relevance)
            batches.append(got["batch"])
        assert sorted(batches) == [1, *[3] * 3, *[8] * 8]
        assert 'fga_fast_batch_size_bucket{le="8.0"}' in http.get("/metrics").text


def until(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# what it refuses


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


HEAD = b"POST /v1/explain HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"


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
        again = Raw(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
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


# what else it says


def test_model(http: httpx.Client) -> None:
    got = http.get("/v1/model").json()
    assert got.pop("version")
    assert got == {
        "model": "tiny", "image_size": [16, 24], "grid": [2, 3], "classes": 5, "class_names": NAMES, "blocks": [0, 1],
        "method": "rollout", "backward": "exact", "probability_is": "softmax", "takes_prompts": False,
        "top_features": serving.LISTED, "gate": {"base": 10.0, "slope": 1.0},
        "limits": {"body_bytes": 100_000, "pixels": 1_000_000, "targets": 4}, "samples": ["one.png"], "cards": None,
    }  # fmt: skip


def test_samples(http: httpx.Client) -> None:
    assert http.get("/v1/samples/one.png").content == serving.png(1)
    for name in ("two.png", "..%2Fone.png", "%2Fetc%2Fpasswd"):
        assert http.get(f"/v1/samples/{name}").status_code == 404


def test_no_address_asks_other_hosts(http: httpx.Client) -> None:
    for path in ("/healthz", "/readyz", "/v1/model", "/openapi.json", "/docs", "/redoc", "/", "/nothing"):
        response = http.get(path)
        policy = response.headers["content-security-policy"]
        assert policy == "default-src 'self'; img-src 'self' blob: data:"
        assert response.headers["x-content-type-options"] == "nosniff"
        if path in ("/docs", "/redoc"):
            assert response.status_code == 404
    assert "/v1/explain" in json.loads(http.get("/openapi.json").content)["paths"]


def test_times_are_counted(http: httpx.Client) -> None:
    ask(http, serving.png())
    text = http.get("/metrics").text
    for stage in ("decode", "queue", "explain", "pack", "total"):
        assert f'fga_fast_seconds_bucket{{le="0.1",stage="{stage}"}}' in text


class Slow(serving.Held):
    """Warms up only when it is let go."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.go.clear()


def test_not_ready_before_it_is_warm() -> None:
    engine = serving.engine(Slow)
    from fga_fast.serve.service import Service

    ready = threading.Event()
    server = Server(Service(engine), port=0, on_ready=lambda _: ready.set())
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with client_of(server) as http:
            assert engine.begun.acquire(timeout=10)
            assert http.get("/healthz").status_code == 200
            assert code_of(http.get("/readyz")) == (503, "starting")
            response = ask(http, serving.png())
            assert code_of(response) == (503, "starting") and response.headers["retry-after"]
            assert not ready.is_set()
            engine.go.set()
            assert ready.wait(10)
            assert http.get("/readyz").status_code == ask(http, serving.png()).status_code == 200
    finally:
        engine.go.set()
        server.stop()
        thread.join(20)
    assert not thread.is_alive()


class Cold(Engine):
    """Cannot warm up."""

    def warm_up(self, size: int) -> None:
        raise RuntimeError("no memory")


def test_warm_up_that_fails() -> None:
    from fga_fast.serve.service import Service

    service = Service(serving.engine(Cold))
    server = Server(service, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: service.trouble)
        response = httpx.get(f"{server.url}/readyz", trust_env=False)
        assert code_of(response) == (503, "starting") and "no memory" in response.text
    finally:
        server.stop()
        thread.join(20)


def test_token() -> None:
    with serving.running(serving.engine(), token=TOKEN) as server, client_of(server) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "ä"}):
            given = [(name, value.encode()) for name, value in headers.items()]
            for path in ("/v1/model", "/metrics", "/openapi.json"):
                assert code_of(http.get(path, headers=given)) == (401, "unauthorised")
            response = http.post("/v1/explain", content=serving.png(), headers=given)
            assert code_of(response) == (401, "unauthorised")
            assert response.headers["www-authenticate"] == "Bearer"
        assert http.get("/healthz").status_code == http.get("/readyz").status_code == 200
        http.headers["Authorization"] = f"Bearer {TOKEN}"
        assert http.get("/v1/model").status_code == 200
        assert ask(http, serving.png()).status_code == 200


def test_open_to_others_without_a_token(caplog: pytest.LogCaptureFixture) -> None:
    from fga_fast.serve.service import Service

    engine = serving.engine()
    for host, token, warned in (("127.0.0.1", None, False), ("0.0.0.0", TOKEN, False), ("0.0.0.0", None, True)):
        caplog.clear()
        Server(Service(engine, token=token), host, 0)._socket.close()
        assert ("there is no token" in caplog.text) == warned
    for bad in ("", "short", "with spaces in it", "ümlaute-sind-lang"):
        with pytest.raises(ValueError, match="token: expected at least 8"):
            Service(engine, token=bad)


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"max_batch": 0}, ValueError), ({"queue": 1.5}, TypeError), ({"deadline": float("nan")}, ValueError),
     ({"max_wait": -1}, ValueError), ({"pixels": True}, TypeError)],
)  # fmt: skip
def test_limits_are_checked(settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{next(iter(settings))}: expected a number"):
        Limits(**settings)
    assert Limits(max_wait=0).max_wait == 0
