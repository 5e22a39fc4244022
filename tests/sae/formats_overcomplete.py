"""State dicts of overcomplete and what its description says they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from formats_case import C, Case, F, draw, largest, store
from torch import Tensor

POINTS = 7


def unit(rows: Tensor) -> Tensor:
    return rows / ((rows**2).sum(1, keepdim=True) ** 0.5 + 1e-8)


def encoder(form: str = "linear") -> dict[str, Tensor]:
    weight, bias = draw(F, C, seed=31), draw(F, seed=32) * 0.5
    if form == "plain":
        return {"encoder.weight": weight}
    if form == "plain with bias":
        return {"encoder.weight": weight, "encoder.bias": bias}
    state = {"encoder.final_block.0.weight": weight, "encoder.final_block.0.bias": bias}
    if form == "batch norm":
        names = ("running_mean", "running_var", "weight", "bias")
        values = (draw(F, seed=33), draw(F, seed=34).abs() + 0.2, draw(F, seed=35), draw(F, seed=36))
        state |= {f"encoder.final_block.1.{n}": v for n, v in zip(names, values, strict=True)}
        state["encoder.final_block.1.num_batches_tracked"] = torch.tensor(100)
    return state


def pre_codes(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    stem = "encoder.final_block.0" if "encoder.final_block.0.weight" in state else "encoder"
    z = x @ state[f"{stem}.weight"].t()
    if f"{stem}.bias" in state:
        z = z + state[f"{stem}.bias"]
    if "encoder.final_block.1.weight" in state:
        mean, var, gamma, beta = (
            state[f"encoder.final_block.1.{n}"] for n in ("running_mean", "running_var", "weight", "bias")
        )
        z = (z - mean) / (var + 1e-5) ** 0.5 * gamma + beta
    return z


def dictionary(form: str = "l2") -> tuple[dict[str, Tensor], Tensor]:
    """The tensors, and the decoder rows the library would use in evaluation."""
    rows, multiplier = draw(F, C, seed=41), torch.tensor(0.3, dtype=torch.float64)
    if form == "archetypal":
        points, weights, relax = draw(POINTS, C, seed=42), draw(F, POINTS, seed=43), draw(F, C, seed=44)
        relax = relax / ((relax**2).sum(1, keepdim=True) ** 0.5) * 1.02  # one step beyond the default bound of 1
        relax[0] *= 0.3
        convex = torch.relu(weights)
        convex = convex / (convex.sum(1, keepdim=True) + 1e-8)
        bounded = relax / torch.clamp((relax**2).sum(1, keepdim=True) ** 0.5, min=1.0)
        parts = {"C": points, "W": weights, "Relax": relax, "multiplier": multiplier}
        return {f"dictionary.{n}": v for n, v in parts.items()}, (convex @ points + bounded) * multiplier.exp()
    if form == "l2":
        stored = unit(rows) * (1 + 0.05 * draw(F, 1, seed=45).tanh())  # after a last optimiser step
        used = unit(stored)
    elif form == "max_l2":
        stored = rows
        used = rows / max(float((row**2).sum() ** 0.5) for row in rows)
    elif form == "l1":
        stored = rows
        used = rows / (rows.abs().sum(1, keepdim=True) + 1e-8)
    else:
        stored = used = rows
    return {"dictionary._weights": stored, "dictionary.multiplier": multiplier}, used * multiplier.exp()


def write(path: Path, state: Any) -> Path:
    if path.suffix == ".safetensors":
        return store(path, state)
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)
    return path


def case(folder: Path, enc: str = "linear", dic: str = "l2", name: str = "sae.pt", **options: Any) -> Case:
    tensors, decoder = dictionary(dic)
    state = encoder(enc) | tensors
    options = options or {"activation": "relu"}
    if options["activation"] == "jump":
        state["thresholds"] = draw(F, seed=46) * 0.5 - 0.5
        options = {}
    kind = options.get("activation", "jump")
    if dic in ("max_l2", "l1", "identity"):
        options["decoder_norm"] = dic

    def codes(x: Tensor) -> Tensor:
        f = torch.relu(pre_codes(x, state))
        if kind == "topk":
            return torch.where(largest(f, 3), f, 0.0)
        if kind == "batch_topk":
            return torch.where(f >= 0.8, f, 0.0)
        if kind == "jump":
            return torch.where(f < state["thresholds"].exp(), 0.0, f)
        return f

    return Case(
        path=write(folder / name, state),
        codes=codes,
        decoder=decoder,
        reconstruct=lambda x: codes(x) @ decoder,
        metadata={"source_format": "overcomplete", "source_file": name},
        options=options,
    )


CASES: dict[str, Callable[[Path], Case]] = {
    "relu": case,
    "relu plain": lambda f: case(f, "plain"),
    "relu plain with bias": lambda f: case(f, "plain with bias", name="model.safetensors"),
    "relu batch norm": lambda f: case(f, "batch norm"),
    "relu max_l2": lambda f: case(f, dic="max_l2"),
    "relu l1": lambda f: case(f, dic="l1"),
    "relu identity": lambda f: case(f, dic="identity"),
    "topk": lambda f: case(f, activation="topk", k=3),
    "topk archetypal": lambda f: case(f, dic="archetypal", activation="topk", k=3),
    "jump": lambda f: case(f, activation="jump"),
    "batch top-k": lambda f: case(f, activation="batch_topk", threshold=0.8),
}
