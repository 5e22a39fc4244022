"""What a tap computes from the residual stream and its gradient at one place: feature gates, or token contributions.

Both classes implement `taps.Record`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fga_fast.engine.backends import Stages
from fga_fast.precision import relevance_dtype
from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.features import TopFeatures
from fga_fast.settings import SMALL_GRADIENT, Gate


@dataclass
class Gating:
    """Scores the patches at one block and turns the scores into gates.

    Slots: scores [B, P], gates [B, P] and, with `top_features`, the four tensors of `TopFeatures`. Their indices travel
    as float64, because a gradient cannot be an integer; float64 is exact for any size of dictionary.
    """

    sae: SparseAutoencoder
    gate: Gate
    permutation: Tensor | None  # [F]
    prefix_tokens: int
    top_features: int
    stages: Stages

    def slots(self, carrier: Tensor) -> tuple[Tensor, ...]:
        batch, patches, k = len(carrier), carrier.shape[1] - self.prefix_tokens, self.top_features
        maps = tuple(carrier.new_zeros(batch, patches) for _ in range(2))
        if not k:
            return maps
        sizes = ((batch, patches, k), (batch, k))
        index, value = ([carrier.new_zeros(size, dtype=t) for size in sizes] for t in (torch.float64, carrier.dtype))
        return *maps, index[0], value[0], index[1], value[1]

    def __call__(self, x: Tensor, g: Tensor, inverse: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        if x.shape[-1] != self.sae.d_model:
            raise ValueError(
                f"saes: expected an SAE for a residual stream of width {x.shape[-1]}, got one for width "
                f"{self.sae.d_model}; use an SAE trained on this model"
            )
        prefix = self.prefix_tokens
        if prefix:  # without a prefix the slice would be an alias, and vmap has no rule for aliases
            x, g = x[:, prefix:], g[:, prefix:]
        scores, *features = self.stages.score(
            x, g, self.sae, self.gate.mode, permutation=self.permutation, top_features=self.top_features
        )
        features[0], features[2] = features[0].to(torch.float64), features[2].to(torch.float64)  # the indices
        if inverse is not None and self.gate.mode != "activation_only":  # all other scores are linear in g
            scores = scores * inverse.unsqueeze(-1)
            features[1], features[3] = features[1] * inverse[..., None, None], features[3] * inverse.unsqueeze(-1)
        gates = self.stages.gate(scores / self._unit(g, inverse), self.gate.bound, self.gate.slope)
        recorded = (scores, gates, *(features if self.top_features else ()))
        return torch.cat([gates.new_ones(len(x), prefix), gates], dim=1), recorded

    def _unit(self, g: Tensor, inverse: Tensor | None) -> Tensor:  # [B, P, C], [B] -> [B, 1]
        """What scores are measured in: 1, or less where gradients are tiny, so that the constant beside the MAD in the
        gate does not drown small signals. A power of two, so the division is exact.
        """
        largest = g.abs().amax((-1, -2)).to(relevance_dtype(g.dtype))
        if inverse is not None:
            largest = largest * inverse
        unit = torch.exp2((largest / SMALL_GRADIENT).clamp(2.0**-100, 1).log2().floor()).unsqueeze(-1)
        return torch.ones_like(unit) if self.gate.mode == "activation_only" else unit

    @staticmethod
    def read(recorded: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, TopFeatures | None]:
        """Scores, gates and features from the gradients of the slots."""
        scores, gates, *features = recorded
        if not features:
            return scores, gates, None
        index, value, image_index, image_value = features
        return scores, gates, TopFeatures(index.long(), value, image_index.long(), image_value)


class Contribution:
    """The token's share of the explained value: x . g. One slot [B, N]."""

    def slots(self, carrier: Tensor) -> tuple[Tensor, ...]:
        return (torch.zeros_like(carrier),)

    def __call__(self, x: Tensor, g: Tensor, inverse: Tensor | None) -> tuple[None, tuple[Tensor, ...]]:
        dtype = relevance_dtype(x.dtype)
        contribution = (x.to(dtype) * g.to(dtype)).sum(-1)
        return None, (contribution if inverse is None else contribution * inverse.unsqueeze(-1),)


def gated_map(contribution: Tensor, gates: Mapping[int, Tensor], first: int) -> Tensor:  # [B, P] or [B, K, P]
    """x . g at the tokens that enter block `first`, times the gates of this block and of all later ones."""
    for block, gate in gates.items():
        if block >= first:
            contribution = contribution * gate
    return contribution
