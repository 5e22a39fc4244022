"""Packages: exported explanations compute what the explainer does, take any number of images, and refuse the rest."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from explaining import agree
from own_vit import CLASSES, GRID
from packages import EVERYTHING, NAMES, PREPROCESS, explainer, images

import fga_fast
from fga_fast import Explainer, Package, load_package

# what it computes


@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_computes_what_the_reference_does(predicted_package: Path, count: int) -> None:
    found = load_package(predicted_package)(images(count))
    expected = explainer(backend="reference", class_names=NAMES, ungated=True)(images(count))
    agree(found, expected, 1e-9)
    assert found.names == tuple(NAMES)
    assert (found.backend, found.backend_reason) == ("native", "package")
    torch.testing.assert_close(found.heatmap(), expected.heatmap(), rtol=1e-6, atol=1e-6)


def test_images_in_one_batch_do_not_change_each_other(predicted_package: Path) -> None:
    package = load_package(predicted_package)
    five = images(5)
    alone = [package(one[None]).relevance for one in five]
    torch.testing.assert_close(package(five).relevance, torch.cat(alone), rtol=1e-12, atol=1e-15)


def test_several_threads_share_a_package(predicted_package: Path) -> None:
    package, many = load_package(predicted_package), [images(count) for count in (1, 2, 3, 4, 5, 6)]
    expected = [package(some).relevance for some in many]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda some: package(some).relevance, many * 5))
    for one, other in zip(found, expected * 5, strict=True):
        assert torch.equal(one, other)


def test_no_images(predicted_package: Path) -> None:
    found = load_package(predicted_package)(images(0))
    assert found.relevance.shape == (0, GRID[0] * GRID[1]) and found.logits.shape == (0, CLASSES)
    assert found.relevance.dtype == torch.float64 and found.targets.dtype == torch.int64


def test_any_layout_of_memory_and_any_mode(predicted_package: Path) -> None:
    package, three = load_package(predicted_package), images(3)
    expected = package(three)
    agree(package(three.to(memory_format=torch.channels_last)), expected, 1e-12)
    shifted = torch.empty(three.numel() + 1, dtype=three.dtype)[1:].copy_(three.flatten()).view_as(three)
    agree(package(shifted), expected, 1e-12)
    with torch.inference_mode():
        agree(package(three.clone()), expected, 1e-12)
    asked = package(three.clone().requires_grad_())
    assert not asked.relevance.requires_grad


@pytest.mark.slow
def test_given_targets_and_everything_besides(given_package: Path) -> None:
    package, four = load_package(given_package), images(4, torch.float32)
    eager = explainer(torch.float32, **EVERYTHING)
    several = [[0, 1, 2, 4], torch.tensor([3, 3, 0, 1]), ["émeu", "ant", "bee", "cat"], [None, 1, "ant", None]]
    for targets in (None, 2, "dog", *several):
        agree(package(four, targets), eager(four, targets), 1e-5)
    assert package(images(0, torch.float32), []).targets.shape == (0,)


@pytest.mark.slow
def test_given_targets_that_are_none(given_package: Path) -> None:
    package, two = load_package(given_package), images(2, torch.float32)
    cases: list[tuple[type[Exception], Any, str]] = [
        (ValueError, 5, r"targets: .*5"), (ValueError, [-1, 0], r"targets: .*-1"),
        (ValueError, torch.tensor([1, 9]), r"targets: .*9"),
        (ValueError, [1, 2, 3], "targets: expected one class an image"),
        (ValueError, [[1, 2]], "a package explains one, Explainer takes several"),
        (ValueError, "fox", "'fox' is not among the names"), (TypeError, lambda logits: logits[:, 0], "targets"),
    ]  # fmt: skip
    for kind, targets, message in cases:
        with pytest.raises(kind, match=message):
            package(two, targets)


@pytest.mark.slow
def test_held_features(tmp_path: Path) -> None:
    plain = explainer(torch.float32, preset="published", class_names=NAMES)
    ablated, three = plain.ablate({1: {3: 1.5}, 0: [2]}), images(3, torch.float32)
    package = load_package(ablated.export(tmp_path / "held.pt2", images(2, torch.float32)))
    found, want = package(three), ablated(three)
    agree(found, want, 1e-5)
    assert found.notices == want.notices and any("feature 3 is held at 1.5" in notice for notice in found.notices)
    assert not torch.allclose(found.logits, plain(three).logits, atol=1e-3)


@pytest.mark.slow
def test_bfloat16_in_place_of_another_package(tmp_path: Path) -> None:
    path, example = tmp_path / "low.pt2", images(2, torch.bfloat16)
    path.write_bytes(b"old")
    path.with_suffix(".json").write_bytes(b"old too")
    low, high = explainer(torch.bfloat16, saes={}), explainer(torch.float32, saes={})
    assert low.export(path, example) == path
    assert {file.name for file in tmp_path.iterdir()} == {"low.pt2", "low.json"}
    found, eager = load_package(path)(example), low(example)
    assert found.logits.dtype == torch.bfloat16 and found.relevance.dtype == torch.float32
    assert found.targets.tolist() == eager.targets.tolist()
    exact = high(example.float(), eager.targets).relevance
    # Fused operators round less often than single ones, and in other places.
    assert float((found.relevance - exact).norm()) <= 2 * float((eager.relevance - exact).norm()) + 1e-3


@pytest.mark.slow
def test_dual_encoder_with_prompts_inside_and_no_example(tmp_path: Path) -> None:
    """Without an example, one image of the model's size."""
    pytest.importorskip("open_clip")
    family = next(family for family in families.registry() if family.library == "open_clip" and family.prompts)
    prompts = [*family.prompts, "an owl"]
    asked = Explainer(family.build(), class_names=prompts, tokenizer=families.tokenize, preset="published")
    package = load_package(asked.export(tmp_path / "clip.pt2", target_mode="given"))
    about = package.metadata
    assert (about.batch, about.height, about.width) == (1, *family.image_size)
    assert about.class_names == tuple(prompts)
    agree(package(family.images(), prompts[1]), asked(family.images(), prompts[1]), 1e-4)


