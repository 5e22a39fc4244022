"""Machine code of the Triton kernels for GPUs that are not there: registers, spills, shared memory, tensor cores."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fga_fast import triton_kernels

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


def compile_kernels(code: str) -> subprocess.CompletedProcess[str]:
    """Runs scripts/compile_kernels.py or code that imports it, never in the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'scripts'); import compile_kernels as c; {code}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("arch", (80, 90, 100))
def test_every_tile_compiles_within_the_limits(arch: int) -> None:
    done = compile_kernels(f"sys.argv = ['', '--arch', '{arch}']; sys.exit(c.main())")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert all(line.endswith("ok") for line in lines[:-1]) and len(lines) > 40
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch]
    sixteen_bit = [line for line in lines if re.search(r" bf16 (dense|targets|top|encode) half", line)]
    assert len(sixteen_bit) >= 9
    assert all(int(re.search(rf"(\d+) {instruction}", line)[1]) > 0 for line in sixteen_bit)  # type: ignore[index]


def test_a_tile_that_does_not_fit_is_found() -> None:
    """128 x 256 accumulators twice are as much as the register file holds."""
    done = compile_kernels(
        "c._tiling._TILES = {(9, 'half', 'dense'): c._tiling.Tile(128, 256, 64, 8, 4)};"
        "c.without_products = lambda _: (); sys.argv = ['', '--arch', '90']; sys.exit(c.main())"
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert "bytes spilled" in done.stdout and "bytes of shared memory" in done.stdout


def test_tiles_are_a_function_of_shape_dtype_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_kernels.load()
    from fga_fast.kernels import _tiling

    assert _tiling.tile("dense", torch.bfloat16, (9, 0), 768) == _tiling.tile("dense", torch.float16, (9, 0), 768)
    assert _tiling.tile("dense", torch.bfloat16, (8, 6), 768) == _tiling.tile("dense", torch.bfloat16, (12, 0), 768)
    assert _tiling.tile("dense", torch.bfloat16, (9, 0), 767) == _tiling.UNALIGNED
    assert _tiling.precision(torch.float32) == "ieee"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert _tiling.precision(torch.float32) == "tf32" and _tiling.precision(torch.float16) == "ieee"


def test_routes_and_workspaces() -> None:
    triton_kernels.load()
    from fga_fast.kernels import _tiling

    assert _tiling.route("topk", 49152, None, True) == "sparse"
    assert _tiling.route("relu", 49152, None, False) == "dense"
    assert _tiling.route("relu", 49152, 1700 / 49152, False) == "dense"
    assert _tiling.route("relu", 49152, 64 / 49152, False) == "sparse"
    assert _tiling.route("relu", 49152, 64 / 49152, True) == "dense"
    tile = _tiling.tile("encode", torch.bfloat16, (9, 0), 768)
    group = _tiling.group_size(49152, 64)
    assert group == 64 and _tiling.group_size(8192, 8192) == 0 and _tiling.group_size(49152, 4096) == -1
    tokens = _tiling.tokens_a_launch(tile, 49152, group, 10**6)
    assert tokens % tile.tokens == 0 and tokens * (49152 + 768) * 4 <= _tiling.WORKSPACE
    dense = _tiling.tile("dense", torch.bfloat16, (9, 0), 768)
    assert _tiling.tiles_a_launch(dense, 384, 32 * 196, 0, 0) == 384
    assert 1 <= _tiling.tiles_a_launch(dense, 384, 10**6, 0, 0) * 4 * 10**6 <= _tiling.WORKSPACE
