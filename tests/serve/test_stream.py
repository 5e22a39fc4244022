"""The WebSocket: every answer is of the frame that it names, and the newest frame wins."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import serving
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from fga_fast import Difference
from fga_fast.serve.limits import Limits
from fga_fast.serve.server import Server

TOKEN = "a-long-token"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving.running(serving.engine(), Limits(body_bytes=200_000, targets=3, queue=2)) as running:
        yield running


@contextmanager
def stream(server: Server, **settings: Any) -> Iterator[ClientConnection]:
    url = server.url.replace("http://", "ws://") + "/v1/stream"
    with connect(url, proxy=None, open_timeout=10, close_timeout=5, **settings) as socket:
        yield socket


def told(socket: ClientConnection) -> Any:
    return json.loads(socket.recv(timeout=10))


def error_of(answer: Any) -> tuple[Any, str]:
    return answer.get("frame"), answer["error"]["code"]


def test_answers_are_those_of_the_explainer(server: Server) -> None:
    asked: list[tuple[dict[str, Any], Any, int]] = [
        ({"target": None, "rather_than": None, "top_features": 0, "accept": "json"}, None, 0),
        ({"target": ["cat", 0]}, [[2, 0]], 0),
        ({"target": [1], "rather_than": "dog"}, Difference(1, 3), 0),
        ({"target": 4, "top_features": 2}, 4, 2),
        ({}, None, 0),
    ]
    with stream(server) as socket:
        for number, (settings, targets, listed) in enumerate(asked):
            socket.send(json.dumps(settings))
            socket.send(serving.png(number))
            got, want = told(socket), serving.direct(serving.picture(number), targets, listed)
            assert got["frame"] == number
            assert got["targets"] == want.targets[0].reshape(-1).tolist()
            expected = want.relevance.reshape(-1, 6)
            torch.testing.assert_close(torch.tensor(got["relevance"], dtype=torch.float64), expected)
            assert ("features" in got) == (listed > 0)
            assert got["milliseconds"]["total"] > 0


def test_frames_without_settings_explain_the_prediction(server: Server) -> None:
    with stream(server) as socket:
        socket.send(serving.png(1))
        assert told(socket)["targets"] == serving.direct(serving.picture(1)).targets.tolist()


def test_the_newest_frame_wins() -> None:
    engine = serving.engine(serving.Held)
    with serving.running(engine) as server, stream(server) as socket:
        engine.hold()
        socket.send("{}")
        socket.send(serving.png(0))
        assert engine.begun.acquire(timeout=10)
        for number in range(1, 6):
            socket.send(serving.png(number))
        socket.send(json.dumps({"target": ["owl"]}))  # answered once the frames before it have been read
        assert error_of(told(socket)) == (None, "bad_target")
        engine.go.set()
        for number in (0, 5):
            got, want = told(socket), serving.direct(serving.picture(number))
            assert got["frame"] == number
            torch.testing.assert_close(torch.tensor(got["relevance"], dtype=torch.float64), want.relevance)
        socket.send(serving.png(6))
        assert told(socket)["frame"] == 6
        text = httpx.get(f"{server.url}/metrics", trust_env=False).text
        assert "fga_fast_dropped_frames_total 4.0" in text
        assert 'fga_fast_requests_total{kind="frame",outcome="ok"} 3.0' in text


def test_bad_frames_do_not_end_the_stream(server: Server) -> None:
    with stream(server) as socket:
        for number, data in enumerate((b"", b"no image", serving.png()[:150])):
            socket.send(data)
            assert error_of(told(socket)) == (number, "bad_image")
        socket.send(serving.png())
        assert told(socket)["frame"] == 3


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ("no json", "bad_parameter"), ("[]", "bad_parameter"), ("[" * 20_000, "bad_parameter"),
        ("[" + 30_000 * "[]," + "1]", "bad_parameter"), ('{"targets": [1]}', "bad_parameter"),
        ('{"target": [true]}', "bad_target"), ('{"target": [1.5]}', "bad_target"),
        ('{"target": [9]}', "bad_target"), ('{"target": [0, 1, 2, 3]}', "bad_target"),
        ('{"target": [1], "rather_than": [2]}', "bad_target"), ('{"prompt": ["an owl"]}', "bad_target"),
        ('{"prompt": [1]}', "bad_target"), ('{"top_features": true}', "bad_parameter"),
        ('{"top_features": 99}', "bad_parameter"), ('{"accept": "png"}', "not_acceptable"),
    ],
    ids=lambda value: value[:30],
)  # fmt: skip
def test_bad_settings_leave_the_old_ones(server: Server, settings: str, code: str) -> None:
    with stream(server) as socket:
        socket.send('{"target": [3]}')
        socket.send(settings)
        assert error_of(told(socket)) == (None, code)
        socket.send(serving.png())
        assert told(socket)["targets"] == [3]


def test_frames_that_are_too_large_end_it(server: Server) -> None:
    with stream(server) as socket:
        socket.send(bytes(200_001))
        with pytest.raises(ConnectionClosed) as closed:
            told(socket)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def test_no_more_streams_than_places(server: Server) -> None:
    with stream(server) as first, stream(server) as second:
        for socket in (first, second):
            socket.send(serving.png())
            told(socket)
        with pytest.raises(InvalidStatus), stream(server):
            pass
    with stream(server) as socket:
        socket.send(serving.png())
        assert told(socket)["frame"] == 0


def test_pages_of_other_sites(server: Server) -> None:
    with pytest.raises(InvalidStatus), stream(server, origin="http://evil.example"):
        pass
    with stream(server, origin=server.url) as socket:
        socket.send(serving.png())
        assert told(socket)["frame"] == 0


def test_who_sends_no_token_loses_the_place() -> None:
    limits = Limits(queue=1, body_seconds=0.5)
    with serving.running(serving.engine(), limits, token=TOKEN) as server:
        with stream(server) as idle, pytest.raises(ConnectionClosed, match="token: expected one in time"):
            idle.recv(timeout=10)
        with stream(server) as socket:
            socket.send(json.dumps({"token": TOKEN}))
            time.sleep(1.0)  # who has shown it may be silent
            socket.send(serving.png())
            assert told(socket)["frame"] == 0


def test_token() -> None:
    """In a header, or, since pages cannot send one, in the first message."""
    with serving.running(serving.engine(), token=TOKEN) as server:
        with pytest.raises(InvalidStatus), stream(server, additional_headers={"Authorization": "Bearer wrong"}):
            pass
        for first in (serving.png(), "{}", json.dumps({"token": "wrong"}), json.dumps({"token": None})):
            with stream(server) as socket:
                socket.send(first)
                with pytest.raises(ConnectionClosed) as closed:
                    told(socket)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
        for headers, first in (({"Authorization": f"Bearer {TOKEN}"}, "{}"), ({}, json.dumps({"token": TOKEN}))):
            with stream(server, additional_headers=headers) as socket:
                socket.send(first)
                socket.send('{"target": [2]}')
                socket.send(serving.png())
                assert told(socket)["targets"] == [2]


def test_stopping_closes_streams() -> None:
    with serving.running(serving.engine()) as server, stream(server) as socket:
        socket.send(serving.png())
        told(socket)
        server.stop()
        with pytest.raises(ConnectionClosed) as closed:
            told(socket)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
