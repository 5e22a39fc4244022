"""Block sizes and routes, as pure functions of shapes, dtype and compute capability: nothing is timed at first call.

The sizes are chosen by counting registers, shared memory and traffic; they have never run on a device. Numbers measured
by benchmarks/device/tune.py, if kernels/tuned/<device>.json is there, take their place.

Costs, for T tokens (image, patch), R rows of them (image, target, patch), C width, F features, e bytes an element:
`dense_cost`, `encode_cost`, `gather_cost`. Weights are read once from memory as long as the rows of one group of tiles
stay in the L2 cache.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

TUNED = Path(__file__).parent / "tuned"
WORKSPACE = 1 << 28  # bytes that one launch may use beyond its outputs
LONGEST_SELECTION = 16384  # values that one program chooses the k largest of, in registers
# Features a token below which gathering decoder rows beats a second product. Two products of a token take 4 C F
# operations, one product and writing and reading its codes takes 2 C F and 12 F bytes, a gathered row 2 C bytes: at the
# H100's ratio of operations to bytes these break even near this share of the dictionary. An estimate, not measured.
SPARSE_SHARE = 0.004


class Tile(NamedTuple):
    """How a kernel with matrix products is cut up."""

    tokens: int
    features: int
    width: int  # step of the inner loop
    warps: int
    stages: int


class Cost(NamedTuple):
    """What a kernel does, for its share of a device's ceilings."""

    flops: int
    bytes: int


# (generation, kind of product, kernel) -> tile. Accumulators of 128 x 128 float32 take 64 registers of each of 256
# threads, the codes kept beside them 64 more: small enough for ptxas to keep everything in registers.
_TILES: dict[tuple[int, str, str], Tile] = {
    (8, "half", "dense"): Tile(128, 128, 32, 8, 4),
    (8, "tf32", "dense"): Tile(64, 128, 32, 8, 3),
    (8, "ieee", "dense"): Tile(32, 64, 16, 4, 3),
    (9, "half", "dense"): Tile(128, 128, 64, 8, 3),
    (9, "tf32", "dense"): Tile(128, 128, 32, 8, 3),
    (9, "ieee", "dense"): Tile(32, 64, 16, 4, 3),
    (10, "half", "dense"): Tile(128, 128, 64, 8, 3),
    (10, "tf32", "dense"): Tile(128, 128, 32, 8, 3),
    (10, "ieee", "dense"): Tile(32, 64, 16, 4, 3),
}

GROUP = 32  # token tiles whose rows of x and g share the L2 cache: 12.6 MB at 128 tokens, width 768, 16 bits


def precision(dtype: object) -> str:
    """How float32 products are made: plain float32, or TensorFloat32 where torch was told that this is precise enough.

    `torch.set_float32_matmul_precision("high")` or `torch.backends.cuda.matmul.allow_tf32 = True` ask for the latter.
    """
    import torch

    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def product_kind(dtype: object) -> str:
    """"half", "tf32" or "ieee": the row of the table of tiles."""
    import torch

    return precision(dtype) if dtype == torch.float32 else "half"


def tile(kernel: str, dtype: object, capability: tuple[int, int], tokens: int, top: bool) -> Tile:
    """The tile of a kernel ("dense" or "encode").

    Args:
        kernel: "dense" or "encode".
        dtype: torch dtype of the dictionary.
        capability: compute capability of the device.
        tokens: images times patches.
        top: whether the strongest features are wanted too.
    """
    generation = max(g for g, _, _ in _TILES if g <= max(8, capability[0]))
    return _TILES[generation, product_kind(dtype), kernel]


def tiles_a_launch(tile: Tile, feature_tiles: int, row_patches: int, row_tiles: int, top: int) -> int:
    """Feature tiles of one launch, so that its workspace stays within `WORKSPACE`."""
    each = 4 * row_patches * (1 + 2 * top) + (4 * row_tiles * tile.features if top else 0)
    return max(1, min(feature_tiles, WORKSPACE // max(1, each)))
