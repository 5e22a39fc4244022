"""visaebench checkpoints and what its description says they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formats_overcomplete
import torch
from formats_case import C, Case, F, changed, draw, largest
from torch import Tensor

THRESHOLD = 0.7
YAML = f"""\
# how it was trained
sae:
  architecture: batchtopk   # the default
  k: 4
  d_sae: {F}
  optimizer:
    lr: 1e-3
    threshold: 99
    d_sae: 99
  d_in: {C}
layer: 11
threshold: {THRESHOLD}
backbone: 'some-vit'
notes:
  - threshold: 98
"""


def tensors(bias: bool = True) -> dict[str, Tensor]:
    state = {
        "encoder.weight": draw(F, C, seed=51),
        "encoder.bias": draw(F, seed=52) * 0.5,
        "decoder.weight": draw(F, C, seed=53),
    }
    return state | ({"decoder.bias": draw(C, seed=54) * 0.4} if bias else {})


def settings(**changes: Any) -> dict[str, Any]:
    """config.json."""
    entries = {
        "architecture": "batchtopk",
        "d_in": C,
        "d_sae": F,
        "k": 4,
        "threshold": THRESHOLD,
        "layer": 11,
        "backbone": "some-vit",
    }
    return changed(entries, changes)


def write(path: Path, state: Any, config: dict[str, Any] | str | None) -> Path:
    formats_overcomplete.write(path, state)
    if isinstance(config, str):
        (path.parent / "config.yaml").write_text(config)
    elif config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path.parent


def own(
    folder: Path,
    name: str = "sae.pt",
    config: Any = "default",
    bias: bool = True,
    flipped: bool = False,
    k: int | None = None,
    **more: Tensor,
) -> Case:
    """The names of visaebench; ``k``: a top-k; ``more`` are further tensors."""
    state = tensors(bias)
    config = settings() if config == "default" else config
    stated = config.get("threshold") if isinstance(config, dict) else THRESHOLD
    threshold = next(iter(more.values()), None) if stated is None else stated

    def codes(x: Tensor) -> Tensor:
        f = torch.relu(x @ state["encoder.weight"].t() + state["encoder.bias"])
        return torch.where(f >= threshold if k is None else largest(f, k), f, 0.0)

    stored = {n: t.t() if flipped and n == "decoder.weight" else t for n, t in state.items()} | more
    shift = state.get("decoder.bias", torch.zeros(C, dtype=torch.float64))
    return Case(
        path=write(folder / name, stored, config),
        codes=codes,
        decoder=state["decoder.weight"],
        reconstruct=lambda x: codes(x) @ state["decoder.weight"] + shift,
        metadata={"source_format": "visaebench", "source_file": name, "layer": "11", "model_name": "some-vit"},
    )


def borrowed(folder: Path, threshold_name: str | None) -> Case:
    """The names of overcomplete with a threshold among the tensors or in the settings, compared as it is stored, and
    with the rows of the dictionary as they are stored."""
    made = formats_overcomplete.case(folder)
    state = torch.load(made.path, weights_only=True)
    value = draw(F, seed=55).abs() if threshold_name == "jump_thresholds" else torch.tensor(THRESHOLD).double()
    if threshold_name is not None:
        state[threshold_name] = value
    made.path = write(folder / "sae.pt", state, settings(threshold=...) if threshold_name else settings())
    made.codes = lambda x: torch.where(
        torch.relu(formats_overcomplete.pre_codes(x, state)) >= value,
        torch.relu(formats_overcomplete.pre_codes(x, state)),
        0.0,
    )
    made.decoder = state["dictionary._weights"] * state["dictionary.multiplier"].exp()
    made.reconstruct = lambda x: made.codes(x) @ made.decoder
    made.metadata = {"source_format": "visaebench", "source_file": "sae.pt", "layer": "11", "model_name": "some-vit"}
    made.options = {}
    return made


CASES: dict[str, Callable[[Path], Case]] = {
    "own names": own,
    "own names, no decoder bias": lambda f: own(f, bias=False),
    "own names, decoder stored transposed": lambda f: own(f, flipped=True),
    "own names, safetensors and yaml": lambda f: own(f, "model.safetensors", YAML),
    "own names, stored threshold": lambda f: own(
        f, config=settings(threshold=...), _running_threshold=torch.tensor(0.4).double()
    ),
    "own names, jump": lambda f: own(
        f, config=settings(threshold=..., architecture="jumprelu"), jump_thresholds=draw(F, seed=56).abs()
    ),
    "own names, jump by another name": lambda f: own(
        f, config=settings(threshold=..., activation="jumprelu"), thresholds=draw(F, seed=56).abs()
    ),
    "own names, the settings' threshold before the stored one": lambda f: own(
        f, config=settings(sae_type="batchtopk", architecture="jumprelu"), _running_threshold=torch.tensor(0.4).double()
    ),
    "own names, top-k": lambda f: own(f, config=settings(threshold=..., activation="topk"), k=4),
    "own names, k alone": lambda f: own(f, config=settings(threshold=..., architecture=...), k=4),
    "overcomplete's names": lambda f: borrowed(f, "_running_threshold"),
    "overcomplete's names, jump": lambda f: borrowed(f, "jump_thresholds"),
    "overcomplete's names, threshold in the settings": lambda f: borrowed(f, None),
}
