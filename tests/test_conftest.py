"""In CI a test may not be skipped for a missing library, nor one of conformance where its numbers are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import conformance
import pytest

HERE = Path(__file__).parent
MODULE = "import pytest\npytest.importorskip('no_such_library')\n"
TEST = "import pytest\ndef test_it():\n    pytest.importorskip('no_such_library')\n"
OTHER = "import pytest\ndef test_it():\n    pytest.skip('for a good reason')\n"


@pytest.mark.parametrize(("ci", "outcome"), [("1", "2 failed, 1 skipped, 1 error"), ("", "4 skipped")])
def test_a_skip_that_must_not_be(tmp_path: Path, ci: str, outcome: str) -> None:
    for name in ("conftest.py", "conformance.py"):
        shutil.copy(HERE / name, tmp_path)
    for name, text in {"module": MODULE, "test": TEST, "other": OTHER, "conformance": OTHER}.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    environment = {**os.environ, "CI": ci, conformance.REQUIRE: "", conformance.VARIABLE: str(tmp_path)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert outcome in ran.stdout
    assert (ran.returncode != 0) is bool(ci)
