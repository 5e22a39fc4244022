"""Runs of training: what they learn, what they write, and what happens when they are stopped or given nonsense."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import files, largest_file
from learning import RECIPES, WIDTH, made, run, stopped, trained, trainee
from safetensors.torch import load, load_file, save_file
from torch.nn import functional as F

import fga_fast
from fga_fast.harvest.tokens import TensorTokens
from fga_fast.io.resume import only_writer
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder
from fga_fast.training import train as module
from fga_fast.training.checkpoint import CHECKPOINT
from fga_fast.training.recipe import Recipe
from fga_fast.training.train import train

# At least these: the mean over the true features of the largest cosine with a learned one, and the explained variance.
LEARNED = {
    "topk": (0.95, 0.9), "batch_topk": (0.94, 0.88), "matryoshka": (0.85, 0.75), "jumprelu": (0.84, 0.78),
    "relu": (0.83, 0.80),
}  # fmt: skip


@pytest.mark.parametrize("name", [*RECIPES])
def test_each_kind_finds_the_dictionary(name: str, tmp_path: Path) -> None:
    x, dictionary = made()
    sae = trained(tmp_path, RECIPES[name])
    cosine, explained = LEARNED[name]
    found = sae.self_check(x)
    cosines = (F.normalize(sae.W_dec, dim=1) @ dictionary.t()).amax(0)
    start = trained(tmp_path / "start", RECIPES[name], steps=1, lr=1e-9)
    first = (F.normalize(start.W_dec, dim=1) @ dictionary.t()).amax(0)
    assert first.mean() < 0.6 < cosine < cosines.mean() and found.explained_variance > explained
    rows = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(rows, rows[:1].expand(32), rtol=1e-5, atol=0)
    assert sae.expected_l0 is not None
    if name == "topk":
        assert found.l0 == pytest.approx(2, abs=0.05)
    elif name != "relu":  # thresholds that were found in training hold for single tokens
        assert found.l0 == pytest.approx(2, rel=0.2) and sae.expected_l0 == pytest.approx(found.l0, rel=0.1)


@pytest.mark.parametrize("name", [*RECIPES])
def test_frozen_codes_are_those_of_training(name: str) -> None:
    x = made(200)[0] * 40
    scale, own = trainee(RECIPES[name], x)
    own.threshold.fill_(0.9)
    sae = own.frozen(scale, {"layer": "1"})
    pre = (scale(x) - own.b_dec) @ own.W_enc.t() + own.b_enc
    if name == "topk":
        codes = torch.zeros_like(pre).scatter(1, pre.topk(2).indices, pre.topk(2).values)
    elif name == "relu":
        codes = pre
    else:
        codes = torch.where(pre > (own.log_theta.exp() if name == "jumprelu" else 0.9), pre, 0)
    codes = codes.relu().detach()
    torch.testing.assert_close(sae.encode(x), codes, rtol=1e-5, atol=1e-5)
    y = (codes @ own.W_dec + own.b_dec) * scale.scale + scale.mean
    torch.testing.assert_close(sae.decode(codes), y, rtol=1e-5, atol=1e-3)
    assert y.std() > 100 and codes.any()


def test_dead_features_come_back_with_the_auxiliary_loss_only(tmp_path: Path) -> None:
    """Features that look away from all tokens at first."""

    def dead(aux: float) -> int:
        x = made(1024)[0]
        scale, own = trainee(Recipe("topk", 48, 2, aux=aux, dead_after=500), x)
        with torch.no_grad():
            own.b_enc[20:] = -2.5
        adam, seen = torch.optim.Adam(own.parameters(), 1e-2), scale(x)
        for _ in range(60):
            adam.zero_grad()
            own.loss(seen, torch.ones(()))[0].backward()
            own.level_gradient()
            adam.step()
            own.unit_decoder()
        return int((own.frozen(scale, {}).encode(x)[:, 20:] > 0).any(0).logical_not().sum())

    assert dead(0.0) > 20
    assert dead(1 / 4) < 14


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(ValueError, match="another run writes into"):
        run(tmp_path)
    assert files(tmp_path) == {}
    run(tmp_path)


def test_a_killed_run_goes_on_without_a_trace(tmp_path: Path) -> None:
    """SIGKILL in mid-run: in the end each file is, byte for byte, that of a run without a stop."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    call = "import sys, pathlib, learning; learning.run(pathlib.Path(sys.argv[1]), learning.Slow)"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", call, str(killed)], cwd=here, env={**os.environ, "PYTHONPATH": paths}
    )
    while not (killed / CHECKPOINT).exists() or time.time() - (killed / CHECKPOINT).stat().st_ctime < 0.01:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (killed / f".{CHECKPOINT}.{process.pid}.0a.tmp").write_bytes(b"cut")
    assert (killed / CHECKPOINT).exists() and not [*killed.glob("*/block_*")]
    run(killed)
    assert files(killed) == files(whole) and len(files(whole)) == 2 + 2 * 2 * len(RECIPES)
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*")}
    run(killed)  # which has nothing to do
    assert {path: path.stat().st_mtime_ns for path in killed.rglob("*")} == before
    course = json.loads((whole / "training.json").read_text())
    assert course["step"] == [*range(1, 9)] and course["topk/block_2"][-1].keys() == {"unexplained", "l0", "dead"}
    assert any(one["dead"] > 0 for block in (0, 2) for one in course[f"topk/block_{block}"])


