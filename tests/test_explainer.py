"""Explainer against the reference for every pooling, dtype and setting, and where it runs."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from explaining import PIXELS, Build, agree, sae_for
from torch import Tensor, nn

from fga_fast import Explainer, Gate, explain
from fga_fast.engine.plan import ExplainerSettings
from fga_fast.models.find import find_layout

FAMILIES: dict[str, dict[str, Any]] = {
    "class token": {},
    "average pooling": {"global_pool": "avg", "fc_norm": True},
    "average pooling without class token": {"global_pool": "avg", "class_token": False},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "attention pooling with class token": {"global_pool": "map"},
    "registers": {"reg_tokens": 4, "init_values": 0.5},
    "pre-norm": {"pre_norm": True, "qk_norm": True},
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, dtype: torch.dtype, tiny_vit: Build) -> None:
    model = tiny_vit(**FAMILIES[family]).to(dtype)
    saes = {0: sae_for(model), 2: sae_for(model, activation="topk", k=4, normalize="layer_norm")}
    images = torch.randn(3, *PIXELS, dtype=dtype)
    for targets in (None, 2, torch.tensor([4, 0, 1])):
        got = Explainer(model, saes, backend="native", preset="published")(images, targets)
        want = Explainer(model, saes, backend="reference", preset="published")(images, targets)
        agree(got, want, 1e-9 if dtype == torch.float64 else 1e-4)
        assert got.backend == "native" and got.relevance.dtype == dtype
        assert got.relevance.shape == (3, 6) and got.grid == (2, 3)


def test_gate_settings(tiny_vit: Build) -> None:
    model = tiny_vit().double()
    saes, images = {1: sae_for(model)}, torch.randn(2, *PIXELS, dtype=torch.float64)
    seen = []
    for gate in (Gate(), Gate(base=3.0, slope=0.5), Gate("activation_only"), Gate("gradient_only"), Gate("shuffled"),
                 Gate("shuffled", seed=1)):  # fmt: skip
        got = Explainer(model, saes, gate=gate, backend="native", preset="published")(images)
        agree(got, Explainer(model, saes, gate=gate, backend="reference", preset="published")(images), 1e-9)
        assert bool((got.gates[1] <= gate.bound).all()) and bool((got.gates[1] >= 1 / gate.bound).all())
        seen.append(got.relevance)
    for i, one in enumerate(seen):
        assert not any(torch.allclose(one, other) for other in seen[i + 1 :])
    ungated = Explainer(model, saes, gate=Gate(base=1.0), backend="native", preset="published")(images).relevance
    torch.testing.assert_close(ungated, Explainer(model, backend="native", preset="published")(images).relevance)


def test_top_features_agree_with_the_reference(tiny_vit: Build) -> None:
    model = tiny_vit().double()
    saes, images = {0: sae_for(model), 1: sae_for(model)}, torch.randn(2, *PIXELS, dtype=torch.float64)
    got = Explainer(model, saes, backend="native", top_features=5, preset="published")(images)
    agree(got, Explainer(model, saes, backend="reference", top_features=5, preset="published")(images), 1e-9)
    assert set(got.features) == {0, 1}
    for top in got.features.values():
        for value, index in ((top.patch_contribution, top.patch_index), (top.image_contribution, top.image_index)):
            assert bool((value != 0).any()) and torch.equal(index == -1, value == 0)


def test_ungated_is_transmm(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    e = Explainer(model, {1: sae_for(model)}, ungated=True, preset="published")(images, 3)
    assert e.ungated is not None
    assert torch.equal(e.ungated, Explainer(model, preset="published")(images, 3).relevance)
    assert not torch.allclose(e.ungated, e.relevance)


def test_an_sae_that_gates_nothing_is_said(tiny_vit: Build, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_vit()
    e = Explainer(model, {2: sae_for(model)}, top_features=3, preset="published")(torch.randn(1, *PIXELS))
    assert "the SAE after the last block gates nothing" in caplog.text
    assert bool((e.gates[2] == 1).all()) and e.top_features(2) == [[]]


def test_images_in_a_batch_do_not_see_each_other(tiny_vit: Build) -> None:
    model = tiny_vit()
    explainer, images = (
        Explainer(model, {1: sae_for(model)}, backend="native", preset="published"),
        torch.randn(3, *PIXELS),
    )
    together = explainer(images, 1).relevance
    for i in range(3):
        torch.testing.assert_close(explainer(images[i : i + 1], 1).relevance[0], together[i], rtol=1e-4, atol=1e-6)


def test_explain_is_the_same_in_one_call(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(1, *PIXELS)
    saes = {1: sae_for(model)}
    one = explain(model, images, 3, saes=saes, gate=Gate(base=2.0))
    assert torch.equal(one.relevance, Explainer(model, saes, gate=Gate(base=2.0))(images, 3).relevance)


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
def test_works_where_gradients_are_off(context: Callable[[], Any], tiny_vit: Build) -> None:
    model = tiny_vit()
    explainer = Explainer(model, {1: sae_for(model)}, backend="native", preset="published")
    images = torch.randn(2, *PIXELS)
    want = explainer(images).relevance
    with context():
        assert torch.equal(explainer(images * 1.0).relevance, want)
        targets = torch.tensor([1, 2])
        e = explainer(images, targets)
        targets += 1
        assert e.targets.tolist() == [1, 2]


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_no_images_no_explanations(backend: Any, tiny_vit: Build) -> None:
    model = tiny_vit()
    explainer = Explainer(model, {1: sae_for(model)}, backend=backend, top_features=3, preset="published")
    e = explainer(torch.zeros(0, *PIXELS))
    assert e.features[1].patch_index.shape == (0, 6, 3) and e.features[1].image_contribution.shape == (0, 3)
    assert explainer(torch.zeros(0, *PIXELS), targets=[]).targets.shape == (0,)
    assert e.relevance.shape == (0, 6) and e.logits.shape == (0, 5) and e.scores[1].shape == (0, 6)
    assert e.heatmap().shape == (0, 32, 48)


def test_auto_falls_back_and_says_why(tiny_vit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from fga_fast import ops

    def missing() -> None:
        raise ops.NativeLibraryError("no compiled library")

    monkeypatch.setattr(ops, "load", missing)
    e = Explainer(tiny_vit(), preset="published")(torch.randn(1, *PIXELS))
    assert (e.backend, e.backend_reason) == ("composite", "no compiled library")
    with pytest.raises(RuntimeError, match="native cannot run: no compiled library"):
        Explainer(tiny_vit(), backend="native", preset="published")


def test_a_missing_library_is_said_with_the_way_to_build_it(tmp_path: Any) -> None:
    code = "import fga_fast, torch; from fga_fast import ops; ops.gate(torch.zeros(1, 2))"
    environment = {"FGA_FAST_LIBRARY": str(tmp_path / "none.so"), "PATH": ""}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 1 and "pip install ." in ran.stderr and "does not load" in ran.stderr


def test_importing_loads_little() -> None:
    own = ["fga_fast._C", "fga_fast.reference", "fga_fast.graph"]
    libraries = ["timm", "transformers", "open_clip", "torchvision", "captum", "huggingface_hub"]
    late = {*own, *libraries, "triton", "PIL", "matplotlib", "torch._inductor"}
    code = f"import sys, fga_fast, fga_fast.models.find; print(set(sys.modules) & {late} or 'none')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "none\n"


def test_keywords_that_are_passed_on_are_those_of_the_explainer() -> None:
    own = inspect.signature(Explainer).parameters
    keywords = {name for name, parameter in own.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == set(ExplainerSettings.__annotations__)
    assert set(own) - keywords == {"model", "saes"}


def test_the_old_name_of_start_block(tiny_vit: Build) -> None:
    with pytest.warns(FutureWarning, match="start_layer: renamed, use start_block=1"):
        assert Explainer(tiny_vit(), start_layer=1, preset="published").settings.start_block == 1
    with pytest.raises(ValueError, match="start_layer: expected start_block alone, got both, 1 and 2"):
        Explainer(tiny_vit(), start_layer=1, start_block=2, preset="published")


def test_threads_may_load_the_library_together() -> None:
    code = (
        "from concurrent.futures import ThreadPoolExecutor\nfrom fga_fast import ops\n"
        "with ThreadPoolExecutor(6) as pool: print(list(pool.map(lambda _: ops.load(), range(6))))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_repr_helps(tiny_vit: Build) -> None:
    model = tiny_vit()
    text = repr(Explainer(model, {1: sae_for(model)}, preset="published"))
    assert "VisionTransformer" in text and "1: 40 features" in text and "native" in text


def test_a_tower_that_takes_several_sizes(tiny_vit: Build) -> None:
    """The grid is that of the images that came; a tower of one size refuses others."""
    model = tiny_vit(dynamic_img_size=True)
    explainer = Explainer(model, {1: sae_for(model)}, backend="native", ungated=True, preset="published")
    for height, width in ((32, 48), (48, 64)):
        e = explainer(torch.randn(2, 3, height, width), 1)
        want = Explainer(model, {1: sae_for(model)}, backend="reference", preset="published")(
            torch.randn(2, 3, height, width), 1
        )
        assert e.grid == want.grid == (height // 16, width // 16)
        assert e.heatmap().shape == (2, height, width)
        assert e.ungated is not None and e.ungated.shape == e.relevance.shape
    with pytest.raises(ValueError, match="images: VisionTransformer takes images of 32 x 48 only, got 48 x 64"):
        Explainer(tiny_vit(), backend="native", preset="published")(torch.randn(2, 3, 48, 64))


class OwnPooling(nn.Module):
    """Averages the tower's patches, which the tower itself would not."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        return self.tower.head(self.tower.forward_features(x)[:, 1:].mean(1))  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_a_wrapper_that_pools_otherwise_is_explained_from_what_it_reads(
    tiny_vit: Build, caplog: pytest.LogCaptureFixture, backend: Any
) -> None:
    tower, images = tiny_vit(fc_norm=False), torch.randn(2, *PIXELS)
    model = OwnPooling(tower)
    got = Explainer(model, backend=backend, preset="published")(images, 1)
    assert "read 6 of the 7 tokens that block 2 hands on, from 1 to 6, not as the layout says" in caplog.text
    caplog.clear()
    layout = dataclasses.replace(find_layout(model), pooling="average", pooled=None)
    told = Explainer(model, layout=layout, backend=backend, preset="published")(images, 1)
    tower.global_pool = "avg"  # type: ignore[assignment]
    want = Explainer(tower, backend=backend, preset="published")(images, 1).relevance
    torch.testing.assert_close(told.relevance, want)
    torch.testing.assert_close(got.relevance, want)
    Explainer(tiny_vit(), backend=backend, preset="published")(images)
    Explainer(tiny_vit(global_pool="map"), backend=backend, preset="published")(images)
    assert caplog.text == ""


def test_an_sae_of_another_block_is_noticed(tiny_vit: Build, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_vit()
    Explainer(
        model,
        {1: sae_for(model, metadata={"layer": "1"}), 0: sae_for(model, metadata={"layer": "0"})},
        preset="published",
    )
    assert caplog.text == ""
    Explainer(model, {1: sae_for(model, metadata={"layer": "2"})}, preset="published")
    assert "saes[1]: its checkpoint says it was trained on block 2" in caplog.text
