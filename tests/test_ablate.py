"""`Explainer.ablate` against a model that edits its own stream, and what it must leave alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from explaining import PIXELS, Build, agree, held, sae_for
from own_vit import IMAGES, TOKENS, WIDTH, OwnViT, own_vit
from pair_vit import PairViT, Step, by_function, by_names, in_place, plainly
from torch import Tensor, nn

from fga_fast import Explainer, SparseAutoencoder
from fga_fast.models.block_io import TapeError
from fga_fast.models.find import find_layout
from fga_fast.models.layout import ModelLayout
from fga_fast.result.explanation import Explanation
from fga_fast.sae.hold import Hold

BACKENDS = ("native", "composite", "reference")
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"activation": "topk", "k": 6, "normalize": "layer_norm"},
    "jumprelu": {"activation": "jumprelu", "threshold": 0.5, "normalize": "constant_norm"},
}


class EditedBlock(nn.Module):
    """A block that edits what it returns, by dense codes and two whole reconstructions."""

    def __init__(self, block: nn.Module, sae: SparseAutoencoder, values: Mapping[int, float], prefix: int) -> None:
        super().__init__()
        self.block, self.sae, self.values, self.prefix = block, sae, dict(values), prefix

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.block(*args, **kwargs)
        x = out[0] if isinstance(out, tuple) else out
        swapped = x.shape[0] == TOKENS
        change = torch.zeros_like(x)
        with torch.no_grad():
            tokens = x.transpose(0, 1) if swapped else x
            patches = tokens[:, self.prefix :].detach()
            f = self.sae.encode(patches)
            edited = f.clone()
            for feature, value in self.values.items():
                edited[..., feature] = value
            moved = self.sae.decode(edited, patches) - self.sae.decode(f, patches)
            (change.transpose(0, 1) if swapped else change)[:, self.prefix :] = moved
        return (x + change, *out[1:]) if isinstance(out, tuple) else x + change


def edits_itself(
    model: nn.Module,
    layout: ModelLayout,
    saes: Mapping[int, SparseAutoencoder],
    edits: Mapping[int, Mapping[int, float]],
) -> tuple[nn.Module, ModelLayout]:
    """A copy of a model whose blocks edit, and its layout."""
    model = copy.deepcopy(model)
    blocks: Any = model.layers if isinstance(model, OwnViT) else model.blocks
    for block, values in edits.items():
        blocks[block] = EditedBlock(blocks[block], saes[block], values, layout.prefix_tokens)
    return model, replace(layout, blocks=tuple(blocks), tower=None)


def own_saes(*blocks: int, **settings: Any) -> dict[int, SparseAutoencoder]:
    like = nn.Linear(1, 1).double()
    like.embed_dim = WIDTH  # type: ignore[assignment]
    return {block: sae_for(like, **settings) for block in blocks}


def check(got: Explainer, want: Explainer, images: Tensor, targets: Any = None) -> None:
    found, expected = got(images, targets), want(images, targets)
    said = got.plan.held and tuple(one.notice(block) for block, one in sorted(got.plan.held.items()))
    assert found.notices[: len(said)] == said
    agree(replace(found, notices=found.notices[len(said) :]), expected, 1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_a_model_that_edits_itself(backend: Any, activation: str, tiny_vit: Build) -> None:
    model = tiny_vit().double()
    saes = {block: sae_for(model, **ACTIVATIONS[activation]) for block in (0, 1)}
    images, layout = torch.randn(2, *PIXELS, dtype=torch.float64), find_layout(model)
    edits = {0: {3: 0.0, 7: 0.0, 11: 0.0}, 1: {5: 2.5, 39: 0.0}}
    edited, its_layout = edits_itself(model, layout, saes, edits)
    settings: dict[str, Any] = {"backend": backend, "top_features": 4, "ungated": True}
    plain = Explainer(model, saes, **settings, preset="published")
    ablated = plain.ablate({0: [3, 7, 11], 1: {5: 2.5, 39: 0.0}})
    check(ablated, Explainer(edited, saes, layout=its_layout, **settings, preset="published"), images)
    assert not torch.allclose(ablated(images).logits, plain(images).logits)
    assert torch.equal(plain.ablate({0: [3]}).ablate({1: {5: 2.5, 39: 0}, 0: (7, 11)})(images).logits,
                       ablated(images).logits)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings",
    (
        {"method": "input_x_gradient"},
        {"method": "block_x_gradient", "per_block": True},
        {"backward": "conservative", "per_block": True},
        {"signed": True, "start_block": 1},
    ),
    ids=str,
)
def test_settings_and_several_targets(backend: Any, settings: dict[str, Any], tiny_vit: Build) -> None:
    model = tiny_vit(global_pool="avg", reg_tokens=2).double()
    saes = {1: sae_for(model)}
    images, layout = torch.randn(2, *PIXELS, dtype=torch.float64), find_layout(model)
    edited, its_layout = edits_itself(model, layout, saes, {1: {2: 0.0, 9: 1.0}})
    ablated = Explainer(model, saes, backend=backend, **settings, preset="published").ablate({1: {2: 0.0, 9: 1.0}})
    want = Explainer(edited, saes, layout=its_layout, backend=backend, **settings, preset="published")
    check(ablated, want, images, torch.tensor([[0, 3], [4, 1]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_that_is_not_explained(backend: Any) -> None:
    """The edit holds before `start_block`, and where only the model without gates is explained beside it."""
    model, saes, images = own_vit(), own_saes(1), torch.randn(IMAGES).double()
    edited, its_layout = edits_itself(model, model.layout(), saes, {1: {4: 1.0}})
    got = Explainer(model, saes, layout=model.layout(), backend=backend, start_block=1, preset="published").ablate(
        {1: {4: 1.0}}
    )
    check(got, Explainer(edited, saes, layout=its_layout, backend=backend, start_block=1, preset="published"), images)
    # Explainer refuses this state: `ablate` holds features of its own SAEs alone, which lie at `start_block` or after.
    # The plan is set by hand, to see that backends edit before the blocks that they explain.
    late = Explainer(model, layout=model.layout(), backend=backend, start_block=2, preset="published")
    late.plan = replace(late.plan, held={1: Hold(saes[1], {4: 1.0})})
    check(late, Explainer(edited, layout=its_layout, backend=backend, start_block=2, preset="published"), images)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("returns", ("tuple", "tokens first"))
def test_what_blocks_hand_over(backend: Any, returns: str) -> None:
    model, saes, images = own_vit(returns=returns), own_saes(0, 1), torch.randn(IMAGES).double()
    edited, its_layout = edits_itself(model, model.layout(), saes, {0: {1: 0.0}, 1: {4: 3.0}})
    got = Explainer(model, saes, layout=model.layout(), backend=backend, preset="published").ablate({0: [1], 1: {4: 3}})
    check(got, Explainer(edited, saes, layout=its_layout, backend=backend, preset="published"), images)


@pytest.mark.parametrize("step", (plainly, in_place, by_function, by_names))
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_are_lists(backend: Any, step: Step) -> None:
    own, saes, images = own_vit(), own_saes(0, 1), torch.randn(IMAGES).double()
    pairs = PairViT(own, step).eval()
    edited, its_layout = edits_itself(own, own.layout(), saes, {0: {1: 0.0}, 1: {4: 3.0}})
    got = Explainer(pairs, saes, layout=pairs.layout(), backend=backend, preset="published").ablate({0: [1], 1: {4: 3}})
    check(got, Explainer(edited, saes, layout=its_layout, backend=backend, preset="published"), images)


def off_at(x: Tensor, features: int = 20) -> SparseAutoencoder:
    """An SAE whose feature 0 is off everywhere and whose feature 1 has the value 2 everywhere."""
    W_enc, W_dec = torch.randn(x.shape[-1], features).to(x), torch.randn(features, x.shape[-1]).to(x)
    W_enc[:, :2] = 0
    b_enc = torch.randn(features).to(x)
    b_enc[:2] = torch.tensor([-1.0, 2.0])
    return SparseAutoencoder(W_enc, b_enc, W_dec, torch.zeros(x.shape[-1]).to(x), normalize="layer_norm")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_its_value_already_changes_nothing(backend: Any, dtype: torch.dtype, tiny_vit: Build) -> None:
    model, images = tiny_vit().to(dtype), torch.randn(2, *PIXELS, dtype=dtype)
    saes = {1: off_at(torch.zeros(16, dtype=dtype))}
    plain = Explainer(model, saes, backend=backend, top_features=3, ungated=True, preset="published")
    want = held(plain(images)) | {"logits": plain(images).logits}
    for edit in ({1: [0]}, {1: {1: 2.0}}, {1: {0: 0.0, 1: 2.0}}):
        ablated = plain.ablate(edit)
        got = held(ablated(images)) | {"logits": ablated(images).logits}
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), name
    assert not torch.equal(plain.ablate({1: {1: 2.5}})(images).logits, plain(images).logits)


def test_compiled_and_as_a_module(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    saes = {1: sae_for(model, activation="topk", k=5, normalize="layer_norm"), 0: sae_for(model)}
    ablated = Explainer(model, saes, preset="published").ablate({1: {3: 1.5}, 0: [1, 2]})
    want = ablated(images)
    found = ablated.module(images)(images)
    torch.testing.assert_close(found["logits"], want.logits)
    torch.testing.assert_close(found["relevance"], want.relevance, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found["logits"], Explainer(model, saes, preset="published")(images).logits)


@pytest.mark.slow
def test_compiled(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    ablated = Explainer(model, {1: sae_for(model)}, preset="published").ablate({1: {3: 1.5}})
    want, got = ablated(images), ablated.compile(images)(images)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert got.notices == want.notices == ("explains an edited model: after block 1, feature 3 is held at 1.5",)


def test_leaves_model_and_explainer_alone(tiny_vit: Build, caplog: pytest.LogCaptureFixture) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    plain = Explainer(model, {1: sae_for(model)}, preset="published")
    before, weights = plain(images), copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        ablated = plain.ablate({1: list(range(12))})
        ablated(images)
    assert not caplog.records  # the caller knows
    said = "explains an edited model: after block 1, feature 0 is held at 0, feature 1 at 0, "
    assert said in repr(ablated) and "feature 7 at 0 and 4 more" in repr(ablated) and "feature 7" not in repr(plain)
    assert torch.equal(plain(images).relevance, before.relevance) and not plain(images).notices
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sixteen_bit_and_autocast(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    sae = sae_for(model)
    want = Explainer(model, {1: sae}, preset="published").ablate({1: {3: 1.5}})(images).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = Explainer(model, {1: sae}, preset="published").ablate({1: {3: 1.5}})(images).logits
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.2)
    low = Explainer(model.bfloat16(), {1: sae}, preset="published").ablate({1: {3: 1.5}})(images.bfloat16()).logits
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, rtol=0.1, atol=0.2)


def test_threads_share_a_model(tiny_vit: Build) -> None:
    """What one thread holds, no other thread sees."""
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    plain = Explainer(model, {1: sae_for(model)}, preset="published")
    both = [plain, plain.ablate({1: {3: 1.5}})]
    want = [explainer(images) for explainer in both]
    assert not torch.equal(want[0].logits, want[1].logits)

    def calls(number: int) -> list[Explanation]:
        return [both[number % 2](images) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(calls, range(4))):
            for one in found:
                assert torch.equal(one.logits, want[number % 2].logits)
                assert torch.equal(one.relevance, want[number % 2].relevance)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_images_and_a_block_that_does_not_run(tiny_vit: Build) -> None:
    model = tiny_vit()
    ablated = Explainer(model, {1: sae_for(model)}, preset="published").ablate({1: [0]})
    assert len(ablated(torch.zeros(0, *PIXELS))) == 0
    own = own_vit(call=lambda block, x, _: x if block is own.layers[0] else block(x))
    explainer = Explainer(own, own_saes(0), layout=own.layout(), preset="published").ablate({0: [1]})
    with pytest.raises(TapeError, match=r"block 0 \(Block\) did not run, so its features cannot be held"):
        explainer(torch.randn(IMAGES).double())


@pytest.mark.parametrize(
    ("features", "error", "words"),
    (
        ({}, ValueError, "expected block -> features, .* got no block"),
        ([1], ValueError, "expected block -> features, .* got list"),
        ({2: [1]}, ValueError, r"expected blocks with an SAE \(1\), got 2"),
        ({1: []}, ValueError, r"features\[1\]: expected at least one feature"),
        ({1: {}}, ValueError, r"features\[1\]: expected at least one feature"),
        ({1: 3}, TypeError, r"features\[1\]: expected feature numbers or values, .* got 3"),
        ({1: "3"}, TypeError, r"features\[1\]: expected feature numbers or values"),
        ({1: [40]}, ValueError, r"features\[1\]: expected features 0 to 39, got 40"),
        ({1: [-1]}, ValueError, r"features\[1\]: expected features 0 to 39, got -1"),
        ({1: [True]}, TypeError, r"features\[1\]: expected feature numbers \(int\), got True"),
        ({1: [1.0]}, TypeError, r"features\[1\]: expected feature numbers \(int\), got 1.0"),
        ({1: {3: float("nan")}}, ValueError, r"features\[1\]\[3\]: expected a finite value, got nan"),
        ({1: {3: float("inf")}}, ValueError, r"features\[1\]\[3\]: expected a finite value, got inf"),
        ({1: {3: "2"}}, TypeError, r"features\[1\]\[3\]: expected a number, got str"),
    ),
)
def test_what_does_not_fit(features: Any, error: type[Exception], words: str, tiny_vit: Build) -> None:
    model = tiny_vit()
    with pytest.raises(error, match=words):
        Explainer(model, {1: sae_for(model)}, preset="published").ablate(features)
