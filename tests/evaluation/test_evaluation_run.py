"""Runs: what is written, what a failure costs, and that a killed run goes on without a trace."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated import LARGEST, Subject, exact, items, run, seeded, subject
from PIL import Image
from torch import Tensor

from fga_fast import Preprocess
from fga_fast.dataset.items import Item, choose, half_of
from fga_fast.evaluation import store
from fga_fast.evaluation.measures import Batch, Measure, measures
from fga_fast.evaluation.run import evaluate
from fga_fast.evaluation.settings import source_of
from fga_fast.io.resume import only_writer

pytest.importorskip("pyarrow")
GREY = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3)


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = store.read(path).to_pylist()
    return found


def small(out: Path, given: list[Item], methods: dict[str, Any] | None = None, **settings: Any) -> list[dict[str, Any]]:
    usual: dict[str, Any] = {"batch_size": 4, "split": "both", "progress": False, "preprocess": GREY}
    metrics = settings.pop("metrics", LARGEST)
    return rows(evaluate(subject(), given, methods or {"exact": exact}, metrics, out=out, **{**usual, **settings}))


def test_values_are_those_of_the_methods(tmp_path: Path) -> None:
    given = items(6)
    found = small(tmp_path, given, {"exact": exact, "seeded": seeded}, seed=(0, 5))
    assert len(found) == 6 * 2 * 2 * 2
    for row in found:
        item = next(one for one in given if one.key == row["key"])
        assert (row["target"], row["error"], row["image"], row["half"]) == (
            item.target,
            None,
            item.key,
            half_of(item.key),
        )
        if row["method"] == "exact":
            want = exact(subject(), item.image[None], torch.tensor([item.target])).double()  # type: ignore[index]
            assert row["value"] == float(want.max() if row["metric"] == "largest" else want.min())
    drawn = {row["seed"]: row["value"] for row in found if row["method"] == "seeded" and row["metric"] == "largest"}
    assert drawn[0] != drawn[5]


def test_without_a_target_the_predicted_class_is_explained(tmp_path: Path) -> None:
    image = items(1)[0].image
    (row, _) = small(tmp_path, [Item("one", image)])
    assert row["target"] == int(subject().model(image[None]).argmax())  # type: ignore[index]


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_a_killed_run_goes_on_without_a_trace(tmp_path: Path) -> None:
    """SIGKILL twice, the second time while the run goes on: values.parquet is byte for byte that of a whole run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    call = "import sys, pathlib, evaluated; evaluated.run(pathlib.Path(sys.argv[1]))"
    for parts in (2, 5):
        process = subprocess.Popen([sys.executable, "-c", call, str(killed)], cwd=Path(__file__).parent)
        while len([*killed.glob("parts/*.parquet")]) < parts:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / store.VALUES).exists()
    (killed / "parts" / ".000009.parquet.1.tmp").write_bytes(b"half")
    assert 5 <= len([*killed.glob("parts/*.parquet")]) < 10
    run(killed)
    assert (killed / store.VALUES).read_bytes() == (whole / store.VALUES).read_bytes()
    assert sorted(path.name for path in killed.iterdir()) == ["settings.json", "values.parquet"]


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(ValueError, match="another run writes into"):
        small(tmp_path, items(4))
    assert not [*tmp_path.iterdir()]
    assert len(small(tmp_path, items(4))) == 8


def test_a_run_that_died_at_its_very_end_is_tidied(tmp_path: Path) -> None:
    found = small(tmp_path, items(3))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "000000.parquet").write_bytes(b"")
    assert small(tmp_path, items(3)) == found
    assert not (tmp_path / "parts").exists()


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    small(tmp_path, items(3))
    with pytest.raises(ValueError, match=r"out: .* other settings: batch_size \(4 there, 2 now\); name another folder"):
        small(tmp_path, items(3), batch_size=2)
    with pytest.raises(ValueError, match=r"seeds \(\[0\] there, \[0, 1\] now\)"):
        small(tmp_path, items(3), seed=(0, 1))
    with pytest.raises(ValueError, match=r"data \(.*items \(3 there, 4 now\)"):
        small(tmp_path, items(4))
    with pytest.raises(ValueError, match=r'methods\.other \(none there, "evaluated:seeded \w+" now\); name'):
        small(tmp_path, items(3), {"exact": exact, "other": seeded})
    other = subject()
    with torch.no_grad():
        other.model.weight[0, 0] += 1  # type: ignore[index, operator]
    with pytest.raises(ValueError, match="weights"):
        evaluate(other, items(3), {"exact": exact}, LARGEST, out=tmp_path, batch_size=4, split="both", preprocess=GREY)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds values without settings\.json"):
        small(tmp_path, items(3))


