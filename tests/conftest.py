"""Shared by all tests: a fixed seed, and the rule that conformance is never skipped where its numbers are."""

from __future__ import annotations

from collections.abc import Generator

import conformance
import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.path.name == "test_conformance.py" and conformance.required():
        report.outcome = "failed"
        report.longrepr = f"conformance test skipped although {conformance.folder()} exists: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if conformance.LARGEST:
        terminalreporter.section("largest errors against the conformance numbers")
        for quantity, (of_norm, of_element) in sorted(conformance.LARGEST.items()):
            terminalreporter.write_line(f"{quantity:<34} {of_norm:.1e} norm-wise   {of_element:.1e} at most")
