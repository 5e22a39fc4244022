"""SAELens folders and what its description says they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from formats_case import C, Case, F, changed, draw, largest, store
from torch import Tensor


def tensors(architecture: str = "standard") -> dict[str, Tensor]:
    state = {"W_enc": draw(C, F, seed=1), "W_dec": draw(F, C, seed=2), "b_dec": draw(C, seed=3) * 0.4}
    if architecture == "gated":
        return state | {n: draw(F, seed=s) * 0.5 for n, s in (("b_gate", 4), ("r_mag", 5), ("b_mag", 6))}
    state["b_enc"] = draw(F, seed=7) * 0.5
    if architecture == "jumprelu":
        state["threshold"] = draw(F, seed=8).abs()
    return state


def settings(**changes: Any) -> dict[str, Any]:
    """cfg.json of version 6."""
    entries = {
        "architecture": "standard",
        "d_in": C,
        "d_sae": F,
        "dtype": "float64",
        "device": "cuda",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.3.0",
            "model_name": "some-vit",
            "hook_name": "blocks.7.hook_resid_post",
            "hook_head_index": None,
        },
    }
    return changed(entries, changes)


def before_6(**changes: Any) -> dict[str, Any]:
    """cfg.json of earlier versions: other names, everything at the top, and settings left out."""
    old = {
        "architecture": ...,
        "metadata": ...,
        "reshape_activations": ...,
        "model_name": "some-vit",
        "hook_point": "blocks.7.hook_resid_post",
        "hook_point_layer": 7,
        "hook_point_head_index": None,
        "activation_fn_str": "relu",
        "normalize_activations": False,
    }
    return settings(**(old | changes))


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> Path:
    store(folder / "sae_weights.safetensors", state)
    store(folder / "sparsity.safetensors", {"sparsity": torch.zeros(F)})
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def normalised(x: Tensor, kind: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The tokens the SAE sees, and the way back."""
    if kind == "layer_norm":
        mean = x.sum(-1, keepdim=True) / C
        std = (((x - mean) ** 2).sum(-1, keepdim=True) / (C - 1)) ** 0.5
        return (x - mean) / (std + 1e-5), lambda y: y * std + mean
    if kind == "constant_norm_rescale":
        factor = C**0.5 / (x**2).sum(-1, keepdim=True) ** 0.5
        return x * factor, lambda y: y / factor
    return x, lambda y: y


def case(folder: Path, architecture: str = "standard", old: bool = False, scale: bool = False, **changes: Any) -> Case:
    state = tensors(architecture)
    if scale:
        state["finetuning_scaling_factor"] = draw(F, seed=9).abs()
    if architecture != "standard" and not old:
        changes["architecture"] = architecture
    config = (before_6 if old else settings)(**changes)
    s = state
    norm = config["normalize_activations"] or "none"  # False before 3.0
    rescale = bool(config.get("rescale_acts_by_decoder_norm"))
    row_norms = (s["W_dec"] ** 2).sum(1) ** 0.5

    def codes(x: Tensor) -> Tensor:
        u = normalised(x, norm)[0]
        if config.get("apply_b_dec_to_input", True):
            u = u - s["b_dec"]
        if architecture == "gated":
            open_ = u @ s["W_enc"] + s["b_gate"] > 0
            return open_ * torch.relu(u @ (s["W_enc"] * s["r_mag"].exp()) + s["b_mag"])
        z = u @ s["W_enc"] + s["b_enc"]
        if architecture == "topk":
            z = z * row_norms if rescale else z
            return torch.where(largest(z, 3), torch.relu(z), 0.0)
        if architecture == "jumprelu":
            return torch.relu(z) * (z > s["threshold"])
        return torch.relu(z)

    decoder = s["W_dec"] / row_norms[:, None] if rescale else s["W_dec"]
    if scale:
        decoder = decoder * s["finetuning_scaling_factor"][:, None]
    return Case(
        path=write(folder, state, config),
        codes=codes,
        decoder=decoder,
        reconstruct=lambda x: normalised(x, norm)[1](codes(x) @ decoder + s["b_dec"]),
        metadata={
            "source_format": "saelens",
            "source_file": "sae_weights.safetensors",
            "hook": "blocks.7.hook_resid_post",
            "layer": "7",
            "model_name": "some-vit",
        },
    )


def averaged(folder: Path) -> Case:
    """expected_average_only_in: the caller gives the scale that the file does not hold."""
    made = case(folder)
    factor = 0.37
    inner, rebuild = made.codes, made.reconstruct
    made.codes = lambda x: inner(x * factor)
    made.reconstruct = lambda x: rebuild(x * factor) / factor
    made.decoder = made.decoder / factor
    (folder / "cfg.json").write_text(json.dumps(settings(normalize_activations="expected_average_only_in")))
    made.options = {"pre_scale": 1 / factor}
    made.metadata["input_statistics"] = "folded in when loaded"
    return made


CASES: dict[str, Callable[[Path], Case]] = {
    "standard": case,
    "standard uncentred": lambda f: case(f, apply_b_dec_to_input=False),
    "standard layer_norm": lambda f: case(f, normalize_activations="layer_norm"),
    "standard constant_norm uncentred": lambda f: case(
        f, normalize_activations="constant_norm_rescale", apply_b_dec_to_input=False
    ),
    "standard scaled": lambda f: case(f, scale=True, finetuning_scaling_factor=True),
    "standard average": averaged,
    "topk": lambda f: case(f, "topk", k=3),
    "topk rescaled": lambda f: case(f, "topk", k=3, rescale_acts_by_decoder_norm=True),
    "topk rescaled uncentred": lambda f: case(
        f, "topk", k=3, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False
    ),
    "jumprelu": lambda f: case(f, "jumprelu"),
    "gated": lambda f: case(f, "gated"),
    "gated uncentred": lambda f: case(f, "gated", apply_b_dec_to_input=False),
    "standard before 6": lambda f: case(f, old=True),
    "topk before 6": lambda f: case(f, "topk", old=True, activation_fn_str="topk", activation_fn_kwargs={"k": 3}),
}
