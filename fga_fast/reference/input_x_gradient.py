"""What each token contributes to the explained value: its entry in the residual stream times the gradient there."""

from __future__ import annotations

from torch import Tensor

from fga_fast.precision import relevance_dtype


def input_x_gradient(
    x: Tensor,  # [B, N, C], input of a block
    g: Tensor,  # [B, N, C], gradient of the explained value with respect to it
) -> Tensor:
    """Signed contribution of every token.

    Equation: `c_t = x_t . g_t`. Under the conservative backward pass `sum_t c_t`, plus `b . dy/db` of all bias terms
    after x, is the explained value (A. Ali et al., ICML 2022).

    Returns:
        [B, N] in `relevance_dtype`.
    """
    dtype = relevance_dtype(x.dtype)
    return (x.to(dtype) * g.to(dtype)).sum(dim=-1)
