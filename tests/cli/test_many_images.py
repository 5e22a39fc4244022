"""`fga-fast explain` with many images: what names them, what a bad one costs, who draws, how a run is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fga_fast import Explanation
from fga_fast.cli import drawing, files, ways
from fga_fast.cli.drawing import Drawing
from fga_fast.cli.main import main
from fga_fast.io.images import ImageFileError

timm = pytest.importorskip("timm")

RANDOM = ("--model", "test_vit", "--random-weights")
FILES = ["explanation.json", "figure.png", "relevance.safetensors"]
Refused = Callable[..., str]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a folder in it: in/{a,b}.png, in/notes.txt, in/more/{a,c}.png."""
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.png", "more/a.png", "more/c.png")):
        pixels = torch.randint(0, 255, (12, 10, 3), generator=torch.Generator().manual_seed(seed)).byte()
        Image.fromarray(pixels.numpy()).resize((80, 60)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def plain_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # which takes longest


def results(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


# which files


@pytest.mark.usefixtures("plain_figures")
def test_files_folders_and_patterns_together(images: Path, tmp_path: Path) -> None:
    """Each file once; a second file of a name gets a number. Images may stand before and after options."""
    out = tmp_path / "out"
    first, last = [f"{images}/a.png", f"{images}"], [f"{images}/**/*.png"]
    assert main(["explain", *first, *RANDOM, "--out", str(out), *last]) == 0
    assert results(out) == ["a-2.png", "a.png", "b.png", "c.png", "contact_sheet.png"]
    for name, path in (("a.png", "a.png"), ("a-2.png", "more/a.png"), ("c.png", "more/c.png")):
        assert results(out / name) == FILES
        assert json.loads((out / name / "explanation.json").read_text())["image"] == str(images / path)


def test_what_a_pattern_finds(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    out = images / "more"
    assert files.find(["*"], out).paths == [Path("a.png"), Path("b.png")]
    assert files.find(["[b-z].png"], out) == ([Path("b.png")], True, [])
    assert files.find(["**/*.png"], out).paths == [Path("a.png"), Path("b.png")]  # what is in `out` are results
    assert len(files.find(["**/*.png"], images / "out").paths) == 4
    (images / "[b-z].png").write_bytes((images / "a.png").read_bytes())
    assert files.find(["[b-z].png"], out) == ([Path("[b-z].png")], False, [])
    with pytest.raises(FileNotFoundError, match=r"IMAGE: no image matches '\*\.txt'; looked for .*\.png"):
        files.find(["*.txt"], out)
    (images / "link.png").symlink_to("b.png")
    found = files.find(
        ["gone.png", "*.jpg", "b.png", "./b.png", "more/../b.png", str(images / "b.png"), "link.png"], out
    )
    assert (found.paths, found.many) == ([Path("b.png"), Path("link.png")], True)
    assert [path.name for path, _ in found.failed] == ["gone.png", "*.jpg"]


@pytest.mark.usefixtures("plain_figures")
def test_bad_files_are_counted_and_cost_no_others(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(images / name) for name in ("notes.txt", "a.png", "gone.png", "b.png")]
    assert main(["explain", *given, *RANDOM, "--out", str(tmp_path / "out")]) == 1
    assert results(tmp_path / "out") == ["a.png", "b.png", "contact_sheet.png"]
    captured = capsys.readouterr()
    for part in ("left out notes.txt: image:", "left out gone.png: IMAGE: no file", "2 of 4 image(s) could not"):
        assert part in captured.err
    assert "explained 2 image(s), left out 2" in captured.out


@pytest.mark.usefixtures("plain_figures")
def test_an_image_that_the_model_cannot_take_costs_no_others(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ways.by_model

    def by_model(args: Any) -> ways.Way:
        way = original(args)
        white = []

        def picky(batch: torch.Tensor) -> Explanation:
            white.append(len(batch))
            if bool((batch[:, 0, 0, 0] > 0.99).any()):
                raise ValueError("logits: contain NaN")
            return way.explain(batch)

        return ways.Way(**{**vars(way), "explain": picky})

    monkeypatch.setattr(ways, "by_model", by_model)
    Image.new("RGB", (80, 60), "white").save(images / "aa.png")
    assert main(["explain", str(images), *RANDOM, "--out", str(tmp_path / "out")]) == 1
    assert results(tmp_path / "out") == ["a.png", "b.png", "contact_sheet.png"]
    assert "left out aa.png: logits: contain NaN" in capsys.readouterr().err


def test_results_do_not_replace_images(images: Path, refused: Refused) -> None:
    text = refused("explain", images / "more" / "a.png", images / "a.png", *RANDOM, "--out", images)
    assert "is the folder of the images" in text


def test_words_that_nobody_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["explain", "--model", "test_vit", "a.png", "--fly"], ["export", "demo", "a.pt2", "b.pt2"]):
        with pytest.raises(SystemExit):
            main(given)
        assert "unrecognized arguments" in capsys.readouterr().err


# reading ahead, drawing, stopping


def test_reading_ahead_is_bounded_and_keeps_the_order() -> None:
    started, seen = [], []

    def load(path: Path) -> str:
        started.append(path)
        if path.name == "3":
            raise ImageFileError("3 is bad")
        return path.name

    failed: files.Failed = []
    for count, (path, loaded) in enumerate(files.read([Path(str(n)) for n in range(40)], load, 4, failed), start=1):
        assert path.name == loaded and len(started) <= count + len(failed) + 5
        seen.append(int(loaded))
    assert seen == [n for n in range(40) if n != 3] and failed == [(Path("3"), "3 is bad")]
    with pytest.raises(ImageFileError, match="3 is bad"):
        list(files.read([Path("3")], load, 4, None))


def saved(folder: Path) -> Path:
    folder.mkdir()
    relevance = torch.linspace(0, 1, 4).view(1, 4)
    Explanation(relevance, torch.zeros(1, 3), torch.tensor([1]), (2, 2), (8, 8)).save(folder / "relevance.safetensors")
    return folder


@pytest.mark.slow
def test_processes_draw_what_a_thread_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_IMAGES_A_PROCESS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    folders = [saved(tmp_path / str(number)) for number in range(3)]
    view = Image.new("RGB", (8, 8), "red")
    with Drawing(3) as processes:
        for folder in folders:
            processes.add(folder, view, ["one"])
    assert type(processes._pool).__name__ == "ProcessPoolExecutor" and not processes.plain
    with Drawing(1) as thread:
        thread.add(saved(tmp_path / "thread"), view, ["one"])
    want = (tmp_path / "thread" / "figure.png").read_bytes()
    assert all((folder / "figure.png").read_bytes() == want for folder in folders)


def test_a_figure_that_fails_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"relevance\.safetensors"), Drawing(1) as drawn:
        drawn.add(tmp_path, Image.new("RGB", (8, 8)), ["one"])


def test_drawing_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few figures wait; an error ends the waiting ones."""
    allowed, drawn = threading.Semaphore(0), []

    def draw(folder: Path, *_: object) -> bool:
        allowed.acquire(timeout=5)
        drawn.append(folder.name)
        return False

    monkeypatch.setattr(drawing, "draw", draw)
    with pytest.raises(KeyboardInterrupt), Drawing(1) as run:
        for number in range(drawing._WAITING):
            run.add(tmp_path / str(number), Image.new("RGB", (8, 8)), [])
        assert drawn == []
        allowed.release()
        run.add(tmp_path / "last", Image.new("RGB", (8, 8)), [])
        assert drawn == ["0"]  # for which this call had to wait
        threading.Timer(0.2, allowed.release).start()
        raise KeyboardInterrupt
    assert drawn == ["0", "1"]  # the one that was being drawn


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_an_interrupt_leaves_whole_files_only(images: Path, tmp_path: Path) -> None:
    """Ctrl-C, which all processes get, while processes draw."""
    for number in range(300):  # more than are drawn before the signal
        os.link(images / "a.png", images / f"x{number}.png")
    given = [sys.executable, "-m", "fga_fast.cli", "explain", images, *RANDOM, "--out", tmp_path / "out"]
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen([*map(str, given), "--batch-size", "1"], stderr=said, start_new_session=True)
    while len([*(tmp_path / "out").rglob("figure.png")]) < 4:
        assert run.poll() is None
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait() == 130
    lines = (tmp_path / "said").read_text().splitlines()
    assert lines[-1] == "fga-fast: interrupted" and not any("Traceback" in line for line in lines)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert 0 < len(written) < 906 and {path.name for path in written} <= set(FILES)
    for path in written:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
        else:
            Explanation.load(path)


# numbers


def test_small_numbers_keep_their_digits(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Logits of 1e-9, and a probability of 1e-12 beside a logit of 27."""
    from safetensors.torch import save_file

    torch.manual_seed(5)
    state = timm.create_model("test_vit", num_classes=7).state_dict()
    state["head.weight"] = torch.randn_like(state["head.weight"]) * 1e-9
    state["head.bias"] = torch.zeros(7)
    for name, bias in (("small", 0.0), ("sure", 27.6)):
        state["head.bias"][2] = bias
        save_file(state, tmp_path / f"{name}.safetensors")
        given = [str(images / "a.png"), "--model", "test_vit", "--checkpoint", str(tmp_path / f"{name}.safetensors")]
        assert main(["explain", *given, "--target", "1", "--out", str(tmp_path / name)]) == 0
        (row,) = json.loads((tmp_path / name / "explanation.json").read_text())["explained"]
        kept = Explanation.load(tmp_path / name / "relevance.safetensors")
        assert row["logit"] == float(kept.logits[0, 1]) and 0 < abs(row["logit"]) < 1e-7
        assert row["probability"] == pytest.approx(float(kept.logits[0].double().softmax(0)[1]))
        text = capsys.readouterr().out
        assert f"logit {row['logit']:.4g}, " in text and f"probability {row['probability']:.4g}, " in text
    assert 0 < row["probability"] < 2e-12
