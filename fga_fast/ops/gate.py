"""Gate: scores of an image's patches to factors on the relevance that flows into each.

    z = (s - med) / (1.4826 (MAD + 1e-8)),   w = base ** tanh(slope z)

`med` and MAD are lower medians (as torch.median has them) over the patches of one image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fga_fast.ops import library


def gate(
    scores: Tensor,  # [M, P]
    base: float = 10.0,
    slope: float = 1.0,
) -> Tensor:
    """Gates [M, P] in [1/base, base], dtype of `scores` (float32 or float64). A row with a NaN gives a row of NaN.

    Raises:
        RuntimeError: rank, dtype or base (must be positive) do not fit; the message names the argument.
    """
    library.load()
    gates: Tensor = torch.ops.fga_fast.gate(scores, base, slope)
    return gates


def register_gate_rules(op: str) -> None:
    """Registers shapes, vmap rule and autograd formula of `fga_fast::<op>`: the native gate's, or Triton's."""

    def fake(scores: Tensor, base: float, slope: float) -> Tensor:
        return scores.new_empty(scores.shape)

    def vmap(info: Any, in_dims: tuple[int | None, ...], scores: Tensor, *more: float) -> tuple[Tensor, int]:
        folded = library.fold(scores, in_dims[0], info.batch_size)
        return library.unfold(getattr(torch.ops.fga_fast, op)(folded, *more), info.batch_size), 0

    library.register_rules(op, fake, vmap)


@library.at_load
def _register() -> None:
    register_gate_rules("gate")
