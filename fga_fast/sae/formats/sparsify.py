"""EleutherAI's sparsify: a folder a hook point, with ``sae.safetensors`` and ``cfg.json``.

Tensors: encoder.weight [F, C], encoder.bias [F], W_dec [F, C], b_dec [C].

    z = relu((x - b_dec) encoder.weight^T + encoder.bias), of which the k largest are kept
"""

from __future__ import annotations

import re
from typing import Any

from fga_fast.sae.formats.checkpoint import Checkpoint
from fga_fast.sae.formats.options import Options
from fga_fast.sae.formats.parameters import Loaded, Parameters, check_sizes, folded, oriented
from fga_fast.sae.formats.scope import check_scope, describe, residual_layer

NAME = "sparsify"
TAKES = ("pre_mean", "pre_scale")
CONFIG = "cfg.json"

_REQUIRED = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
# A folder is named after its module, such as "layers.9" or "encoder.layer.9.output".
_HOOK = re.compile(r"(?:[\w.]*\.)?(?:layers?|blocks?|resblocks|h)\.\d{1,4}(?:\.[\w.]+)?")


def matches(found: Checkpoint) -> bool:
    """Whether the tensors are those of sparsify."""
    return found.names >= {"encoder.weight", "b_dec"} and "decoder.weight" not in found.names


def load(found: Checkpoint, options: Options) -> Loaded:
    """Read an SAE of sparsify; see `SparseAutoencoder.from_pretrained`."""
    config, where = found.required_config(CONFIG)
    check_scope(config, where)
    if "W_skip" in found.names:
        raise ValueError(f"{found.weights}: W_skip: a transcoder's weights, which cannot gate patches")
    k = _k(config, where)
    hook = found.folder.name if _HOOK.fullmatch(found.folder.name) else None
    layer = None if hook is None else residual_layer(hook, str(found.folder))
    tensors = found.require(NAME, _REQUIRED, ())
    encoder = tensors["encoder.weight"]
    d_model, d_sae = tensors["b_dec"].numel(), tensors["encoder.bias"].numel()
    check_sizes(config, {"d_in": d_model, "num_latents": d_sae}, where, 0)  # num_latents 0: from expansion_factor
    parameters = Parameters(
        W_enc=oriented("encoder.weight", encoder, d_sae, d_model, where).t(),
        W_dec=oriented("W_dec", tensors["W_dec"], d_sae, d_model, where).to(encoder.dtype),
        b_dec=tensors["b_dec"].to(encoder.dtype),
        biases={"b_enc": tensors["encoder.bias"].to(encoder.dtype)},
        activation="topk",
        centred=True,
        k=k,
        metadata=describe(NAME, found.weights.name, hook, layer),
    )
    return folded(parameters, options, where)


def _k(config: dict[str, Any], where: str) -> int:
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise ValueError(
            f"{where}: activation: expected 'topk', got {activation!r}"
            + (", which keeps the largest of each group and is not supported" if activation == "groupmax" else "")
        )
    k = config.get("k")
    if type(k) is not int:
        raise ValueError(f"{where}: k: expected an integer, got {k!r}")
    return k
