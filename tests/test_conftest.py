"""In CI a test may not be skipped for a missing library, elsewhere it may."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODULE = "import pytest\npytest.importorskip('no_such_library')\n"
TEST = "import pytest\ndef test_it():\n    pytest.importorskip('no_such_library')\n"
OTHER = "import pytest\ndef test_it():\n    pytest.skip('for a good reason')\n"


@pytest.mark.parametrize(("ci", "outcome"), [("1", "1 failed, 1 skipped, 1 error"), ("", "3 skipped")])
def test_a_skip_for_a_missing_library(tmp_path: Path, ci: str, outcome: str) -> None:
    for name in ("conftest.py", "conformance.py"):
        shutil.copy(HERE / name, tmp_path)
    for index, text in enumerate((MODULE, TEST, OTHER)):
        (tmp_path / f"test_{index}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    environment = {**os.environ, "CI": ci}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert outcome in ran.stdout
    assert (ran.returncode != 0) is bool(ci)
