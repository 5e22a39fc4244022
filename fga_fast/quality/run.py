"""How good SAEs are on images they were not trained on: what they reconstruct, how sparsely, and what the model keeps.

Images pass twice: first for the mean of each stream, which stands for "nothing is known" in the second pass. Batches
are added up in float64, so memory does not grow with the number of images. docs/sae_report.md defines the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fga_fast.io.images import Preprocess
from fga_fast.io.window import Window
from fga_fast.models import checks
from fga_fast.models.layout import ModelLayout
from fga_fast.quality.behaviour import Behaviour, Output, behaviour
from fga_fast.quality.cosines import MATCH, Stability, cosine_histogram, nearest_others, stability
from fga_fast.quality.histogram import Histogram, histogram, percentiles, whole_histogram
from fga_fast.quality.measure import Errors, Images, Means, Plan, Sums, each, make_plan, pictures_of
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

_VARIES = 1e-12  # of the squared mean; below it, what varies is rounding


@dataclass(frozen=True)
class Quality:
    """How good an SAE is on some images. Tokens are those of patches; class tokens and registers do not count.

    Attributes:
        block: the block, from 0, whose stream the SAE reads.
        activation: of the SAE. features: F. width: C. expected_l0: its own, or its k, or None.
        images: that were measured. tokens: images x patches.
        explained_variance: as `SparseAutoencoder.self_check`: 1 - squared error / squared distance to the mean of all
            tokens, at most 1.
        unexplained: [rows][columns] of the patches' grid: squared error at a position / squared distance to the mean of
            all tokens there, at least 0. None where all tokens are that mean.
        l0: mean number of active features a token, 0 to F.
        l0_percentiles: the 5th, 50th and 95th, each the least L0 that so many percent of the tokens do not exceed.
        l0_histogram: tokens by L0, in bins of whole numbers.
        dead: share of the features that no token activated, 0 to 1.
        density: the other features by log10 of the share of tokens that activated them, in steps of a quarter.
        cosines: features by the largest cosine of their decoder row to another one, in steps of 0.05.
        copies: share of the features for which that is above 0.9, 0 to 1.
        behaviour: what the model does with the reconstruction in the place of its stream at the patches.
        stability: beside a second SAE, if one was given.
        errors: (key, reason) of images that could not be measured.
    """

    block: int
    activation: str
    features: int
    width: int
    expected_l0: float | None
    images: int
    tokens: int
    explained_variance: float
    unexplained: tuple[tuple[float | None, ...], ...]
    l0: float
    l0_percentiles: tuple[int, int, int]
    l0_histogram: Histogram
    dead: float
    density: Histogram
    cosines: Histogram
    copies: float
    behaviour: Behaviour
    stability: Stability | None
    errors: tuple[tuple[str, str], ...]


def quality(
    model: nn.Module, saes: Mapping[int, SparseAutoencoder], images: Images, *,
    second: Mapping[int, SparseAutoencoder] | None = None, layout: ModelLayout | None = None,
    preprocess: Preprocess | None = None, window: Window | None = None, output: Output | None = None,
    batch_size: int = 8, seed: int = 0, progress: bool = True,
) -> dict[int, Quality]:  # fmt: skip
    """Measures one SAE a block: block -> `Quality`. `compare` says what the arguments are and what is raised."""
    found = compare(
        model, {str(block): (block, sae) for block, sae in saes.items()}, images, second=second, layout=layout,
        preprocess=preprocess, window=window, output=output, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    return {one.block: one for one in found.values()}


@torch.no_grad()
def compare(
    model: nn.Module, saes: Mapping[str, tuple[int, SparseAutoencoder]], images: Images, *,
    second: Mapping[int, SparseAutoencoder] | None = None, layout: ModelLayout | None = None,
    preprocess: Preprocess | None = None, window: Window | None = None, output: Output | None = None,
    batch_size: int = 8, seed: int = 0, progress: bool = True,
) -> dict[str, Quality]:  # fmt: skip
    """Measures any number of SAEs on the same images: name -> `Quality`.

    An image that cannot be read or measured is left out, and its reason is in `Quality.errors`.

    Args:
        model: in eval mode. It is left as it came.
        saes: name -> (block, SAE), on the model's device, in its dtype.
        images: held-out images: items, or [I, channels, H, W] as the model takes them. Items of the same file or the
            same object are one image with several classes.
        second: block -> another SAE of the same block, such as that of another seed, to compare the features with.
        layout: of the model, if `find_layout` does not know it.
        preprocess, window: how pictures are read, see `fga_fast.dataset.items.load`.
        output: what the model's outputs are; None: "softmax", or "features" for a model without a head or a dual
            encoder. "sigmoid": a class that no item of an image names is taken to be absent.
        batch_size: images at once.
        seed: of the random rows that stability is compared with.
        progress: show a bar.

    Raises:
        TypeError, ValueError: an argument does not fit, no image could be measured, or the tokens do not vary.
    """
    second = second or {}
    plan = make_plan(model, saes, layout, preprocess, window, output, batch_size)
    _check_second(plan, second)
    pictures, errors = pictures_of(images), Errors([])
    with tqdm(total=2 * len(pictures), unit="image", desc="measuring", disable=not progress) as bar:
        means = Means(plan)
        good = each(plan, pictures, means.add, errors, bar.update)
        bar.total = len(pictures) + len(good)
        sums = Sums(plan, means)
        each(plan, good, sums.add, errors, bar.update)
    if not sums.images:
        raise ValueError(f"images: none of {len(pictures)} could be measured; the first: {': '.join(errors.found[0])}")
    found = {}
    for name in tqdm(plan.saes, unit="SAE", desc="comparing features", disable=not progress):
        block, sae = plan.saes[name]
        beside = stability(sae, second[block], seed) if block in second else None
        found[name] = _quality(sums, name, beside, errors)
    return found


def _check_second(plan: Plan, second: Mapping[int, SparseAutoencoder]) -> None:
    checks.check_saes(second, plan.layout, plan.like)
    for block in second:
        if block not in plan.blocks:
            raise ValueError(f"second: expected SAEs of the blocks {plan.blocks}, got one of block {block}")


def _quality(sums: Sums, name: str, beside: Stability | None, errors: Errors) -> Quality:
    block, sae = sums.plan.saes[name]
    codes, total = sums.codes[name], sums.spreads[block].total()  # [P]
    tokens = sums.images * sums.plan.layout.patches
    if float(total.sum()) <= _VARIES * tokens * float((sums.spreads[block].mean.mean(0) ** 2).sum()):
        raise ValueError(f"images: expected tokens that differ after block {block}, got {tokens} without variance")
    lengths = codes.lengths.cpu()
    near = nearest_others(sae.W_dec)
    fired = codes.fired[codes.fired > 0].cpu()
    return Quality(
        block=block, activation=sae.activation, features=sae.d_sae, width=sae.d_model,
        expected_l0=sae.k if sae.expected_l0 is None else sae.expected_l0, images=sums.images, tokens=tokens,
        explained_variance=1.0 - float(codes.residual.sum() / total.sum()),
        unexplained=_grid(codes.residual, total, sums.plan.layout.grid),
        l0=float((lengths * torch.arange(len(lengths))).sum()) / tokens,
        l0_percentiles=percentiles(lengths), l0_histogram=whole_histogram(lengths),
        dead=1.0 - len(fired) / sae.d_sae, density=_density(fired, tokens),
        cosines=cosine_histogram(near), copies=float((near > MATCH).double().mean()),
        behaviour=behaviour(sums.effects[name], sums.output, sums.known, sums.images), stability=beside,
        errors=tuple(errors.found),
    )  # fmt: skip


def _grid(residual: Tensor, total: Tensor, grid: tuple[int, int]) -> tuple[tuple[float | None, ...], ...]:
    """[rows][columns], squared error / squared distance to the mean, from two [P]."""
    shares = [None if t == 0 else r / t for r, t in zip(residual.tolist(), total.tolist(), strict=True)]
    return tuple(tuple(shares[row * grid[1] : (row + 1) * grid[1]]) for row in range(grid[0]))


def _density(fired: Tensor, tokens: int) -> Histogram:  # [live features] int64, tokens that activated each
    lowest = math.floor(-4 * math.log10(tokens))
    return histogram((fired.double() / tokens).log10(), [quarter / 4 for quarter in range(min(lowest, -1), 1)])
