#!/usr/bin/env python3
"""Compiles the Triton kernels for GPUs that need not be there, and holds the machine code to its limits.

    python scripts/compile_kernels.py [--arch 80 90 100] [--all]

For each tile that kernels/tiling.py can choose, the plain variant and the heaviest ones; --all adds every other
combination of flags and float16. Limits: no register spilled, at most 255 registers, shared memory within the device's,
16-bit and TensorFloat32 products on tensor cores (mma.sync, wgmma or tcgen05), and wgmma not serialised. Exit status 1
if one is broken. What this cannot show is that the code is right or fast: it is compiled, not run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from fga_fast.kernels import score_dense, score_topk, tiling
from fga_fast.kernels.gate import _gate
from fga_fast.kernels.score import _normalise
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may use
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What an argument points to, where that is not the dictionary's dtype.
POINTERS = {
    name: kind
    for kind, names in {
        "i64": "start order permutation",
        "i32": "top_index kept_index to_index index count groups",
        "fp32": "partial top_value to_value totals codes maxima value values kept_value scores contributions gates",
    }.items()
    for name in names.split()
} | dict.fromkeys(["x", "g", "encoder", "decoder", "bias", "theta", "scale", "mag_bias", "to"])
# By 16, as they are for real models.
DIVISIBLE = ["C", "F", "x_image", "x_patch", "g_row", "g_patch", "row_stride"]


class Variant(NamedTuple):
    """One kernel with its flags."""

    name: str
    kernel: Any
    dtype: str
    flags: dict[str, Any]
    warps: int
    stages: int
    tensor_cores: bool = False
    divisible: bool = True


class Report(NamedTuple):
    """What came of one variant."""

    variant: Variant
    arch: int
    registers: int
    spilled: int
    shared: int
    matrix_instructions: int
    serialised: bool

    def faults(self) -> list[str]:
        """The limits that are broken."""
        found = {
            f"{self.spilled} bytes spilled": self.spilled > 0,
            f"{self.registers} registers": self.registers > 255,
            f"{self.shared} bytes of shared memory": self.shared > SHARED[self.arch],
            f"no {TENSOR_CORE[self.arch]}": self.variant.tensor_cores and not self.matrix_instructions,
            "wgmma serialised": self.serialised,
        }
        return [fault for fault, broken in found.items() if broken]


def tuned_tiles(arch: int) -> Iterator[tuple[str, tiling.Tile]]:
    """Tiles that were measured on devices of this architecture."""
    for path in sorted(tiling.TUNED.glob("*.json")):
        table = tiling.tuned(path.stem)
        if table["capability"][0] == arch // 10:
            yield from table["tiles"].items()


def with_products(arch: int, every: bool) -> Iterator[Variant]:
    """Variants of the kernels with matrix products."""
    kinds = {"half": ("bf16", "ieee"), "tf32": ("fp32", "tf32"), "ieee": ("fp32", "ieee")}
    tiles = {
        (kind, use, tile, True) for (generation, kind, use), tile in tiling.TILES.items() if generation == arch // 10
    }
    tiles |= {(*name.split(), tile, True) for name, tile in tuned_tiles(arch)}
    tiles |= {(kind, use, tiling.UNALIGNED, False) for kind, use, *_ in tiles if every or kind == "ieee"}
    for kind, use, tile, aligned in sorted(tiles):
        dtype, precision = kinds[kind]
        for each, (name, flags) in itertools.product(
            ("bf16", "fp16") if every and kind == "half" else (dtype,),
            (encode_flags if use == "encode" else dense_flags)(use, tile, every),
        ):
            if not aligned and (flags["EVEN_C"] or not (every or "gated" in name)):
                continue
            flags |= {
                "PRECISION": precision,
                "INTERPRET": False,
                "BLOCK_T": tile.tokens,
                "BLOCK_F": tile.features,
                "BLOCK_C": tile.width,
                "GROUP": tiling.GROUP,
            }
            if kind != "ieee":  # Triton makes strides of 1 constants
                flags |= {"x_column": 1} | ({} if use == "encode" else {"g_column": 1})  # fmt: skip
            kernel = score_topk._encode if use == "encode" else score_dense._dense
            yield Variant(
                f"{use} {kind} {name}{'' if aligned else ' unaligned'}",
                kernel,
                each,
                flags,
                tile.warps,
                tile.stages,
                kind != "ieee" and aligned,
                aligned,
            )


def dense_flags(use: str, tile: tiling.Tile, every: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and flags of the dense kernel: plain, and the heaviest with one and with several targets."""
    for activation, (gradient, grouped), shuffled, even in itertools.product(
        ("relu", "threshold", "gated"), ((False, False), (True, False), (True, True)), (False, True), (True, False)
    ):
        plain = activation == "relu" and even and not shuffled
        heaviest = activation == "gated" and not even and shuffled
        if (shuffled and not gradient) or (use != "top" and grouped != (use == "targets")):
            continue
        if not (every or (gradient and (plain or heaviest))):
            continue
        name = f"{activation}{' shuffled' * shuffled}{' targets' * grouped}{'' if gradient else ' codes only'}"
        yield (
            name + ("" if even else " ragged"),
            {
                "ACTIVATION": activation, "GRADIENT": gradient, "GROUPED": grouped, "SHUFFLED": shuffled,
                "TOP": use == "top", "FUSED": tile.fused and gradient and not grouped, "EVEN_C": even,
            },
        )  # fmt: skip


