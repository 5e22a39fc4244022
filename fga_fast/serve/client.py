"""Asks a service from Python. Needs httpx."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import httpx

Image: TypeAlias = "bytes | str | os.PathLike[str]"  # an encoded image, or a file of one

_AGAIN = (502, 503)  # nobody worked on such a request
_LONGEST = 30.0  # seconds between tries


class ServeError(RuntimeError):
    """The service refused.

    Attributes:
        status: of HTTP.
        code: such as "bad_image"; see docs/serve.md.
    """

    def __init__(self, response: httpx.Response) -> None:
        try:
            error = response.json()["error"]
            self.code, message = str(error["code"]), str(error["message"])
        except (ValueError, KeyError, TypeError):
            self.code, message = "unknown", response.text[:200]
        self.status = response.status_code
        super().__init__(f"{self.code}: {message}")


class _Asking:
    def __init__(self, url: str, token: str | None, tries: int) -> None:
        if tries < 1:
            raise ValueError(f"tries: expected at least 1, got {tries}")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._url, self._headers, self._tries = url.rstrip("/"), headers, tries

    def _request(self, image: Image, accept: str, asked: dict[str, Any]) -> dict[str, Any]:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        wanted = {name: value for name, value in asked.items() if value is not None}
        headers = {**self._headers, "Accept": accept, "Content-Type": "application/octet-stream"}
        return {"url": f"{self._url}/v1/explain", "content": data, "params": wanted, "headers": headers}

    def _waits(self) -> Iterator[float]:
        """Seconds to wait after each failed try but the last; longer each time, and not the same for all clients."""
        for number in range(self._tries - 1):
            yield 0.1 * 2**number * (1 + random.random())


def _answer_or_pause(response: httpx.Response, wait: float | None) -> httpx.Response | float:
    """The response if it is the answer, else the seconds until the next try; raises where there is none."""
    if response.status_code == 200:
        return response
    if wait is None or response.status_code not in _AGAIN:
        raise ServeError(response)
    told = response.headers.get("Retry-After", "")
    return min(max(wait, float(told) if told.isdecimal() else 0.0), _LONGEST)


class Client(_Asking):
    """Asks a service; to be closed, or used in a `with` block. Threads may share one.

    Tries again when the service is busy or cannot be reached. Explaining changes nothing, so that is safe.

    Args:
        url: its address, such as "http://127.0.0.1:8000".
        token: if it asks for one.
        tries: of each request, at least 1.
        timeout: seconds for each.
    """

    def __init__(self, url: str, *, token: str | None = None, tries: int = 5, timeout: float = 30.0) -> None:
        super().__init__(url, token, tries)
        self._http = httpx.Client(timeout=timeout, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def explain(
        self, image: Image, target: int | str | Sequence[int | str] | None = None, *, prompt: Sequence[str] = (),
        rather_than: int | str | None = None, top_features: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        """The answer as JSON; docs/serve.md says what is in it. Arguments as there.

        Raises:
            ServeError: the service refused.
            httpx.TransportError: it cannot be reached.
        """
        asked = {"target": target, "prompt": prompt, "rather_than": rather_than, "top_features": top_features}
        found: dict[str, Any] = self.fetch(image, "application/json", **asked).json()
        return found

    def fetch(self, image: Image, accept: str, **asked: Any) -> httpx.Response:
        """The answer in another form ("image/png", "application/x-npz"), as `response.content`; `asked` is the query.

        What comes as "application/x-safetensors" is a file for `Explanation.load`. Raises as `explain`.
        """
        request, waits = self._request(image, accept, asked), self._waits()
        while True:
            wait = next(waits, None)
            try:
                found = _answer_or_pause(self._http.post(**request), wait)
            except httpx.TransportError:
                if wait is None:
                    raise
                found = wait
            if isinstance(found, httpx.Response):
                return found
            time.sleep(found)


class AsyncClient(_Asking):
    """`Client` for asyncio, with the same arguments; to be used in an `async with` block."""

    def __init__(self, url: str, *, token: str | None = None, tries: int = 5, timeout: float = 30.0) -> None:
        super().__init__(url, token, tries)
        self._http = httpx.AsyncClient(timeout=timeout, trust_env=False)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def explain(
        self, image: Image, target: int | str | Sequence[int | str] | None = None, *, prompt: Sequence[str] = (),
        rather_than: int | str | None = None, top_features: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        """As `Client.explain`."""
        asked = {"target": target, "prompt": prompt, "rather_than": rather_than, "top_features": top_features}
        found: dict[str, Any] = (await self.fetch(image, "application/json", **asked)).json()
        return found

    async def fetch(self, image: Image, accept: str, **asked: Any) -> httpx.Response:
        """As `Client.fetch`."""
        request, waits = self._request(image, accept, asked), self._waits()
        while True:
            wait = next(waits, None)
            try:
                found = _answer_or_pause(await self._http.post(**request), wait)
            except httpx.TransportError:
                if wait is None:
                    raise
                found = wait
            if isinstance(found, httpx.Response):
                return found
            await asyncio.sleep(found)
