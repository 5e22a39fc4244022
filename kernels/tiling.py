"""Block sizes and routes, as pure functions of shapes, dtype and compute capability: nothing is timed at first call.

The sizes are chosen by counting registers, shared memory and traffic; they have never run on a device. Numbers that
benchmarks/device/tune.py measured take their place where kernels/tuned/<device>.json exists.

Costs, for T tokens (image, patch), R rows of them (image, target, patch), C width, F features, e bytes an element:
`dense_cost`, `encode_cost`, `gather_cost`. Weights are read once from memory as long as the rows of one group of tiles
stay in the L2 cache.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

TUNED = Path(__file__).parent / "tuned"
WORKSPACE = 1 << 28  # bytes that one launch may use beyond its outputs
LONGEST_SELECTION = 8192  # most values from which one program chooses the k largest, in registers
FEW = 32  # most strongest features that are searched one after the other; more are sorted
# Share of the dictionary active in a token below which gathering decoder rows beats a second product. For a token, two
# products take 4 C F operations. One product takes 2 C F, its codes 12 F bytes to write and read, a gathered row 2 C
# bytes. At the H100's ratio of operations to bytes they break even near this share. An estimate, not measured.
SPARSE_SHARE = 0.004


class Tile(NamedTuple):
    """How a kernel with matrix products is cut up."""

    tokens: int
    features: int
    width: int  # step of the inner loop
    warps: int
    stages: int
    fused: bool = True  # both products of a program in one loop, where it has one target


class Cost(NamedTuple):
    """What a kernel does, for its share of a device's ceilings."""

    flops: int
    bytes: int


# (generation, kind of product, kernel) -> tile: what ptxas keeps in registers, and what fits in shared memory (163 KB
# on 8.0, 99 KB on its successors, 227 KB on 9.0 and 10.0). A program on Hopper holds two accumulators of 128 x 128
# float32, 128 registers of each of its 256 threads, and three stages of four 16 KB operands. On Blackwell both come out
# of tensor memory at once, beside the epilogue's parameters: half as many features there.
TILES: dict[tuple[int, str, str], Tile] = {
    (8, "half", "dense"): Tile(128, 128, 32, 8, 4, fused=False),
    (8, "tf32", "dense"): Tile(128, 128, 32, 8, 3, fused=False),
    (9, "half", "dense"): Tile(128, 128, 64, 8, 3),
    (9, "tf32", "dense"): Tile(128, 128, 32, 8, 3),
    (10, "half", "dense"): Tile(128, 64, 64, 8, 3),
    (10, "tf32", "dense"): Tile(128, 64, 32, 8, 3),
    (8, "half", "targets"): Tile(128, 128, 32, 8, 4),
    (8, "tf32", "targets"): Tile(128, 128, 32, 8, 3),
    (9, "half", "targets"): Tile(128, 128, 64, 8, 4),
    (9, "tf32", "targets"): Tile(128, 128, 32, 8, 4),
    (10, "half", "targets"): Tile(64, 128, 64, 8, 4),
    (10, "tf32", "targets"): Tile(64, 128, 32, 8, 4),
    (8, "half", "top"): Tile(64, 128, 32, 8, 3, fused=False),
    (8, "tf32", "top"): Tile(64, 128, 32, 8, 3, fused=False),
    (9, "half", "top"): Tile(64, 128, 64, 8, 3),
    (9, "tf32", "top"): Tile(64, 128, 32, 8, 3),
    (10, "half", "top"): Tile(64, 64, 64, 8, 3),
    (10, "tf32", "top"): Tile(64, 64, 32, 8, 3),
    (8, "half", "encode"): Tile(128, 128, 32, 8, 4),
    (8, "tf32", "encode"): Tile(128, 128, 32, 8, 3),
    (9, "half", "encode"): Tile(128, 256, 64, 8, 3),
    (9, "tf32", "encode"): Tile(128, 128, 32, 8, 4),
    (10, "half", "encode"): Tile(128, 128, 64, 8, 4),
    (10, "tf32", "encode"): Tile(128, 128, 32, 8, 4),
} | {
    (generation, "ieee", kernel): tile
    for generation in (8, 9, 10)
    for kernel, tile in {
        "dense": Tile(128, 64, 16, 8, 3, fused=False),
        "targets": Tile(128, 64, 16, 8, 3),
        "top": Tile(64, 64, 16, 8, 3, fused=False),
        "encode": Tile(128, 64, 16, 8, 3),
    }.items()
}

UNALIGNED = Tile(32, 64, 16, 8, 2, fused=False)
GROUP = 32  # token tiles whose rows of x and g share the L2 cache: 12.6 MB at 128 tokens, width 768, 16 bits


