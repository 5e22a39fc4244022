"""Steps of training and what they leave on the disk: gradients, the course, checkpoints, the end of a run."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import files
from learning import RECIPES, WIDTH, made, stopped, trained, trainee

from fga_fast.harvest.tokens import TensorTokens
from fga_fast.io.safetensors_file import SafetensorsFile
from fga_fast.training.checkpoint import CHECKPOINT
from fga_fast.training.recipe import Recipe
from fga_fast.training.train import train


def test_settings_count_once_there_is_something_to_protect(tmp_path: Path) -> None:
    """What ends before its first checkpoint can be given again in another way."""
    tokens = stopped(tmp_path, 2)
    assert sorted(files(tmp_path)) == ["settings.json"]
    one: dict[str, Any] = {"steps": 3, "batch_size": 64, "progress": False, "out": tmp_path}
    train(tokens, {"one": RECIPES["topk"]}, lr=1e-3, **one)
    assert json.loads((tmp_path / "settings.json").read_text())["lr"] == 1e-3
    with pytest.raises(ValueError, match=r"lr \(0.001 there, none now\)"):
        train(tokens, {"one": RECIPES["topk"]}, **one)


def test_what_a_killed_end_leaves(tmp_path: Path) -> None:
    tokens = stopped(tmp_path, 5)
    one: dict[str, Any] = {"steps": 10, "batch_size": 64, "progress": False, "out": tmp_path}
    for left in ("one/.block_1.0a1b.tmp", "one/block_1/.block_1.0a1b.tmp"):
        (tmp_path / left).mkdir(parents=True)
        (tmp_path / left / "sae.safetensors").write_bytes(b"cut")
    checkpoint = (tmp_path / CHECKPOINT).read_bytes()
    train(tokens, {"one": RECIPES["topk"]}, **one)
    whole = files(tmp_path)
    assert [*whole] == ["one/block_1/config.json", "one/block_1/sae.safetensors", "settings.json", "training.json"]
    (tmp_path / CHECKPOINT).write_bytes(checkpoint)
    train(tokens, {"one": RECIPES["topk"]}, **one)
    assert files(tmp_path) == whole


def test_results_are_on_the_disk_before_the_checkpoint_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def note(what: str, path: Path) -> None:
        happened.append(f"{what} {re.sub(r'[.][0-9a-f.]+[.]tmp', '.tmp', str(path.relative_to(tmp_path)))}")

    def fsynced(handle: int) -> None:
        note("sync", Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    def replaced(self: Path, target: Path) -> Path:
        note("name", target)
        return replace(self, target)

    def unlinked(self: Path, missing_ok: bool = False) -> None:
        note("delete", self)
        unlink(self, missing_ok)

    monkeypatch.setattr(os, "fsync", fsynced)
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    tokens = TensorTokens({1: made(512)[0]})
    for again in (False, True):  # into a new folder, and over an autoencoder that is there
        happened.clear()
        train(tokens, {"one": RECIPES["topk"]}, out=tmp_path, steps=1, batch_size=64, progress=False)
        staging = "one/block_1/.block_1.tmp" if again else "one/.block_1.tmp"
        written = [f"sync {staging}/sae.safetensors", f"sync {staging}/config.json", f"sync {staging}"]
        names = [f"name one/block_1/{name}" for name in ("sae.safetensors", "config.json")]
        kept = [*names, "sync one/block_1"] if again else ["name one/block_1", "sync one"]
        end = ["sync .", "sync .training.json.tmp", "name training.json", "sync .", f"delete {CHECKPOINT}"]
        assert happened[-len(written + kept + end) :] == written + kept + end
        (tmp_path / "training.json").unlink()


def test_no_checkpoint_holds_nan(tmp_path: Path) -> None:
    """Weights become NaN in the step after the last loss that was looked at."""
    recipe = Recipe("jumprelu", 32, 2, dead_after=100)
    poisoned = torch.optim.Adam.step

    def step(self: torch.optim.Adam) -> None:
        poisoned(self)
        state = next(iter(self.state.values()))
        if state["step"] == 5:
            self.param_groups[0]["params"][0].data[3, 2] = float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", step)
        with pytest.raises(
            FloatingPointError, match=r"step 5: weights became NaN or Inf \(one/block_1/W_.*; take a lo"
        ):
            trained(tmp_path / "poisoned", recipe, checkpoint_every=1)
    left = SafetensorsFile(tmp_path / "poisoned" / CHECKPOINT, max_header=2**20)
    assert left.metadata["step"] == "4" and all(bool(x.isfinite().all()) for x in left.tensors().values())
    sae = trained(tmp_path / "wild", recipe, lr=10, checkpoint_every=1)  # thresholds stay in their range
    assert sae.threshold is not None and bool(torch.isfinite(sae.threshold).all())
    assert sae.threshold.min() >= 0.99 * math.exp(-10) and sae.threshold.max() <= 1.01 * math.exp(10)


def test_tokens_that_end(tmp_path: Path) -> None:
    class Short(TensorTokens):
        def batches(self, size: int, start: int = 0) -> Iterator[dict[int, torch.Tensor]]:
            return itertools.islice(super().batches(size, start), 3)

    with pytest.raises(ValueError, match="tokens: expected batches without end, got none for step 4 of 9"):
        train(Short({1: made(512)[0]}), {"one": RECIPES["topk"]}, out=tmp_path, steps=9, batch_size=9, progress=False)


@pytest.mark.parametrize("steps", [8, 99, 120])
def test_the_course_has_few_points(steps: int, tmp_path: Path) -> None:
    train(TensorTokens({1: made(64)[0]}), {"one": Recipe("topk", 8, 1)}, out=tmp_path, steps=steps, batch_size=4,
          progress=False)  # fmt: skip
    found = json.loads((tmp_path / "training.json").read_text())["step"]
    assert found[0] == 1 and found[-1] == steps and min(steps, 40) <= len(found) <= 51


def test_each_step_takes_a_gradient_of_length_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that turns decoder rows without changing their lengths; for each autoencoder by itself."""
    seen: list[int] = []
    plain = torch.optim.Adam.step

    def step(self: torch.optim.Adam) -> None:
        parameters = [one for group in self.param_groups for one in group["params"]]
        gradients = [one.grad for one in parameters if one.grad is not None]
        assert torch.cat([one.flatten() for one in gradients]).norm().item() == pytest.approx(1, abs=1e-5)
        W_dec = parameters[0]
        assert W_dec.shape == (32, WIDTH) and W_dec.grad is not None and W_dec.grad.norm() > 1e-3
        assert (W_dec.grad * W_dec).sum(1).abs().max() < 1e-6
        seen.append(id(self))
        plain(self)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    x = made(512)[0]
    train(TensorTokens({0: x, 2: 9 * x}), RECIPES, out=tmp_path, steps=3, batch_size=64, progress=False)
    assert len(seen) == 3 * 2 * len(RECIPES) and len({*seen}) == 2 * len(RECIPES)


def test_a_threshold_stays_where_no_code_comes() -> None:
    x = made(16)[0]
    scale, own = trainee(RECIPES["batch_topk"], x)
    own.threshold.fill_(0.6)
    own.silent.fill_(3)
    own.b_enc.data.fill_(-100)
    own.loss(scale(x), torch.ones(()))
    assert own.threshold == torch.tensor(0.6) and bool((own.silent == 19).all()) and own.active == 0
