"""`Explainer.compile`: the explainer's own numbers, for any number of images, from machine code made once."""

from __future__ import annotations

import threading
from typing import Any

import families
import pytest
import torch
from explaining import PIXELS, Build, sae_for
from torch import Tensor, nn

from fga_fast import Difference, Embedding, Explainer, Explanation
from fga_fast.graph.compiled import CompiledExplainer

pytestmark = pytest.mark.slow
CLASSES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    torch.manual_seed(3)
    model: nn.Module = vit(img_size=PIXELS[1:], patch_size=16, embed_dim=16, depth=3, num_heads=2, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def explainer(model: nn.Module) -> Explainer:
    torch.manual_seed(4)
    return Explainer(model, {0: sae_for(model), 1: sae_for(model)}, top_features=2, class_names=CLASSES)


@pytest.fixture(scope="module")
def predicted(explainer: Explainer) -> CompiledExplainer:
    return explainer.compile(images(2), batches=(1, 4))


@pytest.fixture(scope="module")
def given(explainer: Explainer) -> CompiledExplainer:
    return explainer.compile(images(2), target_mode="given")


def images(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, *PIXELS, generator=torch.Generator().manual_seed(seed))


def same(got: Explanation, want: Explanation) -> None:
    assert torch.equal(got.targets, want.targets) and got.names == want.names and got.grid == want.grid
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-4)
    assert families.error(got.relevance, want.relevance) < 1e-4
    for layer in want.scores:
        assert families.error(got.scores[layer], want.scores[layer]) < 1e-4
        assert families.error(got.gates[layer], want.gates[layer]) < 1e-4
        assert torch.equal(got.features[layer].image_index, want.features[layer].image_index)
    torch.testing.assert_close(got.heatmap(), want.heatmap(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_the_same_numbers_for_any_batch(predicted: CompiledExplainer, explainer: Explainer, count: int) -> None:
    got = predicted(images(count, seed=count))
    same(got, explainer(images(count, seed=count)))
    assert (got.backend, got.backend_reason) == ("native", "compiled") and predicted.batches == (1, 4)


def test_images_do_not_depend_on_their_neighbours(predicted: CompiledExplainer) -> None:
    batch = images(3)
    together = predicted(batch).relevance
    for i in range(3):
        torch.testing.assert_close(predicted(batch[i : i + 1]).relevance[0], together[i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("targets", [2, "cat", [0, 4, 1], torch.tensor([3, 3, 0]), ["bee", 1, "eel"]], ids=str)
def test_given_targets(given: CompiledExplainer, explainer: Explainer, targets: Any) -> None:
    same(given(images(3), targets), explainer(images(3), targets))


def laid_out_otherwise() -> dict[str, Tensor]:
    wide = torch.randn(4, 6, 32, 96, generator=torch.Generator().manual_seed(6))
    return {
        "channels last": images(2).to(memory_format=torch.channels_last), "one": images(1)[:, [2, 1, 0]].mT.mT,
        "sliced": wide[:2, ::2, :, ::2], "every other": images(4)[::2], "turned": images(2).mT.contiguous().mT,
        "expanded": images(1).expand(3, -1, -1, -1), "asks for a gradient": images(2).requires_grad_(),
    }  # fmt: skip


@pytest.mark.parametrize("name", laid_out_otherwise())
def test_images_may_lie_in_memory_as_they_like(predicted: CompiledExplainer, explainer: Explainer, name: str) -> None:
    batch = laid_out_otherwise()[name]
    same(predicted(batch), explainer(batch))


def test_modes_of_the_caller_are_not_taken_over(predicted: CompiledExplainer) -> None:
    batch = images(2)
    want = predicted(batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = predicted(batch)
    assert cast.logits.dtype == torch.float32 and torch.equal(cast.relevance, want.relevance)
    with torch.inference_mode():
        inside = predicted(images(2))
    assert torch.equal(inside.relevance, want.relevance) and not inside.relevance.is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_change_of_weights_does_not_reach_it(tiny_vit: Build, dtype: torch.dtype) -> None:
    """Of none: half of them would be neither the old model nor the new one."""
    model, batch = tiny_vit(depth=2).to(dtype), images(1).to(dtype)
    sae = sae_for(model)
    compiled = Explainer(model, {0: sae}).compile(batch)
    want = compiled(batch)
    with torch.no_grad():
        for tensor in (*model.parameters(), *sae.buffers()):
            tensor.mul_(1.5)
    got = compiled(batch)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.relevance, want.relevance)
    assert torch.equal(got.scores[0], want.scores[0])


def test_a_dictionary_and_its_result_may_be_kept(predicted: CompiledExplainer) -> None:
    first = predicted(images(1))
    kept = first.relevance.clone()
    predicted(images(1, seed=9))
    assert torch.equal(first.relevance, kept)


def test_threads_share_it(predicted: CompiledExplainer) -> None:
    want = [predicted(images(1, seed=seed)).relevance for seed in range(4)]
    got: dict[int, list[Tensor]] = {}

    def work(seed: int) -> None:
        got[seed] = [predicted(images(1, seed=seed)).relevance for _ in range(20)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(relevance, want[seed]) for seed in range(4) for relevance in got[seed])


def test_float64_and_bfloat16(tiny_vit: Build) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.bfloat16, 0.1)):
        model = tiny_vit(depth=2).to(dtype)
        explainer, batch = Explainer(model, {0: sae_for(model)}), images(1).to(dtype)
        got, want = explainer.compile(batch)(batch), explainer(batch)
        assert got.relevance.dtype == want.relevance.dtype
        assert families.error(got.relevance, want.relevance) < tolerance


def test_nan_is_found(predicted: CompiledExplainer) -> None:
    with pytest.raises(ValueError, match="images: contain NaN"):
        predicted(images(1) * float("nan"))


@pytest.mark.parametrize(
    ("batch", "targets", "words"),
    [
        (images(0), None, r"images: expected \[B, 3, 32, 48\] with B at least 1"),
        (images(1)[:, :, :16], None, r"images: expected shape \[B, 3, 32, 48\]"),
        (images(1).double(), None, "images: expected dtype torch.float32"),
        (images(1), 3, "targets: this graph explains the predicted class"),
    ],
    ids=["empty", "size", "dtype", "targets"],
)
def test_bad_calls_of_predicted(predicted: CompiledExplainer, batch: Tensor, targets: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predicted(batch, targets)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (None, "targets: this graph explains given classes"),
        (5, "targets: .*5"),
        (torch.tensor([9]), "targets: .*9"),
        ([-1], "targets: .*-1"),
        ([[0, 1]], "targets: expected one class an image"),
        ("cow", "targets: .*cow"),
        (Difference(1, 2), "targets: a graph explains classes, got Difference"),
        (Embedding([1.0] * 5), "targets: a graph explains classes, got Embedding"),
        (torch.sum, "targets: a graph explains classes"),
    ],
    ids=str,
)
def test_bad_targets(given: CompiledExplainer, targets: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        given(images(1), targets)


def test_bad_settings(explainer: Explainer) -> None:
    with pytest.raises(ValueError, match="batches: expected batch sizes of at least 1"):
        explainer.compile(images(1), batches=(0, 2))
    for example in (images(1).numpy(), images(1)[0], None):
        with pytest.raises(ValueError, match=r"example: expected images \[B, channels, H, W\]"):
            explainer.compile(example, batches=(1,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mode: expected None or one of .*max-autotune.*, got 'fast'"):
        explainer.compile(images(1), mode="fast")
