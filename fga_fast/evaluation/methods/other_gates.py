"""TransMM with gates from other scores than an SAE's: controls of what the SAE adds. Base 10 and slope 1, as FGA.

    random_gates       s ~ N(0, 1), independent for each image, target, block and patch
    no_sae_centred     s = g_l . (x_l - mean_p x_l), the mean over the image's patches

The codes of an SAE do not see what all patches share, or see it as a constant, while g . x does. The mean over patches
is taken off rather than the SAE's b_dec: so nothing of the SAE takes part but the number of its block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fga_fast.evaluation.methods.random_map import draw
from fga_fast.evaluation.methods.recorded import record, usable
from fga_fast.evaluation.subject import Subject
from fga_fast.precision import relevance_dtype
from fga_fast.reference.explain import explain
from fga_fast.reference.gate import gate, unit
from fga_fast.settings import Gate

_BASE, _SLOPE = 10.0, 1.0


def random_gates(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    """TransMM with random gates at the blocks that have SAEs. The same seed, image and target give the same gates.

    Args:
        images: [B, channels, H, W].
        targets: [B].

    Returns:
        [B, P], at least 0.

    Raises:
        ValueError: the subject has no SAEs.
    """
    subject.check_saes("fga_random_gates")
    patches, dtype = subject.explainer().plan.check(images).patches, relevance_dtype(images.dtype)
    gates = {}
    for block in subject.saes:
        scores = draw(f"random_gates {block}", subject.seed, images, targets, patches).to(dtype)
        gates[block] = gate(scores, _BASE, _SLOPE)
    return _gated(subject, images, targets, gates)


def no_sae_centred(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    """TransMM with gates of `g . (x - mean x)` at the blocks that have SAEs.

    Arguments, result and errors are those of `random_gates`. Two passes of the model.
    """
    subject.check_saes("fga_no_sae_centred")
    found = record(subject, images, targets)
    gates = {}
    for block in subject.saes:
        x, g = found.after(block)  # [B, P, C]
        scores = ((x - x.mean(1, keepdim=True)) * g).sum(-1)
        gates[block] = gate(scores / unit(g).to(scores), _BASE, _SLOPE)
    return _gated(subject, images, targets, gates)


def _gated(
    subject: Subject,
    images: Tensor,  # [B, channels, H, W]
    targets: Tensor,  # [B]
    gates: Mapping[int, Tensor],  # block -> [B, P]
) -> Tensor:  # [B, P]
    # The mode whose scores cost nothing, since given gates take the place of theirs.
    plan = subject.explainer(Gate(mode="no_sae")).plan
    layout = plan.check(images)
    with torch.inference_mode(False):
        return explain(
            plan.model, usable(images), targets, plan.saes, plan.settings, layout=layout, readout=plan.readout,
            given_gates=gates,
        ).relevance  # fmt: skip