def test_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = stopped(tmp_path, 5)
    one: dict[str, Any] = {"steps": 10, "batch_size": 64, "progress": False, "out": tmp_path}
    before = files(tmp_path)
    for given, message in (
        ({"steps": 11}, r"steps \(10 there, 11 now\)"),
        ({"lr": 0.5}, r"lr \(none there, 0.5 now\)"),
        ({"recipes": {"one": Recipe("topk", 32, 3)}}, r"recipes.one.k \(2 there, 3 now\)"),
        ({"recipes": {"two": RECIPES["topk"]}}, r"recipes.one.aux .*; recipes.two.aux"),
        ({"tokens": TensorTokens({1: made(512)[0]}, seed=1)}, r"tokens.seed \(0 there, 1 now\)"),
        ({"tokens": TensorTokens({1: made(512, seed=1)[0]})}, r"tokens.sha256 \("),
        ({"compile": True}, r"compile \(false there, true now\)"),
        ({"tokens": TensorTokens({2: made(512)[0]})}, r"blocks \(\[1\] there, \[2\] now\)"),
    ):
        call: dict[str, Any] = {"tokens": tokens, "recipes": {"one": RECIPES["topk"]}, **one, **given}
        with pytest.raises(ValueError, match=message):
            train(call.pop("tokens"), call.pop("recipes"), **call)
    for version, message in (
        ("fga_fast.__version__", r'fga_fast \(".*" there, "0.0" now\)'),
        ("torch.__version__", r'torch \(".*" there, "0.0" now\)'),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(version, "0.0")
            train(tokens, {"one": RECIPES["topk"]}, **one)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"algorithm \(2 there, 3 now\)"):
        patch.setattr(module, "ALGORITHM", 3)
        train(tokens, {"one": RECIPES["topk"]}, **one)
    assert files(tmp_path) == before


def test_damaged_checkpoints(tmp_path: Path) -> None:
    tokens = stopped(tmp_path, 5)
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    state = load(whole)
    course = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]["course"]
    other = {**state, "one/block_1/W_enc": torch.zeros(3, 3)}
    for content in (whole[:-9], b"", b"\xff" * 100, (state, {}), (other, {"step": "3", "course": course}),
                    ({**state, "one/block_1/b_dec": torch.zeros(WIDTH).double()}, {"step": "3", "course": course}),
                    (state, {"step": "11", "course": course}), (state, {"step": "3", "course": "[]"})):  # fmt: skip
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content[0], path, content[1])
        with pytest.raises(ValueError, match=r"out: the checkpoint cannot be read: .*; delete it to start anew"):
            train(tokens, {"one": RECIPES["topk"]}, out=tmp_path, steps=10, batch_size=64, progress=False)
    path.write_bytes(whole)
    train(tokens, {"one": RECIPES["topk"]}, out=tmp_path, steps=10, batch_size=64, progress=False)


def test_a_full_disk(tmp_path: Path) -> None:
    tokens = stopped(tmp_path, 5)
    before = files(tmp_path)
    message = r"out: cannot write the checkpoint of step 6 into .*; the last checkpoint, if any, is unharmed"
    one: dict[str, Any] = {"steps": 10, "batch_size": 64, "checkpoint_every": 3, "progress": False, "out": tmp_path}
    with largest_file(4096), pytest.raises(OSError, match=message):
        train(tokens, {"one": RECIPES["topk"]}, **one)
    assert files(tmp_path) == before
    (tmp_path / "one").write_bytes(b"")  # so that autoencoders cannot be written
    with pytest.raises(OSError, match=r"out: cannot write .*block_1: .*; the last checkpoint, if any, is unharmed"):
        train(tokens, {"one": RECIPES["topk"]}, **one)
    assert (tmp_path / CHECKPOINT).exists()
    (tmp_path / "one").unlink()
    train(tokens, {"one": RECIPES["topk"]}, **one)


