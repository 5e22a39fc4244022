"""Draws figures beside the explaining: one in place, some in a thread, many in processes."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from fga_fast.io.atomic import atomic_write
from fga_fast.result.explanation import Explanation
from fga_fast.sae.notes import Note

# Drawing takes a core as long as explaining with a small model, and matplotlib holds Python's lock all the while. A
# process needs some seconds and a few hundred MB to start.
_IMAGES_A_PROCESS = 20
_MOST_PROCESSES = 8
_TILE, _CAPTION = 168, 24  # pixels
_WAITING = 16  # figures that may be waiting for each process; bounds the memory


class Drawing:
    """Draws figures of explanations that are on disk.

    Args:
        images: about how many figures there will be.

    Attributes:
        plain: whether matplotlib is missing, so that figures show overlays alone.
    """

    def __init__(self, images: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = min(cores, images // _IMAGES_A_PROCESS, _MOST_PROCESSES)
        self.plain = False
        self._waiting: deque[Future[bool]] = deque()
        self._most = _WAITING * max(processes, 1)
        self._pool: Executor
        if processes > 1:
            # Not a fork of this process, whose threads may hold locks.
            kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
            context = multiprocessing.get_context(kind)
            if kind == "forkserver":
                context.set_forkserver_preload([__name__])
                _start_server()
            self._pool = ProcessPoolExecutor(processes, context, initializer=_start_process)
        else:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="fga-fast draws")

    def __enter__(self) -> Drawing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """Waits for all figures, or after an error for those that are being drawn."""
        try:
            while kind is None and self._waiting:
                self._take()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def add(
        self, folder: Path, view: Image.Image, captions: Sequence[str],
        notes: Mapping[tuple[int, int], Note] | None = None,
    ) -> None:  # fmt: skip
        """Draws figure.png for a folder's relevance.safetensors.

        Args:
            view: what the model saw.
            captions: what stands beside the row of each target.
            notes: names of features.
        """
        self._waiting.append(self._pool.submit(draw, folder, view, captions, notes or {}))
        while len(self._waiting) > self._most:
            self._take()

    def _take(self) -> None:
        self.plain |= self._waiting.popleft().result()


def _start_server() -> None:
    """Starts the server that forks the processes. Ctrl-C does not reach them, not even while they begin."""
    from multiprocessing import forkserver  # which not every system has

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which what is started now inherits
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that explains ends the others
    torch.set_num_threads(1)


def draw(
    folder: Path, view: Image.Image, captions: Sequence[str], notes: Mapping[tuple[int, int], Note]
) -> bool:  # fmt: skip
    """Draws one figure, in a process or thread of its own; returns whether it is plain, for lack of matplotlib."""
    explanation = Explanation.load(folder / "relevance.safetensors")
    buffer, plain = io.BytesIO(), False
    try:
        names = dict(zip(explanation.targets.flatten().tolist(), captions, strict=True))
        figure = explanation.plot(view, class_names=names, notes=notes)
    except ImportError:
        plain = True
        strip(view, explanation, captions).save(buffer, format="PNG", compress_level=1)
    else:
        figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    atomic_write(folder / "figure.png", buffer.getvalue())
    return plain


def strip(view: Image.Image, explanation: Explanation, captions: Sequence[str]) -> Image.Image:
    """One row of tiles: the picture, then one overlay for each target, with captions below."""
    tile = (_TILE, _TILE * view.height // view.width)
    large = view.convert("RGB").resize(tile, Image.Resampling.BICUBIC)
    grey = large.convert("L").convert("RGB")  # so that all colour in an overlay is the heat map's
    overlays = explanation.overlay(grey, alpha=0.55).flatten(0, -4)  # [K, H, W, 3]
    tiles = [large, *(Image.fromarray(one.numpy()) for one in overlays)]
    picture = Image.new("RGB", (len(tiles) * (_TILE + 4) - 4, tile[1] + _CAPTION), "white")
    draw = ImageDraw.Draw(picture)
    for number, (one, caption) in enumerate(zip(tiles, ["image", *captions], strict=True)):
        picture.paste(one, (number * (_TILE + 4), 0))
        draw.text((number * (_TILE + 4) + 2, tile[1] + 4), caption[:24], fill="black", font=_font())
    return picture


def _font() -> Any:
    try:
        return ImageFont.load_default(13)
    except TypeError:  # Pillow below 10.1 has one size only
        return ImageFont.load_default()
