"""Runs that go on after a break: one process at a time writes into a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fga_fast.io.resume import only_writer

HOLD = """
import pathlib, sys
from fga_fast.io.resume import only_writer

with only_writer(pathlib.Path(sys.argv[1])):
    print("in", flush=True)
    input()
"""


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match=r"out: another run writes into .*; wait for its end")
    with only_writer(tmp_path), refused, only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="another run"), only_writer(tmp_path):
            pass
        process.kill()
        process.wait()
        with only_writer(tmp_path):
            pass
