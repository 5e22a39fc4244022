"""Triton kernels of the score and gate stages, installed as `fga_fast.kernels`. They have never run on a device.

    score(x, g, sae, mode, image=, permutation=, top_features=)   as `ops.score`    -> score.py
    gate(scores, base, slope)                                     as `ops.gate`     -> gate.py

What was shown is in tests/kernels/test_kernels_interpreted.py (numbers, in Triton's interpreter on the CPU) and
tests/kernels/test_kernels_compile.py (machine code for compute capability 8.0, 9.0 and 10.0). Speed was not measured.
"""

from __future__ import annotations

# With a source tree on its path, transformers finds this folder when it asks for a package `kernels`. It gets an empty
# one, because the ops may be defined only once.
if __name__ == "fga_fast.kernels":
    from .gate import gate
    from .score import score

    __all__ = ["gate", "score"]