@pytest.mark.slow
def test_served(predicted_package: Path, given_package: Path) -> None:
    """The engine of `fga-fast serve` answers what the package can be asked, and refuses the rest."""
    pytest.importorskip("fastapi")
    import serving

    from fga_fast.serve.engine import Answered, Engine
    from fga_fast.serve.limits import Refused

    for path, asked, wrong in ((predicted_package, [None], [1]), (given_package, [None, "émeu", 2], [0, 2])):
        package = load_package(path)
        engine = Engine(package)
        engine.warm_up(2)
        questions = [engine.question([] if target is None else [target]) for target in asked]
        found = engine.explain([(engine.decode(serving.png(n)), question) for n, question in enumerate(questions)])
        for number, (one, target) in enumerate(zip(found, asked, strict=True)):
            assert isinstance(one, Answered) and one.batch == len(asked)
            image = PREPROCESS(serving.picture(number))[None].to(getattr(torch, package.metadata.dtype))
            agree(one.explanation, replace(package(image, target), features={}), 1e-5)
        for refused in ([wrong, None], [[1], 2], [[1, 2], None]):
            with pytest.raises(Refused, match=r"(target: expected (0|0 or 1), as|rather_than: the served)"):
                engine.question(*refused)  # type: ignore[arg-type]


# what it refuses


@pytest.mark.slow
def test_models_without_a_head_predict_nothing(given_package: Path, tmp_path: Path) -> None:
    """So each call must name a feature; the same of the service."""
    pytest.importorskip("fastapi")
    from fga_fast.serve.engine import Engine
    from fga_fast.serve.limits import Refused

    package, two = load_package(copy_of(given_package, tmp_path, predicts=False)), images(2, torch.float32)
    agree(package(two, 3), load_package(given_package)(two, 3), 1e-9)
    for targets in (None, [3, None]):
        with pytest.raises(ValueError, match="this package is of a model without a classification head"):
            package(two, targets)
    engine = Engine(package)
    engine.warm_up(1)
    with pytest.raises(Refused, match="target: expected 1, as the served package was made, got 0"):
        engine.question()


