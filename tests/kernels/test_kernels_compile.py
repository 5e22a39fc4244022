"""Machine code of the Triton kernels for GPUs that are not there: registers, spills, shared memory, tensor cores."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fga_fast.kernels import tiling

ROOT = Path(__file__).resolve().parents[2]


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


def test_plain_float32_tokens_are_read_side_by_side() -> None:
    """Four tokens at a time: 16 columns are 16 reads of a thread, in each of two products."""
    done = compile_kernels(
        "c.triton.knobs.compilation.always_compile = c.triton.knobs.nvidia.dump_ptxas_log = True;"
        "found, make = [], c.triton.compile;"
        "c.triton.compile = lambda *a, **k: (found.append(make(*a, **k)), found[-1])[1];"
        "v = next(v for v in c.with_products(90, False) if v.name == 'dense ieee relu');"
        "c.compile_variant(v, 90); print('wide', found[0].asm['ptx'].count('ld.shared.v4'))"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 2 * 16


def test_launches_bind_their_arguments() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/kernels_bound.py"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_tile_that_does_not_fit_is_found() -> None:
    """128 x 256 accumulators twice are as much as the register file holds."""
    done = compile_kernels(
        "c.tiling.TILES = {(9, 'half', 'dense'): c.tiling.Tile(128, 256, 64, 8, 4)};"
        "c.without_products = lambda _: (); sys.argv = ['', '--arch', '90']; sys.exit(c.main())"
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert "bytes spilled" in done.stdout and "bytes of shared memory" in done.stdout


@pytest.mark.parametrize(
    "wish",
    (
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ),
)
def test_tensorfloat32_is_taken_however_torch_was_asked_for_it(wish: str) -> None:
    """In a process of its own: torch refuses its older getters once the newer setting was used."""
    done = compile_kernels(
        "import torch; f = torch.float32; assert c.tiling.precision(f) == 'ieee';"
        f"{wish}; assert c.tiling.precision(f) == 'tf32' and c.tiling.precision(torch.half) == 'ieee'"
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_tiles_are_a_function_of_shape_dtype_and_device() -> None:
    assert tiling.tile("dense", torch.bfloat16, (9, 0), 768) == tiling.tile("dense", torch.float16, (9, 0), 768)
    assert tiling.tile("dense", torch.bfloat16, (8, 6), 768) == tiling.tile("dense", torch.bfloat16, (12, 0), 768)
    assert tiling.tile("dense", torch.bfloat16, (9, 0), 767) == tiling.UNALIGNED


def test_routes_and_workspaces() -> None:
    assert tiling.route("topk", None, True) == "sparse"
    assert tiling.route("relu", None, False) == "dense"
    assert tiling.route("relu", 1700 / 49152, False) == "dense"
    assert tiling.route("relu", 64 / 49152, False) == "sparse"
    assert tiling.route("relu", 64 / 49152, True) == "dense"
    tile = tiling.tile("encode", torch.bfloat16, (9, 0), 768)
    group = tiling.group_size(49152, 64)
    assert group == 64 and tiling.group_size(8192, 8192) == 0 and tiling.group_size(49152, 4096) == -1
    tokens = tiling.tokens_a_launch(tile, 49152, group, 10**6)
    assert tokens % tile.tokens == 0 and tokens * (49152 + 768) * 4 <= tiling.WORKSPACE
    dense = tiling.tile("dense", torch.bfloat16, (9, 0), 768)
    assert tiling.tiles_a_launch(dense, 384, 32 * 196, 0, 0) == 384
    assert 1 <= tiling.tiles_a_launch(dense, 384, 10**6, 0, 0) * 4 * 10**6 <= tiling.WORKSPACE


def test_tiles_measured_on_a_device_are_taken_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiling, "TUNED", tmp_path)
    table = {"tiles": {"half dense": [64, 64, 32, 4, 2, False]}, "sparse_share": 0.5}
    (tmp_path / "some-gpu-9.json").write_text(json.dumps(table))
    (tmp_path / "broken.json").write_text("[]")
    tile, dtype = tiling.tile, torch.bfloat16
    assert tile("dense", dtype, (9, 0), 768, "Some GPU (9)") == tiling.Tile(64, 64, 32, 4, 2, False)
    assert tile("encode", dtype, (9, 0), 768, "Some GPU (9)") == tile("encode", dtype, (9, 0), 768)
    assert tile("dense", dtype, (9, 0), 768, "Other GPU") == tile("dense", dtype, (9, 0), 768)
    assert tiling.route("relu", 0.4, False, "Some GPU (9)") == "sparse"
    with pytest.raises(ValueError, match=r"broken\.json: expected what benchmarks/device/tune\.py writes"):
        tile("dense", dtype, (9, 0), 768, "broken")


def test_costs() -> None:
    """Of 2 tokens with 3 rows, width 4, 5 features and 16 bits, counted by hand."""
    assert tiling.dense_cost(2, 3, 4, 5, 2) == (2 * 4 * 5 * 5, 2 * 4 * (2 + 3 + 10) + 12)
    assert tiling.encode_cost(2, 4, 5, 2) == (2 * 4 * 5 * 2, 2 * 4 * (2 + 5) + 80)
    assert tiling.gather_cost(2, 3, 4, 5, 2) == (2 * 4 * 13, 2 * 4 * 13 + 80 + 12)


def test_the_tuner_times_candidates_where_it_ran_before() -> None:
    """A table of the device is there; what is launched must not come from it, and what is not timed must stay."""
    code = (
        "import sys; sys.argv = ['tune', '--rehearse', '--kinds', 'half', '--uses', 'dense'];"
        "sys.path[:0] = ['benchmarks/device']; import tune; from fga_fast.kernels import score_dense;"
        "t = tune.tiling; old, seen, launch = t.Tile(16, 16, 16, 4, 2), set(), score_dense._launch;"
        "t.tuned = lambda _: {'tiles': {'half dense': old, 'half top': old}, 'sparse_share': 0.0};"
        "score_dense._launch = lambda problem, tile, *more: (seen.add(tile), launch(problem, tile, *more))[1];"
        "status = tune.main(); assert old not in seen and len(seen) == 3, seen; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert '"half top"' in done.stdout and '"half dense"' in done.stdout


def test_the_tuner_runs() -> None:
    command = [sys.executable, "benchmarks/device/tune.py", "--rehearse", "--kinds", "half"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "rehearsed: nothing written" in done.stdout and "other scores" not in done.stdout
