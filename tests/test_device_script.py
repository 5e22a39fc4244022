"""The script that measures a device, at toy sizes on the CPU: it has to run when a device is there at last."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
        ("graph", "FGA relu 1700, compiled, native", "bfloat16"),
    ):  # fmt: skip
        assert wanted in names
    assert all(float(row["median_s"]) > 0 for row in rows if row["benchmark"] != "ceiling")
    chart = ElementTree.parse(tmp_path / "gpu-rehearsal.svg")
    assert len(chart.findall(".//{http://www.w3.org/2000/svg}rect")) > 8


def test_the_script_is_valid_bash() -> None:
    script = ROOT / "benchmarks" / "device" / "run.sh"
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    named = [word for word in script.read_text(encoding="utf-8").split() if word.startswith("tests/")]
    assert named and all((ROOT / name).is_file() for name in named)
