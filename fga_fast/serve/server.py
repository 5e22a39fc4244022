"""Runs a service on a socket: until a signal, then until what was asked is answered."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fga_fast.serve.app import make_app
from fga_fast.serve.service import Service

logger = logging.getLogger(__name__)

_LOCK_OUT = 2.0  # seconds after the deadline in which answers still leave


def serve(
    service: Service, host: str = "127.0.0.1", port: int = 8000, on_ready: Callable[[str], object] | None = None
) -> None:  # fmt: skip
    """Serves until SIGINT or SIGTERM, or until the process ends.

    Args:
        host: an address of this machine; others than loopback are reachable from outside.
        port: 0 takes a free one.
        on_ready: called with the address when the service is warm.

    Raises:
        OSError: the address cannot be had.
    """
    Server(service, host, port, on_ready).run()


class Server(uvicorn.Server):
    """A uvicorn server for one service. Its socket is bound at once, so `url` is known before it runs.

    Attributes:
        url: its address.
    """

    def __init__(
        self, service: Service, host: str = "127.0.0.1", port: int = 8000,
        on_ready: Callable[[str], object] | None = None,
    ) -> None:  # fmt: skip
        limits = service.limits
        if not _is_loopback(host) and service.token is None:
            logger.warning(
                "host: %s can be reached from other machines, and there is no token: whoever reaches it can use the "
                "model. Give a token, or put it behind a proxy that checks who asks",
                host,
            )
        self._service, self._on_ready = service, on_ready
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.create_server((host, port), family=family, backlog=256).detach()
        # By this protocol asyncio knows that it may switch Nagle's algorithm off. With it, the body of an answer waits
        # up to 40 ms for the client to acknowledge the headers.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=bound)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"

        class Hurried(_Hurried):
            seconds = limits.body_seconds

        super().__init__(
            uvicorn.Config(
                make_app(service), http=Hurried, ws="websockets-sansio", ws_max_size=limits.body_bytes,
                ws_per_message_deflate=False, access_log=False, log_config=None, server_header=False,
                proxy_headers=False, lifespan="on", timeout_keep_alive=5,
                timeout_graceful_shutdown=math.ceil(limits.deadline + _LOCK_OUT),
            )
        )  # fmt: skip

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Runs in this thread, until a signal or `stop`."""
        super().run(sockets or [self._socket])

    def stop(self) -> None:
        """Answers what was asked, then ends; from any thread."""
        self._service.stopping = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Of signals. A second Ctrl-C ends at once."""
        self._service.stopping = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens the service."""
        await super().startup(sockets)
        self._announcing = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        await self._service.ready.wait()
        if self._on_ready is not None:
            self._on_ready(self.url)


class _Hurried(H11Protocol):
    """Closes connections whose headers do not arrive in time; uvicorn would wait for ever.

    The rest of a body that was refused is read and dropped for as long, since to close before would often reach the
    client before the answer does.
    """

    seconds = 10.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        """Starts the clock when the client has to finish something, and stops it when that is done."""
        if not self._awaited():
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self._too_late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        if self._awaited():
            self.transport.close()

    def _awaited(self) -> bool:
        theirs, ours = self.conn.their_state, self.conn.our_state
        return theirs is h11.IDLE or (theirs is h11.SEND_BODY and ours is h11.DONE)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
