"""Public ops, one a file: checks, fake kernel, autograd formula and one call of the native kernel. No mathematics here;
what an op computes is written in the file of the same name under `fga_fast/reference/`."""

from fga_fast.ops._library import NativeLibraryError, cuda_error, load
from fga_fast.ops.attention import attention, attention_backward
from fga_fast.ops.gate import gate
from fga_fast.ops.score import MODES, Score, score

__all__ = [
    "MODES", "NativeLibraryError", "Score", "attention", "attention_backward", "cuda_error", "gate", "load", "score"
]  # fmt: skip
