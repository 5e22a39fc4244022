"""`fga-fast features` from end to end, the names it keeps, and what `fga-fast explain` makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fga_fast import Preprocess, assets
from fga_fast.cli.main import main
from fga_fast.io.images import load_image
from fga_fast.sae.notes import Note, read_notes
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

pytest.importorskip("timm")


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "streams"
    assert main(["harvest", "--blocks", "2", "3", "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def features(streams: Path, *given: object) -> list[dict[str, Any]]:
    assert main(["features", "--harvest", str(streams), "--examples", "2", "--out", "out", *map(str, given)]) == 0
    found: list[dict[str, Any]] = json.loads(Path("out", "cards.json").read_bytes())["features"]
    return found


def test_the_demo(streams: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = features(streams, "--features", "3:17", "2:100", "--features", "3:5")
    assert [(one["block"], one["feature"]) for one in found] == [(2, 100), (3, 5), (3, 17)]
    assert all(example["measured"] is not None and not example["error"] for one in found for example in one["examples"])
    said = capsys.readouterr()
    assert "model    the fashion demo model, 6 images\nwrote cards.html and cards.json into out" in said.out
    assert "block 3: 100%" in said.err and "cards of block 3: 100%" in said.err
    assert {share["name"] for one in found for share in one["pushes"]} <= {*assets.fashion_config().class_names}


def test_features_of_an_image_and_of_a_density(streams: Path) -> None:
    sae = Path(assets.__file__).parent / "fashion" / "sae_3"
    (image, *_) = assets.fashion_scenes()
    found = features(streams, "--image", image, "--top", "4", "--sae", f"3={sae}")
    given = ["explain", str(image), "--sae", f"3={sae}", "--top-features", "4", "--preset", "published"]
    assert main([*given, "--out", "one"]) == 0
    told = json.loads(Path("one", "explanation.json").read_bytes())["explained"][0]
    assert [one["feature"] for one in found] == sorted(one["feature"] for one in told["top_features"]["3"])
    dense = features(streams, "--min-density", "0.02", "--limit", "3", "--sae", f"3={sae}")
    assert len(dense) == 3 and all(one["density"] >= 0.02 and one["block"] == 3 for one in dense)


def test_names_are_kept_beside_the_sae_and_shown(streams: Path) -> None:
    shutil.copytree(Path(assets.__file__).parent / "fashion" / "sae_3", "sae_3")
    (image, *_) = assets.fashion_scenes()
    given = ["explain", str(image), "--sae", "3=sae_3", "--out", "one", "--cards", "../out/cards.html"]
    assert main(given) == 0
    listed = json.loads(Path("one", "explanation.json").read_bytes())["explained"][0]["top_features"]["3"]
    first, second, *_ = (one["feature"] for one in listed)
    assert listed[0]["card"] == f"../out/cards.html#block-3-feature-{first}" and "name" not in listed[0]
    found = features(streams, "--sae", "3=sae_3", "--features", first, "--name", f"{first}=sleeve = cuff")
    assert [one["name"] for one in found] == ["sleeve = cuff"]
    features(streams, "--sae", "3=sae_3", "--features", first, "--name", f"3:{second}=heel")
    path = Path("sae_3", "features.json")
    assert read_notes(path) == {(3, first): Note("sleeve = cuff"), (3, second): Note("heel")}
    SparseAutoencoder.from_pretrained("sae_3")  # a file beside it is no trouble
    assert main(given) == 0
    listed = json.loads(Path("one", "explanation.json").read_bytes())["explained"][0]["top_features"]["3"]
    assert listed[0] == listed[0] | {"feature": first, "name": "sleeve = cuff", "note": ""}
    features(streams, "--sae", "3=sae_3", "--features", first, "--name", f"{first}=")
    assert read_notes(path) == {(3, second): Note("heel")}


def test_a_name_alone_leaves_the_cards(streams: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--sae", f"3={Path(assets.__file__).parent / 'fashion' / 'sae_3'}", "--notes", "mine.json"]
    features(streams, *given, "--limit", "1", "--name", "17=sleeve")  # no cards before
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    capsys.readouterr()
    features(streams, *given, "--name", "18=heel")
    assert "kept the names; the cards in out are as they were" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before and len(before) == 2
    assert read_notes("mine.json") == {(3, 17): Note("sleeve"), (3, 18): Note("heel")}
    (card,) = features(streams, *given, "--features", "18", "--name", "18=sole")
    assert card["name"] == "sole"


def test_an_image_without_features(streams: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = SparseAutoencoder.from_pretrained(Path(assets.__file__).parent / "fashion" / "sae_3")
    zeros = torch.zeros(4, sae.d_model)
    SparseAutoencoder(zeros.t(), torch.full((4,), -1.0), zeros, zeros[0]).save("dead")
    (image, *_) = assets.fashion_scenes()
    assert main(["features", "--harvest", str(streams), "--out", "out", "--sae", "3=dead", "--image", str(image)]) == 2
    said = capsys.readouterr().err
    assert "--image: no feature of these autoencoders contributes; take another image" in said
    assert not Path("out").exists()


def test_a_file_of_names_for_several_blocks(streams: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"format": "fga_fast feature notes", "version": 1, "blocks": {"9": {"1": {"name": "of another model"}}}}
    Path("mine.json").write_text(json.dumps(content))
    found = features(streams, "--notes", "mine.json", "--name", "2:100=left", "--name", "3:17=right",
                     "--features", "2:100", "3:17")  # fmt: skip
    assert [one["name"] for one in found] == ["left", "right"]
    kept = {(2, 100): Note("left"), (3, 17): Note("right"), (9, 1): Note("of another model")}
    assert read_notes("mine.json") == kept
    top = features(streams, "--notes", "mine.json", "--features", "2:100")
    assert top[0]["name"] == "left" and read_notes("mine.json") == kept
    (image, *_) = assets.fashion_scenes()
    capsys.readouterr()
    assert main(["explain", str(image), "--notes", "mine.json", "--target", "0", "--out", "one"]) == 0
    listed = json.loads(Path("one", "explanation.json").read_bytes())["explained"][0]["top_features"]["2"]
    content["blocks"] = {"2": {str(listed[0]["feature"]): {"name": "cuff"}}}
    Path("mine.json").write_text(json.dumps(content))
    assert main(["explain", str(image), "--notes", "mine.json", "--target", "0", "--out", "one"]) == 0
    assert f"block 2 top features: {listed[0]['feature']} cuff (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    (
        (("--features", "17"), "--features: expected BLOCK:N, since there are several autoencoders, such as 2:17"),
        (("--features", "2:768"), "--features: expected a block and one of its features (2: 0 to 767, 3: 0 to 767)"),
        (("--features", "x:1"), "--features: expected BLOCK:N"),
        (("--features", "2:1", "--image", "a.png"), "--features, --image: expected one of them, got both"),
        (("--image", "a.png"), "image: no file a.png"),
        (("--top", "0"), "--top: expected at least 1, got 0"),
        (("--name", "2:1=a"), "--name: expected --notes FILE to keep names in"),
        (("--name", "2:1", "--notes", "n.json"), "--name: expected [BLOCK:]N=NAME"),
        (("--notes", "n.json"), "n.json: no such file"),
        (("--model", "test_vit", "--random-weights"), "--sae: expected an autoencoder after a harvested block (2, 3)"),
    ),
)
def test_what_is_refused(
    given: tuple[str, ...], words: str, streams: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["features", "--harvest", str(streams), "--out", "out", *given]) == 2
    assert words in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_the_page_of_the_documentation(streams: Path) -> None:
    """The examples of docs/features.md, as printed."""
    page = (Path(__file__).parents[2] / "docs" / "features.md").read_text(encoding="utf-8")
    examples = [part.partition("```")[0] for part in page.split("```py\n")[1:]]
    (image, *_) = assets.fashion_scenes()
    config = assets.fashion_config()
    preprocess = Preprocess((56, 56), config.mean, config.std)
    names: dict[str, Any] = {
        "model": assets.fashion_model(), "saes": assets.fashion_saes(), "images": preprocess(load_image(image))[None],
    }  # fmt: skip
    shutil.copytree(streams, "streams")
    for example in examples:
        exec(compile(example, "docs/features.md", "exec"), names)
    assert names["without"].logits.shape == (1, 9) and Path("features", "cards.html").is_file()
    assert f'id="{names["address"].partition("#")[2]}"' in Path("features", "cards.html").read_text()
