"""Writes files that PIL reads but does not write: PNG and TIFF of some kinds, and DICOM."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

CHEST_XRAY = "1.2.840.10008.5.1.4.1.1.1.1"  # DICOM's name of digital X-ray images


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


def write_dicom(path: Path, pixels: npt.NDArray[Any] | bytes, shape: tuple[int, ...] = (), **elements: Any) -> Path:
    """A file of `pixels` [H, W] or [H, W, 3], or of a compressed frame of this shape; elements None are left out."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate

    meta, dataset = pydicom.dataset.FileMetaDataset(), pydicom.Dataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = elements.pop("sop", CHEST_XRAY), "1.2.3.4"
    meta.TransferSyntaxUID = elements.pop("syntax", "1.2.840.10008.1.2.1")
    values = np.zeros(shape, np.uint8) if isinstance(pixels, bytes) else pixels
    bits = elements.pop("bits", 8 * values.itemsize)
    signed = int(values.dtype.kind == "i")
    defaults = {
        "Modality": "DX", "Rows": values.shape[0], "Columns": values.shape[1], "PixelRepresentation": signed,
        "SamplesPerPixel": 1 if values.ndim == 2 else 3, "BitsAllocated": 8 * values.itemsize, "BitsStored": bits,
        "HighBit": bits - 1, "PhotometricInterpretation": "MONOCHROME2" if values.ndim == 2 else "RGB",
    }  # fmt: skip
    if values.ndim == 3:
        defaults["PlanarConfiguration"] = 0
    data = encapsulate([pixels]) if isinstance(pixels, bytes) else pixels.tobytes()
    for keyword, value in {**defaults, **elements}.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if elements.get("PixelData", data) is not None:
        dataset.add_new("PixelData", "OB" if values.itemsize == 1 else "OW", elements.get("PixelData", data))
        dataset["PixelData"].is_undefined_length = isinstance(pixels, bytes)
    dataset.file_meta = meta
    dataset.save_as(path, enforce_file_format=True)
    return path
