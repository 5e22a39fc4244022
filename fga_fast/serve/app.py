"""The HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from fga_fast import __version__
from fga_fast.result import colours
from fga_fast.serve.answers import FORMS, JSON, Form, Packed, json_bytes, wanted
from fga_fast.serve.body import IMAGE_TYPES, read_image
from fga_fast.serve.guard import Guard
from fga_fast.serve.limits import Refused
from fga_fast.serve.service import Result, Service
from fga_fast.serve.stream import stream

PAGE = Path(__file__).parent / "page"
RETRY_SECONDS = 1

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {"schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {**dict.fromkeys(IMAGE_TYPES, _BINARY), "multipart/form-data": _FORM},
    }
}
_TEXT = {"type": "string"}
_ERROR = {
    "description": "An error; docs/serve.md lists the codes.",
    "content": {
        JSON: {
            "schema": {
                "type": "object",
                "properties": {"error": {"type": "object", "properties": {"code": _TEXT, "message": _TEXT}}},
            }
        }
    },
}
_BEARER = [Depends(HTTPBearer(auto_error=False))]  # only says in the schema what Guard asks for


def make_app(service: Service) -> FastAPI:
    """The ASGI app of a service, for uvicorn or another server. It starts and stops the service."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    # FastAPI's own pages of documentation load scripts from another host. Those of FastAPIOffline have scripts within
    # them, which our headers forbid; so we take its Swagger UI, and page/docs.html is the page.
    app = FastAPIOffline(
        title="fga-fast", version=__version__, docs_url=None, redoc_url=None, static_url="/swagger", lifespan=lifespan,
        responses={422: _ERROR, "default": _ERROR},
        description="Explains the decisions of a vision transformer. docs/serve.md has the WebSocket at /v1/stream.",
    )  # fmt: skip

    def refuse(error: Refused) -> Response:
        service.counters.refused("http", error.code)
        headers = {"Retry-After": str(RETRY_SECONDS)} if error.status == 503 else {}
        headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        headers |= {"Connection": "close"} if error.code == "slow_body" else {}
        return Response(json_bytes(error.content()), error.status, headers, JSON)

    async def on_error(_: Request, error: Exception) -> Response:
        if isinstance(error, Refused):
            return refuse(error)
        if isinstance(error, RequestValidationError):
            said = "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()[:3])
            return refuse(Refused("bad_parameter", said))
        status = error.status_code if isinstance(error, HTTPException) else 500
        code = {404: "not_found", 405: "method"}.get(status, "bad_request" if status < 500 else "internal")
        return refuse(Refused(code, {404: "no such address"}.get(status, "the server does not answer this")))

    for kind in (Refused, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_middleware(Guard, token=service.token, hosts=service.hosts, refuse=refuse)
    _add_explain(app, service)
    _add_about(app, service)
    _add_page(app)
    return app


def _add_explain(app: FastAPI, service: Service) -> None:
    limits = service.limits

    @app.post(
        "/v1/explain", response_class=Response, openapi_extra=_BODY, dependencies=_BEARER,
        responses={200: {"content": {form: {} for form in FORMS}}},
    )  # fmt: skip
    async def explain(
        request: Request,
        target: Annotated[list[str], Query()] = [],  # noqa: B006  (FastAPI copies it)
        prompt: Annotated[list[str], Query()] = [],  # noqa: B006
        rather_than: str | None = None,
        top_features: Annotated[int, Query(ge=0)] = 0,
        opacity: Annotated[float, Query(ge=0, le=1)] = 0.5,
        colormap: str | None = None,
        accept: Annotated[str, Header()] = "*/*",
    ) -> Response:
        """Explains the image in the body, or the form's file `image`."""
        began = time.perf_counter()
        service.check_ready()
        if colormap is not None and colormap not in colours.NAMES:
            raise Refused("bad_parameter", f"colormap: expected one of {', '.join(colours.NAMES)}")
        form = Form(wanted(accept), opacity, colormap)
        question = service.question(target, rather_than, prompt, top_features)
        with service.readers.one():
            data = await read_image(request, limits)
        packed = await unless_gone(request, service.answer(data, question, form, "http", {}, began))
        return _response(packed)

    @app.websocket("/v1/stream")
    async def frames(socket: WebSocket) -> None:
        await stream(socket, service)


async def unless_gone(request: Request, answer: Coroutine[Any, Any, Result]) -> Result:
    """The answer; given up when the client goes away.

    Raises:
        Refused: the client is gone.
    """
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused("gone", "the client went away")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(packed: Packed) -> Response:
    timing = ", ".join(f"{name};dur={value}" for name, value in packed.milliseconds.items())
    return Response(
        packed.content, 200, {"Server-Timing": timing, "Cache-Control": "no-store", "Vary": "Accept"}, packed.media_type
    )


def _add_about(app: FastAPI, service: Service) -> None:
    limits = service.limits

    @app.get("/v1/model", dependencies=_BEARER)
    async def model() -> dict[str, Any]:
        """What is explained, and what can be asked."""
        facts = service.engine.facts
        names = None if facts.class_names is None else list(facts.class_names)
        return {
            "model": facts.model, "image_size": list(facts.image_size), "grid": list(facts.grid),
            "classes": facts.classes, "class_names": names, "blocks": list(facts.blocks), "method": facts.method,
            "backward": facts.backward, "probability_is": facts.probability_is, "takes_prompts": facts.takes_prompts,
            "top_features": facts.top_features, "gate": facts.gate,
            "limits": {"body_bytes": limits.body_bytes, "pixels": limits.pixels, "targets": limits.targets},
            "samples": sorted(service.samples), "cards": service.cards, "version": __version__,
        }  # fmt: skip

    @app.get("/v1/samples/{name}", response_class=FileResponse, dependencies=_BEARER)
    async def sample(name: str) -> FileResponse:
        """A picture to try."""
        if name not in service.samples:
            raise Refused("not_found", "no such sample; /v1/model lists them")
        return FileResponse(service.samples[name])

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """The service takes requests: it is warm and does not stop."""
        service.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, dependencies=_BEARER)
    async def metrics() -> Response:
        """Counters and times, for Prometheus."""
        return Response(service.metrics(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    def file(name: str) -> FileResponse:
        if not (PAGE / name).is_file():
            raise Refused("not_found", "this installation has no page; /openapi.json lists the addresses")
        return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    @app.get("/", response_class=FileResponse, include_in_schema=False)
    async def page() -> FileResponse:
        return file("index.html")

    @app.get("/docs", response_class=FileResponse, include_in_schema=False)
    async def docs() -> FileResponse:
        return file("docs.html")

    if PAGE.is_dir():
        app.mount("/static", StaticFiles(directory=PAGE), name="static")
