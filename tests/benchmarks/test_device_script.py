"""The scripts that measure a device, at toy sizes on the CPU: they must work when a device is there."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
SESSION = "FGA relu 1700, package, C++ session, composite"


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "device" / "rows_cuda.py"), str(tmp_path), "--rehearse"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "gpu-rehearsal.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {(row["benchmark"], row["name"], row["dtype"]) for row in rows}
    for wanted in (
        ("ceiling", "matmul", "bfloat16"), ("gate", "composite", "float32"), ("attention", "native", "bfloat16"),
        ("relevance", "native", "float32"),
        ("score", "topk 64, native", "float32"), ("explainer", "FGA relu 1700, composite", "bfloat16"),
        ("explainer", "TransMM, reference", "float32"), ("memory", "FGA, reference", "bfloat16"),
        ("graph", "FGA relu 1700, compiled, native", "bfloat16"), ("graph", "FGA relu 1700, eager, native", "bfloat16"),
        ("graph", "FGA relu 1700, package, composite", "bfloat16"), ("graph", SESSION, "bfloat16"),
        ("graph", "FGA relu 1700, package, native", "bfloat16"),
        ("soak", "FGA relu 1700, compiled, native", "bfloat16"),
    ):  # fmt: skip
        assert wanted in names
    (session,) = (row for row in rows if row["name"] == SESSION)
    if not environment.get("FGA_FAST_CMAKE_BUILD"):
        assert session["note"].startswith("not run: FGA_FAST_CMAKE_BUILD")
        rows.remove(session)
    assert not any(row["note"].startswith("not run") for row in rows)
    assert all(float(row["median_s"]) > 0 for row in rows if row["benchmark"] not in ("ceiling", "soak"))
    assert "all bit-equal" in next(row["note"] for row in rows if row["benchmark"] == "soak")
    assert f"{SESSION}, bfloat16, batch 1" in done.stdout or not session["median_s"]
    chart = ElementTree.parse(tmp_path / "gpu-rehearsal.svg")
    assert len(chart.findall(".//{http://www.w3.org/2000/svg}rect")) > 8


def test_the_scripts_are_valid_bash() -> None:
    script = ROOT / "benchmarks" / "device" / "run.sh"
    for file in (script, script.with_name("build_session.sh")):
        done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    named = [word for word in script.read_text(encoding="utf-8").split() if word.startswith("tests/")]
    assert named and all((ROOT / name).is_file() for name in named)