def test_tokens_that_are_no_numbers(tmp_path: Path) -> None:
    class Bad(TensorTokens):
        def batches(self, size: int, start: int = 0) -> Iterator[dict[int, torch.Tensor]]:
            for step, batch in enumerate(super().batches(size, start), start):
                if step == 7:
                    batch[1][5, 3] = float("nan")
                yield batch

    one: dict[str, Any] = {"steps": 10, "batch_size": 64, "checkpoint_every": 3, "progress": False}
    message = (
        "step 8, recipe one, block 1: the loss is nan: 1 of the 64 tokens of this step hold NaN or Inf; .* "
        "an earlier checkpoint is unharmed"
    )
    for name, recipe in RECIPES.items():
        out = tmp_path / name
        with pytest.raises(FloatingPointError, match=message):
            train(Bad({1: made(512)[0]}), {"one": recipe}, out=out, **one)
        assert sorted(files(out)) == [CHECKPOINT, "settings.json"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(out / CHECKPOINT).values())
    x = made(512)[0]
    x[3, 3] = float("inf")
    with pytest.raises(ValueError, match="the sample holds NaN or Inf"):
        train(TensorTokens({1: x}), {"one": RECIPES["topk"]}, out=tmp_path / "sample", **one)
    with pytest.raises(ValueError, match="expected tokens that differ"):
        train(TensorTokens({1: torch.ones(9, 4)}), {"one": RECIPES["topk"]}, out=tmp_path / "equal", **one)


def test_a_rate_that_is_too_high(tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"recipe one, block 1: the loss is .*: the training diverged; take a lo"
    ):
        trained(tmp_path, RECIPES["relu"], lr=1e30, steps=40)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_sweep_gives_what_single_runs_give(tmp_path: Path) -> None:
    x = made(600)[0]
    streams = {0: x, 2: x.flip(0) ** 2}
    recipes = {"small": Recipe("topk", 24, 2, dead_after=100)}  # so that dead features take part
    recipes |= {name: dataclasses.replace(one, dead_after=100) for name, one in RECIPES.items()}
    one: dict[str, Any] = {"steps": 6, "batch_size": 100, "progress": False}
    together = train(TensorTokens(streams), recipes, out=tmp_path / "all", **one)
    assert [*together] == [(name, block) for name in recipes for block in (0, 2)]
    for name, block in (("small", 2), ("jumprelu", 0), ("batch_topk", 2)):
        out = tmp_path / f"{name} {block}"
        alone = train(TensorTokens({block: streams[block]}), {name: recipes[name]}, out=out, **one)[name, block]
        for key, tensor in together[name, block].state_dict().items():
            assert torch.equal(tensor, alone.state_dict()[key]), key


def test_what_is_written(tmp_path: Path) -> None:
    about = {"model": "vit", "model_checksum": "abc", "preprocess": {"mean": [0.5]}}
    tokens = TensorTokens({3: made(512)[0]}, about=about)
    made_of = train(tokens, {"mine-1": RECIPES["matryoshka"]}, out=tmp_path, steps=4, batch_size=64, progress=False)
    sae = SparseAutoencoder.from_pretrained(tmp_path / "mine-1" / "block_3")
    assert sae.activation == "batch_topk" and sae.k == 2 and sae.expected_l0 == pytest.approx(2, abs=0.1)
    assert (
        sae.metadata["layer"] == "3" and sae.metadata["model_name"] == "vit" and sae.metadata["model_checksum"] == "abc"
    )
    recipe = json.loads(sae.metadata["recipe"])
    assert recipe["name"] == "mine-1" and recipe["kind"] == "matryoshka" and recipe["prefixes"] == [16, 24, 32]
    told = json.loads(sae.metadata["training"])
    assert told["steps"] == 4 and told["tokens"]["preprocess"] == {"mean": [0.5]} and told["tokens"]["tokens"] == 512
    assert told["lr"] == RECIPES["matryoshka"].rate and told["fga_fast"] == fga_fast.__version__
    sae.save(tmp_path / "theirs", format="saelens")
    assert json.loads((tmp_path / "theirs" / "cfg.json").read_text())["metadata"]["model_name"] == "vit"
    assert torch.equal(made_of["mine-1", 3].W_dec, sae.W_dec) and not (tmp_path / CHECKPOINT).exists()


