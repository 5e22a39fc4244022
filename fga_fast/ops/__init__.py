"""The native ops, one a file: checks, fake kernel, autograd formula and one call of the kernel. There is no mathematics
here: what an op computes stands in the file of the same name under `fga_fast/reference/`.

On the CPU all kernels are C++. On a GPU the native backend is a mix: `attention` and `gate` of this package are CUDA
kernels, and the score is `fga_fast.kernels.score`, in Triton.
"""

from fga_fast.ops.attention import attention, attention_backward
from fga_fast.ops.gate import gate
from fga_fast.ops.library import NativeLibraryError, cuda_error, load
from fga_fast.ops.score import MODES, Score, score

__all__ = [
    "MODES", "NativeLibraryError", "Score", "attention", "attention_backward", "cuda_error", "gate", "load", "score"
]  # fmt: skip
