"""Model weights from a file that may be damaged or hostile: all of it checked before anything large is allocated."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fga_fast.io import torch_file
from fga_fast.io.safetensors_file import SafetensorsFile

logger = logging.getLogger(__name__)

# Checkpoints of training runs also hold an optimizer's state, several tensors a parameter.
_MAX_ENTRIES = 100_000
_MAX_PICKLE = 64 << 20
_MAX_DEPTH = 4  # of dicts in dicts


class Checkpoint:
    """A checked, still unread state dict in safetensors or torch's .pt format.

    Training tools keep a model's weights under names of their own: "model." (Lightning), "module." (DDP), "_orig_mod."
    (torch.compile), and in dicts such as "state_dict" or "model_ema". A dict in the file counts as such a prefix too.
    So the weights are found by the model's names: under one prefix, whatever it is, the file has to hold them all.

    Args:
        path: the file.
        key: where the weights are, such as "state_dict_ema", for files with several models of these names.

    Attributes:
        path: the file.
        shapes: shape of every tensor by its full name, known without reading the tensors.
        tensors: reads the weights by full name, onto the CPU; raises ValueError for a damaged safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, an oversized header, a pickle with objects other than tensors, or neither format; no
            tensor under `key`.
    """

    def __init__(self, path: str | Path, key: str | None = None) -> None:
        self.path, self._inside = Path(path), "" if key is None else key.rstrip(".") + "."
        if not self.path.is_file():
            raise FileNotFoundError(f"checkpoint: no file {path}")
        try:
            self.shapes, self.tensors = _opened(self.path)
        except ValueError as error:
            raise ValueError(f"checkpoint: {error}") from error
        if not any(name.startswith(self._inside) for name in self.shapes):
            tops = list(dict.fromkeys(name.split(".")[0] for name in self.shapes))
            raise ValueError(f"checkpoint key: {self.path} has no tensors under {key!r}, but under {_listed(tops)}")

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor by the model's name for it; None if there is none, or several that differ."""
        found = {
            shape
            for full, shape in self.shapes.items()
            if full.startswith(self._inside) and (full == name or full.endswith("." + name))
        }
        return found.pop() if len(found) == 1 else None

    def load_into(self, model: nn.Module) -> tuple[str, list[str]]:
        """Copies the weights into a model of exactly these names and shapes, which is left alone on an error.

        Returns:
            The prefix that the file has before the model's names; and where it has more tensors, which are not read:
            an optimizer's, a loss's.

        Raises:
            ValueError: names or shapes differ from the model's, several prefixes would do, a tensor holds NaN or Inf.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        prefix = self._prefix(expected)
        self._compare(prefix, expected)
        tensors = self.tensors()
        state = {name: tensors[prefix + name] for name in expected}
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"checkpoint: {prefix + name} in {self.path} contains NaN or Inf")
        model.load_state_dict(state)
        left_out = _beside(prefix, self.shapes)
        if prefix:
            logger.info("%s: weights are those under %r; left out: %s", self.path, prefix, _listed(left_out) or "none")
        return prefix, left_out

    def _prefix(self, expected: Collection[str]) -> str:
        """What the file has before all of the expected names; where there is no such thing, before most of them."""
        found: Counter[str] = Counter()
        for full in self.shapes:
            if full.startswith(self._inside):
                places = [0, *(at + 1 for at, letter in enumerate(full) if letter == ".")]
                found.update(full[:at] for at in places if at >= len(self._inside) and full[at:] in expected)
        fitting = [prefix for prefix, count in found.items() if count == len(expected)]
        if len(fitting) > 1:
            raise ValueError(
                f"checkpoint: {self.path} holds several models of these names, under {_listed(fitting)}; say which is "
                f"meant, such as --checkpoint-key {fitting[-1].rstrip('.')}"
            )
        return max(found, key=lambda prefix: (found[prefix], -len(prefix)), default=self._inside)

    def _compare(self, prefix: str, expected: dict[str, tuple[int, ...]]) -> None:
        shapes = {name.removeprefix(prefix): shape for name, shape in self.shapes.items() if name.startswith(prefix)}
        missing = [name for name in expected if name not in shapes]
        unknown = [name for name in shapes if name not in expected]
        other = [
            f"{name}: model {list(shape)}, file {list(shapes[name])}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ]
        found = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", other))
            if names
        ]
        if found:
            under = f" under {prefix!r}" if prefix else ""
            raise ValueError(
                f"checkpoint: {self.path} does not fit the model: tensors{under} {'; '.join(found)}. "
                "It has to be a state dict with the model's own names; is --model the right one?"
            )


def _beside(prefix: str, names: Iterable[str]) -> list[str]:
    """What is not under the prefix, each branch of dotted names once, as far as it differs."""
    above, branches = prefix.split("."), dict[str, None]()
    for name in names:
        if not name.startswith(prefix):
            parts = name.split(".")
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(parts, above, strict=False)))
            branches[".".join(parts[: shared + 1])] = None
    return list(branches)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")


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
            f"{error}; pickled objects other than tensors are refused because they can run any code{_foreign(path)}. "
            "Where you trust the file, save its weights alone: "
            "safetensors.torch.save_file(torch.load('FILE', weights_only=False)['state_dict'], 'weights.safetensors')"
        ) from error
    found = dict(_flat(loaded, "", _MAX_DEPTH)) if isinstance(loaded, dict) else {}
    if not found:
        raise ValueError(f"{path} holds no state dict (names to tensors), got {type(loaded).__name__}")
    for name, tensor in found.items():
        torch_file.check_size(name, tensor, path)
    return found


def _flat(entries: dict[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors by dotted names, of a dict and the dicts in it; an optimizer's, whose keys are numbers, are left out."""
    for name, value in entries.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(name, str) and isinstance(value, dict) and depth:
            yield from _flat(value, f"{prefix}{name}.", depth - 1)


def _foreign(path: Path) -> str:
    """The classes that a file needs beside tensors, for a message; read from the pickle without running it."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file, of which the message speaks already
        return ""
    return f"; this file's are {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""
