"""`fga-fast explain` from end to end on a small random timm model, and every refusal with its message."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fga_fast.cli import explain as explain_command
from fga_fast.cli.main import main
from fga_fast.cli.subject import Subject
from fga_fast.io.checkpoint import Checkpoint
from fga_fast.io.images import Preprocess, load_image
from fga_fast.result.explanation import Explanation
from fga_fast.sae import SparseAutoencoder

timm = pytest.importorskip("timm")

MODEL, WIDTH = "test_vit", 64  # timm's own test model: 160 px, 10 x 10 patches, 6 blocks


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


def state(weights: Path) -> dict[str, Tensor]:
    return Checkpoint(weights).tensors()


# what it writes


def test_explain_one_photo(
    tmp_path: Path, weights: Path, sae: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", MODEL, "--checkpoint", str(weights), "--sae", f"2={sae}", "--sae", f"4={sae}"]
    given += ["--target", "3", "7", "--out", str(tmp_path), "--base", "5", "--top-features", "4"]
    assert main(["explain", str(photo), *given]) == 0
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"figure.png", "explanation.json", "relevance.safetensors"}
    kept = Explanation.load(tmp_path / "relevance.safetensors")
    assert kept.relevance.shape == (2, 100)
    assert kept.targets.tolist() == [3, 7]
    assert kept.ungated is not None
    assert all(float(gate.min()) >= 1 / 5 - 1e-6 and float(gate.max()) <= 5 + 1e-5 for gate in kept.gates.values())
    facts = json.loads((tmp_path / "explanation.json").read_text())
    assert facts["grid"] == [10, 10]
    assert facts["gated_layers"] == [2, 4]
    assert facts["probability_is"] == "softmax"
    assert facts["milliseconds"] > 0 and facts["milliseconds_forward_pass"] > 0
    for row, (one, target) in enumerate(zip(facts["explained"], (3, 7), strict=True)):
        assert one["target"] == target
        assert one["probability"] == pytest.approx(float(kept.logits[row].softmax(0)[target]), rel=1e-5)
        listed = [(pair["feature"], pair["contribution"]) for pair in one["top_features"]["4"]]
        assert listed == [tuple(pair) for pair in kept.top_features(4, 4)[row]]
    assert Image.open(tmp_path / "figure.png").width > 1000
    text = capsys.readouterr().out
    for part in ("grid 10 x 10", "FGA, gates after block 2, 4", "milliseconds", "class 3: probability", "block 4 top"):
        assert part in text


def test_numbers_are_those_of_the_library(tmp_path: Path, weights: Path, sae: Path, photo: Path) -> None:
    from fga_fast.explainer import Explainer

    given = ["--model", MODEL, "--checkpoint", str(weights), "--sae", f"3={sae}", "--out", str(tmp_path)]
    assert main(["explain", str(photo), *given]) == 0
    model = timm.create_model(MODEL, num_classes=11, dynamic_img_size=False).eval()
    model.load_state_dict(state(weights))
    half = (0.5, 0.5, 0.5)
    image = Preprocess((160, 160), half, half, crop_pct=0.95)(load_image(photo)).unsqueeze(0)
    expected = Explainer(model, saes={3: SparseAutoencoder.from_pretrained(sae)})(image)
    kept = Explanation.load(tmp_path / "relevance.safetensors")
    assert kept.targets.tolist() == expected.targets.tolist()  # the predicted class
    torch.testing.assert_close(kept.relevance, expected.relevance, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(kept.ungated, Explainer(model)(image).relevance, rtol=1e-4, atol=1e-7)


def test_without_saes_it_is_transmm(
    tmp_path: Path, weights: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", MODEL, "--checkpoint", str(weights), "--out", str(tmp_path / "new" / "folder")]
    assert main(["explain", str(photo), *given]) == 0
    assert "TransMM, no autoencoder given" in capsys.readouterr().out
    kept = Explanation.load(tmp_path / "new" / "folder" / "relevance.safetensors")
    assert kept.gates == {}
    assert kept.ungated is None


def test_folder_goes_on_after_a_broken_image(
    tmp_path: Path, weights: Path, sae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    picture(1).save(folder / "a.png")
    picture(2, 120, 400).convert("L").save(folder / "c.png")
    picture(3).convert("RGBA").save(folder / "d.png")
    data = (folder / "a.png").read_bytes()
    (folder / "b.png").write_bytes(data[: len(data) // 2])
    given = [
        "--model",
        MODEL,
        "--checkpoint",
        str(weights),
        "--sae",
        f"2={sae}",
        "--batch-size",
        "2",
        "--out",
        str(out),
    ]
    assert main(["explain", str(folder), *given, "--target", "1", "4"]) == 1
    assert {path.name for path in out.iterdir()} == {"a.png", "c.png", "d.png", "contact_sheet.png"}
    for name in ("a.png", "c.png", "d.png"):
        assert json.loads((out / name / "explanation.json").read_text())["image"].endswith(name)
    captured = capsys.readouterr()
    assert "left out b.png" in captured.err and "truncated" in captured.err
    assert "1 of 4 image(s)" in captured.err
    assert "explaining" in captured.err  # the progress bar
    assert "explained 3 image(s), left out 1" in captured.out
    alone = tmp_path / "alone"
    assert main(["explain", str(folder / "c.png"), *given[:-1], str(alone), "--target", "1", "4"]) == 0
    batched = Explanation.load(out / "c.png" / "relevance.safetensors")
    torch.testing.assert_close(
        Explanation.load(alone / "relevance.safetensors").relevance, batched.relevance, rtol=1e-4, atol=1e-7
    )


def test_folder_of_broken_images_only(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"nothing")
    given = ["--model", MODEL, "--checkpoint", str(weights), "--out", str(tmp_path / "out")]
    assert main(["explain", str(folder), *given]) == 1
    assert "1 of 1 image(s)" in capsys.readouterr().err


def test_without_matplotlib_overlays_are_written(
    tmp_path: Path, weights: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    given = ["--model", MODEL, "--checkpoint", str(weights), "--out", str(tmp_path)]
    assert main(["explain", str(photo), *given]) == 0
    assert "fga_fast[plot]" in capsys.readouterr().err
    assert Image.open(tmp_path / "figure.png").width > 300


def test_fashion_demo_needs_no_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fga_fast.assets import fashion_config

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
        assert one["top_features"]
        assert f"{one['name']} (class {one['target']}): probability" in text


def test_demo_takes_class_names(tmp_path: Path) -> None:
    from fga_fast.assets import fashion_config

    name = fashion_config().class_names[1]
    assert main(["explain", "--target", name.upper(), "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "explanation.json").read_text())
    assert [one["target"] for one in facts["explained"]] == [1]


# refusals


def refused(capsys: pytest.CaptureFixture[str], *given: object) -> str:
    """Runs `explain`, which has to end with exit code 2 and one message, and returns that message."""
    assert main(["explain", *map(str, given)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("fga-fast: error: ")
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("flag", ("--checkpoint=x.pt", "--pretrained", "--random-weights"))
def test_weights_without_a_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert f"{flag.partition('=')[0]}: expected --model" in refused(capsys, flag, "--out", tmp_path)


def test_results_do_not_go_among_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(0).save(tmp_path / "a.png")
    assert "is the folder of the images" in refused(capsys, tmp_path, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_missing_weights_are_named(tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, photo, "--model", MODEL, "--out", tmp_path)
    for part in (f"no weights for {MODEL}", "--checkpoint FILE", "pretrained=True", "--random-weights"):
        assert part in text


def test_missing_network_is_explained(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    text = refused(capsys, photo, "--model", MODEL, "--pretrained", "--out", tmp_path)
    assert "no route to host" in text
    assert "--checkpoint FILE" in text


def test_random_weights_only_when_asked(tmp_path: Path, photo: Path, weights: Path) -> None:
    assert main(["explain", str(photo), "--model", MODEL, "--random-weights", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "explanation.json").read_text())["explained"][0]["name"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "no_such_vit", "--random-weights"], "timm has no model 'no_such_vit'"),
        (["--model", MODEL, "--random-weights", "--pretrained"], "expected one of them"),
        (["--model", MODEL, "--random-weights", "--target", "1000"], "expected a class from 0 to 999, got 1000"),
        (["--model", MODEL, "--random-weights", "--target", "-1"], "expected a class from 0 to 999, got -1"),
        (["--model", MODEL, "--random-weights", "--target", "unicorn"], "is called 'unicorn'"),
        (["--model", MODEL, "--random-weights", "--target", "terrier"], "fits several classes: 153 (Maltese dog"),
        (["--model", MODEL, "--random-weights", "--sae", "sae_folder"], "expected LAYER=PATH"),
        (["--model", MODEL, "--random-weights", "--sae", "2=no_such_folder"], "no file or folder no_such_folder"),
        (["--model", MODEL, "--checkpoint", "no_such.safetensors"], "no file no_such.safetensors"),
        (["--model", MODEL, "--random-weights", "--batch-size", "0"], "--batch-size"),
        (["--model", MODEL, "--random-weights", "--device", "warp"], "warp"),
        (["--model", "resnet18", "--random-weights"], "ResNet"),
        (["--model", MODEL, "--random-weights", "--base", "-1"], "base"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert message in refused(capsys, photo, "--out", tmp_path / "out", *given)
    assert list((tmp_path / "out").glob("*")) == []


def test_wrong_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", MODEL, "--random-weights", "--out", tmp_path / "out"]
    assert "no file or folder" in refused(capsys, tmp_path / "gone.png", *model)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "cut.png" in refused(capsys, tmp_path / "cut.png", *model)
    (tmp_path / "empty").mkdir()
    assert "no image in" in refused(capsys, tmp_path / "empty", *model)
    assert "IMAGE: expected" in refused(capsys, *model)


def test_sae_that_does_not_fit(tmp_path: Path, photo: Path, sae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = [photo, "--model", MODEL, "--random-weights", "--out", tmp_path]
    assert "layer 6 is out of range" in refused(capsys, *model, "--sae", f"6={sae}")  # blocks are 0 to 5
    named = [*model, "--sae", f"2={sae}", "--sae-normalize", "layer_norm"]
    assert "stores its own normalisation; got normalize='layer_norm'" in refused(capsys, *named)
    assert "second one for layer 2" in refused(capsys, *model, "--sae", f"2={sae}", f"2={sae}")
    small = SparseAutoencoder(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8), activation="relu")
    assert "width 8" in refused(capsys, *model, "--sae", f"2={small.save(tmp_path / 'small')}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda_is_said(tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, photo, "--model", MODEL, "--random-weights", "--device", "cuda", "--out", tmp_path)
    assert "no CUDA device" in text


# output folders


def test_unusable_output_folder_is_found_before_computing(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def computing(*_: object) -> Subject:
        raise AssertionError("the model was loaded before the folder was checked")

    monkeypatch.setattr(explain_command, "load_subject", computing)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        text = refused(capsys, photo, "--model", MODEL, "--random-weights", "--out", out)
        assert f"cannot write into the folder {out}" in text
    assert (tmp_path / "file").read_text() == "x"


def test_read_only_output_folder(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in for chmod, which root's processes are not bound by.
    original = Path.open

    def refuse(self: Path, mode: str = "r", *more: object, **settings: object) -> object:
        if "x" in mode or "w" in mode:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, mode, *more, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    text = refused(capsys, photo, "--model", MODEL, "--random-weights", "--out", tmp_path)
    assert "cannot write into the folder" in text and "Permission denied" in text
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_leaves_no_half_file(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:  # the folder's check and the first file still fit
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    text = refused(capsys, photo, "--model", MODEL, "--random-weights", "--out", tmp_path)
    assert "No space left" in text
    assert [path.name for path in tmp_path.iterdir()] == ["explanation.json"]
    json.loads((tmp_path / "explanation.json").read_text())


def test_truncated_checkpoint(
    tmp_path: Path, weights: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def building(*_: object, **__: object) -> None:
        raise AssertionError("the model was built before the checkpoint was checked")

    monkeypatch.setattr(timm, "create_model", building)
    cut = tmp_path / "cut.safetensors"
    data = weights.read_bytes()
    for length in (0, 5, 500, len(data) - 1):
        cut.write_bytes(data[:length])
        text = refused(capsys, photo, "--model", MODEL, "--checkpoint", cut, "--out", tmp_path / "out")
        assert "truncated" in text or "neither a safetensors nor" in text


# the program itself


def test_usage_errors_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ([], ["fly"], ["explain", "--backend", "abacus"]):
        with pytest.raises(SystemExit) as stopped:
            main(given)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert "fga-fast" in capsys.readouterr().out


def test_traceback_on_request(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "explain", str(tmp_path / "gone.png"), "--model", MODEL, "--random-weights"])


def test_interrupt(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Subject:
        raise KeyboardInterrupt

    monkeypatch.setattr(explain_command, "load_subject", interrupted)
    assert main(["explain", str(photo), "--model", MODEL, "--random-weights", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
