"""Packages: exported explanations compute what the explainer does, take any number of images, and refuse the rest."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from own_vit import CLASSES, GRID
from packages import NAMES, PREPROCESS, explainer, images
from torch import Tensor

import fga_fast
from fga_fast import Explainer, Explanation, Package, load_package


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float64, two SAEs, batches of two, with all that metadata can say."""
    path = tmp_path_factory.mktemp("packages") / "predicted.pt2"
    return explainer().export(path, images(2), preprocessing=PREPROCESS, class_names=NAMES)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32, given classes, batches of three, with everything that an explanation can have besides."""
    path = tmp_path_factory.mktemp("packages") / "given.pt2"
    full = explainer(torch.float32, top_features=4, per_block=True, signed=True, class_names=NAMES)
    return full.export(path, images(3, torch.float32), target_mode="given")


def assert_close(found: Explanation, expected: Explanation, tolerance: float) -> None:
    def close(a: Tensor | None, b: Tensor | None) -> None:
        assert a is not None and b is not None
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert float((a - b).norm()) <= tolerance * float(b.norm())

    assert found.targets.tolist() == expected.targets.tolist()
    assert (found.grid, found.image_size) == (expected.grid, expected.image_size)
    for name in ("relevance", "logits", "values"):
        close(getattr(found, name), getattr(expected, name))
    assert (list(found.scores), list(found.gates)) == (list(expected.scores), list(expected.gates))
    for layer in expected.gates:
        close(found.scores[layer], expected.scores[layer])
        close(found.gates[layer], expected.gates[layer])


# what it computes


@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_computes_what_the_reference_does(predicted: Path, count: int) -> None:
    found = load_package(predicted)(images(count))
    expected = explainer(backend="reference", class_names=NAMES)(images(count))
    assert_close(found, expected, 1e-9)
    assert found.names == tuple(NAMES)
    assert (found.backend, found.backend_reason) == ("native", "package")
    torch.testing.assert_close(found.heatmap(), expected.heatmap(), rtol=1e-6, atol=1e-6)


def test_images_in_one_batch_do_not_change_each_other(predicted: Path) -> None:
    package = load_package(predicted)
    five = images(5)
    alone = [package(one[None]).relevance for one in five]
    torch.testing.assert_close(package(five).relevance, torch.cat(alone), rtol=1e-12, atol=1e-15)


def test_several_threads_share_a_package(predicted: Path) -> None:
    package, many = load_package(predicted), [images(count) for count in (1, 2, 3, 4, 5, 6)]
    expected = [package(some).relevance for some in many]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda some: package(some).relevance, many * 5))
    for one, other in zip(found, expected * 5, strict=True):
        assert torch.equal(one, other)


def test_no_images(predicted: Path) -> None:
    found = load_package(predicted)(images(0))
    assert found.relevance.shape == (0, GRID[0] * GRID[1]) and found.logits.shape == (0, CLASSES)
    assert found.relevance.dtype == torch.float64 and found.targets.dtype == torch.int64


def test_any_layout_of_memory_and_any_mode(predicted: Path) -> None:
    package, three = load_package(predicted), images(3)
    expected = package(three)
    assert_close(package(three.to(memory_format=torch.channels_last)), expected, 1e-12)
    shifted = torch.empty(three.numel() + 1, dtype=three.dtype)[1:].copy_(three.flatten()).view_as(three)
    assert_close(package(shifted), expected, 1e-12)
    with torch.inference_mode():
        assert_close(package(three.clone()), expected, 1e-12)
    asked = package(three.clone().requires_grad_())
    assert not asked.relevance.requires_grad


@pytest.mark.slow
def test_given_targets_and_everything_besides(given: Path) -> None:
    package, four = load_package(given), images(4, torch.float32)
    eager = explainer(torch.float32, top_features=4, per_block=True, signed=True, class_names=NAMES)
    for targets in (2, "dog", [0, 1, 2, 4], torch.tensor([3, 3, 0, 1]), ["émeu", "ant", "bee", "cat"]):
        found, expected = package(four, targets), eager(four, targets)
        assert_close(found, expected, 1e-5)
        assert found.blocks is not None and expected.blocks is not None
        torch.testing.assert_close(found.blocks, expected.blocks, rtol=1e-3, atol=1e-5)
        for layer in (0, 1):
            assert torch.equal(found.features[layer].image_index, expected.features[layer].image_index)
    assert package(images(0, torch.float32), []).targets.shape == (0,)


@pytest.mark.slow
def test_given_targets_that_are_none(given: Path) -> None:
    package, two = load_package(given), images(2, torch.float32)
    with pytest.raises(ValueError, match="this package explains given classes"):
        package(two)
    with pytest.raises(ValueError, match=r"targets: .*5"):
        package(two, 5)
    with pytest.raises(ValueError, match=r"targets: .*9"):
        package(two, torch.tensor([1, 9]))
    with pytest.raises(ValueError, match="targets: expected one class an image"):
        package(two, [1, 2, 3])
    with pytest.raises(ValueError, match="a package explains one, Explainer takes several"):
        package(two, [[1, 2]])
    with pytest.raises(ValueError, match="'fox' is not among the names"):
        package(two, "fox")
    with pytest.raises(TypeError, match="targets"):
        package(two, lambda logits: logits[:, 0])


@pytest.mark.slow
def test_bfloat16(tmp_path: Path) -> None:
    low, high = explainer(torch.bfloat16, saes={}), explainer(torch.float32, saes={})
    package = load_package(low.export(tmp_path / "low.pt2", images(2, torch.bfloat16)))
    found, eager = package(images(2, torch.bfloat16)), low(images(2, torch.bfloat16))
    assert found.logits.dtype == torch.bfloat16 and found.relevance.dtype == torch.float32
    assert found.targets.tolist() == eager.targets.tolist()
    exact = high(images(2, torch.bfloat16).float(), eager.targets).relevance
    # Fused operators round less often than single ones, and in other places.
    assert float((found.relevance - exact).norm()) <= 2 * float((eager.relevance - exact).norm()) + 1e-3


@pytest.mark.slow
def test_dual_encoder_with_prompts_inside(tmp_path: Path) -> None:
    from test_dual import PROMPTS, open_clip_model, tokenize

    model = open_clip_model("CLIP").eval()
    asked = Explainer(model, class_names=PROMPTS, tokenizer=tokenize)
    two = torch.randn(2, 3, 32, 32)
    package = load_package(asked.export(tmp_path / "clip.pt2", two, target_mode="given"))
    assert package.metadata.class_names == tuple(PROMPTS)
    assert_close(package(two, PROMPTS[1]), asked(two, PROMPTS[1]), 1e-4)


# what it refuses


def test_images_are_checked_as_the_explainer_does(predicted: Path) -> None:
    package, eager = load_package(predicted), explainer()
    two = images(2)
    broken = two.clone()
    broken[1, 0, 3, 3] = torch.nan
    wrong: list[Any] = [two[0], two[:, :1], two.float(), "two", two.new_zeros(2, 3, 24, 16), broken]
    for given in wrong[:4] + wrong[5:]:
        with pytest.raises((TypeError, ValueError)) as said:
            package(given)
        with pytest.raises((TypeError, ValueError)) as expected:
            eager(given)
        # The layout of a model of one's own need not know its size; a package always does.
        words = ("[B, 3, 16, 24]", "[B, 3, H, W]")
        assert type(said.value) is type(expected.value)
        assert str(said.value).replace(*words) == str(expected.value).replace(*words)
    with pytest.raises(ValueError, match=r"expected shape \[B, 3, 16, 24\]"):
        package(wrong[4])
    with pytest.raises(ValueError, match="this package explains the predicted class"):
        package(two, 1)


def test_overflow_is_said(predicted: Path) -> None:
    with pytest.raises(ValueError, match="came out NaN or Inf although images"):
        load_package(predicted)(torch.full_like(images(1), 1.7e308))


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
    ({"format_version": 1}, "format_version: expected 2, the one that this version of fga_fast reads, got 1"),
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
    ({"layers": [0, 1, 2]}, "outputs: expected 'scores.2' of shape [2, 6], got none"),
    ({"layers": "0"}, "layers: expected a list, got '0'"),
    ({"outputs": []}, "outputs: expected 'logits' of shape [2, 5], got none"),
    ({"outputs": [{"name": "logits", "shape": [2, 5], "dtype": "int3"}]}, "outputs: dtype: expected 'float32'"),
    ({"preprocessing": {"mean": [1], "std": [1]}}, "preprocessing: mean: expected 3 numbers"),
    ({"preprocessing": {"mean": [1, 1, 1], "std": [0, 1, 1]}}, "preprocessing: mean, std: expected 1 or 3 numbers"),
    ({"preprocessing": {"mean": [1, 1, None], "std": [1, 1, 1]}}, "preprocessing: mean: expected numbers"),
    ({"preprocessing": []}, "preprocessing: expected an object, got list"),
    ({"preprocessing": {"image_size": [9, 9]}}, "preprocessing: image_size: expected height and width"),
    ({"sha256": "0" * 64}, "is damaged, or not the file that copy.json was written for"),
    ({"machine": {"architecture": "vax", "features": []}}, "was compiled for another processor, this one lacks vax"),
    ({"machine": {"architecture": "vax"}}, "machine: features: expected a list, got nothing"),
]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_metadata_is_checked_first(predicted: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as said:
        load_package(copy_of(predicted, tmp_path, **changes))
    assert message in str(said.value) and "copy" in str(said.value)


@pytest.mark.usefixtures("unloaded")
def test_processor_without_an_extension(predicted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = json.loads(predicted.with_suffix(".json").read_text(encoding="utf-8"))["machine"]
    if not machine["features"]:
        pytest.skip("this torch does not tell what the processor can do")
    changed = {**machine, "features": [*machine["features"], "avx2048"]}
    with pytest.raises(ValueError, match="this one lacks avx2048; export it on a machine like this one"):
        load_package(copy_of(predicted, tmp_path, machine=changed))


@pytest.mark.usefixtures("unloaded")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_package_for_another_device(predicted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was exported for cuda, but torch sees no CUDA device"):
        load_package(copy_of(predicted, tmp_path, device="cuda"))


@pytest.mark.usefixtures("unloaded")
def test_damaged_and_missing_files(predicted: Path, tmp_path: Path) -> None:
    copied = copy_of(predicted, tmp_path)
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


def test_file_that_is_no_package(predicted: Path, tmp_path: Path) -> None:
    sha = hashlib.sha256(b"nothing").hexdigest()
    copied = copy_of(predicted, tmp_path, sha256=sha)
    copied.write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="does not load in torch"):
        load_package(copied)


# writing


def test_metadata_says_what_it_is(predicted: Path) -> None:
    package = load_package(predicted)
    assert isinstance(package, Package)
    about = package.metadata
    assert (about.batch, about.channels, about.height, about.width) == (2, 3, 16, 24)
    assert (about.dtype, about.device, about.targets, about.layers) == ("float64", "cpu", "predicted", (0, 1))
    assert about.gate == {"mode": "combined", "base": 10.0, "slope": 1.0}
    assert about.versions == {"fga_fast": fga_fast.__version__, "torch": torch.__version__}
    assert [output.name for output in about.outputs] == [
        "logits", "targets", "values", "relevance", "scores.0", "gates.0", "scores.1", "gates.1"
    ]  # fmt: skip
    assert package.preprocess == PREPROCESS
    assert {path.name for path in predicted.parent.iterdir()} == {"predicted.pt2", "predicted.json"}


def test_importing_fga_fast_imports_no_compiler() -> None:
    program = (
        "import sys, fga_fast; print([n for n in sys.modules if n.startswith(('fga_fast.graph', 'torch._inductor'))])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_without_an_example_it_takes_one_image_of_the_models_size(tiny_vit: Any, tmp_path: Path) -> None:
    asked = Explainer(tiny_vit(depth=1))
    package = load_package(asked.export(tmp_path / "one.pt2"))
    assert (package.metadata.batch, package.metadata.height, package.metadata.width) == (1, 32, 48)
    batch = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(package(batch).relevance, asked(batch).relevance, rtol=1e-4, atol=1e-6)
