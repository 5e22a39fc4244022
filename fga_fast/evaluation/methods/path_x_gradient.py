"""Path x gradient: what tokens contribute to the logit, averaged over the blocks on their way.

    mean_l x_lp . g_lp        x_l the tokens that enter block l = 0 .. L - 1, g_l of the conservative backward pass

At every block the sum over all tokens, plus what biases after it contribute, is the logit (docs/conservative.md; A. Ali
et al.: XAI for Transformers, ICML 2022), so each block's map shares out the same number. The mean over blocks is this
library's own.
"""

from __future__ import annotations

from torch import Tensor

from fga_fast.evaluation.subject import Subject


def path_x_gradient(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    """Mean over blocks of the conservative `x . g` at the tokens that enter them.

    Args:
        images: [B, channels, H, W].
        targets: [B].

    Returns:
        [B, P], signed.
    """
    explainer = subject.explainer(method="input_x_gradient", backward="conservative", per_block=True)
    blocks = explainer(images, targets).blocks  # [B, L, P]
    assert blocks is not None  # per_block
    return blocks.mean(1)
