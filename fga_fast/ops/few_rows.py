"""Product of a gradient with a weight where most rows of the gradient are zero, as in the last block of a model that
reads one token. It is an op because only the values tell which rows are zero, and because it looks at the rows of K
targets together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("fga_fast::few_rows_product", mutates_args=())
def few_rows_product(
    g: Tensor,  # [rows, out]
    weight: Tensor,  # [out, in]
) -> Tensor:
    """`g @ weight` [rows, in]; rows of g that are all zero give zeros and cost nothing."""
    if g.is_cuda:  # the host would have to wait to learn which rows are zero
        return g @ weight
    rows = (g != 0).any(-1).nonzero()[:, 0]
    if 2 * len(rows) > len(g):
        return g @ weight
    product = g.new_zeros(len(g), weight.shape[1])
    product[rows] = g[rows] @ weight
    return product


@few_rows_product.register_fake
def _fake(g: Tensor, weight: Tensor) -> Tensor:
    return g.new_empty(g.shape[0], weight.shape[1])


@few_rows_product.register_vmap
def _batched(info: Any, in_dims: tuple[int | None, int | None], g: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """K targets: their rows are one longer list of rows."""
    if in_dims[1] is not None:
        raise RuntimeError("few_rows_product: weight: expected one for all targets, got one a target; call it for each")
    g = g.movedim(in_dims[0] or 0, 0)  # [K, rows, out]
    product: Tensor = few_rows_product(g.reshape(-1, g.shape[-1]), weight)
    return product.view(*g.shape[:-1], weight.shape[1]), 0
