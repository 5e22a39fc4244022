"""Reading a safetensors file that is not trusted: its header is checked against the file's size first."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fga_fast.sae.formats.json_config import MAX_JSON_BYTES, parse_json

# The header of ten tensors takes about 1 kB, plus the settings it may repeat.
MAX_HEADER_BYTES = 4 * MAX_JSON_BYTES
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_header(weights: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors file's JSON header and the size of its tensors, without reading (or allocating for) them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, an oversized header, or no JSON object.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; the SAE's weights are read from it")
    size = weights.stat().st_size
    with weights.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{weights}: truncated: expected an 8-byte header length, got a file of {size} bytes")
        length: int = struct.unpack("<Q", start)[0]
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{weights}: oversized header: expected at most {MAX_HEADER_BYTES} bytes, got {length}")
        if length > size - 8:
            raise ValueError(f"{weights}: truncated: expected a header of {length} bytes, got a file of {size} bytes")
        header = parse_json(file.read(length), f"{weights}: header")
    return header, size - 8 - length


def tensor_names(weights: Path) -> frozenset[str]:
    """Names of the tensors in the file; raises as `read_header`."""
    return frozenset(read_header(weights)[0]) - {"__metadata__"}


def read_tensors(weights: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Return those of the tensors ``names`` that the file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a tensor that is not floating-point or larger than the file, or a damaged file.
    """
    header, data_bytes = read_header(weights)
    wanted = [name for name in names if name in header]
    for name in wanted:
        entry = header[name] if isinstance(header[name], dict) else {}
        dtype, shape = FLOATS.get(str(entry.get("dtype"))), entry.get("shape")
        if dtype is None:
            raise ValueError(f"{weights}: {name}: expected a dense floating-point tensor, got {entry.get('dtype')!r}")
        if not isinstance(shape, list) or any(type(extent) is not int or extent < 0 for extent in shape):
            raise ValueError(f"{weights}: {name}: expected a shape of whole numbers, got {shape!r}")
        claimed = dtype.itemsize
        for extent in shape:
            claimed *= extent
        if claimed > data_bytes:
            raise ValueError(f"{weights}: {name}: claims {claimed} bytes, the file stores {data_bytes} for all tensors")
    try:
        with safe_open(weights, framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted}
    except Exception as error:  # safetensors raises its own type, which is not part of its stable interface
        raise ValueError(f"{weights}: not a readable safetensors file ({error})") from error
