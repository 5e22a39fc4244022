"""A checkpoint on disk before its format is known: which file holds the weights, and what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fga_fast.sae.formats.build import check_stored
from fga_fast.sae.formats.json_config import MAX_JSON_BYTES, parse_json, read_json
from fga_fast.sae.formats.options import Options
from fga_fast.sae.formats.paths import inside
from fga_fast.sae.formats.safetensors_file import read_tensors, tensor_names
from fga_fast.sae.formats.torch_archive import config_classes, read_archive
from fga_fast.sae.formats.yaml_config import read_yaml

SPARSITY_SUFFIX = "_log_feature_sparsity.pt"  # ViT-Prisma writes it beside the weights; not an SAE
_SAFETENSORS = ("sae_weights.safetensors", "sae.safetensors", "model.safetensors")
_TORCH = (".pt", ".pth")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint; no format has looked at it yet.

    Attributes:
        weights: the file with the tensors.
        kind: how they are stored; "saev" is a line of JSON and then what torch.save writes.
        names: names of the tensors.
        content: what torch.save wrote; None for safetensors.
        header: the JSON line of "saev".
        given: what the caller named, a file or a folder.
    """

    given: Path
    weights: Path
    kind: Literal["safetensors", "torch", "saev"]
    names: frozenset[str]
    content: Mapping[str, Any] | None = None
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder the weights lie in."""
        return self.weights.parent

    def state(self) -> Mapping[str, Any]:
        """The state dict of a file of torch.save, which may be the whole content or its entry "state_dict"."""
        return {} if self.content is None else self.content.get("state_dict", self.content)

    def tensors(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Those of the tensors ``names`` that the checkpoint holds, checked against the file's size.

        Raises:
            ValueError: not a dense floating-point tensor, or larger than the file.
        """
        if self.content is None:
            return read_tensors(self.weights, names)
        state = self.state()
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
                return (read_json(file) if file.suffix == ".json" else read_yaml(file)), str(file)
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
        return Checkpoint(path, weights, "safetensors", tensor_names(weights))
    with weights.open("rb") as file:
        if file.read(1) == b"{":
            return _with_header(path, weights)
    return _archive(Checkpoint(path, weights, "torch", frozenset()), None, options.allow_pickled_config)


def _archive(found: Checkpoint, archive: bytes | None, allow_pickled_config: bool) -> Checkpoint:
    classes = config_classes(found.weights, archive)
    if classes and archive is not None:
        raise ValueError(
            f"{found.weights}: refused without running it: it refers to {classes[0]}, which is not a tensor"
        )
    if classes and not allow_pickled_config:
        raise ValueError(
            f"{found.weights}: holds its configuration as a pickled object ({classes[0]}), which is refused by "
            "default; pass allow_pickled_config=True to read that object as plain settings (no code of the file is run)"
        )
    content = read_archive(found.weights, classes, archive)
    if not isinstance(content, Mapping):
        raise ValueError(f"{found.weights}: expected a dict of tensors, got {type(content).__name__}")
    state = content.get("state_dict", content)
    names = frozenset(str(name) for name in state) if isinstance(state, Mapping) else frozenset()
    return Checkpoint(found.given, found.weights, found.kind, names, content, found.header)


def _with_header(path: Path, weights: Path) -> Checkpoint:
    with weights.open("rb") as file:
        line = file.readline(MAX_JSON_BYTES + 1)
        if not line.endswith(b"\n"):
            kind = "oversized" if len(line) > MAX_JSON_BYTES else "truncated"
            raise ValueError(
                f"{weights}: {kind} header: expected one line of JSON of at most {MAX_JSON_BYTES} bytes before the "
                "tensors, as saev writes it"
            )
        header = parse_json(line, f"{weights}: header")
        archive = file.read()
    return _archive(Checkpoint(path, weights, "saev", frozenset(), header=header), archive, False)


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
