"""What the tests of commands share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fga_fast.cli.main import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that has to end with exit code 2 and one message, and returns that message."""

    def run(*given: object) -> str:
        assert main([*map(str, given)]) == 2
        text = capsys.readouterr().err
        assert text.startswith("fga-fast: error: ") and "Traceback" not in text
        return text

    return run
