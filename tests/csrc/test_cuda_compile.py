"""The CUDA kernels through nvcc for every architecture that is shipped: no spills, registers, tensor cores. No GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
KERNELS = ("attention_relevance", "gate")


class Compiled(NamedTuple):
    kernels: dict[str, dict[str, int]]  # registers, spilled bytes and shared memory by name
    cubin: Path


def toolkit() -> Path | None:
    for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if folder and (Path(folder) / "bin" / "nvcc").is_file():
            return Path(folder)
    return None


def machine_code(cubin: Path) -> str:
    """What cuobjdump says, the one on PATH or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    spec = None if found else importlib.util.find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.is_file() else None
    if found is None:
        pytest.skip("no cuobjdump, neither on PATH nor with Triton")
    return subprocess.run([found, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout


pytestmark = pytest.mark.skipif(toolkit() is None, reason="no nvcc")


def parse(report: str) -> dict[str, dict[str, int]]:
    """What ptxas -v says of each kernel."""
    kernels = {}
    for part in report.split("Compiling entry function '")[1:]:
        shared = re.search(r"(\d+) bytes smem", part)
        numbers = [re.search(pattern, part) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
        assert all(numbers), part
        registers, spilled = (int(match[1]) for match in numbers if match)
        kernels[part.split("'")[0]] = {
            "registers": registers, "spilled": spilled, "shared": int(shared[1]) if shared else 0,
        }  # fmt: skip
    return kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Compiled]:
    found = toolkit()
    assert found is not None
    folder = tmp_path_factory.mktemp("cubin")
    result = {}
    for stem in KERNELS:
        for architecture in ARCHITECTURES:
            cubin = folder / f"{stem}_{architecture}.cubin"
            run = subprocess.run(
                [
                    found / "bin" / "nvcc", "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", "-cubin",
                    "-Werror", "all-warnings", "-o", cubin, ROOT / "csrc" / "cuda" / f"{stem}.cu",
                ],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert run.returncode == 0, run.stderr
            result[stem, architecture] = Compiled(parse(run.stderr), cubin)
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", KERNELS)
def test_no_spills(compiled: dict[tuple[str, str], Compiled], stem: str, architecture: str) -> None:
    kernels = compiled[stem, architecture].kernels
    assert kernels and {name: k["spilled"] for name, k in kernels.items() if k["spilled"]} == {}
    assert all(k["shared"] <= 48 * 1024 for k in kernels.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_on_a_multiprocessor(compiled: dict[tuple[str, str], Compiled], architecture: str) -> None:
    """65,536 registers hold three blocks of 128 threads for 16-bit numbers, two for float32."""
    for name, kernel in compiled["attention_relevance", architecture].kernels.items():
        assert kernel["registers"] <= (255 if "5Float" in name else 168), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensor_cores(compiled: dict[tuple[str, str], Compiled], architecture: str) -> None:
    """Every attention kernel multiplies on tensor cores in its own type and copies asynchronously."""
    text = machine_code(compiled["attention_relevance", architecture].cubin)
    functions = {part.split("\n", 1)[0].strip(): part for part in text.split("Function : ")[1:]}
    multiplying = {name: code for name, code in functions.items() if "combine_kernel" not in name}
    assert all(any(kind in name for name in multiplying) for kind in ("5Float", "4Bf16", "4Half"))
    for name, code in multiplying.items():
        kind = "TF32" if "5Float" in name else "BF16" if "4Bf16" in name else "F32"
        products = re.findall(r"HMMA\.(\S+)", code)
        assert products and all(kind in product for product in products), (name, set(products))
        assert "LDGSTS" in code and "LDL" not in code and "STL" not in code, name
        assert "MUFU.EX2" in code, name
        assert not re.search(r"@!?U?P\d\s+(HMMA|BAR)", code), name  # the whole warp or none of it


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gate_counts_with_native_atomics(compiled: dict[tuple[str, str], Compiled], architecture: str) -> None:
    """Scores crowd into few bins: where an addition is a loop of compare-and-swap, a warp's lanes take turns in it."""
    text = machine_code(compiled["gate", architecture].cubin)
    assert "ATOMS" in text and not re.search(r"ATOMS\S*CAS", text), set(re.findall(r"ATOMS\S*", text))
