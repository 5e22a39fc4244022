"""Writes files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes `data` to `path`; an error or a crash leaves whatever was there before, and no half-written file.

    Args:
        path: the file to write. Its folder must exist.
        data: the whole content.

    Returns:
        `path` as a Path.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder does not exist, or its name is a file's.
        PermissionError, OSError: the folder or the disk does not take the file.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(data)
    return Path(path)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the name of a file to write; it takes the place of `path` when the block ends without an error.

    Raises:
        OSError: as `atomic_write`.
    """
    path = Path(path)
    # In the same folder, because os.replace is atomic only within one file system. Opened by us rather than by
    # tempfile, whose files are readable by their owner alone whatever the umask says.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.open("xb").close()
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder and os.name == "nt":  # where folders cannot be opened, and need not be
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable_folder(folder: str | os.PathLike[str]) -> Path:
    """Creates `folder` if it is missing, then writes and removes a file to check that results can be written there.

    Raises:
        OSError: of the kind the system gave (PermissionError, NotADirectoryError, ...), its message naming the folder.
    """
    folder = Path(folder)
    probe = folder / f".fga_fast.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(probe, b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"cannot write into the folder {folder}: {reason}; choose another folder") from error
    return folder
