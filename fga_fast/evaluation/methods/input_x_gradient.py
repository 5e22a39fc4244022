"""Input x gradient at the tokens, with and without gates, under both backward passes.

    input_x_gradient    c_p = x_p . g_p, x the tokens that enter the first block, g = dy/dx; signed
    gated               c_p * prod_l w_lp, the gates of FGA at all blocks with an SAE, of base 2

Under the conservative backward pass the sum of c over all tokens, plus what biases contribute, is the logit: A. Ali
et al., XAI for Transformers: Better Explanations through Conservative Propagation, ICML 2022, there "gradient x input"
(docs/conservative.md). The gates: Šula, TU Wien 2026, doi 10.34726/hss.2026.132361.
"""

from __future__ import annotations

from torch import Tensor

from fga_fast.evaluation.subject import Method, Subject
from fga_fast.settings import Backward, Gate


def input_x_gradient(backward: Backward) -> Method:
    """`x . g` of one of the backward passes."""

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:  # [B, channels, H, W] [B] -> [B, P]
        explainer = subject.explainer(method="input_x_gradient", backward=backward)
        return explainer(images, targets).relevance

    return method


def gated(name: str, backward: Backward, base: float = 2.0) -> Method:
    """`x . g` times the gates of all SAEs, scored with gradients of the same backward pass.

    Args:
        name: of the method, for errors.
    """

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:  # [B, channels, H, W] [B] -> [B, P]
        subject.check_saes(name)
        explainer = subject.explainer(Gate(base=base), "input_x_gradient", backward)
        return explainer(images, targets).relevance

    return method
