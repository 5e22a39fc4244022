"""Whether a model pools as its layout says."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fga_fast.models.layout import ModelLayout

logger = logging.getLogger(__name__)


def check_pooling(values: Tensor, stream: Tensor | None, outside: list[Tensor], layout: ModelLayout) -> None:
    """Says so where the values depend on other tokens of the last residual stream than the layout's pooled ones, not on
    all of these, or on attention after the blocks that is not the layout's pool.

    That is how a wrong `ModelLayout` shows, and a wrapper that pools the tower's tokens itself.
    """
    last = layout.pooled[1] - 1
    if stream is None or layout.pooling == "attention" or not (stream.requires_grad and values.requires_grad):
        return
    g, *others = torch.autograd.grad(
        values.sum(), [stream, *(x for x in outside if x.requires_grad)], retain_graph=True, materialize_grads=True
    )
    read = (g != 0).flatten(2).any(-1).any(1 if layout.tokens_first else 0).tolist()  # [N]
    besides = [token for token, is_read in enumerate(read) if is_read and not layout.pooled[0] <= token <= last]
    if besides:
        what = f"{len(besides)} token(s) of the last residual stream besides the pooled ones, such as {besides[0]}"
    elif any(read) and not all(read[layout.pooled[0] : last + 1]):
        what = "only some of the pooled tokens of the last residual stream"
    elif any(bool(other.any()) for other in others):
        what = "attention after the blocks, which the layout does not know of"
    else:
        return
    logger.warning(
        "the explained value depends on %s, pooled being tokens %d to %d (%s), so the rollout starts from the wrong "
        "place or from a part only; if the model pools otherwise, pass layout=ModelLayout(...) that says how",
        what, layout.pooled[0], last, layout.pooling,
    )  # fmt: skip