def precision(dtype: object) -> str:
    """How float32 products are made: plain float32, or TensorFloat32 where torch was told that this is precise enough.

    `torch.set_float32_matmul_precision("high")`, `torch.backends.cuda.matmul.allow_tf32 = True` or `fp32_precision =
    "tf32"` there ask for the latter. The last is read: it follows the others, whose getters raise once it is set.
    """
    import torch

    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def product_kind(dtype: object) -> str:
    """ "half", "tf32" or "ieee": the row of the table of tiles."""
    import torch

    return precision(dtype) if dtype == torch.float32 else "half"


@functools.cache
def tuned(device: str) -> dict[str, Any]:
    """What benchmarks/device/tune.py measured on a device of that name: "tiles" and "sparse_share"; {} if it never ran.

    Raises:
        ValueError: the file is not what the tuner writes.
    """
    path = TUNED / f"{slug(device)}.json"
    if not device or not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("tiles"), dict):
        raise ValueError(f"{path}: expected what benchmarks/device/tune.py writes; delete it or tune again")
    return found | {"tiles": {name: Tile(*numbers) for name, numbers in found["tiles"].items()}}


def slug(device: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def tile(kernel: str, dtype: object, capability: tuple[int, int], width: int, device: str = "") -> Tile:
    """The tile of a kernel.

    Args:
        kernel: "dense", "targets" (several an image), "top" (with the strongest features, any targets) or "encode".
        dtype: torch dtype of the dictionary.
        capability: compute capability of the device. One without tiles of its own gets those of 8.0, the smallest.
        width: C. A width that is no multiple of 16 gets a tile of its own: its rows cannot be read 16 bytes at a time.
        device: its name, for what was measured on it.
    """
    if width % 16:
        return UNALIGNED
    kind = product_kind(dtype)
    measured: Tile | None = tuned(device)["tiles"].get(f"{kind} {kernel}") if tuned(device) else None
    return measured or TILES[capability[0] if capability[0] in (9, 10) else 8, kind, kernel]


def tiles_a_launch(tile: Tile, feature_tiles: int, row_patches: int, row_tiles: int, top: int) -> int:
    """Feature tiles of one launch, so that its workspace stays within `WORKSPACE`."""
    each = 4 * row_patches * (1 + 2 * top) + (4 * row_tiles * tile.features if top else 0)
    return max(1, min(feature_tiles, WORKSPACE // max(1, each)))


def tokens_a_launch(tile: Tile, features: int, group: int, tokens: int) -> int:
    """Tokens whose pre-activations one launch writes, so that its workspace stays within `WORKSPACE`."""
    each = 4 * features + (4 * -(-features // group) if group > 0 else 4 * features)
    return min(max(1, WORKSPACE // each // tile.tokens) * tile.tokens, max(1, tokens))


def group_size(features: int, k: int) -> int:
    """Features of a group in the first round of a selection; 0: one round will do; -1: too many, sort instead."""
    if features <= LONGEST_SELECTION:
        return 0
    for size in (64, 32, 16):
        if k * size <= LONGEST_SELECTION and features <= size * LONGEST_SELECTION:
            return size
    return -1


def select_warps(block: int) -> int:
    """Warps that choose from `block` candidates, 16 of them a thread."""
    return min(32, max(1, block // 512))


def gathered_rows(block: int) -> int:
    """Decoder rows of `block` columns that a program holds at a time."""
    return max(1, min(16, 8192 // block))


def gather_warps(block: int) -> int:
    """Warps of a program that gathers decoder rows of `block` columns."""
    return 8 if block > 1024 else 4


def route(activation: str, density: float | None, top: bool, device: str = "") -> str:
    """ "dense" or "sparse".

    Args:
        activation: as `SparseAutoencoder.activation`.
        density: active features a token over F, if it was measured.
        top: whether the strongest features are wanted; codes without a k then take the dense route.
        device: its name, for the share measured on it.
    """
    if activation in ("topk", "topk_signed"):
        return "sparse"
    share = tuned(device).get("sparse_share", SPARSE_SHARE)
    return "sparse" if density is not None and density < share and not top else "dense"


def dense_cost(tokens: int, rows: int, width: int, features: int, size: int) -> Cost:
    """Two products: codes of T tokens, gradients of R rows; both matrices, x, g and the scores move once."""
    flops = 2 * width * features * (tokens + rows)
    return Cost(flops, size * width * (tokens + rows + 2 * features) + 4 * rows)


def encode_cost(tokens: int, width: int, features: int, size: int) -> Cost:
    """One product; codes are written and read once."""
    return Cost(2 * width * features * tokens, size * width * (tokens + features) + 8 * tokens * features)


def gather_cost(tokens: int, rows: int, width: int, active: int, size: int) -> Cost:
    """`active` decoder rows a token, and one product with each gradient, as if there were no caches."""
    flops = 2 * width * (active * tokens + rows)
    return Cost(flops, size * width * (active * tokens + rows) + 8 * active * tokens + 4 * rows)
