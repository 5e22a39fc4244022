"""The recipes: folders of each layout become items, wrong ones are refused, and the command runs each of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fga_fast import find_layout
from fga_fast.cli.main import main
from fga_fast.dataset.items import load
from fga_fast.evaluation import store
from fga_fast.evaluation.methods import METHODS
from fga_fast.evaluation.recipes import RECIPES, covid_qu_ex, hyperkvasir
from fga_fast.evaluation.recipes.imagenet_clip import prompt_classifier
from fga_fast.evaluation.subject import Subject
from fga_fast.io.images import Preprocess

for library in ("timm", "open_clip", "pyarrow", "scipy"):
    pytest.importorskip(library)

TINY = "fga-fast-tiny-clip"
FISH = ("n01440764", "n01443537", "n01484850")  # the first three of ImageNet
SIDE = 64


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 255, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed)).byte()
    Image.fromarray(pixels.numpy()).save(path)
    return path


def imagenet(root: Path, classes: tuple[str, ...] = FISH) -> Path:
    for number, name in enumerate(classes):
        picture(root / "val" / name / f"ILSVRC2012_val_0000000{number}.JPEG", number)
    return root


def endoscopy(root: Path) -> Path:
    upper = ("barretts", "esophagitis", "pylorus", "retroflex-stomach", "z-line")
    for number, name in enumerate(hyperkvasir.CLASSES):
        tract = "upper-gi-tract" if name.startswith(upper) else "lower-gi-tract"
        picture(root / "labeled-images" / tract / "findings" / name / "0a69.jpg", number)
    return root


def lungs(root: Path, kinds: tuple[str, ...] = ("infection masks", "lung masks")) -> Path:
    """As in the archive: two folders of one name; masks are black where nothing is infected."""
    for number, name in enumerate(covid_qu_ex.CLASSES):
        place = root / covid_qu_ex.PART / covid_qu_ex.PART / "Test" / name
        for image in range(2):
            picture(place / "images" / f"{name} ({image}).png", 2 * number + image)
            for kind in kinds:
                mask = Image.new("L", (SIDE, SIDE))
                if kind == "lung masks" or name == "COVID-19":
                    mask.paste(255, (0, 0, 16, 32) if kind[0] == "i" else (0, 0, 48, 48))
                (place / kind).mkdir(exist_ok=True)
                mask.save(place / kind / f"{name} ({image}).png")
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {"imagenet-clip": imagenet, "hyperkvasir": endoscopy, "covid-qu-ex": lungs}


def test_the_layouts_are_those_of_all_recipes() -> None:
    assert [*RECIPES] == [*LAYOUTS]


def test_imagenet_has_its_1000_classes_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    recipe = RECIPES["imagenet-clip"]
    numbers = [*recipe.classes()]
    assert len(numbers) == 1000 and numbers == sorted(numbers) and tuple(numbers[:3]) == FISH
    names = dict(zip(numbers, recipe.class_names(), strict=True))
    assert (names["n01440764"], names["n02012849"], names["n03126707"], names["n15075141"]) == (
        "tench", "crane bird", "construction crane", "toilet paper",
    )  # fmt: skip
    one = picture(tmp_path / "one.JPEG")
    for number in reversed(numbers):
        folder = tmp_path / "ILSVRC" / "val" / number
        folder.mkdir(parents=True)
        os.link(one, folder / "a.JPEG")
    items = recipe.items(tmp_path / "ILSVRC", explained="label")
    assert [(item.key, item.target) for item in items] == [(f"{name}/a.JPEG", n) for n, name in enumerate(numbers)]
    assert recipe.items(tmp_path / "ILSVRC" / "val", explained="label") == items


def test_hyperkvasir_has_23_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    recipe = RECIPES["hyperkvasir"]
    assert len(hyperkvasir.CLASSES) == 23 and [*hyperkvasir.CLASSES] == sorted(hyperkvasir.CLASSES)
    assert recipe.class_names() == [*hyperkvasir.CLASSES]
    items = recipe.items(endoscopy(tmp_path), explained="label")
    assert [item.key.split("/")[2] for item in items] == [*hyperkvasir.CLASSES]
    assert [item.target for item in items] == [*range(23)] and items[0].key.startswith("upper-gi-tract/findings/barr")
    inner = recipe.items(tmp_path / "labeled-images")
    assert [item.key for item in inner] == [item.key for item in items]
    assert {item.target for item in inner} == {None}  # the class that the model predicts


def test_covid_qu_ex_has_masks(tmp_path: Path) -> None:
    recipe = RECIPES["covid-qu-ex"]
    items = recipe.items(lungs(tmp_path), explained="label")
    assert recipe.class_names() == ["COVID-19", "Non-COVID", "Normal"]
    assert [item.target for item in items] == [0, 0, 1, 1, 2, 2]
    assert items[3].key == "Test/Non-COVID/images/Non-COVID (1).png"
    plain = Preprocess((SIDE, SIDE))
    found = [load(item, plain).mask for item in items]
    assert found[0] is not None and bool(found[0][:32, :16].all()) and int(found[0].sum()) == 16 * 32
    assert found[2:] == [None] * 4  # nothing is infected
    (tmp_path / covid_qu_ex.PART).rename(tmp_path / "moved")
    assert recipe.items(tmp_path / "moved" / covid_qu_ex.PART, explained="label")[0].key == items[0].key
    lung = tmp_path / "Lung Segmentation Data"
    (tmp_path / "moved" / covid_qu_ex.PART).rename(tmp_path / lung.name)
    assert recipe.items(lung, explained="label")[0].key == items[0].key
    lung.rename(tmp_path / "inner")
    lung.mkdir()
    (tmp_path / "inner").rename(lung / lung.name)
    assert recipe.items(lung, explained="label")[0].key == items[0].key


def test_lungs_where_no_infection_is_marked(tmp_path: Path) -> None:
    items = RECIPES["covid-qu-ex"].items(lungs(tmp_path, ("lung masks",)))
    masks = [load(item, Preprocess((SIDE, SIDE))).mask for item in items]
    assert [0 if mask is None else int(mask.sum()) for mask in masks] == [48 * 48] * 6


def test_other_classes_in_another_order(tmp_path: Path) -> None:
    recipe = RECIPES["hyperkvasir"]
    items = recipe.items(endoscopy(tmp_path), ["z-line", "cecum"], "label")
    assert [(item.key.split("/")[2], item.target) for item in items] == [("z-line", 0), ("cecum", 1)]
    assert recipe.class_names(["z-line", "mine"]) == ["z-line", "mine"]
    clip = RECIPES["imagenet-clip"]
    assert clip.class_names([FISH[2], FISH[0]]) == ["great white shark", "tench"]
    with pytest.raises(ValueError, match="classes: expected classes of imagenet-clip, which have names, got n02084071"):
        clip.class_names([FISH[0], "n02084071"])


def _remove(name: str) -> Callable[[Path], object]:
    def run(root: Path) -> None:
        for path in [path for path in root.rglob("*") if path.name == name]:
            path.rename(root.parent / f"gone-{len([*root.parent.iterdir()])}")

    return run


def _add(place: str) -> Callable[[Path], object]:
    return lambda root: picture(root / place)


POLYPS = "labeled-images/lower-gi-tract/findings/polyps"
NORMAL = f"{covid_qu_ex.PART}/{covid_qu_ex.PART}/Test/Normal"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("imagenet-clip", _remove(FISH[1]), f"no folder of 1 of 3 classes: {FISH[1]}; expected val/CLASS/"),
        ("imagenet-clip", _remove("val"), "no folder n01440764, n01443537, n01484850 in"),
        ("imagenet-clip", _add("val/train/a.JPEG"), "1 folder(s) of no known class: train, such as"),
        ("imagenet-clip", _remove("ILSVRC2012_val_00000001.JPEG"), f"no image in {{root}}/val/{FISH[1]}; looked for"),
        ("hyperkvasir", _remove("z-line"), "no folder of 1 of 23 classes: z-line; expected labeled-images/TRACT/KIND"),
        ("hyperkvasir", _remove("labeled-images"), "no folder lower-gi-tract, upper-gi-tract in"),
        ("hyperkvasir", _add(f"{POLYPS}/../poylps/a.jpg"), "1 folder(s) of no known class: poylps, such as"),
        ("hyperkvasir", _add("labeled-images/upper-gi-tract/x/polyps/a.jpg"), "class polyps has two folders"),
        ("covid-qu-ex", _remove("Normal"), "no folder of 1 of 3 classes: Normal; expected Infection Segmentation Data"),
        ("covid-qu-ex", _remove("Test"), "no folder Test in"),
        ("covid-qu-ex", _add(f"{NORMAL}/images/a.png"), "1 of the files of Normal have no partner: a is an image wi"),
        (
            "covid-qu-ex",
            _add(f"{NORMAL}/infection masks/b.png"),
            "of Normal have no partner: b is a mask without an im",
        ),
        ("covid-qu-ex", _add(f"{NORMAL}/../Tuberculosis/images/a.png"), "1 folder(s) of no known class: Tuberculosis"),
        ("covid-qu-ex", lambda root: (root / NORMAL / "infection masks").rename(root / "x"), "Normal/infection masks;"),
    ],
    ids=lambda value: None if callable(value) else value.replace("/", " ")[:40],
)
def test_a_wrong_layout_is_named(tmp_path: Path, name: str, change: Callable[[Path], object], message: str) -> None:
    root = LAYOUTS[name](tmp_path / "data")
    classes = FISH if name == "imagenet-clip" else None
    assert RECIPES[name].items(root, classes)  # as it should be
    change(root)
    with pytest.raises(ValueError, match="^" + name) as caught:
        RECIPES[name].items(root, classes)
    assert message.format(root=root) in str(caught.value)


def test_arguments_are_checked(tmp_path: Path) -> None:
    recipe, root = RECIPES["covid-qu-ex"], lungs(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"covid-qu-ex: no folder .*gone; expected Infection"):
        recipe.items(tmp_path / "gone")
    with pytest.raises(ValueError, match="classes: expected different folders of classes, got Normal, Normal"):
        recipe.items(root, ["Normal", "Normal"])
    with pytest.raises(ValueError, match="classes: expected different folders of classes, got none"):
        recipe.items(root, [])
    with pytest.raises(ValueError, match="explained: expected 'predicted' or 'label', got 'both'"):
        recipe.items(root, explained="both")  # type: ignore[arg-type]


def test_preprocessing_is_that_of_the_libraries() -> None:
    import open_clip
    import timm

    for name in ("hyperkvasir", "covid-qu-ex"):
        recipe = RECIPES[name]
        data = timm.data.resolve_data_config(model=None, pretrained_cfg=timm.get_pretrained_cfg(recipe.model).to_dict())
        assert recipe.preprocess == Preprocess(
            data["input_size"][1:], data["mean"], data["std"], data["crop_pct"], data["interpolation"]
        )
    recipe = RECIPES["imagenet-clip"]
    found = open_clip.get_pretrained_cfg(recipe.model, recipe.tag)
    side = open_clip.get_model_config(recipe.model)["vision_cfg"]["image_size"]
    assert recipe.preprocess == Preprocess((side, side), found["mean"], found["std"], 1.0, found["interpolation"])
    assert found["resize_mode"] == "shortest" and [*recipe.saes] == [*range(12)]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny CLIP that open_clip makes by name."""
    import open_clip

    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": SIDE}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    file = tmp_path_factory.mktemp("configs") / f"{TINY}.json"
    file.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(file)
    torch.manual_seed(1)
    return open_clip.create_model(TINY).eval()


