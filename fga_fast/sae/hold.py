"""SAE features that are held at values in a residual stream: what would the model do without them?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from fga_fast.sae.normalise import rescale
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

_ROWS = 256  # tokens encoded at a time: codes of 49,152 float32 features take 50 MB
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Hold:
    """Features of one SAE and the value that each is held at."""

    sae: SparseAutoencoder
    values: Mapping[int, float]  # feature -> value

    @torch.no_grad()
    def change(
        self,
        x: Tensor,  # [..., C]
    ) -> Tensor:
        """What holding adds to tokens: ``decode(f', x) - decode(f, x)``, with f the codes of x and f' those with the
        values put in; exactly 0 where a feature has its value already.

        Returns:
            [..., C], dtype of ``x``; computed in the SAE's dtype.
        """
        # By numbers and not by tensors of them, which a CUDA graph would have to copy to the device.
        rows = torch.stack([self.sae.W_dec[feature] for feature in self.values])  # [S, C]
        changes = []
        with torch.autocast(self.sae.device.type, enabled=False):
            for tokens in torch.split(x.reshape(-1, x.shape[-1]).to(self.sae.dtype), _ROWS):
                codes = self.sae.encode(tokens)
                moved = torch.stack([value - codes[:, feature] for feature, value in self.values.items()], dim=1)
                changes.append(rescale(moved @ rows, tokens, self.sae.normalize))  # [T, S] [S, C]
        return torch.cat(changes).view(x.shape).to(x.dtype)

    def notice(self, block: int) -> str:
        """What a reader of an explanation must know."""
        # "is held" once, with the first.
        shown = [
            f"feature {feature} {'at' if place else 'is held at'} {value:g}"
            for place, (feature, value) in enumerate(self.values.items())
        ]
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        return f"explains an edited model: after block {block}, {', '.join(shown[:_SHOWN])}{more}"


def hold(
    features: Mapping[int, Sequence[int] | Mapping[int, float]],
    saes: Mapping[int, SparseAutoencoder],
    before: Mapping[int, Hold],
) -> dict[int, Hold]:
    """Block -> `Hold` of what `Explainer.ablate` is given, with what was held there `before`."""
    example = "such as {9: [17, 30]}, or {9: {17: 1.5}} to hold values"
    if not isinstance(features, Mapping) or not features:
        got = "no block" if isinstance(features, Mapping) else type(features).__name__
        raise ValueError(f"features: expected block -> features, {example}, got {got}")
    found: dict[int, Hold] = {}
    for block, chosen in features.items():
        if block not in saes:
            known = ", ".join(map(str, sorted(saes))) or "none"
            raise ValueError(f"features: expected blocks with an SAE ({known}), got {block!r}")
        if isinstance(chosen, (str, bytes)) or not isinstance(chosen, (Mapping, Sequence)):
            raise TypeError(f"features[{block}]: expected feature numbers or values, {example}, got {chosen!r:.80}")
        if not chosen:
            raise ValueError(f"features[{block}]: expected at least one feature, {example}, got none")
        pairs = chosen if isinstance(chosen, Mapping) else dict.fromkeys(chosen, 0.0)
        for feature, value in pairs.items():
            _check(block, feature, value, saes[block].d_sae)
        earlier = before[block].values if block in before else {}
        values = {**earlier, **{int(feature): float(value) for feature, value in pairs.items()}}
        found[int(block)] = Hold(saes[block], values)
    return found


def _check(block: int, feature: object, value: object, count: int) -> None:
    if isinstance(feature, bool) or not isinstance(feature, Integral):
        raise TypeError(f"features[{block}]: expected feature numbers (int), got {feature!r:.80}")
    if not 0 <= int(feature) < count:
        raise ValueError(f"features[{block}]: expected features 0 to {count - 1}, got {feature}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"features[{block}][{feature}]: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"features[{block}][{feature}]: expected a finite value, got {value}")
