"""`fga-fast explain` from end to end on a small random timm model and the demo, and every refusal with its message."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fga_fast import Explainer, Explanation, Gate, SparseAutoencoder
from fga_fast.assets import fashion_config, fashion_scenes
from fga_fast.cli import ways
from fga_fast.cli.main import main
from fga_fast.io.images import Preprocess, load_image

timm = pytest.importorskip("timm")

MODEL, WIDTH = "test_vit", 64  # timm's own test model: 160 px, 10 x 10 patches, 6 blocks
RANDOM = ("--model", MODEL, "--random-weights")
Refused = Callable[..., str]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model(MODEL, num_classes=11).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 8

    autoencoder = SparseAutoencoder(draw(WIDTH, 96), draw(96), draw(96, WIDTH), draw(WIDTH), activation="relu")
    return autoencoder.save(tmp_path_factory.mktemp("sae") / "block")


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    picture(0).save(path)
    return path


def picture(seed: int, width: int = 300, height: int = 200) -> Image.Image:
    values = torch.rand(8, 12, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((values * 255).byte().numpy()).resize((width, height), Image.Resampling.BICUBIC)


def explained(out: Path, *given: object) -> tuple[Explanation, dict[str, Any]]:
    """Runs `explain`, which has to succeed; what it wrote into `out`."""
    assert main([*map(str, ("explain", *given, "--out", out))]) == 0
    return Explanation.load(out / "relevance.safetensors"), json.loads((out / "explanation.json").read_text())


# what it writes


def test_explain_one_photo(
    tmp_path: Path, weights: Path, sae: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are the library's, for classes that are given and for the predicted one."""
    given: list[object] = [photo, "--model", MODEL, "--checkpoint", weights]
    gated = ["--sae", f"2={sae}", f"4={sae}", "--target", "3", "7", "--base", "5", "--top-features", "4"]
    kept, facts = explained(tmp_path / "gated", *given, *gated)
    assert {path.name for path in (tmp_path / "gated").iterdir()} == {
        "figure.png", "explanation.json", "relevance.safetensors"
    }  # fmt: skip
    assert Image.open(tmp_path / "gated" / "figure.png").width > 1000
    text = capsys.readouterr().out
    for part in (
        "grid 10 x 10",
        "block_x_gradient, conservative backward pass, gates of base 5 after block 2, 4",
        "milliseconds",
        "class 3: logit",
        "block 4 top",
    ):
        assert part in text

    model = timm.create_model(MODEL, num_classes=11, dynamic_img_size=False).eval()
    model.load_state_dict(load_file(weights))
    image = Preprocess((160, 160), (0.5,) * 3, (0.5,) * 3, crop_pct=0.95)(load_image(photo)).unsqueeze(0)
    saes = dict.fromkeys((2, 4), SparseAutoencoder.from_pretrained(sae))
    want = Explainer(model, saes, gate=Gate(base=5), top_features=4, ungated=True)(image, [[3, 7]])
    for name in ("targets", "relevance", "ungated", "logits"):
        torch.testing.assert_close(getattr(kept, name), getattr(want, name), rtol=1e-4, atol=1e-7)
    assert kept.gates.keys() == {2, 4} and kept.relevance.shape == (1, 2, 100)
    assert all(float(gate.min()) >= 1 / 5 - 1e-6 and float(gate.max()) <= 5 + 1e-5 for gate in kept.gates.values())
    assert (facts["grid"], facts["gated_blocks"], facts["gate_base"]) == ([10, 10], [2, 4], 5)
    assert facts["probability_is"] == "softmax"
    assert facts["milliseconds"] > 0 and facts["milliseconds_forward_pass"] > 0
    for k, (one, target) in enumerate(zip(facts["explained"], (3, 7), strict=True)):
        assert one["target"] == target
        assert one["probability"] == pytest.approx(float(kept.logits[0].softmax(0)[target]), rel=1e-5)
        listed = [(pair["feature"], pair["contribution"]) for pair in one["top_features"]["4"]]
        assert listed == [tuple(pair) for pair in kept.top_features(4, 4)[0][k]]

    kept, facts = explained(tmp_path / "new" / "folder", *given)
    assert "block_x_gradient, conservative backward pass, no autoencoder given" in capsys.readouterr().out
    want = Explainer(model)(image)
    assert kept.targets.tolist() == want.targets.tolist()
    torch.testing.assert_close(kept.relevance, want.relevance, rtol=1e-4, atol=1e-7)
    assert kept.gates == {} and kept.ungated is None and facts["gate_base"] is None


