"""`fga-fast evaluate` from end to end, with methods and metrics of the tests, and every refusal with its message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fga_fast.assets import fashion_config, fashion_scenes
from fga_fast.cli import evaluate as command
from fga_fast.cli.main import main
from fga_fast.evaluation import store
from fga_fast.evaluation.measures import MEASURES, Batch, Measure
from fga_fast.evaluation.methods import METHODS

for library in ("timm", "pyarrow", "scipy"):
    pytest.importorskip(library)

Refused = Callable[..., str]
OWN = """
import torch

def middle(subject, images, targets):
    found = torch.zeros(len(images), 8, 8)
    found[:, 2:6, 2:6] = 1
    return found.flatten(1)
"""


def inside(batch: Batch) -> dict[str, Tensor]:
    assert batch.mask is not None
    rows, columns = batch.grid
    covered = batch.mask.view(len(batch.mask), rows, -1, columns, batch.mask.shape[2] // columns).double().mean((2, 4))
    return {"inside": (batch.maps * covered.flatten(1)).sum(2) / batch.maps.sum(2)}


def sharp(batch: Batch) -> dict[str, Tensor]:
    return {"sharp": batch.maps.amax(2) / batch.maps.abs().sum(2)}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A few methods and two cheap metrics in place of the library's own."""
    few = {name: METHODS[name] for name in command._METHODS}
    monkeypatch.setattr(command, "METHODS", few)
    cheap = {"sharp": Measure(sharp, {"sharp": True}), "inside": Measure(inside, {"inside": True}, needs_mask=True)}
    monkeypatch.setattr(command, "MEASURES", cheap)
    monkeypatch.setattr("fga_fast.evaluation.measures.MEASURES", cheap)
    monkeypatch.chdir(tmp_path)


def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--out", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "report.html", "report.md", "settings.json", "values.parquet",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "the fashion demo model, 6 images (both), 16 questions" in said and "inside ↑" in said
    table = store.read("out")
    assert table.num_rows == 16 * 6 * 2 and set(table.column("metric").to_pylist()) == {"sharp", "inside"}
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "fga-fast evaluate --out out" in page and page.count("data:image/png") == 6 * 3
    assert sum(name in page for name in fashion_config().class_names) >= 2
    before = Path("out/values.parquet").stat().st_mtime_ns
    assert main(["evaluate", "--out", "out"]) == 0  # which only writes the report again
    assert Path("out/values.parquet").stat().st_mtime_ns == before


def test_a_method_of_ones_own_and_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    scene = fashion_scenes()[0]
    (tmp_path / "list.csv").write_text(f"image,target,x0,y0,x1,y1\n{scene},Trouser,37,27,48,56\n{scene},8,,,,\n")
    given = ["--manifest", "list.csv", "--methods", "transmm", "--method", "mine:middle", "--split", "both"]
    assert main(["evaluate", *given, "--seed", "0", "1", "--out", "out"]) == 0
    rows = store.read("out").to_pylist()
    assert {row["method"] for row in rows} == {"transmm", "middle"} and {row["seed"] for row in rows} == {0, 1}
    assert len(rows) == 2 * 2 * (1 + 2) and {row["image"] for row in rows} == {str(scene)}


def test_metrics_that_explain_again_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**command.MEASURES, **{name: MEASURES[name] for name in ("sensitivity", "randomisation")}}
    monkeypatch.setattr(command, "MEASURES", known)
    monkeypatch.setattr("fga_fast.evaluation.measures.MEASURES", known)
    call = ["evaluate", "--limit", "1", "--methods", "transmm", "random"]
    assert main([*call, "--out", "usual"]) == 0
    assert [*store.settings("usual")["metrics"]] == ["sharp", "inside"]
    assert main([*call, "--metrics", "sensitivity", "randomisation", "--out", "named"]) == 0
    rows = store.read("named").to_pylist()
    assert {row["metric"] for row in rows} == {"sensitivity", "randomisation_whole"}
    found = {(row["method"], row["metric"]): row["value"] for row in rows if row["key"] == rows[0]["key"]}
    assert found["random", "randomisation_whole"] == pytest.approx(1)
    assert found["transmm", "randomisation_whole"] < 0.9
    assert found["random", "sensitivity"] > 1 > found["transmm", "sensitivity"] > 0


def test_a_folder_with_a_bad_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in" / "Bag"
    folder.mkdir(parents=True)
    for seed in range(3):
        pixels = torch.randint(0, 255, (60, 60, 3), generator=torch.Generator().manual_seed(seed)).byte()
        Image.fromarray(pixels.numpy()).save(folder / f"{seed}.png")
    (folder / "bad.png").write_bytes(b"none")
    assert main(["evaluate", "--split", "both", "--methods", "random", "--out", "out", "in"]) == 1
    rows = store.read("out").to_pylist()
    assert [(row["key"], row["target"]) for row in rows] == [(f"Bag/{n}.png", 7) for n in range(3)] + [
        ("Bag/bad.png", None)
    ]
    assert "1 error(s): ImageFileError: image:" in capsys.readouterr().err
    assert main(["evaluate", "--split", "both", "--methods", "random", "--limit", "2", "--out", "few", "in"]) in (0, 1)
    assert store.settings("few")["images"] == 2


def test_without_autoencoders_their_methods_are_left_out(
    tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    model = [".", "--model", "test_vit", "--random-weights", "--split", "both"]
    assert main(["evaluate", *model, "--out", "out", "--methods", "all"]) == 0
    rows = store.read("out").to_pylist()
    assert {row["method"] for row in rows} == {"transmm", "block_x_gradient", "random"}
    capsys.readouterr()
    text = refused("evaluate", *model, "--methods", "transmm", "fga", "--out", "other")
    assert "--methods: fga needs autoencoders; give --sae BLOCK=PATH" in text and not Path("other").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--model", "test_vit", "--random-weights"],
            "IMAGES: expected a folder of images, --manifest FILE or --dataset",
        ),
        (["a", "b"], "expected one folder, file or dataset, got several"),
        (["a", "--manifest", "b.csv"], "expected one folder, file or dataset, got several"),
        (["a"], "IMAGES: expected a folder of images, got a"),
        (["--manifest", "gone.csv"], "manifest: no file gone.csv"),
        (
            ["--methods", "grad"],
            f"--methods: expected some of {', '.join(command._METHODS)}, got 'grad'",
        ),
        (["--method", "mine"], "--method: expected MODULE:FUNCTION, such as mine:my_map, got 'mine'"),
        (["--method", "json:nothing"], "--method: expected a function nothing in json"),
        (["--method", "broken:map"], "--method: cannot import broken: SyntaxError"),
        (["--metrics", "sacco"], "metrics: expected some of sharp, inside, got 'sacco'"),
        (["--limit", "0"], "limit: expected at least 1 image, got 0"),
        (["--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["--seed", "-1"], "seed: expected different numbers from 0"),
    ],
)
def test_what_is_refused(refused: Refused, given: list[str], message: str) -> None:
    Path("broken.py").write_text("def map(:")
    assert message in refused("evaluate", *given, "--out", "out")
    assert not Path("out").exists()


def test_other_settings_are_refused(refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--limit", "1", "--methods", "random", "--out", "out"]) == 0
    capsys.readouterr()
    text = refused("evaluate", "--limit", "1", "--methods", "random", "--seed", "3", "--out", "out")
    assert "out: out holds a run with other settings: seeds ([0] there, [3] now)" in text
