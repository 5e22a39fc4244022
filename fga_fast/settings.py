"""How SAE scores become gates: the settings of the method, one frozen object."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

Method = Literal["rollout", "input_x_gradient"]
Backward = Literal["exact", "conservative"]
Mode = Literal["combined", "activation_only", "gradient_only", "no_sae", "shuffled"]


@dataclass(frozen=True)
class Gate:
    """Settings of the feature-gradient gate.

    Attributes:
        mode: what a patch is scored by. "combined" (the method): codes times feature gradients. The others are its
            controls: "activation_only" (codes), "gradient_only" (feature gradients), "no_sae" (gradient . residual
            stream), "shuffled" (combined with decoder rows permuted).
        base: gates lie in [1/base, base]; above 0, 1 gates nothing.
        slope: how fast a gate saturates with the robust z of its patch's score.
        seed: of the permutation for "shuffled".
        permutation: int64 [F] for "shuffled": decoder row k used is permutation[k]; None draws one from `seed`.

    Raises:
        ValueError: a value outside these ranges.
        TypeError: a permutation that is no tensor.
    """

    mode: Mode = "combined"
    base: float = 10.0
    slope: float = 1.0
    seed: int = 0
    permutation: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if not (math.isfinite(self.base) and self.base > 0):
            raise ValueError(f"base: expected a finite number above 0, got {self.base}")
        if not math.isfinite(self.slope):
            raise ValueError(f"slope: expected a finite number, got {self.slope}")
        if self.permutation is not None and not isinstance(self.permutation, Tensor):
            raise TypeError(f"permutation: expected an int64 tensor [F], got {type(self.permutation).__name__}")
        if self.permutation is not None and self.mode != "shuffled":
            raise ValueError(f'permutation: belongs to mode "shuffled" only, got mode {self.mode!r}')

    def decoder_permutation(self, features: int, device: torch.device) -> Tensor | None:
        """int64 [F] on `device` for mode "shuffled", else None.

        Raises:
            ValueError: the given permutation is not one of 0 .. features - 1.
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
