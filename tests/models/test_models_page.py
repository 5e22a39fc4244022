"""docs/models.md: its tables are what scripts/models_table.py writes, and its example runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import families
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"


def test_the_tables_are_up_to_date() -> None:
    for library in families.LIBRARIES.values():
        pytest.importorskip(library)
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "scripts" / "models_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = PAGE.read_text(encoding="utf-8")
    assert script.render(text) == text, "run python scripts/models_table.py"
    assert "| **" not in text  # what the script writes for an error over the bound


def test_the_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "docs/models.md", "exec"), {"__name__": "example"})
    (expected,) = re.findall(r"print\(.*\)  # (.*)", code)
    assert capsys.readouterr().out.strip() == expected
