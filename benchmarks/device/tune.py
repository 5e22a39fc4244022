"""Times candidate tiles of the Triton score kernels on this machine's GPU and writes kernels/tuned/<device>.json.

    python benchmarks/device/tune.py [--tokens 4096] [--width 768] [--features 49152] [--kinds half tf32 ieee]
                                     [--uses dense targets top encode]

STATUS: has never run on a device. `--rehearse` runs the same code at toy sizes in Triton's interpreter on the CPU, and
writes nothing. Commit the file that this script writes: on devices of that name the kernels take their tiles from it,
and scripts/compile_kernels.py checks these tiles against the limits too. The script skips a tile that does not compile,
does not fit, or gives other scores than the default. Nearly all of its time goes into compiling: seconds per tile, and
up to 56 tiles per kind and use. What a call does not measure keeps its earlier value.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
from device import Device  # noqa: E402
from fga_fast.kernels import tiling  # noqa: E402
from fga_fast.kernels.device import capability, device_name  # noqa: E402
from torch import Tensor  # noqa: E402

from fga_fast import SparseAutoencoder, kernels  # noqa: E402

USES = ("dense", "targets", "top", "encode")
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
ACTIVE = (16, 32, 64, 128, 256, 512, 1024)  # active features per token, to find where gathering stops paying


def candidates(use: str, kind: str, small: bool, shared: int = 227 << 10) -> Iterator[tiling.Tile]:
    """Tiles worth timing: powers of two around the limits of the register file and of `shared` bytes of memory."""
    if small:
        yield from (tiling.Tile(16, 64, 16, 4, 2), tiling.Tile(32, 64, 16, 4, 2, fused=False))
        return
    if kind == "ieee":
        for tokens, features, warps in itertools.product((32, 64, 128), (64, 128), (4, 8)):
            yield tiling.Tile(tokens, features, 16, warps, 2, fused=False)
        return
    widths = (32, 64, 128) if kind == "half" else (16, 32, 64)
    for tokens, features, width, warps, stages in itertools.product(
        (64, 128), (64, 128, 256), widths, (4, 8), (2, 3, 4)
    ):
        # With fewer than 64 accumulators per thread and product it waits for memory; more than 128 in all spill.
        accumulators = tokens * features // (32 * warps)
        if not 64 <= accumulators <= (128 if use == "encode" else 64):
            continue
        stage = width * (tokens + features) * (2 if kind == "half" else 4)
        for fused in (True, False) if use in ("dense", "top") else (True,):
            if stages * stage * (2 if fused and use in ("dense", "top") else 1) <= shared:
                yield tiling.Tile(tokens, features, width, warps, stages, fused)


class Case:
    """One use of the kernels, on random weights and tokens."""

    def __init__(self, use: str, kind: str, device: Device, shape: argparse.Namespace) -> None:
        dtype, place = DTYPES[kind], {"device": device.kind, "dtype": DTYPES[kind]}
        generator = torch.Generator(device.kind).manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, **place)

        width, features = shape.width, shape.features
        activation = "topk" if use == "encode" else "relu"
        self.sae = SparseAutoencoder(
            random(width, features) / width**0.5, random(features) - 2, random(features, width) / width**0.5,
            torch.zeros(width, **place), activation, k=min(64, features) if activation == "topk" else None,
        )  # fmt: skip
        self.x = random(shape.images, shape.tokens // shape.images, width)
        rows = shape.images * (2 if use == "targets" else 1)
        self.g = random(rows, shape.tokens // shape.images, width)
        self.more: dict[str, Any] = {"top_features": 10 if use == "top" else 0}
        if use == "targets":
            self.more["image"] = torch.arange(shape.images, device=device.kind).repeat(2)
        self.key = f"{kind} {use}"
        self.table_key = (capability(self.x)[0] if capability(self.x)[0] in (9, 10) else 8, kind, use)
        self.dtype = dtype

    def __call__(self) -> Tensor:
        scores: Tensor = kernels.score(self.x, self.g, self.sae, **self.more).scores
        return scores

    def seconds(self, device: Device, tile: tiling.Tile, want: Tensor) -> float | None:
        """Median time with this tile, None if it cannot be used."""
        tiling.TILES[self.table_key] = tile
        try:
            got = self()
            if not torch.allclose(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().max())):
                print(f"{self.key} {tuple(tile)}: other scores than the default", flush=True)
                return None
            return device.seconds(self, rounds=10, warm_up=2)[0]
        except Exception as problem:
            print(f"{self.key} {tuple(tile)}: {str(problem).splitlines()[0][:100]}", flush=True)
            return None


def best_tile(case: Case, device: Device) -> tiling.Tile:
    """The fastest candidate; the default if none is faster."""
    default = tiling.TILES[case.table_key]
    want = case()
    times = {default: case.seconds(device, default, want)}
    shared = 0 if device.small else torch.cuda.get_device_properties(case.x.device).shared_memory_per_block_optin
    for tile in candidates(case.key.split()[1], case.key.split()[0], device.small, shared):
        times[tile] = case.seconds(device, tile, want)
    fastest = min((tile for tile, time in times.items() if time is not None), key=lambda tile: times[tile] or 0.0)
    tiling.TILES[case.table_key] = fastest
    print(f"{case.key}: {tuple(fastest)} {times[fastest]} s, default {tuple(default)} {times[default]} s", flush=True)
    return fastest


def sparse_share(device: Device, shape: argparse.Namespace) -> float:
    """The share of active features below which gathering decoder rows is faster than the second product."""
    case = Case("dense", "half", device, shape)
    z = (case.x.flatten(0, 1)[:512] @ case.sae.W_enc).float().flatten()
    share = 0.0
    for active in ACTIVE:
        if active >= shape.features:
            break
        rank = max(1, round(z.numel() * (1 - active / shape.features)))
        case.sae.bias.fill_(-float(z.kthvalue(rank).values))
        times = {}
        for route, l0 in (("dense", shape.features), ("sparse", 0)):
            case.sae.expected_l0 = float(l0)
            times[route] = device.seconds(case, rounds=10, warm_up=2)[0]
        print(f"{active} active features: {times}", flush=True)
        if times["sparse"] > times["dense"]:
            break
        share = active / shape.features
    return share


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--features", type=int, default=49152)
    parser.add_argument("--kinds", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--uses", nargs="+", choices=USES, default=list(USES))
    parser.add_argument("--rehearse", action="store_true", help="toy sizes in the interpreter; writes nothing")
    shape = parser.parse_args()
    if shape.rehearse:
        shape.tokens, shape.images, shape.width, shape.features = 16, 2, 16, 64
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device; --rehearse runs without one")
    device = Device("cpu" if shape.rehearse else "cuda", shape.rehearse)
    earlier: dict[str, Any] = tiling.tuned(device.name)
    tiles = dict(earlier.get("tiles", {}))
    tiling.tuned = lambda _: {}  # type: ignore[assignment]  # time the candidates, not earlier results
    for kind, use in itertools.product(shape.kinds, shape.uses):
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
        case = Case(use, kind, device, shape)
        tiles[case.key] = best_tile(case, device)
    table = {
        "device": device_name(case.x), "capability": capability(case.x), "torch": torch.__version__,
        "shape": [shape.tokens, shape.width, shape.features], "tiles": tiles,
        "sparse_share": sparse_share(device, shape),
    }  # fmt: skip
    if shape.rehearse:
        print(f"rehearsed: nothing written of {json.dumps(table)}")
        return 0
    path = tiling.TUNED / f"{tiling.slug(table['device'])}.json"
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
