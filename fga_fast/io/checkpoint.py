"""Model weights from a file that may be damaged or hostile: all of it checked before anything large is allocated."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MAX_HEADER = 100 * 2**20  # bytes, the safetensors format's own limit
MAX_PICKLE = 64 * 2**20  # bytes of the pickle inside a .pt file; a state dict of thousands of tensors has below 1 MiB
_WRAPPERS = ("state_dict", "model", "model_state_dict")  # where training scripts keep the weights


class CheckpointError(ValueError):
    """A checkpoint that is damaged, unsafe, or not this model's."""


class Checkpoint:
    """A checked, still unread state dict in safetensors or torch's .pt format.

    Attributes:
        path: the file.
        shapes: shape of every tensor by name, known without reading the tensors.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: truncated, an oversized header, a pickle with objects other than tensors, or neither format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"checkpoint: no file {self.path}")
        with self.path.open("rb") as file:
            start = file.read(9)
        self._state: dict[str, Tensor] | None = None
        if start[8:9] == b"{":
            self.shapes = _safetensors_shapes(self.path, int.from_bytes(start[:8], "little"))
        elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            self._state = _torch_state(self.path, zipped=start[:2] == b"PK")
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        else:
            raise CheckpointError(
                f"checkpoint: {self.path} is neither a safetensors nor a torch .pt file; its size is "
                f"{self.path.stat().st_size} bytes"
            )

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name, on the CPU."""
        if self._state is None:
            from safetensors.torch import load_file

            return load_file(self.path)
        return dict(self._state)

    def load_into(self, model: nn.Module) -> None:
        """Copies the weights into a model of exactly these names and shapes, which is left alone on an error.

        Raises:
            CheckpointError: names or shapes differ from the model's, or a tensor holds NaN or Inf.
        """
        self._compare({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
        state = self.tensors()
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"checkpoint: {name} in {self.path} contains NaN or Inf")
        model.load_state_dict(state)

    def _compare(self, expected: dict[str, tuple[int, ...]]) -> None:
        missing = [name for name in expected if name not in self.shapes]
        unknown = [name for name in self.shapes if name not in expected]
        other = [
            f"{name}: model {list(shape)}, file {list(self.shapes[name])}"
            for name, shape in expected.items()
            if name in self.shapes and self.shapes[name] != shape
        ]
        found = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", other))
            if names
        ]
        if found:
            raise CheckpointError(
                f"checkpoint: {self.path} does not fit the model: tensors {'; '.join(found)}. "
                "It has to be a state dict with the model's own names; is --model the right one?"
            )


def _safetensors_shapes(path: Path, header: int) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    if header > MAX_HEADER:
        raise CheckpointError(
            f"checkpoint: {path} announces a header of {header} bytes, over the limit of {MAX_HEADER}"
        )
    if header > size - 8:
        raise CheckpointError(f"checkpoint: {path} is truncated: a header of {header} bytes in a file of {size}")
    try:
        with safe_open(path, framework="pt") as stored:  # checks offsets and sizes against the file's length
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint: {path} is truncated or damaged: {error}") from error


def _torch_state(path: Path, zipped: bool) -> dict[str, Tensor]:
    if zipped:
        _check_archive(path)
    try:
        # weights_only: only tensors and plain containers are built. mmap: nothing is read before it is used.
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint: {path} holds pickled Python objects, which are refused because unpickling them can run any "
            "code. Where you trust the file, save its weights alone: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint: {path} is truncated or damaged: {error}") from error
    for name in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"checkpoint: {path} holds no state dict (names to tensors), got {type(loaded).__name__}")
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"checkpoint: {path} is truncated or damaged: {error}") from error
    # torch stores without compression; what expands is no checkpoint of its making, and may expand without end.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"checkpoint: {path} is a compressed archive, which torch.save does not write")
    large = [entry for entry in entries if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE]
    if large:
        raise CheckpointError(
            f"checkpoint: {path} has a pickle of {large[0].file_size} bytes, over the limit of {MAX_PICKLE}"
        )
