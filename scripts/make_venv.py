"""Creates a virtual environment and installs fga_fast in it (editable). Used by the Makefile.

    python3 scripts/make_venv.py .venv                    # torch and tools as pinned in constraints.txt
    python3 scripts/make_venv.py .venv --torch system     # the torch that this python3 imports, unchanged

Needs Python 3.10 or newer with its headers and venv module, and a C++ compiler. Safe to run again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What timm needs besides torch and torchvision. torchvision must match the exact build of torch, and pip cannot tell
# which one does. If the system has none, we install timm alone; fga_fast/models/timm_import.py handles that.
TIMM_NEEDS = ["pyyaml", "huggingface_hub", "safetensors"]


def check_machine() -> None:
    """Stop if something is missing that pip cannot install, and say what to install."""
    if sys.version_info < (3, 10):  # noqa: UP036 - any python3 may run this file
        raise SystemExit(f"fga_fast needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]}")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise SystemExit(f"no C++ compiler: {compiler!r} is not on PATH. Install one (Debian, Ubuntu: apt install g++)")
    if find_spec("ensurepip") is None:
        raise SystemExit(
            f"{sys.executable} cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise SystemExit(f"{header} is missing, the extension needs it (Debian, Ubuntu: apt install python3-dev)")


def run(*command: str | Path) -> None:
    """Run a command in the repository root; stop if it fails."""
    result = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False)
    if result.returncode != 0:
        raise SystemExit(f"failed with status {result.returncode}: {' '.join(map(str, command))}")


def answer(python: Path, code: str) -> str:
    """The output of a line of Python in the environment; "" if it fails."""
    result = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def share_torch(python: Path) -> list[str]:
    """Put this interpreter's torch on the environment's path and return pip constraints that keep it.

    Uses a .pth file, because --system-site-packages misses a torch that is itself in a virtual environment.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"TORCH=system: {sys.executable} has no torch. Name one that has (make demo TORCH=system PYTHON=...), "
            "or leave out TORCH=system and torch is installed"
        )
    folder = Path(spec.origin).resolve().parent.parent
    site = Path(answer(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    (site / "torch_of_the_system.pth").write_text(f"{folder}\n", encoding="utf-8")
    version = answer(python, "import torch; print(torch.__version__)")
    if not version:
        raise SystemExit(f"TORCH=system: torch in {folder} cannot be imported by {python}")
    print(f"using torch {version} in {folder}", flush=True)
    return [f"torch=={version}"]


def main() -> None:
    """Make or complete the environment named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch", choices=("pinned", "system"), default="pinned")
    options = parser.parse_args()
    check_machine()
    folder = options.folder.resolve()
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"creating {folder} with {sys.executable} ({sys.version.split()[0]})", flush=True)
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if options.torch == "system":
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join([*share_torch(python), "setuptools<82", ""]), encoding="utf-8")
        alone = not answer(python, "import torchvision; print('there')")
        extras = "plot" if alone else "models,plot"
    else:
        constraints, extras, alone = ROOT / "constraints.txt", "models,plot,test,dev", False
    print("installing torch and the building tools (the first time this is a large download)", flush=True)
    run(*pip, "-c", constraints, "torch", "numpy", "setuptools", "wheel", "ninja")
    print(f"building and installing fga_fast[{extras}]", flush=True)
    run(*pip, "-c", constraints, "--no-build-isolation", "-e", f".[{extras}]")
    if alone:
        run(*pip, "-c", constraints, *TIMM_NEEDS)
        run(*pip, "-c", ROOT / "constraints.txt", "--no-deps", "timm")
    if not answer(python, "import torch, fga_fast._C; print('loaded')"):
        raise SystemExit(
            f"fga_fast was installed but its native library does not load; run: {python} -c 'import torch, fga_fast._C'"
        )


if __name__ == "__main__":
    main()
