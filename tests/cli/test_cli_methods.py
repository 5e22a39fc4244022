"""`fga-fast explain` hands its settings on: methods, backward rules, depth, sign, backends."""

from __future__ import annotations

from pathlib import Path

import pytest

from fga_fast import Explanation
from fga_fast.cli.main import main


def explained(out: Path, *arguments: str) -> Explanation:
    assert main(["explain", *arguments, "--out", str(out)]) == 0
    return Explanation.load(next(iter(sorted(out.rglob("relevance.safetensors")))))


def test_settings_are_handed_on(tmp_path: Path) -> None:
    plain = explained(tmp_path / "plain")
    assert bool((plain.relevance >= 0).all()) and plain.start_layer == 0
    signed = explained(tmp_path / "signed", "--signed")
    assert bool((signed.relevance < 0).any())
    shares = explained(tmp_path / "shares", "--method", "input_x_gradient", "--backward", "conservative")
    assert bool((shares.relevance < 0).any())
    assert explained(tmp_path / "late", "--start-layer", "2").start_layer == 2
    assert explained(tmp_path / "composite", "--backend", "composite").backend == "composite"


def test_a_start_beyond_an_autoencoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--start-layer", "3", "--out", str(tmp_path / "out")]) == 2
    assert "saes[2]" in capsys.readouterr().err
