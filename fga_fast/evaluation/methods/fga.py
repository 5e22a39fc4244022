"""Feature-Gradient Attribution: TransMM whose patch columns are multiplied by gates of SAE scores, and its controls.

    w_l = base ** tanh(slope * z(s_l)),  z the robust z over an image's patches,  Cbar_l[:, p] <- w_lp Cbar_l[:, p]

    combined (the method)    s = sum_k f_k h_k,  f the codes of x_l,  h = g_l D^T with the decoder rows D
    activation_only          s = sum_k f_k
    gradient_only            s = sum_k h_k
    no_sae                   s = g_l . x_l, which reads of the SAEs only where they are
    shuffled                 s = sum_k f_k h_perm(k), the decoder rows in another order, drawn from the subject's seed

A class token's head reads the patches after the last block but one through a LayerNorm only. There g . x is 0 but for
rounding, so that "no_sae" gates by noise. At earlier blocks it is a control; "fga_no_sae_centred" is one at all.

Šula, TU Wien 2026, doi 10.34726/hss.2026.132361. As published: base 10, slope 1.
"""

from __future__ import annotations

from torch import Tensor

from fga_fast.evaluation.subject import Method, Subject
from fga_fast.settings import Gate, Mode


def fga(name: str, mode: Mode = "combined", base: float = 10.0) -> Method:
    """FGA with the rollout and the exact backward pass.

    Args:
        name: of the method, for errors.
        mode, base: as in `Gate`.
    """

    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:  # [B, channels, H, W] [B] -> [B, P]
        subject.check_saes(name)
        gate = Gate(mode=mode, base=base, seed=subject.seed)
        return subject.explainer(gate)(images, targets).relevance

    return method
