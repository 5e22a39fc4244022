"""What the real server says of itself, and when it is ready."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx
import pytest
import serving
from packages import NAMES
from serving import ask, client_of, code_of, until

from fga_fast.serve.engine import Engine
from fga_fast.serve.limits import Limits
from fga_fast.serve.server import Server

TOKEN = "a-long-token"


def test_model(http: httpx.Client) -> None:
    got = http.get("/v1/model").json()
    assert got.pop("version")
    assert got == {
        "model": "tiny", "image_size": [16, 24], "grid": [2, 3], "classes": 5, "class_names": NAMES, "blocks": [0, 1],
        "method": "block_x_gradient", "backward": "conservative", "probability_is": "softmax", "takes_prompts": False,
        "top_features": serving.LISTED, "gate": {"base": 2.0, "slope": 1.0},
        "limits": {"body_bytes": 100_000, "pixels": 1_000_000, "targets": 4}, "samples": ["one.png"], "cards": None,
    }  # fmt: skip


def test_answers_do_not_wait_for_acknowledgements(server: Server, http: httpx.Client) -> None:
    """Nagle's algorithm would hold the body back until the client has acknowledged the headers."""
    assert http.get("/healthz").status_code == 200  # the connection stays
    (connection, *_) = server.server_state.connections
    used = connection.transport.get_extra_info("socket")
    assert used.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_samples(http: httpx.Client) -> None:
    assert http.get("/v1/samples/one.png").content == serving.png(1)
    for name in ("two.png", "..%2Fone.png", "%2Fetc%2Fpasswd"):
        assert http.get(f"/v1/samples/{name}").status_code == 404


def test_no_address_asks_other_hosts(http: httpx.Client) -> None:
    for path in (
        "/healthz",
        "/readyz",
        "/v1/model",
        "/openapi.json",
        "/docs",
        "/redoc",
        "/",
        "/swagger/swagger-ui.css",
        "/nothing",
    ):
        response = http.get(path)
        policy = response.headers["content-security-policy"]
        assert policy == "default-src 'self'; img-src 'self' blob: data:"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.status_code == (404 if path in ("/redoc", "/nothing") else 200)
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
            for path in ("/v1/model", "/metrics", "/v1/samples/one.png"):
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
