"""`fga-fast train-sae` from end to end: from a harvest, straight from a model, a sweep, and its messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harvesting import items, picture, small

from fga_fast.cli import train_sae as module
from fga_fast.cli.main import build_parser, main
from fga_fast.dataset.items import Item, half_of
from fga_fast.harvest import live
from fga_fast.harvest.activations import HarvestTokens
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

SHORT = ("--features", "24", "--steps", "3", "--batch-size", "32")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_sweep_on_a_harvest(capsys: pytest.CaptureFixture[str]) -> None:
    activations = small(Path("h"), items(20), model_name="vit_x")
    given = ["train-sae", "--harvest", "h", *SHORT, "--k", "2", "5", "--out", "out", "--checkpoint-every", "2"]
    assert main(given) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == "model    vit_x" and "wrote 4 autoencoder(s) into out" in said.out
    rows = [line.split() for line in lines if line.startswith("topk-24-")]
    assert [(row[0], int(row[1])) for row in rows] == [(f"topk-24-k{k}", block) for k in (2, 5) for block in (0, 2)]
    held = {block: activations.read(block, 18, 20).flatten(0, 1) for block in (0, 2)}
    for name, block, explained, l0, dead in rows:
        sae = SparseAutoencoder.from_pretrained(Path("out", name, f"block_{block}"))
        expected = sae.self_check(held[int(block)])
        assert float(explained) == pytest.approx(expected.explained_variance, abs=1e-4)
        assert float(l0) == pytest.approx(expected.l0, abs=0.05)
        assert float(dead[:-1]) == pytest.approx(100 * expected.dead, abs=0.05)
    assert f"measured on {len(held[0])} tokens held back" in said.out
    rest = "IMAGES --model vit_x --checkpoint FILE --sae 0=out/topk-24-k2/block_0 2=out/topk-24-k2/block_2"
    assert lines[-2:] == [f"next: fga-fast sae-report {rest}", f"then: fga-fast evaluate {rest}"]
    assert main(given) == 0 and "training" not in capsys.readouterr().err.replace("training: 100%", "")
    assert main([*given, "--lr", "0.5"]) == 2
    assert "lr (none there, 0.5 now); name another folder" in capsys.readouterr().err


def test_the_demo_model_on_its_scenes(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["train-sae", "--blocks", "3", "--kind", "relu", "--l1", "0.2", "0.20000001", *SHORT, "--out", "out"]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "model    the fashion demo model" in said and "relu-24-l1-0.2 " in said and "relu-24-l1-0.20000001 " in said
    assert "that were trained on, as the images are too few to hold some back" in said
    assert said.splitlines()[-2] == "next: fga-fast sae-report --sae 3=out/relu-24-l1-0.2/block_3"
    sae = SparseAutoencoder.from_pretrained(Path("out", "relu-24-l1-0.2", "block_3"))
    assert sae.activation == "relu" and sae.d_model == 128 and sae.metadata["model_name"] == "the fashion demo model"


def photos(count: int) -> None:
    Path("photos").mkdir()
    for number in range(count):
        picture(number).save(Path("photos", f"{number}.png"))


def said_by(given: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["train-sae", given[0], *SHORT, "--k", "2", *given[1:]]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_half_that_is_not_trained_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    photos(24)
    loaded: set[str] = set()
    load = live.load

    def noted(item: Item, *rest: Any) -> Any:
        loaded.add(item.key)
        return load(item, *rest)

    monkeypatch.setattr(live, "load", noted)
    model = ["--model", "test_vit", "--random-weights", "--window", "0", "255"]
    for split in ("tune", "report"):
        loaded.clear()
        lines = said_by(["photos", *model, "--blocks", "1", "--split", split, "--out", split], capsys)
        assert loaded and {half_of(key) for key in loaded} == {split}
        other = " --split tune" if split == "report" else ""
        rest = f"photos {' '.join(model)}{other} --sae 1={split}/topk-24-k2/block_1"
        assert lines[-2:] == [f"next: fga-fast sae-report {rest}", f"then: fga-fast evaluate {rest}"]
        for line in lines[-2:]:
            build_parser().parse_args(line.split()[2:])


@pytest.mark.parametrize(("codes", "images"), [(2**26, 3), (2 * 64 * 24, 2), (1, 1)])
def test_held_images_are_measured_once_and_after_training(
    codes: int, images: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there is memory for; of the demo model, whose images have 64 patches."""
    photos(30)
    monkeypatch.setattr(module, "_CODES", codes)
    measured: list[torch.Tensor] = []
    check = SparseAutoencoder.self_check
    monkeypatch.setattr(SparseAutoencoder, "self_check", lambda sae, x: (measured.append(x), check(sae, x))[1])
    order: list[str] = []
    train, batches = module.train, module.LiveTokens.batches
    monkeypatch.setattr(module, "train", lambda *a, **k: (train(*a, **k), order.append("trained"))[0])
    monkeypatch.setattr(module.LiveTokens, "batches", lambda *a: (order.append("read"), batches(*a))[1])
    lines = said_by(["photos", "--blocks", "1", "--out", "out", "--batch-size", "128"], capsys)
    assert f"measured on {64 * images} tokens held back; dead: features that none of them activates" in lines
    assert len(measured) == 1 and len(measured[0].unique(dim=0)) == len(measured[0]) == 64 * images
    assert order[-2:] == ["trained", "read"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "--blocks: expected the numbers of some blocks"),
        (("--harvest", "h", "--blocks", "1"), "which images, model or blocks, got --blocks;"),
        (
            ("a", "--harvest", "h", "--checkpoint", "f", "--pretrained", "--window", "auto", "--split", "tune"),
            "got IMAGES, --checkpoint, --window, --split, --pretrained; leave it out",
        ),
        (("--blocks", "1", "--features", "0"), "features: expected a whole number of at least 2, got 0"),
        (("--harvest", "nowhere"), "nowhere"),
        (("--blocks", "77"), "blocks: expected some of 0 to 4, got [77]"),
        (("--blocks", "1", "--kind", "relu", "--k", "3"), "--k: relu takes --l1 instead"),
        (("--blocks", "1", "--l1", "3"), "--l1: only relu takes it; give --k for topk"),
        (("--blocks", "1", "--k", "3000"), "k: expected a whole number from 1 to 1024 (features), got 3000"),
    ],
)
def test_arguments_that_do_not_fit(given: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-sae", "--out", "out", *given]) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


def test_images_that_are_held_back_never_come(tmp_path: Path) -> None:
    activations = small(tmp_path / "h", items(10))  # several shards, and a part of one
    tokens = HarvestTokens(activations, seed=3, images=7)
    patches = activations.about.patches
    rows = activations.read(0, 0, 7).flatten(0, 1)
    epoch = [batch for batch, _ in zip(tokens.batches(patches), range(7), strict=False)]
    seen = torch.cat([batch[0] for batch in epoch])
    assert sorted(seen.tolist()) == sorted(rows.tolist())
    assert tokens.about["images"] == 7 and tokens.about["tokens"] == 7 * patches
    for wrong in (0, 11):
        with pytest.raises(ValueError, match="images: expected 1 to 10, as many as the harvest has"):
            HarvestTokens(activations, images=wrong)


def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The Python of docs/sae_training.md, as printed, and its commands' options."""
    page = (Path(__file__).parents[2] / "docs" / "sae_training.md").read_text(encoding="utf-8")
    small(Path("streams"), items(20))
    (code,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "sae_training.md", "exec"), {})
    said = capsys.readouterr().out
    assert "narrow 0 topk 8.0" in said and "nested 2 batch_topk" in said and "explained_variance" in said
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("fga-fast train-sae")]
    assert commands
    for words in commands:
        build_parser().parse_args(words)
