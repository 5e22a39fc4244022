"""What the numbers of an explanation say about their own worth: saturated outputs and maps of zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ROUNDINGS = 100  # nearer to 1 than so many roundings, 1 - p has lost most of its digits


def value_notices(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Notices for the reader of an explanation.

    Args:
        fields: the explanation's, of which it takes logits, targets, values, relevance and signal. It looks at their
            values, so the host waits for a device.
    """
    notices = []
    logits, values = fields["logits"], fields["values"]
    if len(logits) and _saturated(logits, values, fields["targets"]):
        notices.append(
            "an explained value is a probability that rounding cannot tell from 1, so its gradient is mostly rounding "
            "error: explain the logit (the model without its softmax or sigmoid) instead"
        )
    signal = fields.get("signal")
    shown: Tensor = fields["relevance"] if signal is None else signal
    largest = shown.abs().amax(-1) if shown.numel() else shown.new_ones(1)
    if bool((largest < torch.finfo(shown.dtype).tiny).any()):
        notices.append(
            "a map is zero everywhere: no gradient reached its patches, or it is too small for "
            f"{str(shown.dtype).removeprefix('torch.')}; explain a value that is not saturated (the logit), or scale it"
        )
    return tuple(notices)


def _saturated(logits: Tensor, values: Tensor, targets: Tensor) -> bool:  # [B, classes], [B, (K)], [B, (K)]
    """Whether a value is 1 but for rounding, where outputs are probabilities; or 0, where they are their logarithms."""
    near = _ROUNDINGS * torch.finfo(values.dtype).eps
    if bool((targets < 0).all()) or bool(((logits >= 0) & (logits <= 1 + near)).all()):  # a function, probabilities
        return bool((values - 1).abs().le(near).any())
    sums = logits.double().exp().sum(-1)
    return bool((logits <= near).all() & (sums - 1).abs().lt(1e-3).all() & values.abs().le(near).any())
