"""What the tests of training share: tokens made of a known dictionary, and the run that a test kills."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fga_fast.harvest.tokens import TensorTokens
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder
from fga_fast.training.recipe import Recipe
from fga_fast.training.train import train
from fga_fast.training.trainee import Scale, Trainee

WIDTH, TRUE, ACTIVE = 16, 24, 2

RECIPES = {
    "topk": Recipe("topk", 32, 2),
    "batch_topk": Recipe("batch_topk", 32, 2),
    "matryoshka": Recipe("matryoshka", 32, 2, prefixes=(16, 24, 32)),
    "jumprelu": Recipe("jumprelu", 32, 2),
    "relu": Recipe("relu", 32, l1=0.3),
}


def made(count: int = 4096, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [count, WIDTH] of ACTIVE rows each of a dictionary, off centre and large, and the dictionary."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = F.normalize(torch.randn(TRUE, WIDTH, generator=generator), dim=1)
    which = torch.rand(count, TRUE, generator=generator).topk(ACTIVE).indices
    size = 1 + torch.rand(count, ACTIVE, generator=generator)
    codes = torch.zeros(count, TRUE).scatter(1, which, size)
    return 7 * codes @ dictionary + 3 * torch.randn(WIDTH, generator=generator), dictionary


def trained(out: Path, recipe: Recipe, **settings: Any) -> SparseAutoencoder:
    usual: dict[str, Any] = {"steps": 100, "batch_size": 512, "lr": 2e-2, "progress": False}
    return train(TensorTokens({1: made()[0]}), {"one": recipe}, out=out, **(usual | settings))["one", 1]


def trainee(recipe: Recipe, x: Tensor) -> tuple[Scale, Trainee]:
    """One that has not been trained, but is no longer where all start."""
    scale = Scale(x)
    own = Trainee(recipe, x.shape[1], scale.variance, torch.Generator().manual_seed(1), torch.device("cpu"))
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        own.unit_decoder()
    return scale, own


class Slow(TensorTokens):
    """Leaves time to kill a run."""

    def batches(self, size: int, start: int = 0) -> Iterator[dict[int, Tensor]]:
        for batch in super().batches(size, start):
            time.sleep(0.02)
            yield batch


def run(out: Path, tokens: type[TensorTokens] = TensorTokens) -> None:
    """All kinds for two blocks; with dead features, so that the auxiliary loss takes part."""
    torch.set_num_threads(1)
    x = made(600)[0]
    recipes = {name: Recipe(one.kind, 32, one.k, one.l1, dead_after=100) for name, one in RECIPES.items()}
    train(tokens({0: x, 2: x.flip(0) ** 2}), recipes, out=out, steps=8, batch_size=64, checkpoint_every=1,
          progress=False)  # fmt: skip


class Stopped(Exception):
    pass


class Until(TensorTokens):
    """Stops at step `end`."""

    end = 0

    def batches(self, size: int, start: int = 0) -> Iterator[dict[int, torch.Tensor]]:
        for step, batch in enumerate(super().batches(size, start), start):
            if step == self.end:
                raise Stopped
            yield batch


def stopped(out: Path, end: int, recipe: Recipe = RECIPES["topk"], **settings: Any) -> TensorTokens:
    """The tokens of a run that was stopped after `end` steps."""
    tokens = Until({1: made(512)[0]})
    tokens.end = end
    usual: dict[str, Any] = {"steps": 10, "batch_size": 64, "checkpoint_every": 3, "progress": False}
    with pytest.raises(Stopped):
        train(tokens, {"one": recipe}, out=out, **(usual | settings))
    return TensorTokens({1: made(512)[0]})
