"""The WebSocket: frames of a camera, each an encoded image. The newest waiting frame is explained, older ones go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

from fastapi import WebSocket
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from fga_fast.serve.answers import JSON, Form, json_bytes
from fga_fast.serve.guard import same
from fga_fast.serve.limits import Refused
from fga_fast.serve.questions import Question
from fga_fast.serve.service import Service

POLICY, LATER = 1008, 1013  # codes of closing
_SETTINGS_CHARS = 2**16
_SETTINGS = {"target", "rather_than", "prompt", "top_features", "accept", "token"}


async def stream(socket: WebSocket, service: Service) -> None:
    """Answers one connection until either side closes it."""
    with contextlib.ExitStack() as stack:
        try:
            service.check_ready()
            stack.enter_context(service.streams.one())
        except Refused as error:
            service.counters.refused("frame", error.code)
            await socket.close(LATER, error.message[:100])
            return
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client may leave at any time
            await _Stream(socket, service).run()


class _Stream:
    def __init__(self, socket: WebSocket, service: Service) -> None:
        self._socket, self._service = socket, service
        self._authorised: bool = socket.scope["fga_fast.authorised"]
        self._question: Question | None = None
        self._newest: tuple[int, bytes, float] | None = None
        self._news = asyncio.Event()

    async def run(self) -> None:
        answering = asyncio.create_task(self._answer())
        reading = asyncio.create_task(self._read())
        try:
            done, _ = await asyncio.wait({answering, reading}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (answering, reading):
                task.cancel()
            await asyncio.gather(answering, reading, return_exceptions=True)

    async def _read(self) -> None:
        number = 0
        while True:
            message = await self._message()
            if message is None:
                return
            if message["type"] == "websocket.disconnect":
                return
            if (text := message.get("text")) is not None:
                if not await self._set(text):
                    return
            elif not self._authorised:
                await self._socket.close(POLICY, "token: expected one before the first frame")
                return
            else:
                if self._newest is not None:
                    self._service.counters.dropped.inc()
                self._newest = number, message["bytes"], time.perf_counter()
                self._news.set()
                number += 1

    async def _message(self) -> Message | None:
        """The next message; None if the client has held its place for too long without the token."""
        if self._authorised:
            return await self._socket.receive()
        try:
            return await asyncio.wait_for(self._socket.receive(), self._service.limits.body_seconds)
        except asyncio.TimeoutError:
            await self._socket.close(POLICY, "token: expected one in time")
            return None

    async def _set(self, text: str) -> bool:
        """Takes settings; returns whether the connection goes on. Wrong settings leave the old ones."""
        try:
            if len(text) > _SETTINGS_CHARS:
                raise Refused("bad_parameter", f"settings: expected at most {_SETTINGS_CHARS} characters")
            given = json.loads(text)
            if not isinstance(given, dict) or not given.keys() <= _SETTINGS:
                raise Refused(
                    "bad_parameter", f"settings: expected an object with some of {', '.join(sorted(_SETTINGS))}"
                )
            token = self._service.token
            if token is not None and not self._authorised and not same(str(given.get("token", "")), token):
                await self._socket.close(POLICY, "token: expected this server's")
                self._service.counters.refused("frame", "unauthorised")
                return False
            self._authorised = True
            self._question = _question(self._service, given)
        except (ValueError, RecursionError):
            await self._say(Refused("bad_parameter", "settings: expected a JSON object"), {})
        except Refused as error:
            await self._say(error, {})
        return True

    async def _answer(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._newest is None:
                continue
            (number, data, began), self._newest = self._newest, None
            extra = {"frame": number}
            question = self._question or Question()
            try:
                packed = await self._service.answer(data, question, Form(JSON), "frame", extra, began)
            except Refused as error:
                await self._say(error, extra)
            else:
                await self._socket.send_text(packed.content.decode())

    async def _say(self, error: Refused, extra: dict[str, Any]) -> None:
        self._service.counters.refused("frame", error.code)
        await self._socket.send_text(json_bytes({**extra, **error.content()}).decode())


def _question(service: Service, given: dict[str, Any]) -> Question:
    targets, prompts = (_several(given.get(name), name) for name in ("target", "prompt"))
    rather_than, listed = given.get("rather_than"), given.get("top_features", 0)
    if isinstance(listed, bool) or not isinstance(listed, int):
        raise Refused("bad_parameter", "top_features: expected a whole number")
    if rather_than is not None and (isinstance(rather_than, bool) or not isinstance(rather_than, (int, str))):
        raise Refused("bad_target", "rather_than: expected a class by number or name")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise Refused("bad_target", "prompt: expected texts")
    if given.get("accept", "json") not in ("json", JSON):
        raise Refused("not_acceptable", "accept: expected 'json'")
    return service.question(targets, rather_than, prompts, listed)


def _several(given: Any, name: str) -> list[Any]:
    values = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(value, (int, str)) and not isinstance(value, bool) for value in values):
        raise Refused("bad_target", f"{name}: expected numbers or names")
    return values
