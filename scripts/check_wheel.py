"""Fails unless a wheel holds every Python and data file of fga_fast/, the native objects, and nothing else."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = {".so", ".pyc"}


def shipped() -> set[str]:
    """Every Python and data file of a wheel, by its path there."""
    folders = ((ROOT / "fga_fast", "fga_fast"), (ROOT / "kernels", "fga_fast/kernels"))
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for folder, prefix in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in NOT_SHIPPED
    }


def main() -> None:
    """Check the wheel named on the command line."""
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        records = [name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL")]
        tags = [line for line in wheel.read(records[0]).decode().splitlines() if line.startswith("Tag:")]
    if not all(tag.startswith("Tag: cp310-abi3-") for tag in tags):
        raise SystemExit(f"the wheel is tagged {tags}, expected cp310-abi3")
    expected = {"fga_fast/_C.abi3.so", *shipped()}
    if os.environ.get("FGA_FAST_CUDA") == "1":
        expected.add("fga_fast/_cuda.abi3.so")
    if expected != inside:
        raise SystemExit(f"missing: {sorted(expected - inside)}; not expected: {sorted(inside - expected)}")
    print(f"{Path(sys.argv[1]).name}: {len(inside)} files as expected")


if __name__ == "__main__":
    main()
