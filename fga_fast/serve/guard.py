"""Stands before all routes: the token, the name and origin that a page's requests give, and headers of answers."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fga_fast.serve.limits import Refused

# No page of ours asks another host for anything.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_OPEN = ("/healthz", "/readyz")  # asked by what starts and stops servers


class Guard:
    """ASGI middleware. With a token it protects /v1/ and /metrics; the pages and the schema hold no secret.

    Browsers cannot send a token's header with a WebSocket, so stream.py takes it in the first message too.

    Args:
        app: what it protects.
        token: None lets all pass who call the server by an address, as localhost or by one of `hosts`. A page of
            another site, whose name was made to lead here, calls it by that name.
        hosts: names of the server.
        refuse: makes the answer to a refused request.
    """

    def __init__(
        self, app: ASGIApp, token: str | None, hosts: Collection[str], refuse: Callable[[Refused], Response]
    ) -> None:
        self._app, self._token, self._refuse = app, token, refuse
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass, or answers it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        sender = _with_headers(send) if scope["type"] == "http" else send
        try:
            self._check(scope)
        except Refused as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": error.message[:100]})
            else:
                await self._refuse(error)(scope, receive, sender)
            return
        await self._app(scope, receive, sender)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        name = _parts(f"//{headers.get('host', '')}").hostname or ""
        if self._token is None and path not in _OPEN and name not in self._hosts and not is_address(name):
            raise Refused(
                "wrong_host", f"Host: the server does not know itself as {name!r}; start it with --allow-host"
            )
        origin = headers.get("origin")
        if origin is not None and _parts(origin).netloc != headers.get("host") and path not in _OPEN:
            raise Refused("cross_origin", "Origin: pages of other sites may not use this server")
        guarded = path.startswith("/v1/") or path == "/metrics"
        given = headers.get("authorization")
        if scope["type"] == "websocket":
            scope["fga_fast.authorised"] = self._token is None or given is not None
            guarded = given is not None
        if guarded and self._token is not None and not same(given or "", f"Bearer {self._token}"):
            raise Refused("unauthorised", "Authorization: expected 'Bearer TOKEN' with this server's token")


def _parts(url: str) -> SplitResult:
    """The parts of an address; empty ones of what is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def is_address(host: str) -> bool:
    """Whether it is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def same(given: str, expected: str) -> bool:
    """Whether two texts are equal, in a time that does not say where they differ."""
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())


def _with_headers(send: Send) -> Callable[[Message], Awaitable[None]]:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
        await send(message)

    return sender
