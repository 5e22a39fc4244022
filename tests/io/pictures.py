"""Writes PNG and TIFF files of kinds that PIL reads but does not write."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy.typing as npt


def write_png16(path: Path, values: npt.NDArray[Any]) -> Path:
    """16 bits a channel: grey [H, W], or [H, W, C] of grey and alpha, RGB, RGBA."""
    height, width, channels = (*values.shape, 1)[:3]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def write_tiff(path: Path, *pages: npt.NDArray[Any], photometric: int | None = None, subfile: int = 0) -> Path:
    """Uncompressed pages [H, W] or [H, W, 3] of any type of number; photometric 0: white is zero."""
    data, last = bytearray(b"II*\0\0\0\0\0"), 4  # `last`: where the offset of the next page goes
    for number, values in enumerate(pages):
        height, width, channels = (*values.shape, 1)[:3]
        pixels = len(data)
        data += values.astype(values.dtype.newbyteorder("<")).tobytes()
        bits = len(data)
        data += struct.pack(f"<{channels}H", *[8 * values.itemsize] * channels)
        kinds = len(data)
        data += struct.pack(f"<{channels}H", *[{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * channels)
        data += b"\0" * (len(data) % 2)
        data[last : last + 4] = struct.pack("<I", len(data))

        # One short is in its entry, several are where the entry points.
        shorts = [at if channels > 1 else struct.unpack_from("<H", data, at)[0] for at in (bits, kinds)]
        tags = {
            254: subfile if number else 0, 256: width, 257: height, 258: shorts[0], 259: 1,
            262: (2 if channels == 3 else 1) if photometric is None else photometric, 273: pixels, 277: channels,
            278: height, 279: bits - pixels, 339: shorts[1],
        }  # fmt: skip
        data += struct.pack("<H", len(tags))
        for tag, value in tags.items():
            short = tag in (258, 339)
            data += struct.pack("<HHII", tag, 3 if short else 4, channels if short else 1, value)
        last = len(data)
        data += b"\0\0\0\0"
    path.write_bytes(data)
    return path
