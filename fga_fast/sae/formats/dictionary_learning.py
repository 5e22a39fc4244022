"""dictionary_learning: ``ae.pt``, a state dict, and ``config.json`` with the settings of its trainer.

Its classes have tensors of different names; decoder.weight is [C, F].

    AutoEncoder             relu(E (x - bias) + e)
    AutoEncoderNew          relu(E x + e); needs config.json, as its names are also visaebench's
    AutoEncoderTopK         the k largest of relu(E (x - b_dec) + e)
    BatchTopKSAE            relu(E (x - b_dec) + e) where > threshold, under the names of AutoEncoderTopK: config.json,
                            or the caller, says which of the two it is
    MatryoshkaBatchTopKSAE  the same with W_enc [C, F] and W_dec [F, C]
    GatedAutoEncoder        h = E (x - decoder_bias); relu(exp(r_mag) h + mag_bias) where h + gate_bias > 0
    JumpReluAutoEncoder     relu(z) where z > threshold; z = x W_enc + b_enc

Its trainer writes weights that take the activations as they are, also where it scaled them for training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fga_fast.sae.formats.checkpoint import Checkpoint
from fga_fast.sae.formats.options import Options
from fga_fast.sae.formats.parameters import Loaded, Parameters, check_sizes, folded, oriented
from fga_fast.sae.formats.scope import check_scope, describe, trained_on

NAME = "dictionary_learning"
TAKES = ("activation", "pre_mean", "pre_scale")
CONFIG = "config.json"


@dataclass(frozen=True)
class _Class:
    """One class: its activation here, whether it subtracts b_dec, and its names of what `Parameters` holds."""

    activation: str
    centred: bool
    names: dict[str, str]  # ours -> the file's
    others: tuple[str, ...] = ()  # tensors that settings are read from, or nothing

    @property
    def stored(self) -> frozenset[str]:
        return frozenset((*self.names.values(), *self.others))


_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}
_PLAIN = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
_GATED = {"b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
_CLASSES = {
    "AutoEncoder": _Class("relu", True, {**_LINEAR, "b_dec": "bias"}),
    "AutoEncoderNew": _Class("relu", False, {**_LINEAR, "b_dec": "decoder.bias"}),
    "AutoEncoderTopK": _Class("topk", True, {**_LINEAR, "b_dec": "b_dec"}, ("k", "threshold")),
    "BatchTopKSAE": _Class("batch_topk", True, {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"}, ("k",)),
    "MatryoshkaBatchTopKSAE": _Class("batch_topk", True, _PLAIN, ("k", "group_sizes")),
    "GatedAutoEncoder": _Class("gated", True, {"W_enc": "encoder.weight", "W_dec": "decoder.weight", **_GATED}),
    "JumpReluAutoEncoder": _Class("jumprelu", False, _PLAIN),
}


def matches(found: Checkpoint) -> bool:
    """Whether the tensors are those of one of its classes, and of none of another library's."""
    return found.kind == "torch" and bool(_candidates(found, None))


def load(found: Checkpoint, options: Options) -> Loaded:
    """Read an SAE of dictionary_learning; see `SparseAutoencoder.from_pretrained`."""
    config, where = _trainer(found)
    check_scope(config, where)
    known = _candidates(found, options.activation)
    if len(known) != 1:
        raise ValueError(
            f"activation: {found.weights} has the tensors of AutoEncoderTopK and of BatchTopKSAE, and there is no "
            f"{CONFIG} that says which it is; pass activation='topk' or 'batch_topk', got {options.activation!r}"
        )
    kind = next(iter(known.values()))
    tensors = found.tensors(tuple(kind.names.values()))
    named = {ours: tensors[theirs] for ours, theirs in kind.names.items()}
    biases: dict[str, Tensor] = {name: named[name] for name in ("b_enc", "b_gate", "b_mag") if name in named}
    d_model, d_sae = named["b_dec"].numel(), next(iter(biases.values())).numel()
    check_sizes(config, {"activation_dim": d_model, "dict_size": d_sae}, where)
    linear = kind.names["W_enc"] == "encoder.weight"
    W_enc = oriented("encoder", named["W_enc"], *((d_sae, d_model) if linear else (d_model, d_sae)), where)
    W_dec = oriented("decoder", named["W_dec"], *((d_model, d_sae) if linear else (d_sae, d_model)), where)
    hook, layer = trained_on(config.get("submodule_name"), config.get("layer"), where)
    parameters = Parameters(
        W_enc=W_enc.t() if linear else W_enc,
        W_dec=W_dec.t() if linear else W_dec,
        b_dec=named["b_dec"],
        biases=biases,
        activation=kind.activation,
        centred=kind.centred,
        k=_k(found, where) if "k" in kind.others else None,
        threshold=named.get("threshold"),
        r_mag=named.get("r_mag"),
        metadata=describe(NAME, found.weights.name, hook, layer, config.get("lm_name")),
    )
    return folded(parameters, options, where)


def _candidates(found: Checkpoint, activation: str | None) -> dict[str, _Class]:
    """The classes whose tensors these are, by name; where there are two, the one that the settings name."""
    config = _trainer(found)[0]
    classes = {
        name: known
        for name, known in _CLASSES.items()
        if known.stored == found.names
        and (name != "AutoEncoderNew" or config)
        and activation in (None, known.activation)
    }
    # Only between two: a trainer of AutoEncoderNew writes another class's name.
    named = str(config.get("dict_class"))
    return {named: classes[named]} if named in classes else classes


def _trainer(found: Checkpoint) -> tuple[dict[str, Any], str]:
    """The trainer's settings, and where they are from; empty if there are none."""
    stored = found.config(CONFIG)
    if stored is None:
        return {}, str(found.weights)
    trainer = stored[0].get("trainer")
    return (trainer if isinstance(trainer, dict) else {}), stored[1]


def _k(found: Checkpoint, where: str) -> int:
    """The tensor k, a whole number."""
    k = found.saved("k")
    if not isinstance(k, Tensor) or k.numel() != 1 or k.is_floating_point() or k.is_complex() or k.is_meta:
        got = f"{k.dtype} of shape {list(k.shape)}" if isinstance(k, Tensor) else type(k).__name__
        raise ValueError(f"{where}: k: expected one whole number, got {got}")
    return int(k)
