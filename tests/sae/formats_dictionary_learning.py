"""Folders of dictionary_learning's trainers and what its description says they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from formats_case import C, Case, F, changed, draw, largest
from torch import Tensor

THRESHOLD = 0.7
PREFIX = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}


def tensors(kind: str = "AutoEncoderTopK") -> dict[str, Tensor]:
    E, D, b_dec = draw(F, C, seed=61), draw(F, C, seed=62), draw(C, seed=63) * 0.4
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        state = {"W_enc": E.t().contiguous(), "W_dec": D, "b_dec": b_dec, "b_enc": draw(F, seed=64) * 0.5}
    else:
        state = {"encoder.weight": E, "decoder.weight": D.t().contiguous(), PREFIX.get(kind, "b_dec"): b_dec}
    if kind == "JumpReluAutoEncoder":
        state["threshold"] = draw(F, seed=65).abs()
    elif kind == "GatedAutoEncoder":
        state |= {name: draw(F, seed=s) * 0.5 for s, name in enumerate(("gate_bias", "mag_bias", "r_mag"), 66)}
    elif "W_enc" not in state:
        state["encoder.bias"] = draw(F, seed=64) * 0.5
    if "TopK" in kind:
        state |= {"k": torch.tensor(3, dtype=torch.int), "threshold": torch.tensor(THRESHOLD).double()}
    if kind.startswith("Matryoshka"):
        state["group_sizes"] = torch.tensor([4, F - 4])
    return state


def settings(kind: str = "AutoEncoderTopK", **changes: Any) -> dict[str, Any]:
    """config.json."""
    named = "AutoEncoder" if kind == "AutoEncoderNew" else kind  # as the library's trainer of it writes
    trainer = {
        "trainer_class": "SomeTrainer",
        "dict_class": named,
        "activation_dim": C,
        "dict_size": F,
        "layer": 8,
        "lm_name": "some-vit",
        "submodule_name": "resid_post_layer_8",
    }
    return {"trainer": changed(trainer, changes), "buffer": {"d_submodule": C}}


def write(folder: Path, state: Any, config: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def case(folder: Path, kind: str, config: dict[str, Any] | None = None, **options: Any) -> Case:
    s = tensors(kind)
    E = s["encoder.weight"].t() if "encoder.weight" in s else s["W_enc"]
    decoder = s["decoder.weight"].t() if "decoder.weight" in s else s["W_dec"]
    b_enc = s.get("encoder.bias", s.get("b_enc"))
    b_dec = s[PREFIX.get(kind, "b_dec")]

    def codes(x: Tensor) -> Tensor:
        if kind == "GatedAutoEncoder":
            h = (x - b_dec) @ E
            return (h + s["gate_bias"] > 0) * torch.relu(s["r_mag"].exp() * h + s["mag_bias"])
        if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):
            z = x @ E + b_enc
            return torch.relu(z * (z > s["threshold"])) if "threshold" in s else torch.relu(z)
        f = torch.relu((x - b_dec) @ E + b_enc)
        if kind == "AutoEncoderTopK":
            return torch.where(largest(f, 3), f, 0.0)
        return f * (f > THRESHOLD) if "TopK" in kind else f

    told = {"hook": "resid_post_layer_8", "layer": "8", "model_name": "some-vit"} if config is None else {}
    return Case(
        path=write(folder, s, settings(kind) if config is None else config or None),
        codes=codes,
        decoder=decoder,
        reconstruct=lambda x: codes(x) @ decoder + b_dec,
        metadata={"source_format": "dictionary_learning", "source_file": "ae.pt"} | told,
        options=options,
    )


KINDS = (
    "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "GatedAutoEncoder",
    "JumpReluAutoEncoder",
)  # fmt: skip
CASES: dict[str, Callable[[Path], Case]] = {
    **{kind: lambda f, kind=kind: case(f, kind) for kind in KINDS},  # type: ignore[misc]
    "AutoEncoderTopK without settings": lambda f: case(f, "AutoEncoderTopK", {}, activation="topk"),
    "BatchTopKSAE without settings": lambda f: case(f, "BatchTopKSAE", {}, activation="batch_topk"),
}
