"""What a feature does to the logits of an image, predicted and measured, and which pixels drive it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fga_fast.engine.streams import edited
from fga_fast.harvest.source import Source
from fga_fast.sae.hold import Hold
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder


class Effects(NamedTuple):
    """Of n pairs of an image and a feature, on the CPU. The last four are None for a model without classes; what needs
    a gradient is None where the model lets none through, such as blocks under `torch.no_grad`.
    """

    code: Tensor  # [n], the feature's code at the given patch
    drive: Tensor | None  # [n, H, W] at least 0: |d code / d pixel|, summed over channels
    target: Tensor | None  # [n] int64, the class whose logit is explained
    predicted: Tensor | None  # [n], the feature's share of that logit by the gradient: minus g . change, over patches
    measured: Tensor | None  # [n], how much of that logit is lost with the feature at 0
    lost: Tensor | None  # [n, classes], likewise of every logit


def effects(
    source: Source,
    sae: SparseAutoencoder,
    block: int,
    images: Tensor,  # [n, channels, H, W]
    features: Sequence[int],
    patches: Sequence[int],
) -> Effects:
    """Runs the model with and without a feature, another one for each image; the predicted classes are explained.

    With h = -(decode(f', x) - decode(f, x)), where f' has a 0 for the feature: the prediction is the sum of g . h over
    patches, with g the logit's exact gradient. Without normalisation in the SAE that is the contribution f_k (D_k . g)
    of `Explanation.top_features`. The measurement is what `Explainer.ablate` gives, for all pairs in one forward pass.

    Args:
        source: the model.
        sae: of the stream after `block`.
        images: of any dtype, on any device.
        features, patches: n each: the feature that is looked at, and the patch where its code is.
    """
    layout, prefix, rows = source.layout, source.layout.prefix_tokens, range(len(images))
    holds = [Hold(sae, {feature: 0.0}) for feature in features]
    streams: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:  # [n, N, C]
        streams.append(x)
        return x.clone()  # so that a model that adds in place leaves x alone

    with torch.enable_grad(), torch.inference_mode(False):
        pixels = images.to(source.like).clone().requires_grad_()
        with edited(layout, {block: keep}, len(images)):
            output = source.readout.run(pixels)
        (x,) = streams
        tokens = torch.stack([x[row, prefix + patch] for row, patch in zip(rows, patches, strict=True)])
        code = sae.encode(tokens.to(sae.dtype))[rows, list(features)]
        drive = _gradient(code.sum(), pixels)
        seen = code.detach().cpu(), None if drive is None else drive.float().abs().sum(1).cpu()
        target = source.readout.predicted(output)
        if target is None:
            return Effects(*seen, None, None, None, None)
        logits = source.readout.logits(output)
        g = _gradient(logits.gather(1, target.unsqueeze(1)).sum(), x)
    with torch.no_grad():
        stream = x.detach()[:, prefix:]
        change = torch.stack([hold.change(one) for hold, one in zip(holds, stream, strict=True)])  # [n, P, C]
        with edited(layout, {block: lambda x: x + pad(change, (0, 0, prefix, 0))}, len(images)):
            after = source.readout.logits(source.readout.run(pixels.detach()))
        lost = (logits.detach() - after).float().cpu()
        # In float64, since a product of small numbers may be 0 in the model's own dtype.
        predicted = None if g is None else -(g[:, prefix:].double() * change.double()).sum((1, 2)).float().cpu()
    target = target.cpu()
    return Effects(*seen, target, predicted, lost.gather(1, target.unsqueeze(1)).squeeze(1), lost)


def _gradient(of: Tensor, by: Tensor) -> Tensor | None:
    """None where one does not depend on the other."""
    if not (of.requires_grad and by.requires_grad):
        return None
    return torch.autograd.grad(of, by, retain_graph=True, allow_unused=True)[0]
