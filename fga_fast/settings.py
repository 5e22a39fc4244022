"""How to explain: all named choices, and the settings of an explanation as frozen objects.

Nothing here knows the model; engine/plan.py checks what must fit it.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Method = Literal["rollout", "input_x_gradient", "block_x_gradient"]
Backward = Literal["exact", "conservative"]
Preset = Literal["faithful", "published"]
Backend = Literal["auto", "native", "triton", "composite", "reference"]
Mode = Literal["combined", "activation_only", "gradient_only", "no_sae", "shuffled"]
Pooling = Literal["token", "average", "attention"]
# A graph explains the predicted class; or a class that each call gives, and where it gives none the predicted one.
TargetMode = Literal["predicted", "given"]
Activation = Literal["relu", "topk", "topk_signed", "batch_topk", "jumprelu", "gated"]
Normalisation = Literal["layer_norm", "constant_norm"]


def check_choice(name: str, value: object, choices: object) -> None:
    """Raises ValueError unless `value` is one of the values of the Literal `choices`."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def check_count(name: str, value: object, least: int, most: int | None = None, of: str = "") -> None:
    """Raises TypeError or ValueError unless `value` is an int from `least` to `most`; `of` names what `most` counts."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most} ({of})"
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def start_of(start_block: int, start_layer: int | None) -> int:
    """The first explained block, also by its old name.

    Raises:
        ValueError: both names are given.
    """
    if start_layer is None:
        return start_block
    if start_block:
        raise ValueError(f"start_layer: expected start_block alone, got both, {start_layer} and {start_block}")
    warnings.warn(f"start_layer: renamed, use start_block={start_layer}", FutureWarning, stacklevel=3)
    return start_layer


# Gradients with a cosine above this are of one vector that a head reads, see `reference.start_rows`.
PARALLEL = 0.9
LITTLE = 1e-6  # the share of the largest amount up to which such a vector counts as not read

PUBLISHED_BASE = 10.0  # of the gates; Šula, TU Wien 2026

# The largest gradient of an image below which scores are measured relative to it, see `reference.gate`.
SMALL_GRADIENT = 2.0**-10


def has_signs(method: Method, signed: bool) -> bool:
    """Whether the relevance of a method may be below 0: evidence against the target."""
    return signed or method != "rollout"


@dataclass(frozen=True)
class Gate:
    """Settings of the feature-gradient gate.

    Attributes:
        mode: how to score a patch. "combined" (the method): codes times feature gradients. The others are controls:
            "activation_only" (codes), "gradient_only" (feature gradients), "no_sae" (gradient . residual stream),
            "shuffled" (like combined, with permuted decoder rows).
        base: gates lie in [1/base, base]. Must be above 0; 1 switches the gates off. None: that of the preset.
        slope: how fast a gate saturates with the robust z of its patch's score.
        seed: seed of the permutation for "shuffled".
        permutation: int64 [F] for "shuffled": feature k uses decoder row permutation[k]; None: drawn from `seed`.

    Raises:
        ValueError: a value is outside its range.
        TypeError: a value that is no number, or a permutation that is no tensor.
    """

    mode: Mode = "combined"
    base: float | None = None
    slope: float = 1.0
    seed: int = 0
    permutation: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, Mode)
        for name, kind in (("base", numbers.Real), ("slope", numbers.Real), ("seed", numbers.Integral)):
            value = getattr(self, name)
            if name == "base" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kind):
                raise TypeError(f"{name}: expected a number ({kind.__name__}), got {type(value).__name__}")
        if self.base is not None and not (math.isfinite(self.base) and self.base > 0):
            raise ValueError(f"base: expected a finite number above 0, got {self.base}")
        if not math.isfinite(self.slope):
            raise ValueError(f"slope: expected a finite number, got {self.slope}")
        if self.permutation is not None and not isinstance(self.permutation, Tensor):
            raise TypeError(f"permutation: expected an int64 tensor [F], got {type(self.permutation).__name__}")
        if self.permutation is not None and self.mode != "shuffled":
            raise ValueError(f'permutation: expected mode "shuffled", got mode {self.mode!r}; change one of them')

    @property
    def bound(self) -> float:
        """The base, or where none is given the published one."""
        return PUBLISHED_BASE if self.base is None else self.base

    def decoder_permutation(self, features: int, device: torch.device) -> Tensor | None:
        """The permutation int64 [F] on `device` for mode "shuffled", else None.

        Raises:
            ValueError: `permutation` is not a permutation of 0 .. features - 1.
        """
        if self.mode != "shuffled":
            return None
        if self.permutation is None:
            generator = torch.Generator("cpu").manual_seed(self.seed)  # the same on every device
            return torch.randperm(features, generator=generator, device="cpu").to(device)
        permutation = self.permutation.to(device=device, dtype=torch.int64)
        if permutation.shape != (features,) or not torch.equal(
            permutation.sort().values, torch.arange(features, device=device)
        ):
            raise ValueError(
                f"permutation: expected a permutation of 0 to {features - 1} for this SAE's features, "
                f"got shape {tuple(permutation.shape)}"
            )
        return permutation


@dataclass(frozen=True)
class Settings:
    """How to explain a model, apart from its SAEs and the question; `Explainer` documents each setting.

    Its own defaults are those of the preset "published".

    Raises:
        TypeError, ValueError: a value has the wrong type or is outside its range.
    """

    gate: Gate = field(default_factory=Gate)
    method: Method = "rollout"
    backward: Backward = "exact"
    backend: Backend = "auto"
    top_features: int = 0
    start_block: int = 0
    signed: bool = False
    per_block: bool = False
    target_chunk: int = 8
    ungated: bool = False

    @property
    def at_every_block(self) -> bool:
        """Whether the relevance of the tokens that enter every block is needed, not of the first block's alone."""
        return self.per_block or self.method == "block_x_gradient"

    @property
    def has_signs(self) -> bool:
        """Whether relevance may be below 0."""
        return has_signs(self.method, self.signed)

    def __post_init__(self) -> None:
        if not isinstance(self.gate, Gate):
            raise TypeError(f"gate: expected a Gate such as Gate(base=10.0), got {type(self.gate).__name__}")
        for name, choices in (("method", Method), ("backward", Backward), ("backend", Backend)):
            check_choice(name, getattr(self, name), choices)
        for name in ("signed", "per_block", "ungated"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        check_count("start_block", self.start_block, 0)
        check_count("target_chunk", self.target_chunk, 1)
        check_count("top_features", self.top_features, 0)
        if self.top_features and self.gate.mode in ("gradient_only", "no_sae"):
            raise ValueError(f"top_features: gate mode {self.gate.mode!r} has no feature contributions to rank; give 0")


# What is chosen where `Explainer` is not told. docs/faithfulness.md has the measurements behind "faithful".
PRESETS: Mapping[Preset, Settings] = MappingProxyType(
    {
        "faithful": Settings(Gate(base=2.0), "block_x_gradient", "conservative"),
        "published": Settings(Gate(base=PUBLISHED_BASE), "rollout", "exact"),
    }
)


def settings_of(
    preset: Preset, gate: Gate | None, method: Method | None, backward: Backward | None, **others: Any
) -> Settings:
    """The settings of a preset, changed where others are given.

    Raises:
        TypeError, ValueError: a value has the wrong type or is outside its range.
    """
    check_choice("preset", preset, Preset)
    start = PRESETS[preset]
    if isinstance(gate, Gate) and gate.base is None:
        gate = replace(gate, base=start.gate.base)
    given: dict[str, Any] = {"gate": gate, "method": method, "backward": backward}
    return replace(start, **{name: value for name, value in given.items() if value is not None}, **others)
