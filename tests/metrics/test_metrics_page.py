"""docs/metrics.md: its example runs and orders the methods as its text says; its calls and table have what exists."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from fga_fast import metrics

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
FUNCTIONS = {name: value for name in metrics.__all__ if inspect.isfunction(value := getattr(metrics, name))}


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "metrics.md", "exec"), names)
    assert capsys.readouterr().out.count("tensor(") == 2
    asked = (names["model"], names["images"], names["ours"].targets, names["maps"])
    _, transmm, chance = metrics.pixel_flipping(*asked).mean(1).tolist()
    assert transmm < chance


def test_names() -> None:
    assert set(re.findall(r"^\| \[`(\w+)`\]", PAGE, re.MULTILINE)) == set(FUNCTIONS)
    for name, arguments in re.findall(r"`(\w+)\(([^`]*)\)`", PAGE):
        if name in FUNCTIONS:
            known = inspect.signature(FUNCTIONS[name]).parameters
            for given in arguments.split(","):
                argument, _, default = given.strip().partition("=")
                assert argument in known, (name, argument)
                assert not default or str(known[argument].default) == default
