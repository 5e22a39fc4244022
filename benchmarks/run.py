"""Runs the benchmarks: `make bench`, or `python benchmarks/run.py [--quick] [bench_score.py ...] [pytest options]`.

A full run writes benchmarks/results/cpu-<model>.csv; with --quick or chosen files it only prints. The table comes last.
With --keep-memory the process keeps freed memory (results/README.md says why).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# glibc reads these at process start. No tensor gets its own mapping, and freed memory stays with the process.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def main() -> int:
    """Runs pytest on the benchmarks and returns its exit status."""
    chosen = [argument for argument in sys.argv[1:] if argument.endswith(".py") or ".py::" in argument]
    options = [argument for argument in sys.argv[1:] if argument not in chosen]
    environment = dict(os.environ)
    if "--keep-memory" in options:
        options.remove("--keep-memory")
        environment |= KEEP_MEMORY
    keep = [] if chosen or "--quick" in options or "--rows" in options else ["--keep-rows"]
    files = [str(HERE / name) for name in chosen] or [str(HERE)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-columns=median,rounds"]
    return subprocess.run([*command, *keep, *options, *files], cwd=HERE.parent, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
