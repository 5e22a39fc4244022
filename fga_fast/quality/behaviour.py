"""What a model still does when its residual stream is replaced: loss, accuracy, agreement and divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Output = Literal["softmax", "sigmoid", "features"]
_NOTHING = 1e-6  # what the mean costs the model, below which there is nothing to recover


@dataclass(frozen=True)
class Effect:
    """One number of three models: as it is, with the reconstruction at the patches, and with their mean there."""

    plain: float
    spliced: float
    mean: float

    @property
    def recovered(self) -> float | None:
        """(mean - spliced) / (mean - plain): 1 as the plain model, 0 as the mean; below 0 worse than the mean, above 1
        better than the plain model. None where the mean is not worse than the plain model by 1e-6.
        """
        cost = self.mean - self.plain
        return (self.mean - self.spliced) / cost if cost > _NOTHING else None


@dataclass(frozen=True)
class Behaviour:
    """How well the model works on reconstructions. Means over images.

    Attributes:
        output: what the model's outputs are: "softmax", classes that exclude each other; "sigmoid", those that do not;
            "features", an embedding without classes.
        known: images whose class is known.
        loss: over those images: cross-entropy, or with sigmoids binary cross-entropy as a mean over classes. At least
            0, in nats; None without such images.
        accuracy: share of those images whose predicted class is right; with sigmoids the share of images x classes on
            the right side of 0.5. 0 to 1.
        agreement: share of all images (with sigmoids images x classes) with the plain model's prediction, 0 to 1; None
            for features.
        divergence: from the plain model, over all images: KL divergence in nats (with sigmoids a mean over classes), at
            least 0; of features 1 - cosine, 0 to 2.
        loss_recovered: see `Effect.recovered`, of the loss; None without a loss too.
        divergence_recovered: the same of the divergence. Needs no classes.
    """

    output: Output
    known: int
    loss: Effect | None
    accuracy: Effect | None
    agreement: Effect | None
    divergence: Effect
    loss_recovered: float | None
    divergence_recovered: float | None

    @property
    def recovered(self) -> float | None:
        """By the loss where classes are known, else by the divergence."""
        return self.loss_recovered if self.loss is not None else self.divergence_recovered


def sums_of(
    outputs: Sequence[Tensor],  # three times [B, classes] or [B, E]: plain, spliced, mean
    output: Output,
    truth: Tensor,  # [B, classes] bool; a row without True: not known
) -> Tensor:  # [3, 4] float64
    """Loss, accuracy, agreement and divergence, summed over images."""
    plain = outputs[0].double()
    return torch.stack([_sums(one.double(), plain, output, truth) for one in outputs]).cpu()


def _sums(found: Tensor, plain: Tensor, output: Output, truth: Tensor) -> Tensor:  # -> [4]
    if output == "features":
        zero = found.new_zeros(())
        return torch.stack([zero, zero, zero, (1 - F.cosine_similarity(found, plain)).sum()])
    known = truth.any(1)
    if output == "softmax":
        loss, right, same, apart = _of_softmax(found, plain, truth)
    else:
        loss, right, same, apart = _of_sigmoids(found, plain, truth)
    return torch.stack([loss[known].sum(), right[known].sum(), same.sum(), apart.sum()])


def _of_softmax(found: Tensor, plain: Tensor, truth: Tensor) -> tuple[Tensor, ...]:  # -> four times [B]
    logs, predicted = found.log_softmax(1), found.argmax(1)
    # Several classes of one image share its weight.
    loss = -(logs * truth).sum(1) / truth.sum(1).clamp(min=1)
    right = truth.gather(1, predicted[:, None])[:, 0].double()
    wanted = plain.log_softmax(1)
    return loss, right, (predicted == plain.argmax(1)).double(), (wanted.exp() * (wanted - logs)).sum(1)


def _of_sigmoids(found: Tensor, plain: Tensor, truth: Tensor) -> tuple[Tensor, ...]:
    loss = F.binary_cross_entropy_with_logits(found, truth.double(), reduction="none").mean(1)
    right = ((found > 0) == truth).double().mean(1)
    p = plain.sigmoid()
    apart = p * (F.logsigmoid(plain) - F.logsigmoid(found)) + (1 - p) * (F.logsigmoid(-plain) - F.logsigmoid(-found))
    return loss, right, ((found > 0) == (plain > 0)).double().mean(1), apart.mean(1)


def behaviour(sums: Tensor, output: Output, known: int, images: int) -> Behaviour:  # [3, 4] of `sums_of`, added up
    """Means of what was summed over images."""
    loss, accuracy, agreement, divergence = (column.tolist() for column in sums.t())

    def mean(column: list[float], count: int) -> Effect:
        return Effect(*(value / count for value in column))

    of_loss = mean(loss, known) if known else None
    apart = mean(divergence, images)
    return Behaviour(
        output, known, of_loss, mean(accuracy, known) if known else None,
        None if output == "features" else mean(agreement, images), apart,
        None if of_loss is None else of_loss.recovered, apart.recovered,
    )  # fmt: skip
