"""Harvests: what is stored, that a broken run goes on without a trace, what is refused before anything is written."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import families
import pytest
import torch
from families import Family
from folders import files, largest_file
from harvesting import PATCHES, PREPROCESS, SHARD, SIZE, items, model, picture, returned, run, small
from own_vit import WIDTH
from pair_vit import PairViT, plainly

from fga_fast.dataset.items import Item
from fga_fast.harvest import run as module
from fga_fast.harvest.activations import Activations
from fga_fast.harvest.run import harvest
from fga_fast.io.resume import only_writer


@pytest.fixture
def short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images of one block a shard."""
    monkeypatch.setattr(module, "SHARD_BYTES", SHARD)


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(ValueError, match="another run writes into"):
        run(tmp_path)
    assert files(tmp_path) == {} and not [*tmp_path.iterdir()]
    run(tmp_path)


def test_what_another_run_wrote_meanwhile_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look and the lock."""
    check = module.check_writable_folder
    written: list[dict[Path, int]] = []

    def times(folder: Path) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

    def late(folder: Path) -> Path:
        monkeypatch.setattr(module, "check_writable_folder", check)
        small(folder, items(4))
        written.append(times(folder))
        return check(folder)

    monkeypatch.setattr(module, "check_writable_folder", late)
    with pytest.raises(ValueError, match=r"blocks \(\[0, 2\] there, \[1\] now\)"):
        small(tmp_path / "other", items(4), [1])
    monkeypatch.setattr(module, "check_writable_folder", late)
    small(tmp_path / "same", items(4))
    assert times(tmp_path / "same") == written[1] and len(written[1]) == 3


def test_a_run_killed_as_it_begins_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("atomic_write", "Path.mkdir"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            tmp_path.joinpath(place).mkdir()
            patch.setattr(f"{module.__name__}.{place}", killed)
            patch.setattr(module, "check_writable_folder", Path)
            run(tmp_path / place)
        run(tmp_path / place)


@pytest.mark.usefixtures("short_shards")
@pytest.mark.parametrize("returns", ("tensor", "tuple", "tokens first"))
def test_numbers_are_those_of_forward_passes(tmp_path: Path, returns: str) -> None:
    """Bit for bit, with class token and predicted classes, in batches of two."""
    own, given = model(returns=returns), items(7)
    found = small(tmp_path / "out", given, model=own, class_token=True)
    assert (found.about.prefix_tokens, found.about.d_model, found.about.dtype) == (1, WIDTH, "float32")
    assert (found.about.blocks, found.about.grid, found.about.image_size) == ((0, 2), (2, 3), SIZE)
    assert sorted(found.keys) == sorted(item.key for item in given) and len(found) == found.about.images == 7
    by_key = {item.key: item for item in given}
    stored = [by_key[key] for key in found.keys]
    assert stored != given  # in a random order
    assert found.targets == [item.target for item in stored] and found.paths == [None] * 7
    for start in range(0, 7, 2):
        batch = torch.stack([item.image for item in stored[start : start + 2]])  # type: ignore[misc]
        want, stop = returned(own, batch, (0, 2)), min(start + 2, 7)
        for block in (0, 2):
            assert torch.equal(found.read(block, start, stop, prefix=True), want[block])
            assert torch.equal(found.read(block, start, stop), want[block][:, 1:])
        assert torch.equal(found.predicted[start:stop], own(batch).argmax(1))
    assert torch.equal(found.read(2, 1, 6), found.read(2, 0, 7)[1:6]) and found.read(0, 3, 3).shape == (0, 6, 16)
    assert len(found.shards) == 4  # two blocks, so two images each
    found.verify()
    found.check_model(own)
    assert not any(module._forward_hooks for module in own.modules()) and not own.training


def test_bfloat16_without_class_token(tmp_path: Path) -> None:
    whole, half = small(tmp_path / "a", items(3)), small(tmp_path / "b", items(3), dtype="bfloat16")
    assert half.about.dtype == "bfloat16" and half.about.prefix_tokens == 0
    x = half.read(0, 0, 3)
    assert x.dtype == torch.float32 and torch.equal(x, whole.read(0, 0, 3).bfloat16().float())
    assert torch.equal(half.read(0, 0, 3, prefix=True), x)
    assert half.shards[0].bytes < 0.6 * whole.shards[0].bytes


@pytest.mark.parametrize("family", families.registry(), ids=lambda family: family.id)
def test_families(tmp_path: Path, family: Family) -> None:
    """Every family, in the size of its images; a head that has no classes predicts none."""
    pytest.importorskip(families.LIBRARIES[family.library])
    own, images = family.build(), family.images()
    given = [Item(str(number), image) for number, image in enumerate(images)]
    found = Activations(harvest(own, given, [1], out=tmp_path / "out", progress=False))
    layout = families.layout_of(family, own)
    assert found.about.grid == layout.grid and found.read(1, 0, 2).shape == (2, layout.patches, layout.d_model)
    logits = families.logits_of(own, images[[int(key) for key in found.keys]])
    want = logits.argmax(1).tolist() if logits.shape[1] == families.CLASSES and not family.prompts else [-1, -1]
    assert found.predicted.tolist() == want


def test_blocks_that_are_lists(tmp_path: Path) -> None:
    own = model()
    want = small(tmp_path / "a", items(2)).read(2, 0, 2)
    pairs = PairViT(own, plainly).eval()
    torch.testing.assert_close(small(tmp_path / "b", items(2), model=pairs).read(2, 0, 2), want)


def test_a_killed_run_goes_on_without_a_trace(tmp_path: Path) -> None:
    """SIGKILL in mid-run: in the end each file is, byte for byte, that of a whole run, and none was made twice."""
    whole, killed = run(tmp_path / "whole"), tmp_path / "killed"
    call = "import sys, pathlib, harvesting; harvesting.run(pathlib.Path(sys.argv[1]), 0.05)"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", call, str(killed)], cwd=here, env={**os.environ, "PYTHONPATH": paths}
    )
    while len([*killed.glob("shards/*.json")]) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match="is not complete; call harvest"):
        Activations(killed)
    done = {path: path.stat().st_mtime_ns for path in killed.glob("shards/*.json")}
    assert 3 <= len(done) < 12
    number = len(done)  # what a kill between and within the two files of a shard leaves
    (killed / "shards" / f"{number:06}.safetensors").write_bytes(b"cut")
    (killed / "shards" / f".{number:06}.json.{process.pid}.0a.tmp").write_bytes(b"{")
    run(killed)
    assert files(killed) == files(whole)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*")}
    run(killed)  # which has nothing to do
    assert {path: path.stat().st_mtime_ns for path in killed.rglob("*")} == before


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, given = tmp_path / "out", items(40)
    with largest_file(4096), pytest.raises(OSError, match=r"out: cannot write .*000000\.safetensors .*it goes on"):
        small(out, given)
    assert [*files(out)] == ["manifest.json"]
    with monkeypatch.context() as patched:
        free = shutil.disk_usage(tmp_path)._replace(free=1000)
        patched.setattr(shutil, "disk_usage", lambda _: free)
        needed = 40 * (2 * PATCHES * WIDTH * 4 + 512)  # a list takes about 512 bytes an image
        message = r"out: 40 images need 0\.1 MB in .*out, 0\.0 MB are free; free some space"
        with pytest.raises(OSError, match=message):
            small(out, given)
        with pytest.raises(OSError, match=message):
            small(tmp_path / "deep" / "out", given)
        assert not (tmp_path / "deep").exists()
        free = free._replace(free=needed - 1)
        with pytest.raises(OSError, match="out: 40 images need"):
            small(out, given)
        free = free._replace(free=needed)
        small(tmp_path / "enough", given)
    assert len(small(out, given)) == 40
    small(tmp_path / "whole", given)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.usefixtures("short_shards")
def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    """They cost themselves, also all of a shard, and are listed with the reason."""
    for number in range(9):
        picture(number).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "7.png").write_bytes(b"no picture")
    given = [Item(f"{number}.png", tmp_path / f"{number}.png") for number in range(10)]
    given[5] = Item("5.png", torch.zeros(3, 8, 8))
    found = small(tmp_path / "out", given)
    errors = dict(found.about.errors)
    assert sorted(errors) == ["3.png", "5.png", "7.png", "9.png"] and len(found) == 6
    assert errors["5.png"] == "ValueError: expected [3, 16, 24], got [3, 8, 8]"
    assert errors["3.png"].startswith("ImageFileError: ") and "truncated" in errors["3.png"]
    assert errors["7.png"].startswith("ImageFileError: ") and errors["9.png"].startswith("FileNotFoundError: ")
    assert found.paths == [tmp_path / key for key in found.keys]
    own = model()
    for row, key in enumerate(found.keys):
        image = PREPROCESS(picture(int(key[0])))
        want = returned(own, image[None], (2,))[2][:, 1:]
        torch.testing.assert_close(found.read(2, row, row + 1), want, rtol=1e-4, atol=1e-4)
    bad = [item for item in given if item.key in errors]
    found = small(tmp_path / "more", [*bad, given[0]])  # shards without any image
    assert found.keys == ["0.png"] and len(found.shards) == 3 and len(found.about.errors) == 4
    with pytest.raises(ValueError, match=r"none of the 4 images could be read; of \d.png: "):
        small(tmp_path / "none", bad)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    own, given = model(), items(5)
    image = given[3].image.clone()  # type: ignore[union-attr]
    image[0, 0, 0] = float("nan")
    broken = [*given[:3], Item("the bad one", image), given[4]]
    message = "NaN or Inf in the residual stream after block 0 for the image the bad one; "
    with pytest.raises(ValueError, match=message):
        small(tmp_path / "a", broken, model=own)
    assert [*files(tmp_path / "a")] == ["manifest.json"]
    with torch.no_grad():
        own.layers[1].mlp[2].bias[0] = float("inf")
    with pytest.raises(ValueError, match="after block 1 for the image image"):
        small(tmp_path / "b", given, (0, 1), model=own)
    with torch.no_grad():
        own.layers[1].mlp[2].bias[0] = torch.finfo(torch.float32).max  # finite, but not in bfloat16
    small(tmp_path / "c", given, (1,), model=own)
    with pytest.raises(ValueError, match="after block 1 for the image image"):
        small(tmp_path / "d", given, (1,), model=own, dtype="bfloat16")


def test_a_model_or_a_setting_that_changed(tmp_path: Path) -> None:
    own, given, out = model(), items(40), tmp_path / "out"
    with largest_file(4096), pytest.raises(OSError, match="out: cannot write"):
        small(out, given, model=own)
    with torch.no_grad():
        own.head.bias[0] += 1e-3
    with pytest.raises(
        ValueError, match=r'other settings: model_checksum \("\w+\.* there, "\w+\.* now\); name another'
    ):
        small(out, given, model=own)
    found = small(out, given)
    with pytest.raises(ValueError, match="other settings: model_checksum"):
        small(out, given, model=own)
    with pytest.raises(ValueError, match=r"model: expected the model of the harvest .*got one with checksum"):
        found.check_model(own)
    changes: list[tuple[str, dict[str, Any]]] = [
        (r"dtype \(\"float32\" there, \"bfloat16\" now\)", {"dtype": "bfloat16"}),
        (r"blocks \(\[0, 2\] there, \[1\] now\)", {"blocks": (1,)}),
        (r"prefix_tokens \(0 there, 1 now\)", {"class_token": True}),
        (r"batch_size \(2 there, 3 now\)", {"batch_size": 3}),
        (r"data \(.*; items \(40 there, 39 now\)", {"limit": 39}),
    ]
    for message, change in changes:
        with pytest.raises(ValueError, match=message):
            small(out, given, **change)
    (tmp_path / "strange" / "shards").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds shards without manifest\.json"):
        small(tmp_path / "strange", given)


class Wrong(NamedTuple):
    message: str
    settings: dict[str, Any]


@pytest.mark.parametrize(
    "wrong",
    (
        Wrong(r"blocks: expected some of 0 to 2, got \[3\]", {"blocks": (3,)}),
        Wrong(r"blocks: expected some of 0 to 2, got \[-1\]", {"blocks": (-1,)}),
        Wrong(r"blocks: expected some of 0 to 2, got \[\]", {"blocks": ()}),
        Wrong(r"blocks: expected different blocks, got \[1, 1\]", {"blocks": (1, 1)}),
        Wrong("model: expected a model in eval mode, got one in train mode", {"model": model().train()}),
        Wrong("dtype: expected one of float32, bfloat16, got 'float16'", {"dtype": "float16"}),
        Wrong("batch_size: expected at least 1, got 0", {"batch_size": 0}),
        Wrong("workers: expected at least 1, got 0", {"workers": 0}),
        Wrong("limit: expected at least 1 image, got 0", {"limit": 0}),
        Wrong("window: expected", {"window": (3, 1)}),
        Wrong(r"layout: block 0 \(Block\) returned \[1, 7, 16\], expected \[7, 1, C\]", {"layout": "tokens first"}),
    ),
    ids=lambda wrong: wrong.message[:30],
)
def test_refused_before_anything_is_written(tmp_path: Path, wrong: Wrong) -> None:
    settings = dict(wrong.settings)
    if "layout" in settings:
        settings["model"] = model()
        settings["layout"] = replace(settings["model"].layout(), tokens_first=True)
    with pytest.raises(ValueError, match=wrong.message):
        small(tmp_path / "out", items(2), **settings)
    assert not (tmp_path / "out").exists()


def test_pictures_and_prefixes_that_are_missing(tmp_path: Path, tiny_vit: Any) -> None:
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"preprocess: expected a Preprocess for the picture a\.png"):
        small(tmp_path / "out", [Item("a.png", tmp_path / "a.png")], preprocess=None)
    bare = tiny_vit(class_token=False, global_pool="avg")
    given = [Item("a", torch.zeros(3, 32, 48))]
    with pytest.raises(ValueError, match="class_token: the model has no tokens in front"):
        harvest(bare, given, [0], out=tmp_path / "out", class_token=True)
    assert not (tmp_path / "out").exists()


def test_questions_about_one_file_are_one_image(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    twice = [Item("a", tmp_path / "a.png", 1, box=(0, 0, 2, 2)), Item("a#2", tmp_path / "a.png", 2)]
    found = small(tmp_path / "out", [*twice, Item("b", torch.zeros(3, *SIZE), 4)])
    assert dict(zip(found.keys, found.targets, strict=True)) == {"a": None, "b": 4}


def test_the_disk_that_is_needed_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fga_fast"):
        found = small(tmp_path / "out", items(3), limit=2)
    assert len(found) == 2 and "harvest: 2 images, 0.0 MB of " in caplog.text
    assert found.shards[0].bytes >= 2 * 2 * PATCHES * WIDTH * 4
