"""`Explainer.compile`: the explainer's own numbers, for any number of images, from machine code made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from explaining import PIXELS, Build, agree, sae_for
from torch import Tensor

from fga_fast import Difference, Embedding, Explainer, Explanation
from fga_fast.graph.compiled import CompiledExplainer

pytestmark = pytest.mark.slow
CLASSES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def explainer(tiny_vit: Build) -> Explainer:
    torch.manual_seed(4)
    model = tiny_vit(depth=2)
    return Explainer(model, {0: sae_for(model)}, top_features=2, class_names=CLASSES)


@pytest.fixture(scope="module")
def predicted(explainer: Explainer) -> CompiledExplainer:
    return explainer.compile(images(2), batches=(1, 4))


@pytest.fixture(scope="module")
def given(explainer: Explainer) -> CompiledExplainer:
    return explainer.compile(images(2), target_mode="given")


def images(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, *PIXELS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_the_same_numbers_for_any_batch(predicted: CompiledExplainer, explainer: Explainer, count: int) -> None:
    got, want = predicted(images(count, seed=count)), explainer(images(count, seed=count))
    agree(got, want, 1e-4)
    torch.testing.assert_close(got.heatmap(), want.heatmap(), rtol=1e-3, atol=1e-3)
    assert (got.backend, got.backend_reason) == ("native", "compiled") and predicted.batches == (1, 4)


@pytest.mark.parametrize("targets", [None, 2, "cat", [0, 4, 1], torch.tensor([3, 3, 0]), ["bee", 1, None]], ids=str)
def test_given_targets(given: CompiledExplainer, explainer: Explainer, targets: Any) -> None:
    agree(given(images(3), targets), explainer(images(3), targets), 1e-4)


def test_ungated(tiny_vit: Build) -> None:
    """Without gates too, in the same graph; a rollout would need a second one, and is refused."""
    model = tiny_vit(depth=2)
    both = Explainer(model, {0: sae_for(model)}, ungated=True)
    want = both(images(1))
    assert want.ungated is not None and not torch.allclose(want.ungated, want.relevance)
    agree(both.compile(images(1))(images(1)), want, 1e-4)
    with pytest.raises(ValueError, match="ungated: a graph holds one rollout; compile an Explainer without SAEs"):
        Explainer(model, {0: sae_for(model)}, ungated=True, preset="published").compile(images(1))


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
    agree(predicted(batch), explainer(batch), 1e-4)


def test_modes_of_the_caller_are_not_taken_over(predicted: CompiledExplainer) -> None:
    batch = images(2)
    want = predicted(batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = predicted(batch)
    assert cast.logits.dtype == torch.float32 and torch.equal(cast.relevance, want.relevance)
    with torch.inference_mode():
        inside = predicted(images(2))
    assert torch.equal(inside.relevance, want.relevance) and not inside.relevance.is_inference()


def assert_frozen(explainer: Explainer, call: Callable[[], Explanation]) -> None:
    """A change of weights reaches none of the compiled ones; if it reached half of them, the numbers would be those of
    neither the old model nor the new one."""
    before, tensors = call(), [*explainer.model.parameters(), *explainer.saes[0].buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(tensor / 2)  # integers too
        after = call()
        for tensor, old in zip(tensors, kept, strict=True):
            tensor.copy_(old)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.relevance, before.relevance)
    assert torch.equal(after.scores[0], before.scores[0])


def test_a_change_of_weights_does_not_reach_it(given: CompiledExplainer, explainer: Explainer) -> None:
    assert_frozen(explainer, lambda: given(images(1), 2))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.bfloat16, 0.1)], ids=str)
def test_float64_and_bfloat16(tiny_vit: Build, dtype: torch.dtype, bound: float) -> None:
    model, batch = tiny_vit(depth=2).to(dtype), images(1).to(dtype)
    explainer = Explainer(model, {0: sae_for(model)}, preset="published")
    compiled, want = explainer.compile(batch), explainer(batch)
    got = compiled(batch)
    assert got.relevance.dtype == want.relevance.dtype
    assert families.error(got.relevance, want.relevance) < bound
    assert_frozen(explainer, lambda: compiled(batch))


OTHER_PROCESS = """
import json, sys, torch
import torch._inductor.config
from timm.models import VisionTransformer
from torch._dynamo.utils import counters
from explaining import PIXELS, sae_for
from fga_fast import Explainer

torch.manual_seed(8)
model = VisionTransformer(img_size=PIXELS[1:], patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=5).eval()
model.head.bias.data = torch.tensor(json.loads(sys.argv[1]))
explainer = Explainer(model, {0: sae_for(model)}, top_features=2)
images = torch.randn(4, *PIXELS)
torch._inductor.config.aot_inductor.metadata["AOTI_DEVICE_KEY"] = "cpu"  # as the export of a package leaves it
got, want = explainer.compile(images)(images), explainer(images)
names = ("relevance", "logits")
errors = [float((getattr(got, name) - getattr(want, name)).norm() / getattr(want, name).norm()) for name in names]
print(json.dumps({"errors": errors, **counters["inductor"]}))
"""


def test_other_processes_find_the_compiled_graph(predicted: CompiledExplainer, explainer: Explainer) -> None:
    """On disk, with weights of their own: a weight that came from the cache would give other numbers. Only the bias of
    the head has to be the same, since TorchInductor writes up to 8 numbers into the code."""
    assert predicted.batches == (1, 4)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, json.dumps(explainer.model.head.bias.tolist())],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    looked_up = {name: count for name, count in found.items() if name.startswith("fxgraph_cache")}
    assert looked_up == {"fxgraph_cache_hit": 1}, done.stderr
    assert max(found["errors"]) < 1e-4


def test_results_may_be_kept(predicted: CompiledExplainer) -> None:
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


def test_nan_is_found(predicted: CompiledExplainer) -> None:
    with pytest.raises(ValueError, match="images: contain NaN"):
        predicted(images(1) * float("nan"))


@pytest.mark.parametrize(
    ("batch", "targets", "words"),
    [
        (images(0), None, r"images: expected \[B, 3, 32, 48\] with B at least 1"),
        (images(1)[:, :, :16], None, "images: VisionTransformer takes images of 32 x 48 only, got 16 x 48"),
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
        (5, "targets: .*5"),
        (torch.tensor([9]), "targets: .*9"),
        ([-1], "targets: .*-1"),
        ([[0, 1]], "targets: expected one class an image"),
        ("cow", "targets: .*cow"),
        (Difference(1, 2), "targets: a graph explains classes, got Difference"),
        (Embedding([1.0] * 5), "targets: a graph explains classes, got Embedding"),
        (torch.sum, "targets: a graph explains classes"),
    ],
    ids=["int", "tensor", "negative", "two", "name", "difference", "embedding", "function"],
)
def test_bad_targets(given: CompiledExplainer, targets: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        given(images(1), targets)


def test_bad_settings(explainer: Explainer) -> None:
    for batches, message in (
        ((0, 2), "batches: expected at least 1, got 0"),
        ((True,), "an int"),
        (8, "a sequence of"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            explainer.compile(images(1), batches=batches)  # type: ignore[arg-type]
    for example in (images(1).numpy(), images(1)[0], None):
        with pytest.raises(ValueError, match=r"example: expected images \[B, channels, H, W\]"):
            explainer.compile(example, batches=(1,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mode: expected None or one of .*max-autotune.*, got 'fast'"):
        explainer.compile(images(1), mode="fast")