def test_the_rate_rises_and_falls(tmp_path: Path) -> None:
    """With a share of warm-up and decay; seen by how far the decoder's bias moves, which Adam makes about the rate."""
    moves = []
    for steps in (1, 2, 3, 4):
        tokens = stopped(tmp_path / str(steps), steps, steps=8, warmup=0.5, decay=0.5, lr=1e-3, checkpoint_every=1)
        assert tokens.d_model == WIDTH
        state = load_file(tmp_path / str(steps) / CHECKPOINT)
        moves.append(state["one/block_1/b_dec"])
    first = [moves[0].abs().max().item(), (moves[1] - moves[0]).abs().max().item()]
    assert first[0] == pytest.approx(2.5e-4, rel=1e-2) and 2.5e-4 < first[1] < 6e-4


def test_bfloat16_pre_activations(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", RECIPES["topk"])
    cast = trained(tmp_path / "cast", RECIPES["topk"], autocast=True)
    x = made()[0]
    assert cast.dtype == torch.float32 and not torch.equal(cast.W_enc, plain.W_enc)
    assert abs(cast.self_check(x).explained_variance - plain.self_check(x).explained_variance) < 0.05


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by Dynamo, and run as it was traced: the same bits as without."""
    compiled = torch.compile
    monkeypatch.setattr(module.torch, "compile", lambda function: compiled(function, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = trained(tmp_path / "compiled", RECIPES["topk"], steps=3, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(found.W_enc, trained(tmp_path / "plain", RECIPES["topk"], steps=3).W_enc)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"kind": "gated"}, ValueError, "kind: expected one of topk, "),
        ({"k": None}, TypeError, "k: expected a whole number from 1 to 32"),
        ({"k": 33}, ValueError, "k: expected a whole number from 1 to 32"),
        ({"features": 1}, ValueError, "features: expected a whole number of at least 2"),
        ({"l1": 0.1}, ValueError, "l1: only 'relu' takes it"),
        ({"kind": "relu"}, ValueError, "k: 'relu' takes l1 instead, got k=2"),
        ({"kind": "relu", "k": None}, TypeError, "l1: expected a finite number above 0, got None"),
        ({"kind": "relu", "k": None, "l1": float("nan")}, ValueError, "l1: expected a finite number above 0"),
        ({"prefixes": (4, 32)}, ValueError, "prefixes: only 'matryoshka'"),
        ({"kind": "matryoshka", "prefixes": (4, 31)}, ValueError, "prefixes: expected rising sizes of which the last"),
        ({"kind": "matryoshka", "prefixes": (8, 4, 32)}, ValueError, "prefixes: expected rising sizes"),
        ({"aux": -1.0}, ValueError, "aux: expected a finite number of at least 0"),
        ({"bandwidth": 0}, ValueError, "bandwidth: expected a finite number above 0"),
        ({"dead_after": 1.5}, TypeError, "dead_after: expected a whole number"),
    ],
)
def test_recipes_that_do_not_fit(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe(**{"kind": "topk", "features": 32, "k": 2, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipes": {}}, "recipes: expected at least one"),
        ({"recipes": {"../up": RECIPES["topk"]}}, "recipes: expected names of letters"),
        ({"recipes": {"training.json": RECIPES["topk"]}}, "recipes: expected names of letters"),
        ({"steps": 0}, "steps: expected a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size: expected a whole number"),
        ({"lr": 0.0}, "lr: expected a finite number above 0"),
        ({"warmup": 1.5}, "warmup: expected a share of the steps"),
        ({"checkpoint_every": -1}, "checkpoint_every: expected a whole number of at least 0"),
    ],
)
def test_arguments_that_do_not_fit(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    call: dict[str, Any] = {"recipes": {"one": RECIPES["topk"]}, "steps": 2, "out": tmp_path / "out", **given}
    with pytest.raises(ValueError, match=message):
        train(TensorTokens({1: made(64)[0]}), call.pop("recipes"), **call)
    assert not (tmp_path / "out").exists()
