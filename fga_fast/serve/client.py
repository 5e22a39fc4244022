"""Asks a service from Python. Needs httpx and httpx-retries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import httpx
from httpx_retries import Retry, RetryTransport

Image: TypeAlias = "bytes | str | os.PathLike[str]"  # an encoded image, or a file of one


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


class Client:
    """Asks a service; to be closed, or used in a `with` block. Threads may share one.

    Tries again when the service is busy or cannot be reached. Explaining changes nothing, so that is safe.

    Args:
        url: its address, such as "http://127.0.0.1:8000".
        token: if it asks for one.
        tries: of each request, at least 1.
        timeout: seconds for each.
    """

    def __init__(self, url: str, *, token: str | None = None, tries: int = 5, timeout: float = 30.0) -> None:
        self._http = httpx.Client(**_settings(url, token, tries, timeout))

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
        return _json(self.fetch(image, "application/json", **asked))

    def fetch(self, image: Image, accept: str, **asked: Any) -> httpx.Response:
        """The answer in another form ("image/png", "application/x-npz"), as `response.content`; `asked` is the query.

        What comes as "application/x-safetensors" is a file for `Explanation.load`. Raises as `explain`.
        """
        return _answer(self._http.post("/v1/explain", **_request(image, accept, asked)))


class AsyncClient:
    """`Client` for asyncio, with the same arguments; to be used in an `async with` block."""

    def __init__(self, url: str, *, token: str | None = None, tries: int = 5, timeout: float = 30.0) -> None:
        self._http = httpx.AsyncClient(**_settings(url, token, tries, timeout))

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
        return _json(await self.fetch(image, "application/json", **asked))

    async def fetch(self, image: Image, accept: str, **asked: Any) -> httpx.Response:
        """As `Client.fetch`."""
        return _answer(await self._http.post("/v1/explain", **_request(image, accept, asked)))


def _settings(url: str, token: str | None, tries: int, timeout: float) -> dict[str, Any]:
    """Arguments of httpx' clients."""
    if tries < 1:
        raise ValueError(f"tries: expected at least 1, got {tries}")
    # Nobody worked on a request that gets one of these answers.
    again = Retry(
        tries - 1, allowed_methods=["POST"], status_forcelist=(502, 503), backoff_factor=0.1, max_backoff_wait=30.0
    )  # fmt: skip
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    # No proxy of the environment: most services are on this machine.
    return {
        "base_url": url, "headers": headers, "timeout": timeout, "trust_env": False,
        "transport": RetryTransport(retry=again),
    }  # fmt: skip


def _request(image: Image, accept: str, asked: dict[str, Any]) -> dict[str, Any]:
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    wanted = {name: value for name, value in asked.items() if value is not None}
    return {
        "content": data, "params": wanted, "headers": {"Accept": accept, "Content-Type": "application/octet-stream"}
    }  # fmt: skip


def _answer(response: httpx.Response) -> httpx.Response:
    if response.status_code != 200:
        raise ServeError(response)
    return response


def _json(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = response.json()
    return found
