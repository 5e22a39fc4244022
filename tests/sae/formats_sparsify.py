"""sparsify folders and what its description says they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from formats_case import C, Case, F, changed, draw, largest, store
from torch import Tensor


def tensors() -> dict[str, Tensor]:
    return {
        "encoder.weight": draw(F, C, seed=21),
        "encoder.bias": draw(F, seed=22) * 0.5,
        "W_dec": draw(F, C, seed=23),
        "b_dec": draw(C, seed=24) * 0.4,
    }


def settings(**changes: Any) -> dict[str, Any]:
    """cfg.json."""
    entries = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": 3,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": C,
    }
    return changed(entries, changes)


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> Path:
    store(folder / "sae.safetensors", state)
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def case(folder: Path, name: str = "layers.10", flipped: tuple[str, ...] = (), **changes: Any) -> Case:
    state = tensors()
    stored = {n: t.t() if n in flipped else t for n, t in state.items()}

    def codes(x: Tensor) -> Tensor:
        z = torch.relu((x - state["b_dec"]) @ state["encoder.weight"].t() + state["encoder.bias"])
        return torch.where(largest(z, 3), z, 0.0)

    metadata = {"source_format": "sparsify", "source_file": "sae.safetensors"}
    return Case(
        path=write(folder / name, stored, settings(**changes)),
        codes=codes,
        decoder=state["W_dec"],
        reconstruct=lambda x: codes(x) @ state["W_dec"] + state["b_dec"],
        metadata=metadata | ({} if name == "mine" else {"hook": name, "layer": "10"}),
    )


CASES: dict[str, Callable[[Path], Case]] = {
    "top-k": case,
    "top-k, latents named": lambda f: case(f, "vision_model.encoder.layers.10", num_latents=F, activation=...),
    "top-k, stored transposed": lambda f: case(f, "mine", ("encoder.weight", "W_dec")),
}
