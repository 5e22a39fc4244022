"""TransMM: attention weighed by its gradient, rolled out.

    Cbar_l = mean_h relu(A_l * dA_l)        R = (I + Cbar_L) ... (I + Cbar_1)        the head's row of R at the patches

H. Chefer, S. Gur, L. Wolf: Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
Transformers, ICCV 2021, equations 5 and 6. "conservative" takes dA of the conservative backward pass: A. Ali et al.,
XAI for Transformers, ICML 2022 (docs/conservative.md).
"""

from __future__ import annotations

from torch import Tensor

from fga_fast.evaluation.subject import Method, Subject
from fga_fast.settings import Backward


def transmm(backward: Backward = "exact") -> Method:
    """TransMM with the gradients of one of the backward passes. Its relevance is never negative."""

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:  # [B, channels, H, W] [B] -> [B, P]
        return subject.explainer(backward=backward)(images, targets).relevance

    return method
