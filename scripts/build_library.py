"""Builds the CPU operators as one plain shared library, without Python in it, by calling the compiler directly.

    python scripts/build_library.py build/libfga_ops.so
    python scripts/build_library.py --sanitize build/sanitize/libfga_ops.so     # AddressSanitizer and UBSan

CMakeLists.txt makes the same library for C++ users; this needs no CMake, only the torch of the running Python. Load it
in place of fga_fast._C by setting FGA_FAST_LIBRARY to its path.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from setup import STABLE_ABI, sources  # noqa: E402

FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-fno-math-errno", "-fvisibility=hidden", STABLE_ABI, "-DNDEBUG"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def main() -> None:
    """Compile every core source, MAX_JOBS at a time, and link them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--sanitize", action="store_true")
    options = parser.parse_args()
    library: Path = options.library.resolve()
    library.parent.mkdir(parents=True, exist_ok=True)
    torch_root = Path(torch.__file__).resolve().parent
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    mode = ["-O1", "-g", *SANITIZE] if options.sanitize else ["-O3"]

    def compile_one(source: str) -> Path:
        target = library.parent / (source.replace("/", "_") + ".o")
        include = [f"-I{ROOT / 'csrc'}", "-isystem", str(torch_root / "include")]
        subprocess.run([*compiler, *FLAGS, *mode, *include, "-c", source, "-o", str(target)], cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = [str(target) for target in pool.map(compile_one, sources("core"))]
    link = ["-shared", *(SANITIZE if options.sanitize else []), "-o", str(library)]
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_root / 'lib'}"]
    subprocess.run([*compiler, *link, *objects, *libraries], cwd=ROOT, check=True)
    print(library)


if __name__ == "__main__":
    main()