def test_images_are_checked_as_the_explainer_does(predicted_package: Path) -> None:
    package, eager = load_package(predicted_package), explainer()
    two = images(2)
    broken = two.clone()
    broken[1, 0, 3, 3] = torch.nan
    wrong: list[Any] = [two[0], two[:, :1], two.float(), "two", broken]
    for given in wrong:
        with pytest.raises((TypeError, ValueError)) as said:
            package(given)
        with pytest.raises((TypeError, ValueError)) as expected:
            eager(given)
        # The layout of a model of one's own need not know its size; a package always does.
        words = ("[B, 3, 16, 24]", "[B, 3, H, W]")
        assert type(said.value) is type(expected.value)
        assert str(said.value).replace(*words) == str(expected.value).replace(*words)
    with pytest.raises(ValueError, match=r"expected shape \[B, 3, 16, 24\]"):
        package(two.new_zeros(2, 3, 24, 16))
    with pytest.raises(ValueError, match="this package explains the predicted class"):
        package(two, 1)


def test_overflow_is_said(predicted_package: Path) -> None:
    with pytest.raises(ValueError, match="came out NaN or Inf although images"):
        load_package(predicted_package)(torch.full_like(images(1), 1.7e308))


def copy_of(package: Path, folder: Path, **changes: Any) -> Path:
    """A copy with other metadata; None leaves an entry out."""
    copied = folder / "copy.pt2"
    copied.write_bytes(package.read_bytes())
    entries = {**json.loads(package.with_suffix(".json").read_text(encoding="utf-8")), **changes}
    kept = {name: value for name, value in entries.items() if value is not Ellipsis}
    copied.with_suffix(".json").write_text(json.dumps(kept), encoding="utf-8")
    return copied


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the package was loaded before its metadata was checked")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", refuse)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"format": "zip"}, "format: expected 'fga_fast package', got 'zip'"),
    ({"format_version": 2}, "format_version: expected 5; export it again"),
    ({"device": "tpu"}, "device: expected 'cpu' or 'cuda', got 'tpu'"),
    ({"dtype": "float16"}, "dtype: expected 'float32'"),
    ({"batch": 0}, "batch: expected a whole number of at least 1, got 0"),
    ({"batch": True}, "batch: expected a whole number of at least 1, got True"),
    ({"batch": 2**30}, "batch: expected a batch of images of at most"),
    ({"height": 16.5}, "height: expected a whole number"),
    ({"grid": [2]}, "grid: expected 2 whole numbers of at least 1, got [2]"),
    ({"grid": [3, 3]}, "outputs: expected 'relevance' of shape [2, 9], got one of shape [2, 6]"),
    ({"classes": ...}, "classes: expected a whole number of at least 1, got nothing"),
    ({"class_names": ["ant"]}, "class_names: expected 5, one for each class, got 1"),
    ({"class_names": [1, 2, 3, 4, 5]}, "class_names: expected strings"),
    ({"target_mode": "all"}, "target_mode: expected 'predicted' or 'given', got 'all'"),
    ({"gated_blocks": [0, 1, 2]}, "outputs: expected 'scores.2' of shape [2, 6], got none"),
    ({"gated_blocks": "0"}, "gated_blocks: expected a list, got '0'"),
    ({"outputs": []}, "outputs: expected 'logits' of shape [2, 5], got none"),
    ({"outputs": [{"name": "logits", "shape": [2, 5], "dtype": "int3"}]}, "outputs: dtype: expected 'float32'"),
    ({"preprocessing": {"mean": [1], "std": [1]}}, "preprocessing: mean: expected 3 numbers"),
    ({"preprocessing": {"mean": [1, 1, 1], "std": [0, 1, 1]}}, "preprocessing: mean, std: expected 1 or 3 numbers"),
    ({"preprocessing": {"mean": [1, 1, None], "std": [1, 1, 1]}}, "preprocessing: mean: expected numbers"),
    ({"preprocessing": []}, "preprocessing: expected an object, got list"),
    ({"preprocessing": {"image_size": [9, 9]}}, "preprocessing: image_size: expected height and width"),
    ({"predicts": 1}, "predicts: expected true or false, got 1"),
    ({"sha256": "0" * 64}, "is damaged, or not the file that copy.json was written for"),
    ({"machine": {"architecture": "vax", "features": []}}, "was compiled for another processor, this one lacks vax"),
    ({"machine": {"architecture": "vax"}}, "machine: features: expected a list, got nothing"),
]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_metadata_is_checked_first(
    predicted_package: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as said:
        load_package(copy_of(predicted_package, tmp_path, **changes))
    assert message in str(said.value) and "copy" in str(said.value)


@pytest.mark.usefixtures("unloaded")
def test_processor_without_an_extension(predicted_package: Path, tmp_path: Path) -> None:
    machine = json.loads(predicted_package.with_suffix(".json").read_text(encoding="utf-8"))["machine"]
    if not machine["features"]:
        pytest.skip("this torch does not tell what the processor can do")
    changed = {**machine, "features": [*machine["features"], "avx2048"]}
    with pytest.raises(ValueError, match="this one lacks avx2048; export it on a machine like this one"):
        load_package(copy_of(predicted_package, tmp_path, machine=changed))


@pytest.mark.usefixtures("unloaded")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_package_for_another_device(predicted_package: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was exported for cuda, but torch sees no CUDA device"):
        load_package(copy_of(predicted_package, tmp_path, device="cuda"))


@pytest.mark.usefixtures("unloaded")
def test_damaged_and_missing_files(predicted_package: Path, tmp_path: Path) -> None:
    copied = copy_of(predicted_package, tmp_path)
    told = copied.with_suffix(".json")
    whole, text = copied.read_bytes(), told.read_bytes()
    copied.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        load_package(copied)
    copied.write_bytes(whole)
    for damaged in (b"", text[:-5], b"\xff" + text, b"[" * 100_000, b"[]", b'{"format": ' + b"9" * 5000 + b"}"):
        told.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"copy\.json"):
            load_package(copied)
    told.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*copy\.json; it has to lie beside"):
        load_package(copied)
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.pt2"):
        load_package(tmp_path / "gone.pt2")
    with pytest.raises(ValueError, match=r"expected a file ending in \.pt2"):
        load_package(told)


def test_file_that_is_no_package(predicted_package: Path, tmp_path: Path) -> None:
    sha = hashlib.sha256(b"nothing").hexdigest()
    copied = copy_of(predicted_package, tmp_path, sha256=sha)
    copied.write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="does not load in torch"):
        load_package(copied)


# writing


def test_metadata_says_what_it_is(predicted_package: Path) -> None:
    package = load_package(predicted_package)
    assert isinstance(package, Package)
    about = package.metadata
    assert (about.batch, about.channels, about.height, about.width) == (2, 3, 16, 24)
    assert (about.dtype, about.device, about.target_mode, about.gated_blocks) == ("float64", "cpu", "predicted", (0, 1))
    assert about.gate == {"mode": "combined", "base": 2.0, "slope": 1.0}
    assert about.versions == {"fga_fast": fga_fast.__version__, "torch": torch.__version__}
    assert [output.name for output in about.outputs] == [
        "logits", "targets", "values", "relevance", "scores.0", "scores.1", "gates.0", "gates.1", "ungated"
    ]  # fmt: skip
    assert package.preprocess == PREPROCESS
    assert {path.name for path in predicted_package.parent.iterdir()} == {"predicted.pt2", "predicted.json"}
