"""Whether a model pools its tokens as its layout says: what the explained values read of what runs after the blocks."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fga_fast.models.block_io import ForwardPass, TapeError
from fga_fast.models.layout import ModelLayout

logger = logging.getLogger(__name__)


def check_pooling(passed: ForwardPass, values: Tensor) -> None:  # values [B] or [B, K], attached to the pass
    """Checks what `values` read against the layout's pooling. It takes a backward pass through the model's head.

    Refused is an attention pool that is read where the layout knows of none, or not read where it promises one. A
    warning is logged where the values depend on other tokens of the last residual stream than the pooled ones, not on
    all of these, or on other attention after the blocks. That is how a wrong `ModelLayout` shows, and a wrapper that
    pools the tower's tokens itself.
    """
    passed.check_complete(values)
    layout = passed.layout
    promised = layout.pooling == "attention"
    before = [found for found in passed.outside[: passed.before_pool] if found.output.requires_grad]
    after = [found for found in passed.outside[passed.before_pool :] if found.output.requires_grad]
    if before:
        raise TapeError(
            f"model: attention with {before[0].queries} queries over {before[0].keys} keys runs between the last block "
            "of the layout and its attention pool, where relevance would pass it by; list all blocks, in forward order"
        )
    ends = [found.output for found in after]
    if promised and passed.pool is not None:
        ends.append(passed.pool)
    # Do not differentiate through the pool: its backward pass belongs to the rollout.
    if not promised and passed.stream is not None and passed.stream.requires_grad:
        ends.append(passed.stream)
    if not ends:
        return
    gradients = torch.autograd.grad(values.sum(), ends, retain_graph=True, allow_unused=True)
    read = [g for g, found in zip(gradients, after, strict=False) if g is not None and found.queries == 1 < found.keys]
    if read or (promised and gradients[-1] is None):
        what = "read another" if read else "do not read the"
        raise TapeError(
            f"model: '{layout.pooling}' pooling, but the explained values {what} attention with one query over the "
            "tokens after the blocks; check the layout's pooling and pooled"
        )
    if any(g is not None and bool(g.any()) for g in gradients[: len(after)]):
        _warn("attention after the blocks, which the layout does not know of", layout)
    elif not promised and len(ends) > len(after):
        _check_tokens(gradients[-1], layout)


def _check_tokens(g: Tensor | None, layout: ModelLayout) -> None:  # [B, N, C] or [N, B, C]; None: zeros
    if g is None:
        return
    first, stop = layout.pooled
    read = (g != 0).flatten(2).any(-1).any(1 if layout.tokens_first else 0).tolist()  # [N]
    besides = [token for token, is_read in enumerate(read) if is_read and not first <= token < stop]
    if besides:
        _warn(
            f"{len(besides)} token(s) of the last residual stream besides the pooled ones, such as {besides[0]}", layout
        )
    elif any(read) and not all(read[first:stop]):
        _warn("only some of the pooled tokens of the last residual stream", layout)


def _warn(what: str, layout: ModelLayout) -> None:
    logger.warning(
        "the explained value depends on %s, pooled being tokens %d to %d (%s), so the rollout starts from the wrong "
        "place or from a part only; if the model pools otherwise, pass layout=ModelLayout(...) that says how",
        what, layout.pooled[0], layout.pooled[1] - 1, layout.pooling,
    )  # fmt: skip
