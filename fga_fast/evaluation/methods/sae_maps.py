"""Maps from one SAE alone, without any rollout: what its features explain at its block, and what it leaves out.

    sae_score             s_p = sum_k f_pk (g_p . D_k), FGA's score, before it becomes a gate
    sae_reconstruction    xhat_p . g_p, with xhat = f D + b_dec, and what normalisation took off put back
    sae_error             (x_p - xhat_p) . g_p; with the line before it adds up to x_p . g_p

Šula, TU Wien 2026, doi 10.34726/hss.2026.132361 (score); S. Marks et al.: Sparse Feature Circuits, ICLR 2025 (features
and error term apart, attribution to first order).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fga_fast.evaluation.methods.recorded import follow, record, usable
from fga_fast.evaluation.subject import Method, Subject
from fga_fast.models.layout import ModelLayout
from fga_fast.settings import Backward, Gate


def sae_score(block: int | None = None) -> Method:
    """The score of one block; signed.

    Args:
        block: of the SAE. None: the last one at which the head still reads patches.
    """

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:  # [B, channels, H, W] [B] -> [B, P]
        subject.check_saes("sae_score")
        explainer = subject.explainer(Gate())
        with torch.inference_mode(False), torch.enable_grad():  # what the head reads is the same for all images
            deepest = follow(subject, usable(images[:1]), targets[:1]).reads.deepest
        where = _block("sae_score", subject, deepest, explainer.layout, block)
        return explainer(images, targets).scores[where]

    return method


def sae_part(
    part: Literal["reconstruction", "error"], block: int | None = None, backward: Backward = "exact"
) -> Method:
    """What an SAE's reconstruction, or its error, contributes to first order; signed.

    Args:
        block: of the SAE. None: the last one at which the head still reads patches.
        backward: the pass that g is of.
    """

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:  # [B, channels, H, W] [B] -> [B, P]
        subject.check_saes(f"sae_{part}")
        found = record(subject, images, targets, backward)
        where = _block(f"sae_{part}", subject, found.deepest, found.layout, block)
        sae = subject.saes[where]
        x, g = found.after(where)  # [B, P, C]
        with torch.no_grad():
            reconstruction: Tensor = sae(x.to(sae.dtype)).to(x)
        return ((reconstruction if part == "reconstruction" else x - reconstruction) * g).sum(-1)

    return method


def _block(name: str, subject: Subject, last: int, layout: ModelLayout, block: int | None) -> int:
    blocks = sorted(subject.saes)
    if block is None:
        blocks = [b for b in blocks if b < last or (b == last and layout.pooled[1] > layout.prefix_tokens)]
        if not blocks:
            raise ValueError(
                f"{name}: the only SAE is after block {last} or later, whose patches the head does not read; give an "
                "SAE of an earlier block"
            )
        return blocks[-1]
    if block not in blocks:
        raise ValueError(f"{name}: expected a block with an SAE ({', '.join(map(str, blocks))}), got {block}")
    return block
