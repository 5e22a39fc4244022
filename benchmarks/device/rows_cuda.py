"""All rows of a CUDA device: ceilings, stages, whole explanations, packages, memory. `rows_cuda.py OUT_FOLDER`.

STATUS: has never run on a device. `rows_cuda.py OUT_FOLDER --rehearse` runs the same code at toy sizes on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import chart
import compiled_rows
import explanation_rows
import kernel_rows
import steadiness
from device import Ceilings, Device, measure_ceilings
from rows import Row, environment, slug, table, write_csv

from fga_fast.engine import backends


def stages_here(device: Device) -> dict[str, backends.Stages]:
    """The backends that load on this device. Prints why another one does not."""
    found = {}
    for name in ("native", "triton", "composite"):
        try:
            choice = backends.choose(name, torch.device(device.kind), torch.bfloat16)
        except RuntimeError as problem:
            print(f"{name}: {problem}", flush=True)
            continue
        if choice.stages is not None:
            found[name] = choice.stages
    return found


def ceiling_rows(ceilings: Ceilings) -> Iterator[Row]:
    yield Row("ceiling", "copy", 1, 0, "", note=f"{ceilings.copy / 1e12:.2f} TB/s read and written")
    for dtype, rate in ceilings.matmul.items():
        name = str(dtype).removeprefix("torch.")
        yield Row("ceiling", "matmul", 1, 0, name, note=f"{rate / 1e12:.0f} TFLOP/s")


def all_rows(device: Device) -> Iterator[Row]:
    stages = stages_here(device)
    ceilings = measure_ceilings(device)
    yield from ceiling_rows(ceilings)
    yield from kernel_rows.gate_rows(device, ceilings, stages)
    yield from kernel_rows.relevance_rows(device, ceilings)
    yield from kernel_rows.attention_rows(device, ceilings, stages)
    yield from kernel_rows.score_rows(device, ceilings, stages)
    built = explanation_rows.build(device)
    yield from explanation_rows.rows(device, built, list(stages), torch.bfloat16)
    yield from compiled_rows.rows(device, built, "native" if "native" in stages else "composite")
    yield from explanation_rows.memory_rows(device, list(stages))
    yield from explanation_rows.rows(device, built, list(stages), torch.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no new row after this long")
    args = parser.parse_args()
    device = Device("cpu" if args.rehearse else "cuda", args.rehearse, time.monotonic() + args.seconds)
    common = environment(device.name if args.rehearse else f"{device.name}, CUDA {torch.version.cuda}")
    path = args.out / f"gpu-{slug(device.name)}.csv"
    rows: list[Row] = []
    for row in all_rows(device):
        rows.append(row)
        write_csv(path, rows, common)  # after each row, so that an interrupted run keeps its rows
        if device.left() < 0:
            print(f"stopped after {args.seconds:.0f} s; the rows after {row.benchmark} {row.name!r} are missing")
            break
    (args.out / f"gpu-{slug(device.name)}.svg").write_text(chart.draw(rows, device.name), encoding="utf-8")
    print(table(rows))
    print(f"\nCalls one after the other:\n{steadiness.table(rows)}\n")
    bad = [row for row in rows if row.note.startswith(("WRONG", "FAILED"))]
    print(f"{len(rows)} rows in {path}, {len(bad)} of them wrong or failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
