"""Model weights from a file that may be damaged or hostile: all of it checked before anything large is allocated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fga_fast.io import torch_file
from fga_fast.io.safetensors_file import SafetensorsFile

# Checkpoints of training runs also hold an optimizer's state, several tensors a parameter.
_MAX_ENTRIES = 100_000
_MAX_PICKLE = 64 << 20
_WRAPPERS = ("state_dict", "model", "model_state_dict")  # where training scripts keep the weights


class Checkpoint:
    """A checked, still unread state dict in safetensors or torch's .pt format.

    Attributes:
        path: the file.
        shapes: shape of every tensor by name, known without reading the tensors.
        tensors: reads the weights by name, onto the CPU; raises ValueError for a damaged safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, an oversized header, a pickle with objects other than tensors, or neither format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"checkpoint: no file {self.path}")
        try:
            self.shapes, self.tensors = _opened(self.path)
        except ValueError as error:
            raise ValueError(f"checkpoint: {error}") from error

    def load_into(self, model: nn.Module) -> None:
        """Copies the weights into a model of exactly these names and shapes, which is left alone on an error.

        Raises:
            ValueError: names or shapes differ from the model's, or a tensor holds NaN or Inf.
        """
        self._compare({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
        state = self.tensors()
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"checkpoint: {name} in {self.path} contains NaN or Inf")
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
            raise ValueError(
                f"checkpoint: {self.path} does not fit the model: tensors {'; '.join(found)}. "
                "It has to be a state dict with the model's own names; is --model the right one?"
            )


def _opened(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[], dict[str, Tensor]]]:
    """The shapes by name, and what reads the tensors."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":
        stored = SafetensorsFile(path)
        return stored.shapes, stored.tensors
    if start[:4] != b"PK\x03\x04" and start[:1] != b"\x80":  # where a pickle starts
        size = path.stat().st_size
        raise ValueError(f"{path} is neither a safetensors nor a torch .pt file; its size is {size} bytes")
    state = _state_dict(path)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, lambda: dict(state)


def _state_dict(path: Path) -> dict[str, Tensor]:
    torch_file.check_archive(path, max_entries=_MAX_ENTRIES, max_pickle=_MAX_PICKLE)
    try:
        loaded: Any = torch_file.load(path, mmap=True)
    except ValueError as error:
        raise ValueError(
            f"{error}; pickled objects other than tensors are refused because they can run any code. Where you trust "
            "the file, save its weights alone: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    for name in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds no state dict (names to tensors), got {type(loaded).__name__}")
    for name, tensor in loaded.items():
        torch_file.check_size(str(name), tensor, path)
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}
