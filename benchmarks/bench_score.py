"""The feature score: the native kernel compared with two dense products, and the point where gathering stops paying.

In a tile with few active features the native kernel gathers their decoder rows; with many it computes a second dense
product (kDenseShare in csrc/cpu/score.cpp). `test_crossover` measures where both cost the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Scale
from peak import peak_bytes
from rows import Row
from subjects import dense_encoder, possible
from timing import Race, Timing
from torch import Tensor

from fga_fast import SparseAutoencoder, ops, reference

WIDTH, PATCHES = 768, 196
GATHERED, DENSE = (0.01, 0.05, 0.1, 0.15, 0.2), (0.3, 0.5)  # shares of active features below and above the switch


def dictionary(features: int, share: float, activation: str = "relu", k: int | None = None) -> SparseAutoencoder:
    """Random SAE; on standard normal x the share `share` of its features is active."""
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(features, WIDTH, generator=generator).div_(WIDTH**0.5).t()
    W_dec = torch.randn(features, WIDTH, generator=generator).div_(WIDTH**0.5)
    quantile = statistics.NormalDist().inv_cdf(1 - share)
    bias = torch.full((features,), -quantile if activation == "relu" else 0.0)
    return SparseAutoencoder(W_enc, bias, W_dec, torch.zeros(WIDTH), activation=activation, k=k)


def two_products(x: Tensor, g: Tensor, sae: SparseAutoencoder) -> Tensor:  # [B, P, C], [B, P, C]
    """The plain way: dense codes and dense feature gradients."""
    codes = sae.encode(x)
    return (codes * (g @ sae.W_dec.t())).sum(dim=-1)


@pytest.mark.parametrize("level", ("relu 64", "relu 500", "relu 1700", "topk 64"))
@pytest.mark.parametrize("images", (1, 8))
def test_score(images: int, level: str, scale: Scale, race: Callable[..., Race], record: Callable[[Row], None]) -> None:
    activation, active = level.split()
    sae = dictionary(scale.features, int(active) / 49_152, activation, int(active) if activation == "topk" else None)
    torch.manual_seed(0)
    x, g = torch.randn(2, images, PATCHES, WIDTH)
    ways: dict[str, Callable[[], Any]] = {
        "native": lambda: ops.score(x, g, sae).scores,
        "native, dense encoder": dense_encoder(lambda: ops.score(x, g, sae).scores),
        "reference": lambda: reference.score(x, g, sae, "combined"),
        "plain": partial(two_products, x, g, sae),
    }
    torch.testing.assert_close(ways["native"](), ways["reference"](), rtol=1e-3, atol=1e-3)
    others = {name: way for name, way in ways.items() if name != "native"}
    found = race(ways["native"], others, seconds=2.5 * images**0.5, least=2)
    L0 = float((sae.encode(x[:1]) > 0).sum(dim=-1).float().mean())
    blank = Row("score", "", images, PATCHES, threads=torch.get_num_threads(), L0=L0)
    timings = {"native": found.baseline(), **{name: found.result(name) for name in others}}
    for name, timing in timings.items():
        row = timed(blank, f"{name} {level}", timing)
        to_plain, to_reference = (timing.ratio / timings[other].ratio for other in ("plain", "reference"))
        row = replace(row, ratio_to_plain=to_plain, ratio_to_reference=to_reference, peak_bytes=peak_bytes(ways[name]))
        if name == "native" and activation == "relu":
            row = replace(row, note=f"{possible(x[0], sae):.2f} features possible for each active one")
        record(row)


@pytest.mark.parametrize("threads", (1, 2))
def test_crossover(threads: int, scale: Scale, race: Callable[..., Race], record: Callable[[Row], None]) -> None:
    """Gathering costs in proportion to the active features; the second product costs nearly the same for any number."""
    features = 1024 if scale.quick else 8192
    torch.manual_seed(0)
    x, g = torch.randn(2, 1, PATCHES, WIDTH)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ways = {share: partial(ops.score, x, g, dictionary(features, share)) for share in (*GATHERED, *DENSE)}
        first = ways[GATHERED[0]]
        found = race(first, {f"{share:g}": way for share, way in ways.items()}, seconds=5.0)
    finally:
        torch.set_num_threads(before)
    timings = {share: found.result(f"{share:g}") for share in ways}
    blank = Row("score", "", 1, PATCHES, threads=threads)
    for share, timing in timings.items():
        record(replace(timed(blank, f"native, share {share:g}, {threads} thread(s)", timing), L0=share * features))
    share = crossover({share: timing.minimum for share, timing in timings.items()})
    record(replace(blank, name=f"crossover, {threads} thread(s)", L0=share * features, note=f"share {share:.2f}"))


def crossover(seconds: dict[float, float]) -> float:
    """The share at which the line through the gathered times meets the line through the dense times."""
    slope, start = line({share: seconds[share] for share in GATHERED})
    dense_slope, dense_start = line({share: seconds[share] for share in DENSE})
    return (dense_start - start) / (slope - dense_slope)


def line(points: dict[float, float]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line."""
    x, y = torch.tensor(list(points), dtype=torch.float64), torch.tensor(list(points.values()), dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return slope, float(y.mean()) - slope * float(x.mean())


def timed(blank: Row, name: str, timing: Timing) -> Row:
    return replace(blank, name=name, rounds=timing.rounds, median_s=timing.median, min_s=timing.minimum)
