"""A safetensors file that is not trusted: the library checks its header against its size before it reads a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

MAX_HEADER_BYTES = 4 << 20  # a tensor takes about 100 bytes of it


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
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        with path.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if length > max_header:
            raise ValueError(f"{path}: a header of {length} bytes, over the limit of {max_header}")
        with self._open() as file:
            names: list[str] = file.keys()
            self.shapes = {name: tuple(map(int, file.get_slice(name).get_shape())) for name in names}
            self.metadata: dict[str, str] = file.metadata() or {}

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Those of the tensors ``names`` that the file holds, on the CPU; None: all.

        Raises:
            ValueError: a damaged file, or a dtype that PyTorch does not have.
        """
        with self._open() as file:
            wanted = self.shapes if names is None else names
            return {name: file.get_tensor(name) for name in wanted if name in self.shapes}

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                yield file
        except Exception as error:  # safetensors raises its own type, which is not part of its stable interface
            raise ValueError(f"{self.path}: truncated or damaged: not a readable safetensors file ({error})") from error
