"""Result rows: what was measured, where, and on which commit."""

from __future__ import annotations

import csv
import io
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

from fga_fast import __version__
from fga_fast.io.atomic import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One measurement; benchmarks/results/README.md explains each column."""

    benchmark: str
    name: str
    batch: int
    tokens: int
    dtype: str = "float32"
    threads: int = 0
    L0: float | None = None
    rounds: int | None = None
    median_s: float | None = None
    min_s: float | None = None
    p99_s: float | None = None
    p999_s: float | None = None
    ratio_to_forward: float | None = None
    min_ratio_to_forward: float | None = None
    ratio_to_compiled: float | None = None
    ratio_to_plain: float | None = None
    ratio_to_reference: float | None = None
    peak_bytes: int | None = None
    images_per_s: float | None = None
    flops: float | None = None
    bytes: float | None = None
    share: float | None = None
    note: str = ""


def cpu_name() -> str:
    """The system's name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """The name of a device as part of a file name."""
    plain = re.sub(r"\((r|tm)\)|@.*", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def environment(device: str = "") -> dict[str, str]:
    """The columns that all rows of a run share. `device`: name of a GPU; by default the processor."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "commit": os.environ.get("FGA_FAST_COMMIT") or _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": "yes" if _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results") else "no",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "device": device or f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": str(os.cpu_count()),
        "load": f"{load:.1f}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fga_fast": __version__,
    }


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip()


def write_csv(path: Path, rows: Sequence[Row], common: dict[str, str]) -> None:
    """Writes rows with the columns that they share. The file is complete or absent."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*common, *(field.name for field in fields(Row))], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**common, **{name: _plain(value) for name, value in asdict(row).items()}})
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.getvalue().encode())


def _plain(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row]) -> str:
    """The rows as short text."""
    head = (
        "benchmark", "name", "batch", "tokens", "L0", "median ms",
        "/forward", "/compiled", "/plain", "/reference", "peak MiB",
    )  # fmt: skip
    lines = [head]
    for row in rows:
        lines.append(
            (
                row.benchmark, row.name, str(row.batch), str(row.tokens), _number(row.L0, ".0f"),
                _number(row.median_s and row.median_s * 1e3, ".3g" if (row.median_s or 0) < 1 else ".0f"),
                _number(row.ratio_to_forward, ".2f"), _number(row.ratio_to_compiled, ".2f"),
                _number(row.ratio_to_plain, ".2f"), _number(row.ratio_to_reference, ".3f"),
                _number(row.peak_bytes and row.peak_bytes / 2**20, ".0f") + ("  " + row.note).rstrip(),
            )
        )  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    return "\n".join(_line(cells, widths) for cells in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    words = [cell.ljust(width) for cell, width in zip(cells[:2], widths, strict=False)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:-1], widths[2:], strict=True)]
    return "  ".join([*words, *numbers, cells[-1]]).rstrip()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