def encode_flags(use: str, tile: tiling.Tile, every: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and flags of the encoder of the sparse route."""
    for activation, size, even in itertools.product(
        ("select", "relu", "threshold", "gated"), (0, 16, 32, 64), (True, False)
    ):
        if (size and activation != "select") or not (
            every or (activation == "select" and size) or activation == "gated"
        ):
            continue
        if not every and even == (activation == "gated"):
            continue
        yield (
            f"{activation} {size}{'' if even else ' ragged'}",
            {"ACTIVATION": activation, "GROUP_SIZE": size, "EVEN_C": even},
        )


def without_products(every: bool) -> Iterator[Variant]:
    """Variants of the other kernels."""
    for block in (256, 4096, 16384):
        yield Variant(f"gate {block}", _gate, "fp32", {"BLOCK": block}, min(16, block // 256), 3)
    for block, size in itertools.product((256, 2048, tiling.LONGEST_SELECTION), (0, 16, 32, 64) if every else (0, 64)):
        flags = {"GROUP_SIZE": size, "RELU": True, "BLOCK": block}
        yield Variant(f"select {block} {size}", score_topk._select, "fp32", flags, tiling.select_warps(block), 3)
    for block in (16, 4096):
        yield Variant(
            f"strongest {block}", score_dense._strongest, "fp32", {"BLOCK": block}, tiling.select_warps(block), 3
        )
    yield Variant("compact", score_topk._compact, "fp32", {"BLOCK": 2048}, 8, 3)
    for centre, block in itertools.product((True, False), (1024, 4096)):
        flags = {"EPSILON": 1e-5, "CENTRE": centre, "BLOCK": block}
        yield Variant(f"normalise {block}", _normalise, "bf16", flags, 4, 3)
    for dtype, block, top in itertools.product(("bf16", "fp32"), (256, 1024, 2048), (False, True)):
        for compacted, grouped, shuffled in itertools.product((False, True), (False, True), (False, True)):
            if (compacted and top) or not (every or (grouped and shuffled and block > 256)):
                continue
            flags = {
                "COMPACTED": compacted, "GROUPED": grouped, "SHUFFLED": shuffled, "TOP": top, "BLOCK_C": block,
                "BLOCK_K": tiling.gathered_rows(block),
            }  # fmt: skip
            name, warps = f"gather {block}{' compacted' * compacted}{' top' * top}", tiling.gather_warps(block)
            yield Variant(name, score_topk._gather, dtype, flags, warps, 3)


def compile_variant(variant: Variant, arch: int) -> Report:
    """Compiles with Triton's own ptxas and reads what it reports."""
    names = variant.kernel.arg_names
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in variant.flags:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = "*" + (POINTERS[name] or variant.dtype)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("slope", "log2_base") else "i32"
            if name in DIVISIBLE and variant.divisible:
                attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in variant.flags.items()}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        done = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": variant.warps, "num_stages": variant.stages},
        )
    text = log.getvalue()
    registers = re.search(r"Used (\d+) registers", text)
    if registers is None:
        raise SystemExit(f"ptxas did not say how many registers {variant.name} takes:\n{text}")
    return Report(
        variant, arch, int(registers[1]), sum(map(int, re.findall(r"(\d+) bytes spill stores", text))),
        done.metadata.shared, done.asm["ptx"].count(TENSOR_CORE[arch]), "C7512" in text,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED), default=sorted(SHARED))
    parser.add_argument("--all", action="store_true", help="every combination of flags, and float16 too")
    arguments = parser.parse_args()
    triton.knobs.compilation.always_compile = True  # a cached kernel has no report
    triton.knobs.nvidia.dump_ptxas_log = True
    broken = 0
    for arch in arguments.arch:
        for variant in (*with_products(arch, arguments.all), *without_products(arguments.all)):
            report = compile_variant(variant, arch)
            faults, instruction = report.faults(), TENSOR_CORE[arch]
            broken += bool(faults)
            print(
                f"sm_{arch} {variant.dtype} {variant.name:44} {report.registers:4} registers "
                f"{report.shared:7} B shared {report.matrix_instructions:4} {instruction}  {', '.join(faults) or 'ok'}",
                flush=True,
            )
    print(f"{broken} variants break a limit")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
