"""A safetensors file that is not trusted: its header is checked against its size before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fga_fast.io.json_file import parse_json

MAX_HEADER_BYTES = 4 << 20  # a tensor takes about 100 bytes of it
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_DIMS = 64  # of a tensor in PyTorch


class SafetensorsFile:
    """A file whose header fits its size; no tensor is read yet.

    Attributes:
        path: the file.
        shapes: shape of every tensor by name.
        metadata: the strings that its writer added.

    Args:
        path: the file.
        max_header: largest header to read, in bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, an oversized header, or a header that is damaged or claims other sizes than the file has.
    """

    def __init__(self, path: Path, max_header: int = MAX_HEADER_BYTES) -> None:
        self.path = path
        header, stored = _read_header(path, max_header)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise ValueError(f"{path}: __metadata__: expected strings by name")
        self.shapes: dict[str, tuple[int, ...]] = {}
        claimed = 0
        for name, entry in header.items():
            dtype, shape = _checked(entry, f"{path}: {name}")
            self.shapes[name] = shape
            claimed += math.prod(shape) * dtype.itemsize
        if claimed != stored:
            raise ValueError(f"{path}: truncated or damaged: tensors claim {claimed} bytes, the file stores {stored}")

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Those of the tensors ``names`` that the file holds, on the CPU; None: all.

        Raises:
            ValueError: a damaged file.
        """
        wanted = [name for name in (self.shapes if names is None else names) if name in self.shapes]
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in wanted}
        except Exception as error:  # safetensors raises its own type, which is not part of its stable interface
            raise ValueError(f"{self.path}: damaged: not a readable safetensors file ({error})") from error


def _read_header(path: Path, max_header: int) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes of tensors follow it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            raise ValueError(f"{path}: truncated: expected the 8 bytes of a header's length, got {len(start)} bytes")
        if length > max_header:
            raise ValueError(f"{path}: a header of {length} bytes, over the limit of {max_header}")
        if length > size - 8:
            raise ValueError(f"{path}: truncated: a header of {length} bytes in a file of {size}")
        return parse_json(file.read(length), f"{path}: header"), size - 8 - length


def _checked(entry: object, where: str) -> tuple[torch.dtype, tuple[int, ...]]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape = _DTYPES.get(str(fields.get("dtype"))), fields.get("shape")
    if dtype is None:
        raise ValueError(f"{where}: expected a dtype of {', '.join(_DTYPES)}, got {fields.get('dtype')!r}")
    extents = shape if isinstance(shape, list) and len(shape) <= _MAX_DIMS else [None]
    if not all(type(extent) is int and 0 <= extent < 1 << 63 for extent in extents):
        raise ValueError(f"{where}: expected a shape of at most {_MAX_DIMS} whole numbers, got {str(shape)[:80]}")
    return dtype, tuple(extents)
