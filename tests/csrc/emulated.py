"""Builds the CUDA kernels for the CPU (tests/csrc/native) and calls them on tensors through ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined")
KERNELS = ("attention_relevance", "gate")
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ORDERS = ("forward", "backward", "shuffled")
Pointer, Long, Int, Bool = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_bool


class HeadTensor(ctypes.Structure):
    _fields_ = [("data", Pointer), ("batch_stride", Long), ("head_stride", Long), ("token_stride", Long)]


class LogitBias(ctypes.Structure):
    _fields_ = [
        ("data", Pointer), ("batch_stride", Long), ("head_stride", Long), ("query_stride", Long), ("key_stride", Long),
        ("float32", Bool),
    ]  # fmt: skip


class AttentionRelevance(ctypes.Structure):
    """csrc/cuda/attention_relevance.h"""

    _fields_ = [
        ("type", Int), ("q", HeadTensor), ("k", HeadTensor), ("v", HeadTensor), ("grad_out", HeadTensor),
        ("bias", LogitBias), ("lse", Pointer), ("row", Pointer), ("gate", Pointer), ("image", Pointer),
        ("messages", Pointer), ("row_out", Pointer), ("rows", Long), ("images", Long), ("heads", Long),
        ("queries", Long), ("keys", Long), ("width", Int), ("scale", ctypes.c_float), ("is_signed", Bool),
    ]  # fmt: skip


def build(path: Path, flags: Sequence[str] = ("-O2",), sources: Sequence[Path] | None = None) -> None:
    """Compiles kernels, by default all, for this machine's CPU into one shared object."""
    native, kernels = ROOT / "tests" / "csrc" / "native", ROOT / "csrc" / "cuda"
    if sources is None:
        sources = [native / "emulated.cpp", *(kernels / f"{stem}.cu" for stem in KERNELS)]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-clobbered"]
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-fPIC", "-shared", *warnings, *flags, "-DFGA_CUDA_ON_HOST"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{native}", "-o", str(path), "-x", "c++", *map(str, sources)]
    subprocess.run(command, check=True)


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels; those in the file FGA_FAST_EMULATED if it is set, else freshly compiled."""
    with tempfile.TemporaryDirectory() as folder:
        built = os.environ.get("FGA_FAST_EMULATED")
        if built is None:
            built = str(Path(folder) / "libemulated.so")
            build(Path(built))
        loaded = ctypes.CDLL(built)
    loaded.emulated_attention_relevance.restype = ctypes.c_char_p
    loaded.emulated_gate.restype = ctypes.c_char_p
    loaded.emulated_gate.argtypes = [Pointer, Pointer, Int, Long, Long, ctypes.c_double, ctypes.c_double]
    loaded.emulated_shared_bytes.restype = ctypes.c_int64
    if loaded.emulated_bytes() != ctypes.sizeof(AttentionRelevance):
        raise RuntimeError("AttentionRelevance is not laid out here as in csrc/cuda/attention_relevance.h")
    return loaded


def head_tensor(t: Tensor) -> HeadTensor:
    return HeadTensor(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def logit_bias(bias: Tensor | None) -> LogitBias:
    if bias is None:
        return LogitBias()
    strides = [0 if bias.shape[dim] == 1 else bias.stride(dim) for dim in range(4)]
    return LogitBias(bias.data_ptr(), *strides, bias.dtype == torch.float32)


def run(kernel: str, order: str, copies_at_once: bool, *arguments: object) -> None:
    library().emulated_settings(ORDERS.index(order), int(copies_at_once))
    failure = getattr(library(), kernel)(*arguments).decode()
    if failure:
        raise RuntimeError(failure)


def attention_relevance(
    grad_out: Tensor, row: Tensor, gate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    lse: Tensor, image: Tensor | None, scale: float, signed: bool, *,
    order: str = "forward", copies_at_once: bool = False,
) -> Tensor:  # fmt: skip
    """As the op `fga_fast::attention_relevance` on CUDA.

    Raises:
        RuntimeError: the kernel did something that a device would not forgive; the message says what.
    """
    rows, heads, queries, width = grad_out.shape
    keys = k.shape[2]
    messages, row_out = torch.full((rows, heads, keys), float("nan")), torch.full((rows, keys), float("nan"))
    problem = AttentionRelevance(
        TYPES[q.dtype], head_tensor(q), head_tensor(k), head_tensor(v), head_tensor(grad_out), logit_bias(bias),
        lse.data_ptr(), row.data_ptr(), None if gate is None else gate.data_ptr(),
        None if image is None else image.data_ptr(), messages.data_ptr(), row_out.data_ptr(), rows, len(q), heads,
        queries, keys, width, scale, signed,
    )  # fmt: skip
    run("emulated_attention_relevance", order, copies_at_once, ctypes.byref(problem))
    return row_out


def gate(scores: Tensor, base: float, slope: float, order: str = "forward") -> Tensor:  # [M, P]
    """As the op `fga_fast::gate` on CUDA.

    Raises:
        RuntimeError: the kernel did something that a device would not forgive; the message says what.
    """
    gates = torch.full_like(scores, float("nan"))
    wide = int(scores.dtype == torch.float64)
    run("emulated_gate", order, False, scores.data_ptr(), gates.data_ptr(), wide, *scores.shape, base, slope)
    return gates
