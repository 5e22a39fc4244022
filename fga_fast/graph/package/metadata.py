"""NAME.json, the file beside a package: how to call the package, what it returns and where it runs.

Every entry is checked before the package itself is opened: the file may be damaged, hostile or of another version.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch

from fga_fast.io.images import Preprocess
from fga_fast.io.json_file import read_json
from fga_fast.settings import Backward, Method, TargetMode, has_signs

FORMAT, VERSION = "fga_fast package", 5
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "int64": torch.int64}
_MAX_BYTES = 64 * 2**20
_MAX_VALUES = 2**31  # of one batch of images
# Instruction sets that a compiler uses without asking. Libraries ask the processor before they use any other.
_EXTENSIONS = ("avx", "sse", "fma", "bmi", "f16c", "lzcnt", "popcnt", "movbe")


class Output(NamedTuple):
    """One tensor that the package returns."""

    name: str  # as `trace.flatten` names it
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Metadata:
    """The content of NAME.json. `method`, `backward`, `start_block`, `signed` and `gate` are the `Explainer`'s."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "float64", "bfloat16"]  # of the images
    batch: int  # images in one run; more images take several runs, fewer are padded
    channels: int
    height: int
    width: int
    grid: tuple[int, int]  # patches (rows, columns)
    preprocess: Preprocess | None  # from pictures to images, if known
    classes: int  # columns of the logits
    predicts: bool  # the columns are classes, of which one is predicted
    class_names: tuple[str, ...] | None  # one for each of these columns, if known
    target_mode: TargetMode  # "given": a call may give one class for each image
    gated_blocks: tuple[int, ...]  # blocks with an SAE
    outputs: tuple[Output, ...]  # what the package returns, in order
    backend: Literal["native", "triton", "composite"]  # whose kernels it calls
    method: Method
    backward: Backward
    start_block: int
    signed: bool
    gate: dict[str, Any]
    notices: tuple[str, ...]  # what a reader of its explanations must know
    versions: dict[str, str]  # of fga_fast and torch
    sha256: str  # of NAME.pt2
    # The processor it was compiled for: {"architecture": "x86_64", "features": ["avx2", ...]}.
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def has_signs(self) -> bool:
        """Whether relevance may be below 0."""
        return has_signs(self.method, self.signed)

    def to_json(self) -> bytes:
        """The content of NAME.json."""
        entries = {"format": FORMAT, "format_version": VERSION, **asdict(self)}
        entries["preprocessing"] = entries.pop("preprocess")
        entries["outputs"] = [output._asdict() for output in self.outputs]
        return (json.dumps(entries, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Metadata:
        """Reads and checks NAME.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, of another format or version, or the entry that the message names is missing or
                wrong.
        """
        if not path.is_file():
            raise FileNotFoundError(f"package: no file {path}; it has to lie beside the .pt2 file")
        try:
            content = read_json(path, _MAX_BYTES)
        except ValueError as error:
            raise ValueError(f"package: {error}") from error
        return _read(Entries(content, f"package: {path}"))


class Entries:
    """Reads the entries of a JSON object. Each method checks one entry and names it in its error."""

    def __init__(self, content: Any, where: str) -> None:
        self.where, self.content = where, content
        if not isinstance(content, dict):
            raise ValueError(f"{where}: expected an object, got {type(content).__name__}")

    def wrong(self, name: str, expected: str) -> ValueError:
        got = repr(self.content[name]) if name in self.content else "nothing"
        return ValueError(f"{self.where}: {name}: expected {expected}, got {got[:80]}")

    def inner(self, name: str) -> Entries:
        return Entries(self.content.get(name), f"{self.where}: {name}")

    def one(self, name: str, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = self.content.get(name)
        if not fits(value):
            raise self.wrong(name, expected)
        return value

    def each(self, name: str, expected: str, fits: Callable[[Any], bool]) -> tuple[Any, ...]:
        values = self.list(name)
        return tuple(self.one(name, expected, lambda _: all(map(fits, values))))

    def list(self, name: str) -> Any:
        return self.one(name, "a list", lambda value: isinstance(value, list))

    def text(self, name: str, *known: str) -> Any:
        expected = " or ".join(map(repr, known)) or "a string"
        return self.one(name, expected, lambda value: isinstance(value, str) and (not known or value in known))

    def whole(self, name: str, least: int = 1) -> Any:
        return self.one(name, f"a whole number of at least {least}", lambda value: _is_whole(value, least))

    def wholes(self, name: str, least: int) -> tuple[int, ...]:
        return self.each(name, f"whole numbers of at least {least}", lambda value: _is_whole(value, least))

    def pair(self, name: str) -> tuple[int, int]:
        values = self.wholes(name, 1)
        first, second = self.one(name, "2 whole numbers of at least 1", lambda _: len(values) == 2)
        return first, second

    def flag(self, name: str) -> bool:
        return name in self.content and self.one(name, "true or false", lambda value: isinstance(value, bool))

    def numbers(self, name: str) -> tuple[float, ...]:
        return tuple(map(float, self.each(name, "numbers", _is_number)))

    def texts(self, name: str) -> tuple[str, ...]:
        return self.each(name, "strings", lambda value: isinstance(value, str))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _read(entries: Entries) -> Metadata:
    entries.text("format", FORMAT)
    if entries.whole("format_version", 0) != VERSION:
        raise entries.wrong("format_version", f"{VERSION}; export it again, or install the fga_fast that wrote it")
    kinds = get_type_hints(Metadata).items()
    metadata = Metadata(
        **{name: entries.text(name, *get_args(kind)) for name, kind in kinds if get_origin(kind) is Literal},
        **{name: entries.whole(name, 0 if name == "start_block" else 1) for name, kind in kinds if kind is int},
        grid=entries.pair("grid"),
        preprocess=_preprocess(entries),
        class_names=None if entries.content.get("class_names") is None else entries.texts("class_names"),
        gated_blocks=entries.wholes("gated_blocks", 0),
        outputs=tuple(_output(Entries(one, f"{entries.where}: outputs")) for one in entries.list("outputs")),
        predicts=entries.flag("predicts"),
        signed=entries.flag("signed"),
        gate=entries.inner("gate").content,
        notices=entries.texts("notices") if "notices" in entries.content else (),
        versions={name: str(version) for name, version in entries.inner("versions").content.items()},
        sha256=entries.text("sha256"),
        machine=_machine(entries),
    )
    _check(metadata, entries)
    return metadata


def _preprocess(entries: Entries) -> Preprocess | None:
    if entries.content.get("preprocessing") is None:
        return None
    inner = entries.inner("preprocessing")
    size = (entries.whole("height"), entries.whole("width"))
    if "image_size" in inner.content and inner.pair("image_size") != size:
        raise inner.wrong("image_size", f"height and width of the package, {list(size)}")
    try:
        return Preprocess(
            size, inner.numbers("mean"), inner.numbers("std"),
            crop_pct=inner.content.get("crop_pct", 1.0), interpolation=inner.content.get("interpolation", "bicubic"),
            squash=inner.flag("squash"),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"{inner.where}: {error}") from error


def _output(entries: Entries) -> Output:
    return Output(entries.text("name"), entries.wholes("shape", 1), entries.text("dtype", *DTYPES))


def _machine(entries: Entries) -> dict[str, Any]:
    if "machine" not in entries.content:
        return {}
    inner = entries.inner("machine")
    return {"architecture": inner.text("architecture"), "features": list(inner.texts("features"))}


def _check(metadata: Metadata, entries: Entries) -> None:
    """Refuses entries that do not fit each other."""
    m = metadata
    if m.batch * m.channels * m.height * m.width > _MAX_VALUES:
        raise entries.wrong("batch", f"a batch of images of at most {_MAX_VALUES} values")
    if m.class_names is not None and len(m.class_names) != m.classes:
        raise ValueError(
            f"{entries.where}: class_names: expected {m.classes}, one for each class, got {len(m.class_names)}"
        )
    if m.preprocess is not None and len(m.preprocess.mean) != m.channels:
        raise entries.inner("preprocessing").wrong("mean", f"{m.channels} numbers, one for each channel")
    each, maps = (m.batch,), (m.batch, math.prod(m.grid))
    expected = {"logits": (m.batch, m.classes), "targets": each, "values": each, "relevance": maps}
    expected |= {f"{kind}.{block}": maps for block in m.gated_blocks for kind in ("scores", "gates")}
    found = {output.name: output.shape for output in m.outputs}
    expected |= {name: maps for name in ("signal", "ungated") if name in found}
    if len(found) < len(m.outputs):
        raise ValueError(f"{entries.where}: outputs: expected different names, got {[o.name for o in m.outputs]}")
    for name, shape in expected.items():
        if found.get(name) != shape:
            got = f"one of shape {list(found[name])}" if name in found else "none"
            raise ValueError(f"{entries.where}: outputs: expected {name!r} of shape {list(shape)}, got {got}")
    if any(shape[:1] != each for shape in found.values()):
        raise ValueError(f"{entries.where}: outputs: expected {m.batch} rows in each, the batch, got {found}")


def this_machine() -> dict[str, Any]:
    """The part of the processor that compiled code depends on; no features if this torch cannot tell them."""
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    features = sorted(name for name, there in told.items() if there is True and name.startswith(_EXTENSIONS))
    return {"architecture": platform.machine(), "features": features}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes in lower-case hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
