"""`fga-fast sae-report` from end to end with the shipped model, and every refusal with its message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fga_fast.assets import fashion_saes, fashion_scenes
from fga_fast.cli.main import main
from fga_fast.sae import SparseAutoencoder

pytest.importorskip("timm")
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def stored(out: str = "out") -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((Path(out) / "sae_report.json").read_text())["saes"]
    return found


def test_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sae-report", "--out", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "sae_report.html", "sae_report.json", "sae_report.md",
    ]  # fmt: skip
    found = stored()
    assert list(found) == ["block 2", "block 3"]
    for one in found.values():
        # The model card says 94.3 and 94.9 %, L0 16, and as good as before; of a thousand scenes.
        assert one["explained_variance"] == pytest.approx(0.94, abs=0.02) and one["l0"] == 16
        assert one["recovered"] > 0.95 and one["images"] == 6 and one["tokens"] == 384
    said = capsys.readouterr().out
    assert "explained variance   94." in said and "! Only 384 patches were seen" in said
    assert "fga-fast sae-report --out out" in Path("out/sae_report.html").read_text()


def test_several_saes_of_a_block_and_a_second_one(capsys: pytest.CaptureFixture[str]) -> None:
    sae = fashion_saes()[2]
    sae.save("a")
    SparseAutoencoder(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, "topk", k=4).save("b")
    given = ["--sae", "2=a", "2=b", "--sae", "3=a", "--second", "2=b", "--limit", "2", "--out", "out"]
    assert main(["sae-report", *given]) == 0
    found = stored()
    assert list(found) == ["block 2: a", "block 2: b", "block 3: a"]
    ev = [one["explained_variance"] for one in found.values()]
    assert ev[0] > ev[1] > ev[2] and found["block 2: a"]["images"] == 2
    assert found["block 2: a"]["stability"]["forth"]["matched"] == 1  # type: ignore[index]
    assert found["block 3: a"]["stability"] is None
    page = Path("out/sae_report.html").read_text()
    assert "Explained variance against L0, block 2" in page and "What a second SAE shares" in page


def test_a_folder_by_class_with_a_bad_image(capsys: pytest.CaptureFixture[str]) -> None:
    Path("in/Bag").mkdir(parents=True)
    for number, scene in enumerate(fashion_scenes()[:2]):
        shutil.copy(scene, f"in/Bag/{number}.png")
    Path("in/Bag/bad.png").write_bytes(b"none")
    assert main(["sae-report", "in", "--split", "both", "--output", "softmax", "--out", "out"]) == 1
    one = stored()["block 2"]
    assert one["images"] == one["behaviour"]["known"] == 2  # type: ignore[index]
    assert "fga-fast: Bag/bad.png: ImageFileError: image:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--sae", "2"], "--sae: expected BLOCK=PATH, e.g. 9=sae_block_9, got '2'"),
        (["--second", "2=gone"], "--second: no file or folder gone; expected a saved SAE after 2="),
        (["--second", "2=a", "2=a"], "--second: expected one autoencoder a block, got two for block 2"),
        (["--second", "1=a"], "second: expected SAEs of the blocks [2, 3], got one of block 1"),
        (["--sae", "2=a", "2=a"], "--sae: expected different autoencoders, got 2=a twice"),
        (["--sae", "7=a"], "saes: expected blocks 0 to 4 as keys, got 7"),
        (["--limit", "0"], "limit: expected at least 1 image, got 0"),
        (["--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["--window", "3"], "--window: expected auto, or LOW and HIGH"),
        (["gone"], "IMAGES: expected a folder of images, got gone"),
        ([".", "--model", "test_vit", "--random-weights"], "--sae: expected BLOCK=PATH"),
    ],
)
def test_what_is_refused(refused: Refused, given: list[str], message: str) -> None:
    fashion_saes()[2].save("a")
    assert message in refused("sae-report", *given, "--out", "out")
    assert not list(Path("out").glob("*"))
