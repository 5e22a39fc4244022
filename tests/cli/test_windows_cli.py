"""`fga-fast explain` on images of more than 8 bits: the window, what the report says of it, what the figure shows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import write_dicom
from PIL import Image

from fga_fast import Explanation, Preprocess, load_image
from fga_fast.assets import fashion_config, fashion_model
from fga_fast.cli import report
from fga_fast.cli.main import main
from fga_fast.explainer import explain

Refused = Callable[..., str]


@pytest.fixture
def xray(tmp_path: Path) -> Path:
    """12 bits in a 16-bit PNG file."""
    values = np.random.default_rng(0).integers(0, 4096, (56, 56), dtype=np.uint16)
    values[0, :2] = 0, 4095
    Image.fromarray(values).save(tmp_path / "xray.png")
    return tmp_path / "xray.png"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """The pictures beside the maps; without matplotlib, which takes longest."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    pictures: list[Image.Image] = []
    strip = report.strip

    def kept(view: Image.Image, *others: Any) -> Image.Image:
        pictures.append(view)
        return strip(view, *others)

    monkeypatch.setattr(report, "strip", kept)
    return pictures


def facts_of(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "explanation.json").read_text())
    return read


@pytest.mark.parametrize("window", ["auto", (-100.0, 3000.0)])
def test_the_window_is_applied_shown_and_reported(
    tmp_path: Path, xray: Path, shown: list[Image.Image], capsys: pytest.CaptureFixture[str], window: Any
) -> None:
    given = [window] if window == "auto" else map(str, map(int, window))
    assert main(["explain", str(xray), "--target", "1", "--window", *given, "--out", str(tmp_path / "out")]) == 0
    config = fashion_config()
    preprocess = Preprocess((56, 56), config.mean, config.std)
    view = preprocess.view(load_image(xray, window))
    assert all(np.array_equal(np.asarray(one), np.asarray(view)) for one in shown) and shown
    facts = facts_of(tmp_path / "out")["read_as"]
    assert facts == load_image(xray, window).info["fga_fast"]
    assert (facts["format"], facts["frames"], facts["values"]) == ("PNG", 1, [0, 4095])
    assert facts["window"] == (
        list(window) if window != "auto" else [pytest.approx(20, abs=15), pytest.approx(4075, abs=15)]
    )
    assert ("given" if window != "auto" else "percentiles 0.5 and 99.5") in facts["window_from"]
    assert f"black {facts['window'][0]:g}, white {facts['window'][1]:g}" in capsys.readouterr().out
    kept = Explanation.load(tmp_path / "out" / "relevance.safetensors")
    want = explain(fashion_model(), preprocess.normalise(view).unsqueeze(0), 1)
    torch.testing.assert_close(kept.logits, want.logits, rtol=1e-4, atol=1e-5)
    assert kept.overlay(view).shape == (1, 56, 56, 3)


def test_a_folder_goes_on_without_what_has_no_range(
    tmp_path: Path, xray: Path, shown: list[Image.Image], capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    Image.new("L", (56, 56), 90).save(tmp_path / "photo.png")
    text = refused("explain", xray, "--out", tmp_path / "out")
    assert "xray.png holds uint16 values from 0 to 4095, a small part of 0 to 65535" in text and "--window" in text
    assert main(["explain", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "left out xray.png" in capsys.readouterr().err
    assert facts_of(tmp_path / "out" / "photo.png")["read_as"]["window"] == [0, 255]


@pytest.mark.parametrize("given", [["1"], ["5", "1"], ["1", "2", "3"], ["low", "high"], ["auto", "1"], ["0", "nan"]])
def test_windows_that_are_none(tmp_path: Path, xray: Path, refused: Refused, given: list[str]) -> None:
    text = refused("explain", xray, "--out", tmp_path / "out", "--window", *given)
    assert f"--window: expected auto, or LOW and HIGH with LOW < HIGH, got '{' '.join(given)}'" in text


def test_a_package_takes_a_window(tmp_path: Path, xray: Path, refused: Refused) -> None:
    given = ["explain", xray, "--package", tmp_path / "none.pt2", "--out", tmp_path / "out", "--window", "auto"]
    assert "none.pt2" in refused(*given)  # which is missing; --window is not what is wrong
    assert "--base: the package has its own" in refused(*given, "--base", "3")


def test_dicom(tmp_path: Path, shown: list[Image.Image]) -> None:
    stored = (np.arange(56 * 56).reshape(56, 56) % 4000).astype("uint16")
    path = write_dicom(
        tmp_path / "cxr.dcm", stored, bits=12, WindowCenter=2000, WindowWidth=3000,
        PhotometricInterpretation="MONOCHROME1", PatientName="Doe^Jane",
    )  # fmt: skip
    assert main(["explain", str(path), "--out", str(tmp_path / "out")]) == 0
    facts = facts_of(tmp_path / "out")
    assert facts["read_as"]["photometric"] == "MONOCHROME1" and facts["read_as"]["inverted"] is True
    assert facts["read_as"]["window"] == [500, 3499]
    assert "Doe" not in json.dumps(facts)
    assert np.asarray(shown[0])[0, 0].tolist() == [255] * 3  # the smallest value is white
