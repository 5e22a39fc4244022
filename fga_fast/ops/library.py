"""Loads the native library once, on first use. Ops hand `at_load` what they register then."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_cuda_error: ImportError | None = None
_registrations: list[Callable[[], None]] = []
_loading, _loaded = threading.Lock(), threading.Event()


class NativeLibraryError(RuntimeError):
    """The compiled half of fga_fast is missing or does not load."""


def at_load(register: Callable[[], None]) -> Callable[[], None]:
    """Decorates a function that registers an op's rules with torch; `load` calls it once the op's schema is there."""
    _registrations.append(register)
    return register


def load() -> None:
    """Makes `torch.ops.fga_fast.*` callable. Cheap after the first call, which other threads wait for.

    `FGA_FAST_LIBRARY` may name a shared object to load instead of the installed one (a build with sanitizers).

    Raises:
        NativeLibraryError: no compiled library was found, or the loader refused it; the message has its words.
    """
    if _loaded.is_set():
        return
    with _loading:
        if not _loaded.is_set():
            _load()
            _loaded.set()


def _load() -> None:
    global _cuda_error
    override = os.environ.get("FGA_FAST_LIBRARY")
    try:
        if hasattr(torch.ops.fga_fast, "score"):
            logger.info("the operators are there already, loaded by another library of this process")
        elif override:
            torch.ops.load_library(override)  # type: ignore[no-untyped-call]
        else:
            importlib.import_module("fga_fast._C")
    except (ImportError, OSError) as error:
        raise NativeLibraryError(
            f"the compiled library of fga_fast does not load: {error}. Build it with `pip install .` in the project's "
            'folder, or use backend="composite"'
        ) from error
    if torch.version.cuda is not None and not override:
        try:
            importlib.import_module("fga_fast._cuda")
        except ImportError as error:
            _cuda_error = error
            logger.info("CUDA kernels not loaded: %s", error)
    while _registrations:  # what a failure leaves is registered by the next try
        _registrations[0]()
        del _registrations[0]


def cuda_error() -> str:
    """Why the native library or its CUDA object did not load; "" if nothing failed."""
    try:
        load()
    except NativeLibraryError as error:
        return str(error)
    return str(_cuda_error) if _cuda_error else ""


def has_cuda_kernel(op: str) -> bool:
    """Whether `fga_fast::<op>` has a kernel for CUDA in this process."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"fga_fast::{op}", "CUDA"))


def require_kernel(op: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor for whose device there is no native kernel, with the reason."""
    device = tensor.device
    if device.type in ("cpu", "meta") or (device.type == "cuda" and has_cuda_kernel(op)):
        return
    reason = f" (the CUDA object did not load: {cuda_error()})" if cuda_error() else ""
    raise RuntimeError(
        f"{op}: this build has no native kernel for {device.type}, got a tensor on {device}{reason}; use "
        'backend="composite" there or move the tensors to the CPU'
    )


def register_rules(op: str, fake: Callable[..., Any], vmap: Callable[..., Any]) -> None:
    """Registers an op's fake kernel and vmap rule, and an autograd formula that refuses: backward passes use the op, so
    a gradient through it would be silently lost."""
    torch.library.register_fake(f"fga_fast::{op}", fake)
    torch.library.register_vmap(f"fga_fast::{op}", vmap)

    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    def backward(ctx: object, *grads: Tensor) -> None:
        raise RuntimeError(f"fga_fast::{op} has no gradient: it is part of a backward pass; detach its arguments")

    torch.library.register_autograd(f"fga_fast::{op}", backward, setup_context=setup_context)


def fold(tensor: Tensor, dim: int | None, count: int) -> Tensor:  # [.., K, ..] with K at `dim`; None: without K
    """Rows of a tensor that vmap batches, [K * M, ...] with K outermost; without `dim` every k has the same rows."""
    if count == 0:
        raise ValueError("vmap: expected at least one target, got a batched dim of size 0")
    batched = tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batched.flatten(0, 1)


def unfold(tensor: Tensor, count: int) -> Tensor:  # [K * M, ...]
    """The opposite of `fold`, [K, M, ...]."""
    return tensor.view(count, tensor.shape[0] // count, *tensor.shape[1:])


def fold_image(
    image: Tensor | None,  # [M], [K, M] or [M, K]
    dim: int | None,
    like: Tensor,
    count: int,
    images: int,
    apart: bool,
) -> Tensor:
    """Which image each of K * M folded rows belongs to, [K * M] on the device of `like`.

    Args:
        image: as the op was called with; None: row m is image m.
        images: B, images of one k.
        apart: each k has images of its own, which were folded too.
    """
    each = torch.arange(images, device=like.device) if image is None else image
    folded = fold(each, dim, count)
    if not apart:
        return folded
    first = torch.arange(count, device=like.device) * images
    return folded + first.repeat_interleave(len(folded) // count)
