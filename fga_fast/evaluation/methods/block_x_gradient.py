"""Block x gradient: what tokens contribute to the logit, averaged over the blocks on their way.

    mean_l x_lp . g_lp        x_l the tokens that enter block l = 0 .. L - 1, g_l of the conservative backward pass

At every block the sum over all tokens, plus what biases after it contribute, is the logit (docs/conservative.md; A. Ali
et al.: XAI for Transformers, ICML 2022), so each block's map shares out the same number. The mean over blocks is this
library's own. With gates, each block's map is multiplied by the gates from there on.
"""

from __future__ import annotations

from torch import Tensor

from fga_fast.evaluation.subject import Method, Subject
from fga_fast.settings import Gate, Mode


def block_x_gradient(name: str, base: float = 1.0, mode: Mode = "combined") -> Method:
    """The conservative `x . g` averaged over blocks, signed.

    Args:
        name: of the method, for errors.
        base: of the gates; 1 is without.
        mode: of the gates.
    """

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:  # [B, channels, H, W] [B] -> [B, P]
        if base != 1:
            subject.check_saes(name)
        gate = None if base == 1 else Gate(mode=mode, base=base, seed=subject.seed)
        explainer = subject.explainer(gate, method="block_x_gradient", backward="conservative")
        return explainer(images, targets).relevance

    return method
