"""Chooses the implementation of each stage. `auto` takes the native kernels on CPUs, composite elsewhere.

All implementations of a stage have the same signature (`ops.attention`, `ops.score`, `ops.gate`), so the tape does not
need to know which one it calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fga_fast import composite, ops
from fga_fast.settings import Backend, check_choice


class Stages(NamedTuple):
    """The implementations of one backend."""

    attention: Callable[..., Any]
    score: Callable[..., ops.Score]
    gate: Callable[..., torch.Tensor]


NATIVE = Stages(ops.attention, ops.score, ops.gate)
COMPOSITE = Stages(composite.attention, composite.score, composite.gate)


class Choice(NamedTuple):
    """What runs. If `auto` could not take the native backend, `reason` says why."""

    name: str
    stages: Stages | None  # None for "reference", which is not made of these stages
    reason: str = ""


# Whether the CUDA kernels have run on a device and have rows in benchmarks/results. Until then `auto` avoids them.
CUDA_MEASURED = False


def choose(backend: Backend, device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
    """The backend that will run on `device` for a model of `dtype`.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: an explicit choice cannot run here; only `auto` falls back.
    """
    check_choice("backend", backend, Backend)
    if backend == "reference":
        return Choice(backend, None)
    if backend == "composite":
        return Choice(backend, COMPOSITE)
    wanted = "native" if backend == "auto" else backend
    stages = _stages(wanted, device, dtype)
    if isinstance(stages, Stages) and (device.type == "cpu" or CUDA_MEASURED or backend != "auto"):
        return Choice(wanted, stages)
    reason = stages if isinstance(stages, str) else "the CUDA kernels have not been measured on a device yet"
    if backend != "auto":
        raise RuntimeError(f"backend: {backend} cannot run: {reason}")
    return Choice("composite", COMPOSITE, reason)


def _stages(wanted: str, device: torch.device, dtype: torch.dtype) -> Stages | str:
    """The implementations of "native" or "triton" on a device, or why there are none."""
    if device.type == "cpu":
        if wanted == "triton":
            return f"Triton kernels run on CUDA devices only, the model is on {device}"
        try:
            ops.load()
        except ops.NativeLibraryError as error:
            return str(error)
        return NATIVE
    if device.type != "cuda":
        return f"native and Triton kernels run on CPU and CUDA devices only, the model is on {device}"
    if dtype == torch.float64:
        return "kernels for CUDA compute in float32, bfloat16 and float16, the model is float64"
    try:
        kernels = importlib.import_module("fga_fast.kernels")
    except ImportError as error:
        return f"the Triton kernels do not load: {error}"
    if wanted == "triton":
        return Stages(composite.attention, kernels.score, kernels.gate)
    if ops.cuda_error():
        return f"the CUDA object did not load: {ops.cuda_error()}"
    for op in ("attention", "attention_backward", "gate"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fga_fast::{op}", "CUDA"):
            return f"this build of fga_fast has no CUDA kernel for {op}; build it with FGA_FAST_CUDA=1"
    return Stages(ops.attention, kernels.score, ops.gate)
