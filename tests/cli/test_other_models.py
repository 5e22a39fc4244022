"""`--model` beside timm's names: image classifiers of transformers, and functions of the user, also with prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fga_fast import Explainer, Explanation
from fga_fast.assets import fashion_scenes
from fga_fast.cli.main import main
from fga_fast.cli.other_models import preprocess_of
from fga_fast.evaluation import store
from fga_fast.io.images import Preprocess, load_image

Refused = Callable[..., str]
SCENE = fashion_scenes()[0]
OWN = """
from timm.models import VisionTransformer
import torch
from fga_fast import Preprocess

def model():
    torch.manual_seed(3)
    return VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=3).eval()

def named():
    return model(), Preprocess((32, 32)), ["cat", "dog", "eel"]

def prompted():  # the same with open_clip.create_model and its pretrained weights
    import open_clip
    from fga_fast.evaluation.recipes.imagenet_clip import prompt_classifier

    torch.manual_seed(3)
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    clip = open_clip.CLIP(24, vision, {"width": 32, "heads": 2, "layers": 1}).eval()
    names, tokenizer = ["cat", "dog"], open_clip.get_tokenizer("ViT-B-32")
    return prompt_classifier(clip, tokenizer, names, ["a photo of a {}".format]), Preprocess((32, 32)), names

def alone():
    return model()

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working folder with the user's file."""
    (tmp_path / "users_models.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("users_models", None)


@pytest.mark.usefixtures("own")
def test_a_function_of_the_user(tmp_path: Path) -> None:
    asked = ["explain", str(SCENE), "--model", "users_models:named", "--target", "dog", "--out", str(tmp_path / "out")]
    assert main(asked) == 0
    found = Explanation.load(tmp_path / "out" / "relevance.safetensors")
    import users_models  # type: ignore[import-not-found]

    image = Preprocess((32, 32))(load_image(SCENE))[None]
    torch.testing.assert_close(found.relevance, Explainer(users_models.model())(image, 1).relevance)
    assert found.names == ("cat", "dog", "eel")


@pytest.mark.usefixtures("own")
def test_clip_is_evaluated(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    (tmp_path / "photos").mkdir()
    for number in range(2):
        (tmp_path / "photos" / f"{number}.png").write_bytes(fashion_scenes()[number].read_bytes())
    asked = ["evaluate", "photos", "--model", "users_models:prompted", "--methods", "transmm", "random"]
    assert main([*asked, "--metrics", "saco", "--split", "both", "--out", "run"]) == 0
    assert np.isfinite(store.read("run").column("value").to_numpy()).all()
    assert store.settings("run")["model"] == "PromptClassifier"


@pytest.mark.usefixtures("own")
def test_refusals(refused: Refused, tmp_path: Path) -> None:
    given = ["explain", SCENE, "--out", tmp_path / "out", "--model"]
    for name, more, message in (
        ("users_models:gone", [], "--model: expected a function gone in users_models, got NoneType"),
        ("users_models:number", [], "--model: expected a function number in users_models, got int"),
        ("users_models:alone", [], "to return a model and its Preprocess, and if you like names, got (Vision"),
        ("no_such_file:f", [], "--model: cannot import no_such_file: ModuleNotFoundError"),
        (":f", [], "--model: expected MODULE:FUNCTION, such as mine:my_model, got ':f'"),
        ("users_models:named", ["--pretrained"], "--pretrained: expected none with --model users_models:named"),
        ("users_models:named", ["--random-weights"], "--random-weights: expected none with --model"),
        ("hf:nowhere", [], "--model: transformers cannot load an image classifier 'nowhere'"),
        ("users_models:named", ["--checkpoint-key", "model"], "--checkpoint-key: expected none with --model"),
        ("hf:nowhere", ["--checkpoint", "a.pt"], "--checkpoint: expected none with --model hf:nowhere"),
    ):  # fmt: skip
        assert message in refused(*given, name, *more)


def test_a_classifier_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16,
        id2label={0: "cat", 1: "dog", 2: "eel"},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    out = tmp_path / "out"
    assert main(["explain", str(SCENE), "--model", f"hf:{tmp_path / 'vit'}", "--target", "eel", "--out", str(out)]) == 0
    found = Explanation.load(out / "relevance.safetensors")
    half = (0.5, 0.5, 0.5)
    image = Preprocess((32, 32), half, half, interpolation="bilinear", squash=True)(load_image(SCENE))[None]
    torch.testing.assert_close(found.relevance, Explainer(model)(image, 2).relevance)
    about = json.loads((out / "explanation.json").read_text(encoding="utf-8"))
    assert about["explained"][0]["name"] == "eel" and about["explained"][0]["probability"] is not None


def test_folders_that_hide_another_model(tmp_path: Path, refused: Refused) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "timm_wrapper", "architecture": "hf-hub:some/where", "num_labels": 2}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    asked = ["explain", SCENE, "--model", f"hf:{tmp_path}", "--out", tmp_path / "out"]
    assert "a model of timm or an adapter; name the model of timm itself" in refused(*asked)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "a model of timm or an adapter" in refused(*asked)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 24, "width": 32}},
        {"size": {"height": 30, "width": 30}, "resample": 3, "do_normalize": False},
        {"size": {"shortest_edge": 38}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
    ],
    ids=["squashed", "as it is", "cropped"],
)
def test_preprocessing_is_that_of_transformers(settings: dict[str, Any]) -> None:
    """To within the rounding of its resizing."""
    transformers = pytest.importorskip("transformers")
    kind = transformers.CLIPImageProcessor if "crop_size" in settings else transformers.ViTImageProcessor
    processor = kind(**settings)
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize((90, 70), Image.Resampling.BICUBIC)
    want = processor(picture, return_tensors="pt")["pixel_values"][0]
    found = preprocess_of(processor.to_dict())(picture)
    assert found.shape == want.shape
    assert (found - want).abs().max() < 0.02


def test_preprocessing_that_is_not_known() -> None:
    known = {"size": {"height": 24, "width": 24}, "rescale_factor": 1 / 255}
    known |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert preprocess_of(known).squash
    for change in (
        {"rescale_factor": 1 / 127.5}, {"do_resize": False}, {"resample": 1}, {"size": {"longest_edge": 24}},
        {"do_center_crop": True}, {"do_center_crop": True, "size": {"shortest_edge": 24}, "crop_size": {"width": 8}},
        {"do_pad": True}, {"image_mean": None},
        {"image_processor_type": "LevitImageProcessor"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="--model: the image processor's settings are not known here"):
            preprocess_of({**known, **change})