def test_folder_goes_on_after_a_broken_image_and_without_matplotlib(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    picture(1).save(folder / "a.png")
    picture(2, 120, 400).convert("L").save(folder / "c.png")
    picture(3).convert("RGBA").save(folder / "d.png")
    data = (folder / "a.png").read_bytes()
    (folder / "b.png").write_bytes(data[: len(data) // 2])
    given = ["--model", MODEL, "--checkpoint", str(weights), "--batch-size", "2", "--target", "1", "4"]
    assert main(["explain", str(folder), *given, "--out", str(out)]) == 1
    assert {path.name for path in out.iterdir()} == {"a.png", "c.png", "d.png", "contact_sheet.png"}
    for name in ("a.png", "c.png", "d.png"):
        assert json.loads((out / name / "explanation.json").read_text())["image"].endswith(name)
        assert Image.open(out / name / "figure.png").width > 300
    captured = capsys.readouterr()
    # The last is the progress bar.
    for part in ("left out b.png", "truncated", "1 of 4 image(s)", "explaining"):
        assert part in captured.err
    assert captured.err.count("fga_fast[plot]") == 1
    assert "explained 3 image(s), left out 1" in captured.out
    alone, _ = explained(tmp_path / "alone", folder / "c.png", *given)
    batched = Explanation.load(out / "c.png" / "relevance.safetensors")
    torch.testing.assert_close(alone.relevance, batched.relevance, rtol=1e-4, atol=1e-7)
    for name in ("a.png", "c.png", "d.png"):
        (folder / name).unlink()
    assert main(["explain", str(folder), *given, "--out", str(out)]) == 1
    assert "1 of 1 image(s)" in capsys.readouterr().err


def test_fashion_demo_needs_no_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["explain"]) == 0
    out = tmp_path / "fga-fast-out"
    found = {path.name for path in out.iterdir()}
    assert found == {"figure.png", "explanation.json", "relevance.safetensors", "contact_sheet.png"}
    facts = json.loads((out / "explanation.json").read_text())
    assert facts["probability_is"] == "sigmoid"
    assert len(facts["explained"]) == 2
    text = capsys.readouterr().out
    for one in facts["explained"]:
        assert one["name"] in fashion_config().class_names
        assert one["probability"] > 0.5
        assert all(one["top_features"].values())
        assert f"{one['name']} (class {one['target']}): logit {one['logit']:.4g}, probability" in text


def test_settings_are_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the demo, whose classes may be named in any letter case."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)  # which takes longest
    scene = fashion_scenes()[0]
    plain, facts = explained(tmp_path, scene, "--target", fashion_config().class_names[1].upper())
    assert plain.targets.tolist() == [1] and facts["explained"][0]["target"] == 1
    assert (facts["method"], facts["backward"], facts["gate_base"]) == ("block_x_gradient", "conservative", 2)
    assert bool((plain.relevance < 0).any()) and plain.start_block == 0
    published, facts = explained(tmp_path, scene, "--preset", "published")
    assert (facts["method"], facts["backward"], facts["gate_base"]) == ("rollout", "exact", 10)
    assert bool((published.relevance >= 0).all())
    assert bool((explained(tmp_path, scene, "--preset", "published", "--signed")[0].relevance < 0).any())
    _, facts = explained(tmp_path, scene, "--method", "input_x_gradient", "--backward", "exact", "--base", "3")
    assert (facts["method"], facts["backward"], facts["gate_base"]) == ("input_x_gradient", "exact", 3)
    assert explained(tmp_path, scene, "--start-block", "2")[0].start_block == 2
    assert explained(tmp_path, scene, "--backend", "composite")[0].backend == "composite"


def test_synonyms_name_classes(tmp_path: Path, photo: Path) -> None:
    _, facts = explained(tmp_path, photo, *RANDOM, "--target", "Tabby cat", "281", "golden retriever")
    assert [one["target"] for one in facts["explained"]] == [281, 281, 207]
    assert facts["explained"][0]["name"].startswith("tabby, tabby cat")


# refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--checkpoint=x.pt"], "--checkpoint: expected --model"),
        (["--pretrained"], "--pretrained: expected --model"),
        (["--random-weights"], "--random-weights: expected --model"),
        (["--model", "no_such_vit", "--random-weights"], "timm has no model 'no_such_vit'"),
        ([*RANDOM, "--pretrained"], "expected one of them"),
        ([*RANDOM, "--target", "1000"], "--target: expected a class from 0 to 999, got 1000"),
        ([*RANDOM, "--target", "-1"], "--target: expected a class from 0 to 999, got -1"),
        ([*RANDOM, "--target", "unicorn"], "--target: 'unicorn' is not among the names of the 1000 classes"),
        ([*RANDOM, "--target", "terrier"], "did you mean 'Maltese dog"),
        ([*RANDOM, "--target", "crane"], "--target: 'crane' is a name of 2 classes: 134 (crane"),
        ([*RANDOM, "--sae", "sae_folder"], "--sae: expected BLOCK=PATH"),
        ([*RANDOM, "--sae", "2=no_such_folder"], "no file or folder no_such_folder"),
        (["--model", MODEL, "--checkpoint", "no_such.safetensors"], "no file no_such.safetensors"),
        ([*RANDOM, "--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        ([*RANDOM, "--device", "warp"], "warp"),
        (["--model", "resnet18", "--random-weights"], "ResNet"),
        ([*RANDOM, "--base", "-1"], "base"),
        (["--start-block", "3"], "saes[2]"),
    ],
)
def test_wrong_arguments(tmp_path: Path, photo: Path, refused: Refused, given: list[str], message: str) -> None:
    assert message in refused("explain", photo, "--out", tmp_path / "out", *given)
    assert list((tmp_path / "out").glob("*")) == []


def test_names_that_are_not_known(tmp_path: Path, weights: Path, photo: Path, refused: Refused) -> None:
    given = [photo, "--model", MODEL, "--checkpoint", weights, "--target", "cat", "--out", tmp_path]
    assert "--target: expected a number from 0 to 10, since the names of" in refused("explain", *given)


def test_results_do_not_go_among_the_images(tmp_path: Path, refused: Refused) -> None:
    picture(0).save(tmp_path / "a.png")
    assert "is the folder of the images" in refused("explain", tmp_path, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_missing_weights(tmp_path: Path, photo: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["explain", photo, "--model", MODEL, "--out", tmp_path]
    text = refused(*given)
    for part in (f"no weights for {MODEL}", "--checkpoint FILE", "pretrained=True", "--random-weights"):
        assert part in text

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    text = refused(*given, "--pretrained")
    assert "no route to host" in text and "--checkpoint FILE" in text


def test_wrong_images(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "empty").mkdir()
    for name, message in (("gone.png", "no file or folder"), ("cut.png", "cut.png"), ("empty", "no image in")):
        assert message in refused("explain", tmp_path / name, *RANDOM, "--out", tmp_path / "out")
    assert "IMAGE: expected" in refused("explain", *RANDOM, "--out", tmp_path / "out")


def test_sae_that_does_not_fit(tmp_path: Path, photo: Path, sae: Path, refused: Refused) -> None:
    small = SparseAutoencoder(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8), activation="relu")
    small_path = small.save(tmp_path / "small")
    for given, message in (
        ([f"6={sae}"], "as keys, got 6"),  # blocks are 0 to 5
        ([f"2={sae}", "--sae-normalize", "layer_norm"], "stores its own, or needs none; got normalize='layer_norm'"),
        ([f"2={sae}", f"2={sae}"], "expected one autoencoder a block, got two for block 2"),
        ([f"2={small_path}"], "width 8"),
    ):
        assert message in refused("explain", photo, *RANDOM, "--out", tmp_path, "--sae", *given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda_is_said(tmp_path: Path, photo: Path, refused: Refused) -> None:
    assert "no CUDA device" in refused("explain", photo, *RANDOM, "--device", "cuda", "--out", tmp_path)


def forbid(*_: object, **__: object) -> None:
    raise AssertionError("this was called before the arguments were checked")


def test_truncated_checkpoint(
    tmp_path: Path, weights: Path, photo: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", forbid)
    cut = tmp_path / "cut.safetensors"
    data = weights.read_bytes()
    for length in (0, 5, 500, len(data) - 1):
        cut.write_bytes(data[:length])
        text = refused("explain", photo, "--model", MODEL, "--checkpoint", cut, "--out", tmp_path / "out")
        assert "truncated" in text or "neither a safetensors nor" in text


# output folders


def test_unusable_output_folder_is_found_before_computing(
    tmp_path: Path, photo: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "load_subject", forbid)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert f"cannot write into the folder {out}" in refused("explain", photo, *RANDOM, "--out", out)
    assert (tmp_path / "file").read_text() == "x"


def test_read_only_output_folder(
    tmp_path: Path, photo: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in for chmod, which does not bind root's processes.
    original = Path.open

    def refuse(self: Path, mode: str = "r", *more: object, **settings: object) -> object:
        if "x" in mode or "w" in mode:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, mode, *more, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    text = refused("explain", photo, *RANDOM, "--out", tmp_path)
    assert "cannot write into the folder" in text and "Permission denied" in text
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_leaves_no_half_file(
    tmp_path: Path, photo: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:  # the folder's check and the first file still fit
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refused("explain", photo, *RANDOM, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["explanation.json"]
    json.loads((tmp_path / "explanation.json").read_text())


# the program itself


def test_usage_errors_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for given, code in (([], 2), (["fly"], 2), (["explain", "--backend", "abacus"], 2), (["--version"], 0)):
        with pytest.raises(SystemExit) as stopped:
            main(given)
        assert stopped.value.code == code
    assert "fga-fast" in capsys.readouterr().out


def test_traceback_on_request(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "explain", str(tmp_path / "gone.png"), *RANDOM])


def test_interrupt(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ways, "load_subject", interrupted)
    assert main(["explain", str(photo), *RANDOM, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
