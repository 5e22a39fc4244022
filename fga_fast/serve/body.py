"""Reads the image in a request's body, with limits on its size and time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from fga_fast.serve.limits import Limits, Refused

IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")


async def read_image(request: Request, limits: Limits) -> bytes:
    """The image in the body: the body itself, or the form's one file `image`.

    Raises:
        Refused: of another type, too large, too slow, no such form, or the client went away.
    """
    kind = request.headers.get("content-type", "application/octet-stream").split(";")[0].strip().lower()
    if kind not in (*IMAGE_TYPES, "multipart/form-data"):
        raise Refused(
            "unsupported_type",
            f"Content-Type: expected {', '.join(IMAGE_TYPES)} or multipart/form-data, got {kind[:80]!r}",
        )
    try:
        body = await asyncio.wait_for(_body(request, limits.body_bytes), limits.body_seconds)
    except asyncio.TimeoutError:
        raise Refused("slow_body", f"the body did not arrive within {limits.body_seconds:g} s") from None
    except ClientDisconnect:
        raise Refused("gone", "the client went away") from None
    data = await _file(request, body) if kind == "multipart/form-data" else body
    if not data:
        raise Refused("bad_image", "image: expected an encoded image in the body, got none")
    return data


async def _body(request: Request, most: int) -> bytes:
    told = request.headers.get("content-length", "")
    refused = Refused("too_large", f"body: expected at most {most} bytes")
    if told.isdecimal() and int(told) > most:
        raise refused
    parts, size = list[bytes](), 0
    async for part in request.stream():  # which may be longer than it says, or say nothing
        size += len(part)
        if size > most:
            raise refused
        parts.append(part)
    return b"".join(parts)


class _InMemory(MultiPartParser):
    spool_max_size = 2**62  # the body is in memory already; nothing goes to the disk


async def _file(request: Request, body: bytes) -> bytes:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await _InMemory(request.headers, stream(), max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refused("bad_request", f"form: cannot be read ({error})") from None
    try:
        file = form.get("image")
        if not isinstance(file, UploadFile):
            raise Refused("bad_request", "form: expected one file in the field 'image'")
        return await file.read()
    finally:
        await form.close()
