"""Loads the native library once, on first use, and tells every op to register its fake kernel and autograd formula."""

from __future__ import annotations

import functools
import importlib
import logging
import os

import torch

logger = logging.getLogger(__name__)

_cuda_error: ImportError | None = None


class NativeLibraryError(RuntimeError):
    """The compiled half of fga_fast is missing or does not load."""


@functools.cache
def load() -> None:
    """Makes `torch.ops.fga_fast.*` callable. Cheap after the first call.

    `FGA_FAST_LIBRARY` may name a shared object to load instead of the installed one (a build with sanitizers).

    Raises:
        NativeLibraryError: no compiled library was found, or the loader refused it; the message has its words.
    """
    global _cuda_error
    override = os.environ.get("FGA_FAST_LIBRARY")
    try:
        if override:
            torch.ops.load_library(override)  # type: ignore[no-untyped-call]
        else:
            importlib.import_module("fga_fast._C")
    except (ImportError, OSError) as error:
        raise NativeLibraryError(
            f"the compiled library of fga_fast does not load: {error}. Build it with `pip install .` in the project's "
            'folder, or use backend="reference"'
        ) from error
    if torch.version.cuda is not None and not override:
        try:
            importlib.import_module("fga_fast._cuda")
        except ImportError as error:
            _cuda_error = error
            logger.info("CUDA kernels not loaded: %s", error)
    for op in ("attention", "score", "gate"):
        importlib.import_module(f"fga_fast.ops.{op}").register()


def cuda_error() -> str:
    """Why the CUDA object did not load, to be said as soon as a CUDA tensor arrives; "" if there is nothing to say."""
    try:
        load()
    except NativeLibraryError as error:
        return str(error)
    return str(_cuda_error) if _cuda_error else ""


def require_cpu(op: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor for whose device there is no native kernel, with the reason."""
    if tensor.device.type == "cpu" or tensor.device.type == "meta":
        return
    reason = f" (the CUDA object did not load: {cuda_error()})" if cuda_error() else ""
    raise RuntimeError(
        f"{op}: native kernels run on the CPU in this version, got a tensor on {tensor.device}{reason}; "
        'use backend="reference" there or move the tensors to the CPU'
    )


def refuse_gradient(op: str) -> None:
    """Registers an autograd formula that says so instead of silently detaching: `op` is used inside backward passes."""

    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    def backward(ctx: object, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"fga_fast::{op} has no gradient: it is part of a backward pass; detach its arguments")

    torch.library.register_autograd(f"fga_fast::{op}", backward, setup_context=setup_context)


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 models; float32 for all others (relevance, scores, gates, softmax statistics)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