def test_the_classifier_is_open_clips(tiny_clip: Any) -> None:
    import open_clip

    names, prompts = ["tench", "crane bird"], [lambda name: f"a {name}.", lambda name: f"a photo of the {name}."]
    tokenizer = open_clip.get_tokenizer(TINY)
    model = prompt_classifier(tiny_clip, tokenizer, names, prompts)
    images = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        texts = open_clip.build_zero_shot_classifier(tiny_clip, tokenizer, names, prompts)  # [E, classes]
        want = tiny_clip.logit_scale.exp() * tiny_clip.encode_image(images, normalize=True) @ texts
        torch.testing.assert_close(model(images), want, rtol=1e-4, atol=1e-4)
    assert not model.training and not tiny_clip.training and model.visual is tiny_clip.visual
    layout = find_layout(model)
    assert layout.tower is tiny_clip.visual and layout.grid == (4, 4)
    relevance = METHODS["transmm"](Subject(model), images, want.argmax(1))
    assert relevance.shape == (3, 16) and bool(relevance.isfinite().all())
    with pytest.raises(ValueError, match="names, prompts: expected at least one of each, got 0 and 2"):
        prompt_classifier(tiny_clip, tokenizer, [], prompts)


def prisma_sae(folder: Path, width: int) -> Path:
    """An SAE after block 0 in the form of Prisma's repositories."""
    folder.mkdir()
    weights: dict[str, Tensor] = {"W_enc": torch.randn(width, 40), "W_dec": torch.randn(40, width)}
    torch.save({**weights, "b_enc": torch.zeros(40), "b_dec": torch.zeros(width)}, folder / "n_images_2600058.pt")
    config = {"hook_point_layer": 0, "layer_subtype": "hook_resid_post", "architecture": "standard", "d_in": width,
              "activation_fn_str": "relu", "normalize_activations": None, "cls_token_only": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_command_with_clip(
    tmp_path: Path, tiny_clip: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPES["imagenet-clip"]
    small = replace(recipe, model=TINY, preprocess=replace(recipe.preprocess, image_size=(SIDE, SIDE)))
    monkeypatch.setitem(RECIPES, recipe.name, small)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    imagenet(tmp_path, FISH[:2])
    save_file({**tiny_clip.state_dict()}, tmp_path / "clip.safetensors")
    sae = prisma_sae(tmp_path / "sae", 32)
    given = [
        ".",
        "--recipe",
        recipe.name,
        "--checkpoint",
        "clip.safetensors",
        "--classes",
        *FISH[:2],
        "--sae",
        f"0={sae}",
    ]
    assert main(["evaluate", *given, "--methods", "transmm", "fga", "--split", "both", "--out", "out"]) == 0
    settings, rows = store.settings("out"), store.read("out").to_pylist()
    assert settings["model"] == "PromptClassifier" and settings["variant"] == "author" and [*settings["saes"]] == ["0"]
    assert settings["probability"] == "softmax" and settings["preprocess"]["std"][0] == 0.26862954
    assert {row["metric"] for row in rows} == {"saco", "faithfulness_correlation", "pixel_flipping"}
    assert {row["method"] for row in rows} == {"transmm", "fga"} and {row["error"] for row in rows} == {None}
    import open_clip

    model = prompt_classifier(tiny_clip, open_clip.get_tokenizer(TINY), small.class_names(FISH[:2]), small.prompts())
    items = small.items(".", FISH[:2], "label")
    with torch.no_grad():
        predicted = {item.key: int(model(load(item, small.preprocess).image[None]).argmax()) for item in items}
    assert {row["key"]: row["target"] for row in rows} == predicted
    right = sum(item.target == predicted[item.key] for item in items)
    assert f"accuracy {right} of 2 images" in capsys.readouterr().out
    before = Path("out/values.parquet").stat().st_mtime_ns
    assert main(["evaluate", *given, "--methods", "transmm", "fga", "--split", "both", "--out", "out"]) == 0
    assert Path("out/values.parquet").stat().st_mtime_ns == before  # the classifier is the same, bit by bit


def vit(classes: int, file: Path) -> Any:
    import timm

    model = timm.create_model("test_vit", num_classes=classes).eval()
    save_file(model.state_dict(), file)
    return model


@pytest.mark.parametrize(("name", "classes"), [("hyperkvasir", 23), ("covid-qu-ex", 3)])
def test_the_command_with_a_fine_tuned_vit(
    tmp_path: Path, name: str, classes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    LAYOUTS[name](tmp_path)
    vit(classes, tmp_path / "vit.safetensors")
    given = [
        ".",
        "--recipe",
        name,
        "--model",
        "test_vit",
        "--checkpoint",
        "vit.safetensors",
        "--methods",
        "random",
        "--limit",
        "6",
    ]
    labels = ["--explain", "label", "--metrics", *(["localisation"] if classes == 3 else ["saco"])]
    assert main(["evaluate", *given, *labels, "--variant", "paper", "--split", "both", "--out", "out"]) == 0
    settings, rows = store.settings("out"), store.read("out").to_pylist()
    assert settings["variant"] == "paper" and "accuracy" not in capsys.readouterr().out
    folders = [*RECIPES[name].classes()]
    assert all(row["target"] == next(n for n, one in enumerate(folders) if f"/{one}/" in row["key"]) for row in rows)
    # Of COVID-QU-Ex, only the two infected images have an object to be found.
    assert len({row["key"] for row in rows if row["metric"] in ("saco", "inside")}) == (2 if classes == 3 else 6)
    page = Path("out/report.md").read_text(encoding="utf-8")
    assert f"--recipe {name}" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["x", "--classes", "a"], "--classes: expected --recipe with it"),
        (["x", "--explain", "label"], "--explain: expected --recipe with it"),
        (
            ["--recipe", "hyperkvasir"],
            "--recipe: expected one folder as IMAGES, which comes first, with labeled-images",
        ),
        (["x", "--recipe", "hyperkvasir", "--manifest", "y.csv"], "--recipe: expected one folder as IMAGES"),
        (["x", "--recipe", "hyperkvasir"], "hyperkvasir: no folder x; expected labeled-images/TRACT/KIND/CLASS/*.jpg"),
        (["covid", "--recipe", "covid-qu-ex"], "no weights for vit_base_patch16_224: nothing is downloaded"),
        (
            ["covid", "--recipe", "covid-qu-ex", "--model", "test_vit", "--checkpoint", "four.safetensors"],
            "expected a model with 3 outputs, one a class in the order COVID-19, Non-COVID, Normal, got 4; give",
        ),
        (["imagenet", "--recipe", "imagenet-clip", "--classes", *FISH], "no weights for ViT-B-32: give --checkpoint"),
        (
            ["imagenet", "--recipe", "imagenet-clip", "--model", "test_vit", "--random-weights"],
            "--model: expected none with --recipe imagenet-clip, whose model is ViT-B-32",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_what_the_command_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    imagenet(tmp_path / "imagenet")
    lungs(tmp_path / "covid")
    vit(4, tmp_path / "four.safetensors")
    assert main(["evaluate", *given, "--out", "out"]) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()
