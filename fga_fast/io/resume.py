"""What runs share that go on after a break: settings that must be the same, what a killed process left, one writer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_same(there: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> None:
    """Refuses to go on in a folder whose run has other settings.

    Args:
        there: settings of the run in `folder`, as read from JSON.
        given: those of this call; tuples and lists are alike.

    Raises:
        ValueError: naming each setting that differs, and both values.
    """
    old, new = _flat(there), _flat(json.loads(json.dumps(given)))
    other = [
        f"{name} ({_short(old.get(name))} there, {_short(new.get(name))} now)"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if other:
        raise ValueError(
            f"out: {folder} holds a run with other settings: {'; '.join(other)}; name another folder, or run with the "
            "settings of that one"
        )


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keeps other processes, and other calls in this one, out of a folder that is there. Nothing is left in it.

    The system lets go of the folder when the process ends, however it ends.

    Raises:
        ValueError: another run writes into the folder.
    """
    try:
        import fcntl
    except ImportError:  # no such lock on this system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out: another run writes into {folder}; wait for its end, or name another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, name: str) -> None:
    """Deletes half-written files of a killed `atomic_write`.

    Args:
        folder: where it wrote; it may be missing.
        name: what the files would be called, a pattern.
    """
    for left in folder.glob(f".{name}.*.tmp"):
        if not _is_running(left):
            left.unlink(missing_ok=True)


def _is_running(temporary: Path) -> bool:
    """Whether the process that writes this file, `.NAME.PID.RANDOM.tmp`, is there."""
    number = temporary.name.split(".")[-3]
    return number.isdecimal() and number != str(os.getpid()) and Path("/proc", number).exists()


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of a group named one by one, such as methods.fga."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
