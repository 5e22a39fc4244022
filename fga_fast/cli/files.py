"""Which image files a command means, and the images in them, read while others are explained."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from fga_fast.io.images import EXTENSIONS, list_images
from fga_fast.io.window import ImageFileError

_READERS = 4  # threads; decoders of images release Python's lock

Failed = list[tuple[Path, str]]
Read = TypeVar("Read")


class Found(NamedTuple):
    """The image files that the arguments name."""

    paths: list[Path]
    many: bool  # whether several files may be meant, so that a bad one does not end the run
    failed: Failed  # what was named but not found, with reasons


def find(given: Sequence[str], out: Path) -> Found:
    """Files, folders of images, and patterns such as "scans/*.png" or "scans/**/*.png", each file once.

    Args:
        given: at least one.
        out: the folder of the results; a pattern does not find what is in it.

    Raises:
        FileNotFoundError, ValueError: one file, folder or pattern was given, and it names no image.
    """
    found: dict[str, Path] = {}  # absolute -> as given; a link is a file of its own
    failed: Failed = []
    for word in given:
        try:
            for path in _files(word, out.resolve()):
                found.setdefault(os.path.abspath(path), path)  # noqa: PTH100  (takes out "..", follows no links)
        except (ValueError, OSError) as error:
            if len(given) == 1:
                raise
            failed.append((Path(word), str(error)))
    many = len(given) > 1 or not Path(given[0]).is_file()
    return Found(list(found.values()), many, failed)


def _files(word: str, out: Path) -> list[Path]:
    path = Path(word)
    if path.is_dir():
        return list_images(path)
    if path.exists():  # before patterns, since "[" may be part of a name
        return [path]
    if glob.escape(word) == word:
        raise FileNotFoundError(f"IMAGE: no file or folder {path}; expected image files, folders of them or patterns")
    matching = (Path(name) for name in sorted(glob.glob(word, recursive=True)))  # noqa: PTH207  (absolute patterns)
    images = [
        path
        for path in matching
        if path.suffix.lower() in EXTENSIONS and path.is_file() and out not in path.resolve().parents
    ]
    if not images:
        raise FileNotFoundError(f"IMAGE: no image matches {word!r}; looked for files ending in {', '.join(EXTENSIONS)}")
    return images


def read(
    paths: Sequence[Path], load: Callable[[Path], Read], ahead: int, failed: Failed | None
) -> Iterator[tuple[Path, Read]]:
    """What `load` makes of each file, in order, read by threads.

    Args:
        load: reads a file.
        ahead: how many files to read before they are asked for, which bounds the memory.
        failed: where to note files that cannot be read, with reasons; None: such a file ends the run.
    """
    waiting: deque[tuple[Path, Future[Read]]] = deque()
    left = iter(paths)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="fga-fast reads") as pool:
        try:
            while True:
                while len(waiting) <= ahead and (path := next(left, None)) is not None:
                    waiting.append((path, pool.submit(load, path)))
                if not waiting:
                    return
                path, reading = waiting.popleft()
                try:
                    done = reading.result()
                except (ImageFileError, OSError) as error:
                    if failed is None:
                        raise
                    failed.append((path, str(error)))
                else:
                    yield path, done
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
