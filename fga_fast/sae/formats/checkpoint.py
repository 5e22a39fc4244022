"""A checkpoint on disk before its format is known: which file holds the weights, and what is in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fga_fast.io import torch_file
from fga_fast.io.json_file import parse_json, read_json
from fga_fast.io.safetensors_file import SafetensorsFile
from fga_fast.sae.formats.options import Options
from fga_fast.sae.formats.parameters import check_stored
from fga_fast.sae.formats.paths import inside
from fga_fast.sae.formats.yaml_config import read_yaml

MAX_SETTINGS_BYTES = 1 << 20
SPARSITY_SUFFIX = "_log_feature_sparsity.pt"  # ViT-Prisma writes it beside the weights; not an SAE
_SAFETENSORS = ("sae.safetensors", "sae_weights.safetensors", "model.safetensors")
_TORCH = (".pt", ".pth")
CONFIG_CLASS = "VisionModelSAERunnerConfig"  # ViT-Prisma's trainer pickles its settings as an object of this class


class ConfigRecord:
    """Stands for the pickled configuration object: keeps its attributes as a dict, has no behaviour."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError(f"{CONFIG_CLASS}: expected a state of named fields, got {type(state).__name__}")
        self.fields = dict(state)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint; no format has looked at it yet.

    Attributes:
        weights: the file with the tensors.
        kind: how they are stored; "saev" is a line of JSON and then what torch.save writes.
        names: names of the tensors.
        content: what torch.save wrote, or the safetensors file.
        header: the JSON line of "saev", or the metadata of a safetensors file.
    """

    weights: Path
    kind: Literal["safetensors", "torch", "saev"]
    names: frozenset[str]
    content: Mapping[str, Any] | SafetensorsFile
    header: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder the weights lie in."""
        return self.weights.parent

    def saved(self, *names: str) -> Any:
        """The first of the entries ``names`` of what torch.save wrote; None if it has none."""
        content = {} if isinstance(self.content, SafetensorsFile) else self.content
        return next((content[name] for name in names if name in content), None)

    def tensors(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Those of the tensors ``names`` that the checkpoint holds, checked against the file's size.

        Raises:
            ValueError: not a dense floating-point tensor, or larger than the file.
        """
        if isinstance(self.content, SafetensorsFile):
            state: Mapping[str, Any] = self.content.tensors(names)
        else:
            state = self.content.get("state_dict", self.content)
        return {name: check_stored(name, state[name], self.weights) for name in names if name in state}

    def require(self, format_name: str, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors of a format, all of ``required`` and no others than these and ``optional``.

        Raises:
            ValueError: a tensor is missing or not known, or refused as in `tensors`.
        """
        missing = [name for name in required if name not in self.names]
        unknown = sorted(self.names - {*required, *optional})
        if missing or unknown:
            raise ValueError(
                f"{self.weights}: tensors missing: {', '.join(missing) or 'none'}; not known: "
                f"{', '.join(unknown[:8]) or 'none'}; an SAE of {format_name} holds {', '.join(required)}"
                + (f" and may hold {', '.join(optional)}" if optional else "")
            )
        return self.tensors((*required, *optional))

    def config(self, *names: str) -> tuple[dict[str, Any], str] | None:
        """The first of the settings files ``names`` beside the weights, and its path; None if there is none."""
        for name in names:
            file = self.folder / name
            if file.is_file() or file.is_symlink():
                file = inside(file, self.folder)
                return (read_json(file, MAX_SETTINGS_BYTES) if file.suffix == ".json" else read_yaml(file)), str(file)
        return None

    def required_config(self, name: str) -> tuple[dict[str, Any], str]:
        """The settings file ``name``.

        Raises:
            FileNotFoundError: there is none.
        """
        found = self.config(name)
        if found is None:
            raise FileNotFoundError(f"{self.folder / name}: no such file; the SAE's settings are read from it")
        return found


def open_checkpoint(path: Path, options: Options) -> Checkpoint | None:
    """Find the weights in ``path`` and look into them, without running or allocating what they ask for.

    Returns:
        None if nothing there looks like weights.

    Raises:
        FileNotFoundError, ValueError: no weights among the files, several, or a damaged or refused file.
    """
    weights = _weights_file(path)
    if weights is None:
        return None
    if weights.suffix == ".safetensors":
        stored = SafetensorsFile(weights)
        return Checkpoint(weights, "safetensors", frozenset(stored.shapes), stored, stored.metadata)
    with weights.open("rb") as file:
        if file.read(1) != b"{":
            return _archive(weights, None, {}, options.allow_pickled_config)
        file.seek(0)
        line = file.readline(MAX_SETTINGS_BYTES + 1)
        if not line.endswith(b"\n"):
            kind = "oversized" if len(line) > MAX_SETTINGS_BYTES else "truncated"
            raise ValueError(
                f"{weights}: {kind} header: expected one line of JSON of at most {MAX_SETTINGS_BYTES} bytes before the "
                "tensors, as saev writes it"
            )
        return _archive(weights, file.read(), parse_json(line, f"{weights}: header"), False)


def _archive(weights: Path, archive: bytes | None, header: dict[str, Any], allow_pickled_config: bool) -> Checkpoint:
    """What torch.save wrote: the whole file, or the ``archive`` after a ``header``."""
    classes = torch_file.foreign_names(weights, archive)
    for name in classes:
        if archive is not None or not re.fullmatch(rf"[\w.]+ {CONFIG_CLASS}", name):
            raise ValueError(
                f"{weights}: refused without running it: it refers to {name.replace(' ', '.')}, which is not a tensor "
                "or plain setting; convert it where you trust it"
            )
    if classes and not allow_pickled_config:
        shown = classes[0].replace(" ", ".")
        raise ValueError(
            f"{weights}: holds its configuration as a pickled object ({shown}), which is refused by default; pass "
            "allow_pickled_config=True to read that object as plain settings (no code of the file is run)"
        )
    content = torch_file.load(weights, archive, stand_ins=dict.fromkeys(classes, ConfigRecord))
    if not isinstance(content, Mapping):
        raise ValueError(f"{weights}: expected a dict of tensors, got {type(content).__name__}")
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise ValueError(f"{weights}: state_dict: expected a dict of tensors, got {type(state).__name__}")
    names = frozenset(str(name) for name in state)
    return Checkpoint(weights, "torch" if archive is None else "saev", names, content, header)


def _weights_file(path: Path) -> Path | None:
    if path.is_file():
        if path.name.endswith(SPARSITY_SUFFIX) or path.name == "sparsity.safetensors":
            raise ValueError(f"{path}: holds the features' sparsity, not an SAE; pass the weights beside it")
        return path if path.suffix in (".safetensors", *_TORCH) else None
    for name in _SAFETENSORS:
        if (path / name).is_file():
            return inside(path / name, path)
    others = [file for file in sorted(path.glob("*.safetensors")) if file.name != "sparsity.safetensors"]
    archives = sorted(path.glob("*.pt"))
    found = others or [file for file in archives if not file.name.endswith(SPARSITY_SUFFIX)]
    if not found and archives:
        raise FileNotFoundError(f"{path}: no SAE weights (.pt, other than *{SPARSITY_SUFFIX}) in this folder")
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:8])
        kind = found[0].suffix
        raise ValueError(f"{path}: expected one {kind} file, got {len(found)} ({names}); pass the path of one of them")
    return inside(found[0], path) if found else None
