"""A model that is read in a microsecond, methods and a metric for it, and the run that a test kills."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fga_fast.dataset.items import Item
from fga_fast.evaluation.measures import MEASURES, Batch, Measure
from fga_fast.evaluation.run import evaluate
from fga_fast.evaluation.subject import Subject

CLASSES, SIDE = 3, 8


class Model(nn.Module):
    """Images [B, 3, 8, 8] to logits [B, 3], from the means of 4 x 4 patches."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(CLASSES, 16, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return patches(images) @ self.weight.t()


def patches(images: Tensor) -> Tensor:  # [B, 3, 8, 8] -> [B, 16]
    return nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)


def subject() -> Subject:
    return Subject(Model().eval())


def exact(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    return (patches(images) * subject.model.weight[targets]).detach()


def seeded(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    return torch.rand(len(images), 16, generator=torch.Generator().manual_seed(subject.seed))


def slow(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    time.sleep(0.05)
    return exact(subject, images, targets)


def _largest(batch: Batch) -> dict[str, Tensor]:
    return {"largest": batch.maps.amax(2), "smallest": batch.maps.amin(2)}


LARGEST = {"extremes": Measure(_largest, {"largest": True, "smallest": False})}


def items(count: int) -> list[Item]:
    generator = torch.Generator().manual_seed(3)
    return [Item(f"image {n}", torch.randn(3, SIDE, SIDE, generator=generator), n % CLASSES) for n in range(count)]


def run(out: Path) -> Path:
    methods = {"exact": exact, "slow": slow, "seeded": seeded}
    metrics = {**LARGEST, "randomisation": MEASURES["randomisation"]}
    return evaluate(
        subject(), items(40), methods, metrics, out=out, batch_size=4, split="both", seed=(0, 1), progress=False
    )
