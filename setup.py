"""Builds the two native objects of fga_fast; everything else about the package is in pyproject.toml.

fga_fast._C     operator schemas and CPU kernels, always built
fga_fast._cuda  CUDA kernels, built when FGA_FAST_CUDA=1, or FGA_FAST_CUDA=auto (the default) and the toolkit is there

Both use LibTorch's stable ABI and Python's limited API, so one wheel serves several torch and Python versions.
Environment: FGA_FAST_CUDA (0, 1, auto), CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# The stable ABI's floor; raising it raises the oldest torch the wheel loads on (0x020a... is 2.10).
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# The newest architecture a toolkit knows bounds what we may ask of it: sm_100 came with CUDA 12.8.
ARCHITECTURES = {(12, 8): "8.0;9.0a;10.0+PTX", (12, 0): "8.0;9.0a+PTX"}


def sources(which: str) -> list[str]:
    """Files of one object ("core" or "cuda") as listed in csrc/sources.txt, relative to the repository root."""
    found: list[str] = []
    for line in (ROOT / "csrc" / "sources.txt").read_text(encoding="utf-8").splitlines():
        fields = line.split("#", 1)[0].split()
        if not fields or fields[0] != which:
            continue
        matches = sorted((ROOT / "csrc").glob(fields[1]))
        if not matches:
            raise SystemExit(f"csrc/sources.txt: {fields[1]!r} matches no file")
        found += [path.relative_to(ROOT).as_posix() for path in matches]
    return found


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder, accepted only if headers and compiler are in it.

    torch's own guess takes the folder above the first nvcc on PATH, which is wrong where that nvcc is a wrapper script.
    """
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for guess in guesses:
        if (
            guess
            and (Path(guess) / "include" / "cuda_runtime.h").is_file()
            and (Path(guess) / "bin" / "nvcc").is_file()
        ):
            return Path(guess)
    return None


def toolkit_version(toolkit: Path) -> tuple[int, int]:
    """Major and minor version of the toolkit's nvcc, (0, 0) if it cannot be run."""
    try:
        text = subprocess.run(
            [toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return (0, 0)
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def cuda_obstacle(toolkit: Path | None) -> str | None:
    """Why the CUDA object cannot be built here, or None if it can."""
    import torch

    if torch.version.cuda is None:
        return f"the torch that builds (torch {torch.__version__}) is a CPU-only build"
    if toolkit is None:
        return "no CUDA toolkit found (looked for include/cuda_runtime.h and bin/nvcc under CUDA_HOME, /usr/local/cuda)"
    version = toolkit_version(toolkit)
    if version[0] != int(torch.version.cuda.split(".")[0]):
        return f"toolkit {toolkit} is CUDA {version[0]}.{version[1]}, torch was built for CUDA {torch.version.cuda}"
    return None


def wanted_toolkit(toolkit: Path | None) -> Path | None:
    """The toolkit to build with after FGA_FAST_CUDA (0 never, 1 must, auto if possible); None builds without CUDA.

    Whether this machine has a GPU is never asked: wheels are built where there is none.
    """
    mode = os.environ.get("FGA_FAST_CUDA", "auto").strip().lower()
    if mode not in ("0", "1", "auto"):
        raise SystemExit(f"FGA_FAST_CUDA must be 0, 1 or auto, got {mode!r}")
    if mode == "0":
        print("fga_fast: building without CUDA (FGA_FAST_CUDA=0)")
        return None
    obstacle = cuda_obstacle(toolkit)
    if obstacle is None:
        print(f"fga_fast: building with CUDA from {toolkit}")
        return toolkit
    if mode == "1":
        raise SystemExit(
            f"FGA_FAST_CUDA=1 asks for CUDA kernels, but {obstacle}. Set FGA_FAST_CUDA=0 to build without."
        )
    print(f"fga_fast: building without CUDA: {obstacle}")
    return None


def extensions() -> tuple[list[object], dict[str, object]]:
    """The extension modules and the command that builds them."""
    toolkit = find_toolkit()
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)  # before torch.utils.cpp_extension reads it
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"building fga_fast needs torch >= 2.10 in the building environment ({error}); "
            "install torch first, or leave out --no-build-isolation so that pip fetches one"
        ) from error

    class Build(BuildExtension):  # type: ignore[misc, valid-type]
        """Keeps objects, so that a wheel after an editable install only links; ninja knows which ones are stale."""

        def finalize_options(self) -> None:
            super().finalize_options()
            made_for = (sysconfig.get_platform(), sys.implementation.cache_tag, f"torch-{torch.__version__}")
            self.build_temp = "-".join(["build/objects", *map(str, made_for), *map(str, compiler)])

    compiler = toolkit_version(toolkit) if toolkit is not None else ()
    # Error messages name source files; they must not carry the building machine's folders.
    flags = ["-O3", "-fno-math-errno", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}=.", STABLE_ABI]
    modules: list[object] = [
        CppExtension(
            "fga_fast._C",
            [*sources("core"), "csrc/py.c"],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": [*flags, "-Wall"]},
            py_limited_api=True,
        )
    ]
    toolkit = wanted_toolkit(toolkit)
    if toolkit is not None:
        version = toolkit_version(toolkit)
        known = next((value for floor, value in ARCHITECTURES.items() if version >= floor), "8.0+PTX")
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", known)
        modules.append(
            CUDAExtension(
                "fga_fast._cuda",
                [*sources("cuda"), "csrc/py_cuda.c"],
                include_dirs=[str(ROOT / "csrc")],
                extra_compile_args={
                    "cxx": [*flags, "-Wall", "-DUSE_CUDA"],
                    "nvcc": ["-O3", "-DUSE_CUDA", STABLE_ABI],
                },
                py_limited_api=True,
            )
        )
    return modules, {"build_ext": Build}


if __name__ == "__main__":
    ext_modules, commands = extensions()
    setup(
        license="Apache-2.0",
        packages=[*find_packages(include=["fga_fast", "fga_fast.*"]), "fga_fast.kernels"],
        package_dir={"fga_fast": "fga_fast", "fga_fast.kernels": "kernels"},  # editable installs follow this too
        ext_modules=ext_modules,
        cmdclass=commands,
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
