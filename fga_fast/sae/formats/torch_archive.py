"""Reading a ``torch.save`` file that is not trusted: what it may hold is checked before anything is unpickled.

A pickle is a program. Two guards stand between such a file and the interpreter, and each would do alone:
  1. the archive's table of contents and the pickle's instructions are read, not run: a name outside the short list
     below, or an instruction that ``torch.save`` does not write, refuses the file by name;
  2. the file is then read by ``torch.load(weights_only=True)``, PyTorch's restricted interpreter.
``torch.load(pickle_module=...)`` is not used: it switches the second guard off.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import threading
import zipfile
from pathlib import Path
from typing import Any

import torch

CONFIG_CLASS = "VisionModelSAERunnerConfig"
# The pickle of a state dict holds names and sizes only, a few kB; the tensors' bytes are beside it in the archive.
MAX_PICKLE_BYTES = 4 << 20
MAX_ENTRIES = 1000

_GLOBALS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch FloatStorage",
        "torch DoubleStorage",
        "torch HalfStorage",
        "torch BFloat16Storage",
        "torch LongStorage",
        "torch float32",
        "torch float64",
        "torch float16",
        "torch bfloat16",
        "torch device",
    }
)
_OPCODE_NAMES = """
    PROTO STOP GLOBAL NEWOBJ REDUCE BUILD BINPERSID MARK BINGET LONG_BINGET BINPUT LONG_BINPUT
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
"""
_OPCODES = frozenset(_OPCODE_NAMES.split())
_ENTRY = re.compile(r"[^/]+/(data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment)")
_ZIP_START = b"PK\x03\x04"
_SERIALIZATION_ID = re.compile(r"[^/]+/\.data/serialization_id")
# torch.serialization.safe_globals is process-wide: one reader at a time may widen it.
_SAFE_GLOBALS_LOCK = threading.Lock()


class ConfigRecord:
    """Stands for the pickled configuration object: keeps its attributes as a dict, has no behaviour."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError(f"{CONFIG_CLASS}: expected a state of named fields, got {type(state).__name__}")
        self.fields = dict(state)


def config_classes(path: Path, content: bytes | None = None) -> list[str]:
    """Check an archive and return the full names of the configuration classes its pickle refers to.

    Args:
        path: the file; with ``content`` it only names the archive in messages.
        content: the archive itself, where it is only a part of the file.

    Raises:
        ValueError: not an archive of ``torch.save``, damaged, oversized, or it holds something that is refused.
    """
    data = _read_pickle(path, content)
    found: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _OPCODES:
                raise _Refused(f"pickle instruction {opcode.name} is not one that torch.save writes")
            if opcode.name == "GLOBAL":
                name = str(argument)
                if re.fullmatch(rf"[\w.]+ {CONFIG_CLASS}", name):
                    found.append(name.replace(" ", "."))
                elif name not in _GLOBALS:
                    raise _Refused(f"it refers to {name.replace(' ', '.')}, which is not a tensor or plain setting")
    except _Refused as error:
        raise ValueError(f"{path}: refused without running it: {error}; convert it where you trust it") from None
    except Exception as error:  # pickletools raises what its decoders raise
        raise ValueError(f"{path}: truncated or damaged pickle ({error})") from error
    return sorted(set(found))


def read_archive(path: Path, allowed_classes: list[str], content: bytes | None = None) -> Any:
    """Return what ``torch.save`` wrote; call `config_classes` with the same ``path`` and ``content`` first.

    Args:
        path, content: see `config_classes`.
        allowed_classes: full names of configuration classes that become `ConfigRecord`; empty: none.

    Raises:
        ValueError: PyTorch's restricted reader refuses the file.
    """
    records: list[Any] = [(ConfigRecord, name) for name in allowed_classes]
    try:
        if not records:
            return torch.load(_source(path, content), map_location="cpu", weights_only=True)
        with _SAFE_GLOBALS_LOCK, torch.serialization.safe_globals(records):
            return torch.load(_source(path, content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise anything from KeyError to RuntimeError
        raise ValueError(f"{path}: damaged or refused by torch.load ({type(error).__name__}: {error})") from error


class _Refused(Exception):
    pass


def _source(path: Path, content: bytes | None) -> Path | io.BytesIO:
    return path if content is None else io.BytesIO(content)


def _read_pickle(path: Path, content: bytes | None) -> bytes:
    """Check the archive's table of contents, and return the pickle in it."""
    if content is None:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_ZIP_START))
    else:
        size, start = len(content), content[: len(_ZIP_START)]
    # An archive's table is found from its end, so anything could stand before it; torch.load looks at the start.
    if start != _ZIP_START:
        raise ValueError(
            f"{path}: not an archive of torch.save (truncated, or written by torch < 1.6 or by another tool); "
            "load it where you trust it and save it again with torch.save"
        )
    try:
        with zipfile.ZipFile(_source(path, content)) as archive:
            entries = archive.infolist()
            _check_entries(path, entries, size)
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{path}: expected one data.pkl in the archive, got {len(pickles)}")
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                got = pickles[0].file_size
                raise ValueError(f"{path}: oversized pickle: expected at most {MAX_PICKLE_BYTES} bytes, got {got}")
            return archive.read(pickles[0])
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path}: truncated or damaged archive ({error})") from error


def _check_entries(path: Path, entries: list[zipfile.ZipInfo], size: int) -> None:
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"{path}: expected at most {MAX_ENTRIES} entries in the archive, got {len(entries)}")
    names = [entry.filename for entry in entries]
    for name in names:
        if not (_ENTRY.fullmatch(name) or _SERIALIZATION_ID.fullmatch(name)):
            raise ValueError(f"{path}: the archive holds {name!r}, which torch.save does not write for a state dict")
    if len(set(names)) != len(names) or len({name.split("/")[0] for name in names}) > 1:
        raise ValueError(f"{path}: the archive holds entries of the same name or in several folders")
    if entries and min(entry.header_offset for entry in entries) != 0:
        raise ValueError(f"{path}: the archive does not start where its table of contents says")
    compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise ValueError(f"{path}: expected uncompressed entries as torch.save writes them, got {compressed[0]!r}")
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise ValueError(f"{path}: truncated: its entries claim {total} bytes, the file has {size}")
