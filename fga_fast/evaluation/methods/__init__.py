"""Methods of explanation, by the names they have in a table: FGA, its controls, and what others have published.

A method is a function `(subject, images [B, channels, H, W], targets int64 [B]) -> relevance [B, P]`, where larger is
more relevant; a function of your own is one too. Relevance is float64 for float64 models, else float32. Each image is
explained for itself, whatever its batch, and the model is left as it came. Every file says the equation and its source.

All raise ValueError or TypeError where images, targets or the model do not fit, as `Explainer`, and where the method is
not defined for the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fga_fast.evaluation.methods.attention_rollout import attention_rollout
from fga_fast.evaluation.methods.block_x_gradient import block_x_gradient
from fga_fast.evaluation.methods.fga import fga
from fga_fast.evaluation.methods.grad_cam import grad_cam
from fga_fast.evaluation.methods.input_x_gradient import gated, input_x_gradient
from fga_fast.evaluation.methods.integrated_gradients import integrated_gradients
from fga_fast.evaluation.methods.legrad import legrad
from fga_fast.evaluation.methods.other_gates import no_sae_centred, random_gates
from fga_fast.evaluation.methods.random_map import random_map
from fga_fast.evaluation.methods.raw_attention import raw_attention
from fga_fast.evaluation.methods.sae_maps import sae_part, sae_score
from fga_fast.evaluation.methods.transmm import transmm
from fga_fast.evaluation.subject import Method

__all__ = ["METHODS", "NEEDS_SAES", "Method", "grad_cam", "integrated_gradients", "sae_part", "sae_score"]

# Name -> method, in the order of a table.
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "transmm": transmm(),
        "transmm_conservative": transmm("conservative"),
        "fga": fga("fga"),
        "fga_base2": fga("fga_base2", base=2.0),
        "fga_activation_only": fga("fga_activation_only", "activation_only"),
        "fga_gradient_only": fga("fga_gradient_only", "gradient_only"),
        "fga_no_sae": fga("fga_no_sae", "no_sae"),
        "fga_no_sae_centred": no_sae_centred,
        "fga_shuffled": fga("fga_shuffled", "shuffled"),
        "fga_random_gates": random_gates,
        "input_x_gradient": input_x_gradient("exact"),
        "input_x_gradient_gated": gated("input_x_gradient_gated", "exact"),
        "input_x_gradient_conservative": input_x_gradient("conservative"),
        "input_x_gradient_conservative_gated": gated("input_x_gradient_conservative_gated", "conservative"),
        "block_x_gradient": block_x_gradient("block_x_gradient"),
        "block_x_gradient_gated": block_x_gradient("block_x_gradient_gated", 2.0),
        "block_x_gradient_gated_no_sae": block_x_gradient("block_x_gradient_gated_no_sae", 2.0, "no_sae"),
        "block_x_gradient_gated_shuffled": block_x_gradient("block_x_gradient_gated_shuffled", 2.0, "shuffled"),
        "sae_score": sae_score(),
        "sae_reconstruction": sae_part("reconstruction"),
        "sae_error": sae_part("error"),
        "attention_rollout": attention_rollout,
        "raw_attention": raw_attention,
        "grad_cam": grad_cam(),
        "legrad": legrad,
        "integrated_gradients": integrated_gradients(),
        "random": random_map,
    }
)
# Those that need SAEs, if only to know at which blocks; the others ignore them.
NEEDS_SAES: frozenset[str] = frozenset(name for name in METHODS if name.startswith(("fga", "sae_")) or "_gated" in name)