def times(constant: float) -> Any:
    def method(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        return constant * exact(subject, images, targets)

    return method


def test_constants_of_methods_and_metrics_are_settings(tmp_path: Path) -> None:
    assert source_of(times(1.0)) == source_of(times(1.0)) != source_of(times(2.0))
    assert source_of(partial(max, 1)) != source_of(partial(max, 2))
    # Also in containers; where an object lies in memory is no setting.
    assert source_of(partial(max, key=times(1.0))) == source_of(partial(max, key=times(1.0)))
    assert source_of(partial(max, [times(1.0)])) != source_of(partial(max, [times(2.0)]))
    assert source_of(partial(max, object())) == source_of(partial(max, object()))
    small(tmp_path, items(3), {"times": times(1.0)})
    with pytest.raises(ValueError, match=r"methods\.times"):
        small(tmp_path, items(3), {"times": times(2.0)})
    other = {"extremes": Measure(partial(LARGEST["extremes"].run), LARGEST["extremes"].higher)}
    with pytest.raises(ValueError, match=r"measures\.extremes"):
        small(tmp_path, items(3), {"times": times(1.0)}, metrics=other)


def test_files_of_others_stay(tmp_path: Path) -> None:
    """Also a part that another process is writing."""
    mine, theirs = tmp_path / ".notes.tmp", tmp_path / "parts" / f".000000.parquet.{os.getppid()}.ab12.tmp"
    theirs.parent.mkdir()
    for path in (mine, theirs):
        path.write_bytes(b"")
    (tmp_path / "settings.json").write_text("{}")
    store.Store(tmp_path, {})
    assert mine.exists() and theirs.exists()


def test_a_broken_image_costs_one_row(tmp_path: Path) -> None:
    pixels = torch.randint(0, 255, (8, 8, 3), generator=torch.Generator().manual_seed(0)).byte()
    Image.fromarray(pixels.numpy()).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    given = [Item(name, tmp_path / f"{name}.png", 1) for name in ("good", "bad", "gone")]
    given += [Item("nan", torch.full((3, 8, 8), torch.nan), 1), Item("far", torch.zeros(3, 8, 8), 7), *items(2)]
    given += [Item("small", torch.zeros(3, 4, 4), 1)]
    found = small(tmp_path / "out", given, batch_size=8)
    errors = {row["key"]: row for row in found if row["error"]}
    assert [*errors] == ["bad", "gone", "nan", "far", "small"]
    assert len(found) == 5 + 3 * 2
    for key, part in (("bad", "damaged"), ("gone", "no file"), ("nan", "NaN"), ("far", "class from 0 to 2, got 7")):
        row = errors[key]
        assert part in row["error"] and row["target"] is row["method"] is row["metric"] is None
        assert math.isnan(row["value"])


def test_a_method_that_fails_on_an_image_costs_one_row(tmp_path: Path) -> None:
    asked: list[int] = []

    def picky(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        asked.append(len(images))
        if bool((images == 0).all(3).all(2).all(1).any()):
            raise KeyError("zero")
        return exact(subject, images, targets)

    def hole(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        found = exact(subject, images, targets)
        found[images[:, 0, 0, 0] == 0] = torch.nan
        return found

    def wide(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        return exact(subject, images, targets)[0]

    given = [*items(3), Item("zero", torch.zeros(3, 8, 8), 0)]
    methods = {"exact": exact, "picky": picky, "hole": hole, "wide": wide}
    found = small(tmp_path, given, methods)
    assert asked == [4, 1, 1, 1, 1]
    errors = [(row["key"], row["method"], row["error"]) for row in found if row["error"]]
    assert ("zero", "picky", "KeyError: 'zero'") in errors
    assert [key for key, method, _ in errors if method == "hole"] == ["zero"]
    assert len([one for one in errors if one[1] == "wide"]) == 4
    assert "expected relevance [1, patches], got [16]" in next(text for _, method, text in errors if method == "wide")
    assert len([row for row in found if row["key"] == "zero" and row["method"] == "exact"]) == 2
    assert len(found) == len(errors) + 2 * (4 + 3 + 3)


def test_a_metric_that_fails_on_an_image_costs_one_row(tmp_path: Path) -> None:
    def inverse(batch: Batch) -> dict[str, Tensor]:
        if bool((batch.images == 0).flatten(1).all(1).any()):
            raise ValueError("nothing there")
        return {"inverse": 1 / batch.maps.sum(2)}

    def flat(batch: Batch) -> dict[str, Tensor]:
        return {"flat": batch.maps.mean(2)[0]}

    metrics = {**LARGEST, "inverse": Measure(inverse, {"inverse": True}), "flat": Measure(flat, {"flat": True})}
    given = [*items(3), Item("zero", torch.zeros(3, 8, 8), 0)]
    found = small(tmp_path, given, metrics=metrics)
    errors = [row for row in found if row["error"]]
    assert [row["key"] for row in errors if row["metric"] == "inverse"] == ["zero"]
    assert len([row for row in errors if row["metric"] == "flat"]) == 4
    assert "expected flat of shape [1, 1], got {'flat': [1]}" in errors[0]["error"]
    assert len([row for row in found if row["metric"] == "inverse" and not row["error"]]) == 3


def test_masks_are_asked_about_where_there_are_some(tmp_path: Path) -> None:
    def covered(batch: Batch) -> dict[str, Tensor]:
        assert batch.mask is not None
        return {"covered": batch.mask.double().mean((1, 2)).expand(len(batch.maps), -1)}

    where = {"where": Measure(covered, {"covered": True}, needs_mask=True)}
    image = torch.zeros(3, 8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, :2] = True
    given = [Item("box", image, 0, box=(0, 0, 4, 2)), Item("mask", image, 0, mask=mask), Item("none", image, 0)]
    found = small(tmp_path / "out", given, metrics=where)
    assert [(row["key"], row["value"]) for row in found] == [("box", 8 / 64), ("mask", 8 / 64)]
    with pytest.raises(ValueError, match="metrics: where needs images with a mask or a box, and none of the 1"):
        small(tmp_path / "other", given[2:], metrics=where)


def test_halves_and_limits() -> None:
    given = [Item(f"{n % 50}#{n // 50}", torch.zeros(3, 8, 8), group=str(n % 50)) for n in range(100)]
    tune, report = choose(given, "tune"), choose(given, "report")
    assert {one.key for one in tune + report} == {one.key for one in given}
    assert not {one.unit for one in tune} & {one.unit for one in report}
    assert 15 < len({one.unit for one in tune}) < 35
    assert [half_of(name) for name in "abcdef"] == ["report", "report", "report", "tune", "report", "report"]
    few = choose(given, "both", 5)
    assert len(few) == 10 and few == choose(given[::-1], "both", 5)[::-1]
    with pytest.raises(ValueError, match=r"items: expected a key of its own for each item, got '0#0' twice"):
        choose([given[0], given[0]])
    with pytest.raises(ValueError, match="limit: expected at least 1 image, got 0"):
        choose(given, "both", 0)
    with pytest.raises(ValueError, match="is in the half 'tune'"):
        choose([Item("a", torch.zeros(3, 8, 8))], "tune")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"seed": (1, 1)}, "seed: expected different numbers"),
        ({"variant": "own"}, "variant: expected 'paper' or 'author'"),
        ({"metrics": ["sacco"]}, "metrics: expected some of saco, .*, got 'sacco'"),
        ({"metrics": []}, "metrics: expected some of"),
        ({"methods": {"one": 1}}, "methods: expected functions by name"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, items(1), **settings)
    assert not [*tmp_path.iterdir()]


def test_a_training_model_is_refused(tmp_path: Path) -> None:
    training = Subject(subject().model.train())
    with pytest.raises(ValueError, match=r"subject: expected a model in eval mode; call model\.eval"):
        evaluate(training, items(1), {"exact": exact}, LARGEST, out=tmp_path)


def test_metrics_have_names_of_their_own() -> None:
    assert [*measures(["saco", "road"])] == ["saco", "road"]
    with pytest.raises(ValueError, match="a name of its own for each metric"):
        measures({"a": LARGEST["extremes"], "b": LARGEST["extremes"]})
