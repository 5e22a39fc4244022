"""saev files (a line of JSON, then torch.save) and what its description says they compute."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from formats_case import C, Case, F, draw, largest
from torch import Tensor

MEAN = [0.2, -0.1, 0.3, 0.0, -0.4, 0.1]
SCALE = 1.7


def tensors() -> dict[str, Tensor]:
    return {
        "W_enc": draw(C, F, seed=11),
        "b_enc": draw(F, seed=12) * 0.5,
        "W_dec": draw(F, C, seed=13),
        "b_dec": draw(C, seed=14) * 0.4,
    }


def header(schema: int | None, activation: str = "Relu", k: int = 3) -> dict[str, Any]:
    """The header of each age: none (April 2025), 1 in its two forms, 2 to 5."""
    old = {"d_vit": C, "exp_factor": 2, "seed": 0, "normalize_w_dec": True}
    if schema is None:
        return old | {"sparsity_coeff": 4e-4, "ghost_grads": False}
    if schema == 1:
        return {"schema": 1, "cls": activation, "cfg": old | ({} if activation == "Relu" else {"top_k": k})}
    params = {} if activation == "Relu" else {"top_k": k}
    sizes = {"d_vit": C, "exp_factor": 2} if schema == 2 else {"d_model": C, "d_sae": F}
    config = sizes | {"activation": {"cls": activation, "params": params}}
    return {"schema": schema, "cfg": config, "commit": "abc1234", "lib": "0.1.0"}


def write(path: Path, state: Any, head: Any) -> Path:
    archive = io.BytesIO()
    torch.save(state, archive)
    line = head if isinstance(head, bytes) else json.dumps(head).encode() + b"\n"
    path.write_bytes(line + archive.getvalue())
    return path


def case(
    folder: Path,
    schema: int | None = 5,
    activation: str = "Relu",
    threshold: float | None = None,
    standardised: bool = False,
    **options: Any,
) -> Case:
    state = tensors()
    if threshold is not None:
        state["activation.threshold"] = torch.tensor(threshold, dtype=torch.float64)
    centred = options.get("subtract_b_dec", schema is None)
    mean = torch.tensor(MEAN, dtype=torch.float64) if standardised else torch.zeros(C, dtype=torch.float64)
    scale = SCALE if standardised else 1.0
    if standardised:
        options |= {"pre_mean": mean, "pre_scale": scale}

    def codes(x: Tensor) -> Tensor:
        u = (x - mean) / scale
        z = (u - state["b_dec"] if centred else u) @ state["W_enc"] + state["b_enc"]
        if activation == "TopK":
            return torch.where(largest(z, 3), z, 0.0)
        if activation == "BatchTopK":
            return torch.where(z > max(threshold or 0.0, 0.0), z, 0.0)
        return torch.relu(z)

    folder.mkdir(exist_ok=True)
    metadata = {"source_format": "saev", "source_file": "sae.pt"}
    return Case(
        path=write(folder / "sae.pt", state, header(schema, activation)),
        codes=codes,
        decoder=state["W_dec"] * scale,
        reconstruct=lambda x: (codes(x) @ state["W_dec"] + state["b_dec"]) * scale + mean,
        metadata=metadata | ({"input_statistics": "folded in when loaded"} if standardised else {}),
        options=options,
    )


def given_threshold(folder: Path) -> Case:
    """Files of schema 2 hold no threshold: the caller gives it."""
    made = case(folder, 5, "BatchTopK", 0.9)
    write(made.path, tensors(), header(2, "BatchTopK"))
    made.options = {"threshold": 0.9}
    return made


CASES: dict[str, Callable[[Path], Case]] = {
    "relu": case,
    "relu without schema": lambda f: case(f, None),
    "relu without schema, not centred": lambda f: case(f, None, subtract_b_dec=False),
    "relu centred": lambda f: case(f, 4, subtract_b_dec=True),
    "relu standardised": lambda f: case(f, standardised=True),
    "relu standardised and centred": lambda f: case(f, None, standardised=True),
    "top-k": lambda f: case(f, 5, "TopK"),
    "top-k schema 1": lambda f: case(f, 1, "TopK"),
    "top-k schema 2 standardised": lambda f: case(f, 2, "TopK", standardised=True),
    "batch top-k": lambda f: case(f, 5, "BatchTopK", 0.6),
    "batch top-k, threshold never set": lambda f: case(f, 4, "BatchTopK", -1.0),
    "batch top-k schema 2": given_threshold,
}
