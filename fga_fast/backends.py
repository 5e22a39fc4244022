"""Which implementation of each stage runs where: `auto` takes the fastest that is known to be right on the device.

A stage's implementations share one signature (`ops.attention`, `ops.score`, `ops.gate`), so the tape does not know
which it calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from fga_fast import composite, ops

Backend = Literal["auto", "native", "triton", "composite", "reference"]
BACKENDS = ("auto", "native", "triton", "composite", "reference")


class Stages(NamedTuple):
    """The implementations of one backend."""

    attention: Callable[..., Any]
    score: Callable[..., ops.Score]
    gate: Callable[..., torch.Tensor]


NATIVE = Stages(ops.attention, ops.score, ops.gate)
COMPOSITE = Stages(composite.attention, composite.score, composite.gate)


class Choice(NamedTuple):
    """What runs, and why it is not the native backend where `auto` could not take that."""

    name: str
    stages: Stages | None  # None for "reference", which has no stages of its own
    reason: str = ""

    def __str__(self) -> str:
        return self.name + (f" ({self.reason})" if self.reason else "")


def choose(backend: Backend, device: torch.device) -> Choice:
    """The backend that will run on `device`.

    Raises:
        ValueError: unknown name.
        RuntimeError: an explicit choice cannot run here; an explicit choice never falls back.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}, got {backend!r}")
    if backend == "reference":
        return Choice(backend, None)
    if backend == "composite":
        return Choice(backend, COMPOSITE)
    if backend == "triton":
        raise RuntimeError('backend: there are no Triton kernels in this version; use "auto", "native" or "composite"')
    reason = _obstacle(device)
    if not reason:
        return Choice("native", NATIVE)
    if backend == "native":
        raise RuntimeError(f"backend: native cannot run: {reason}")
    return Choice("composite", COMPOSITE, reason)


def _obstacle(device: torch.device) -> str:
    """Why native kernels cannot explain on this device; "" if they can."""
    if device.type == "cpu":
        try:
            ops.load()
        except ops.NativeLibraryError as error:
            return str(error)
        return ""
    reason = f"native kernels for a whole explanation run on the CPU only, the model is on {device}"
    if device.type == "cuda" and ops.cuda_error():
        reason += f"; the CUDA object did not load: {ops.cuda_error()}"
    return reason
