"""Rows on a CUDA device: plain forward, the reference on the device, and the gate kernel. `rows_cuda.py OUT_FOLDER`.

STATUS: has never run. In this version the fast path of a whole explanation is CPU code, so what can be measured on a
device is the reference (the "before" of kernels to come) and the one CUDA kernel there is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import subjects
from rows import Row, environment, slug, table, write_csv
from timing import Race, Timing

from fga_fast import Explainer, ops, reference

ROUNDS = 7
GATE_CALLS = 50  # calls a timing


def peak_of(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def raced(baseline: Callable[[], object], contestants: Mapping[str, Callable[[], object]]) -> Race:
    race = Race(baseline, contestants, torch.cuda.synchronize)
    race.warm_up()
    for _ in range(ROUNDS):
        race.round()
    return race


def timed(blank: Row, name: str, timing: Timing, calls: int = 1) -> Row:
    return replace(blank, name=name, rounds=timing.rounds, median_s=timing.median / calls, min_s=timing.minimum / calls)


def gate_rows() -> list[Row]:
    rows = []
    for images, patches in ((1, 196), (32, 196), (32, 4096)):
        scores = torch.randn(images, patches, device="cuda")
        torch.testing.assert_close(ops.gate(scores), reference.gate(scores, 10.0, 1.0))

        def repeat(gate: Callable[..., object], scores: torch.Tensor = scores) -> None:
            for _ in range(GATE_CALLS):
                gate(scores, 10.0, 1.0)

        race = raced(partial(repeat, reference.gate), {"native": partial(repeat, ops.gate)})
        blank = Row("gate", "", images, patches)
        rows.append(replace(timed(blank, "reference", race.baseline(), GATE_CALLS), ratio_to_reference=1.0))
        native = race.result("native")
        rows.append(replace(timed(blank, "native", native, GATE_CALLS), ratio_to_reference=native.ratio))
    return rows


def explanation_rows() -> list[Row]:
    model = subjects.vit()
    found = {}
    for block, x in subjects.streams(model, (9, 10), subjects.images(2)).items():
        found[block] = subjects.Dictionary(x, 49_152, seed=block).relu(1700)
    model.cuda()
    saes = {block: sae.cuda() for block, (sae, _) in found.items()}
    L0 = sum(active for _, active in found.values()) / len(found)
    rows = []
    for batch in (1, 8):
        images = subjects.images(batch).cuda()

        @torch.no_grad()
        def forward(images: torch.Tensor = images) -> torch.Tensor:
            logits: torch.Tensor = model(images)
            return logits

        ways = {
            "reference TransMM": partial(Explainer(model, backend="reference"), images),
            "reference FGA relu 1700": partial(Explainer(model, saes, backend="reference"), images),
        }
        race = raced(forward, ways)
        blank = Row("explainer", "", batch, 197)
        row = timed(blank, "forward", race.baseline())
        rows.append(replace(row, ratio_to_forward=1.0, peak_bytes=peak_of(forward)))
        for name, work in ways.items():
            timing = race.result(name)
            row = replace(timed(blank, name, timing), ratio_to_forward=timing.ratio, ratio_to_reference=1.0)
            rows.append(replace(row, L0=L0 if "FGA" in name else None, peak_bytes=peak_of(work)))
    return rows


def main() -> None:
    device = torch.cuda.get_device_name()
    common = environment(f"{device}, CUDA {torch.version.cuda}")
    rows = explanation_rows() + gate_rows()
    path = Path(sys.argv[1]) / f"gpu-{slug(device)}.csv"
    write_csv(path, rows, common)
    print(table(rows))
    print(f"{len(rows)} rows in {path}")


if __name__ == "__main__":
    main()
