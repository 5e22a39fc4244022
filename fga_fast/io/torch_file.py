"""A ``torch.save`` file that is not trusted: what it may hold is checked before anything is unpickled.

A pickle is a program. Three guards stand between such a file and the interpreter:
  1. `check_archive` reads the archive's table of contents: its sizes, and that it holds what torch.save writes;
  2. `foreign_names` reads the pickle's instructions without running them, and lists what is no tensor and no setting;
  3. `load` reads the file with ``torch.load(weights_only=True)``, PyTorch's restricted interpreter.
``torch.load(pickle_module=...)`` is not used: it switches the third guard off.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The pickle of a state dict holds names and sizes only, a few kB; the tensors' bytes are beside it in the archive.
MAX_PICKLE_BYTES = 4 << 20
MAX_ENTRIES = 1000

_OF_TORCH = (
    "FloatStorage DoubleStorage HalfStorage BFloat16Storage LongStorage IntStorage float32 float64 float16 bfloat16 "
    "device"
)
_TENSOR_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}" for name in _OF_TORCH.split()),
}
_OPCODE_NAMES = """
    PROTO STOP GLOBAL NEWOBJ REDUCE BUILD BINPERSID MARK BINGET LONG_BINGET BINPUT LONG_BINPUT
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
"""
_OPCODES = frozenset(_OPCODE_NAMES.split())
_ENTRY = re.compile(
    r"[^/]+/(data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
_ZIP_START = b"PK\x03\x04"
# torch.serialization.safe_globals is process-wide: one reader at a time may widen it.
_SAFE_GLOBALS_LOCK = threading.Lock()


def check_archive(
    path: Path, content: bytes | None = None, max_entries: int = MAX_ENTRIES, max_pickle: int = MAX_PICKLE_BYTES
) -> bytes:
    """Check an archive's table of contents, and return the pickle in it.

    Args:
        path: the file; with ``content`` it only names the archive in messages.
        content: the archive itself, where it is only a part of the file.
        max_entries: most files in the archive; each tensor is one.
        max_pickle: largest pickle, in bytes.

    Raises:
        ValueError: not an archive of ``torch.save``, damaged, or oversized.
    """
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
            _check_entries(path, entries, size, max_entries)
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{path}: expected one data.pkl in the archive, got {len(pickles)}")
            if pickles[0].file_size > max_pickle:
                got = pickles[0].file_size
                raise ValueError(f"{path}: oversized pickle: expected at most {max_pickle} bytes, got {got}")
            return archive.read(pickles[0])
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path}: truncated or damaged archive ({error})") from error


def foreign_names(path: Path, content: bytes | None = None) -> list[str]:
    """Check an archive, and list what its pickle refers to beside tensors and settings, as "module name".

    Args:
        path, content: see `check_archive`.

    Raises:
        ValueError: as `check_archive`, a damaged pickle, or an instruction in it that ``torch.save`` does not write.
    """
    data = check_archive(path, content)
    found: dict[str, None] = {}  # in the order of the pickle
    unknown = None
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _OPCODES:
                unknown = opcode.name
                break
            if opcode.name == "GLOBAL":
                found[str(argument)] = None
    except Exception as error:  # pickletools raises what its decoders raise
        raise ValueError(f"{path}: truncated or damaged pickle ({error})") from error
    if unknown is not None:
        raise ValueError(
            f"{path}: refused without running it: pickle instruction {unknown} is not one that torch.save writes"
        )
    return [name for name in found if name not in _TENSOR_NAMES]


def load(
    path: Path, content: bytes | None = None, *, stand_ins: Mapping[str, type] | None = None, mmap: bool = False
) -> Any:
    """Return what ``torch.save`` wrote; call `check_archive` or `foreign_names` with the same file first.

    Args:
        path, content: see `check_archive`.
        stand_ins: classes to build in place of those that the pickle refers to, by "module name".
        mmap: leave tensors in the file until they are used; for archives only.

    Raises:
        ValueError: PyTorch's restricted reader refuses the file.
    """
    classes: list[Any] = [(kind, name.replace(" ", ".")) for name, kind in (stand_ins or {}).items()]
    try:
        if not classes:
            return torch.load(_source(path, content), map_location="cpu", weights_only=True, mmap=mmap)
        with _SAFE_GLOBALS_LOCK, torch.serialization.safe_globals(classes):
            return torch.load(_source(path, content), map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged files raise anything from KeyError to RuntimeError
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"  # further lines are torch's advice
        raise ValueError(f"{path}: damaged or refused by torch.load(weights_only=True) ({reason})") from error


def check_size(name: str, tensor: Tensor, where: object) -> None:
    """Refuses a tensor that claims more bytes than its file stores.

    Zero strides let a few stored bytes stand for a tensor of any size; a copy of it would allocate that size.
    """
    claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > stored:
        raise ValueError(f"{where}: {name}: claims {claimed} bytes, the file stores {stored}")


def _source(path: Path, content: bytes | None) -> Path | io.BytesIO:
    return path if content is None else io.BytesIO(content)


def _check_entries(path: Path, entries: list[zipfile.ZipInfo], size: int, max_entries: int) -> None:
    if len(entries) > max_entries:
        raise ValueError(f"{path}: expected at most {max_entries} entries in the archive, got {len(entries)}")
    names = [entry.filename for entry in entries]
    for name in names:
        if not _ENTRY.fullmatch(name):
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
