"""The reference's whole explanation: against another form of itself, over models, targets, dtypes and misuse."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fga_fast.models.find import find_layout
from fga_fast.reference import explain, gate, score
from fga_fast.reference.explain import differentiate
from fga_fast.reference.recording import recording
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder
from fga_fast.settings import Gate, Settings

Build = Callable[..., Any]
Saes = dict[int, SparseAutoencoder]
IMAGES = (3, 3, 32, 48)


@pytest.fixture
def two_saes(random_sae: Build) -> Saes:
    return {0: random_sae("relu"), 1: random_sae("topk")}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reg_tokens": 2},
        {"global_pool": "avg"},
        {"global_pool": "avg", "pool_include_prefix": True},
        {"global_pool": "map"},
        {"global_pool": "map", "pool_include_prefix": True, "reg_tokens": 1},
        {"class_token": False, "global_pool": "map"},
    ],
)
def test_explanation_equals_the_row_carried_from_the_head_to_the_patches(
    tiny_vit: Build, settings: dict[str, object], two_saes: Saes
) -> None:
    """The same relevance from a row vector, seeded at the pooling and carried back block by block."""
    model, saes = tiny_vit(**settings).double(), two_saes
    images = torch.randn(IMAGES).double()
    result = explain(model, images, None, saes, Settings())
    layout = find_layout(model)
    with recording(layout, images) as record:
        logits = model(images.requires_grad_())
        found = differentiate(logits.amax(dim=1).sum(), record, saes)

    row = torch.zeros(3, layout.tokens).double()
    start, stop = layout.pooled
    row[:, start:stop] = 1 / (stop - start)
    if None in record.maps:
        row[:, start:stop] = (record.maps[None] * found.maps[None]).clamp(min=0).mean(dim=1)[:, 0]
    for block in reversed(range(3)):
        message = torch.einsum(
            "bi,bhij->bj", row, (record.maps[block] * found.maps[block]).clamp(min=0) / record.maps[block].shape[1]
        )
        if block in saes:
            message[:, layout.prefix_tokens :] *= result.gates[block]
        row = row + message
    torch.testing.assert_close(result.relevance, row[:, layout.prefix_tokens :], rtol=1e-11, atol=1e-13)
    assert result.relevance.abs().min() > 0
    assert torch.equal(result.targets, logits.argmax(dim=1))
    torch.testing.assert_close(result.logits, logits)
    for block, sae in saes.items():
        x = record.streams[block][:, layout.prefix_tokens :]
        g = found.streams[block][:, layout.prefix_tokens :]
        torch.testing.assert_close(result.scores[block], score(x, g, sae, "combined"))
        assert torch.equal(result.gates[block], gate(result.scores[block], 10.0, 1.0))


def test_registers_and_class_token_are_not_among_the_patches(tiny_vit: Build) -> None:
    result = explain(tiny_vit(reg_tokens=3), torch.randn(IMAGES), None, {}, Settings())
    assert result.relevance.shape == (3, 6)
    assert result.scores == {}
    assert result.gates == {}


def test_images_do_not_see_each_other(tiny_vit: Build, two_saes: Saes) -> None:
    model, saes = tiny_vit().double(), two_saes
    images = torch.randn(IMAGES).double()
    together = explain(model, images, torch.tensor([4, 0, 2]), saes, Settings())
    for index, target in enumerate((4, 0, 2)):
        alone = explain(model, images[index : index + 1], target, saes, Settings())
        torch.testing.assert_close(alone.relevance[0], together.relevance[index], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(alone.scores[1][0], together.scores[1][index], rtol=1e-9, atol=1e-12)


def test_targets_may_be_none_an_int_or_one_an_image(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(IMAGES)
    predicted = explain(model, images, None, {}, Settings())
    named = explain(model, images, model(images).argmax(dim=1), {}, Settings())
    assert torch.equal(predicted.relevance, named.relevance)
    same = explain(model, images, 2, {}, Settings())
    assert same.targets.tolist() == [2, 2, 2]
    assert torch.equal(same.relevance, explain(model, images, torch.tensor([2, 2, 2]), {}, Settings()).relevance)
    assert not torch.equal(same.relevance, explain(model, images, 3, {}, Settings()).relevance)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (5, ValueError, r"expected classes 0 to 4"),
        (-1, ValueError, r"expected classes 0 to 4"),
        (torch.tensor([0, 1]), ValueError, r"shape \[3\], got \[2\]"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "integer class indices, got dtype torch.float32"),
        (torch.tensor([True, False, True]), TypeError, "integer class indices, got dtype torch.bool"),
    ],
)
def test_bad_targets_leave_the_model_as_it_was(
    tiny_vit: Build, targets: Any, error: type[Exception], message: str
) -> None:
    model = tiny_vit()
    with pytest.raises(error, match=message):
        explain(model, torch.randn(IMAGES), targets, {}, Settings())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_came(tiny_vit: Build, frozen: bool, two_saes: Saes) -> None:
    model = tiny_vit().double().requires_grad_(not frozen)
    model.blocks[1].requires_grad_(frozen)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(IMAGES).double()
    explain(model, images, None, two_saes, Settings())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not images.requires_grad


def test_hooks_are_gone_after_an_interrupt(tiny_vit: Build) -> None:
    model = tiny_vit()

    def interrupt(module: nn.Module, inputs: Any) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        explain(model, torch.randn(IMAGES), None, {}, Settings())
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert explain(model, torch.randn(IMAGES), None, {}, Settings()).relevance.shape == (3, 6)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(tiny_vit: Build, context: Callable[[], Any]) -> None:
    model, images = tiny_vit(), torch.randn(IMAGES)
    want = explain(model, images, None, {}, Settings()).relevance
    with context():
        assert torch.equal(explain(model, images.clone(), None, {}, Settings()).relevance, want)


@pytest.mark.parametrize("images", [0, 1])
def test_small_batches(tiny_vit: Build, images: int, two_saes: Saes) -> None:
    result = explain(tiny_vit().double(), torch.randn(images, 3, 32, 48).double(), None, two_saes, Settings())
    assert result.relevance.shape == (images, 6)
    assert result.scores[0].shape == (images, 6)
    assert result.logits.shape == (images, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_follow_the_float64_explanation(tiny_vit: Build, dtype: torch.dtype, two_saes: Saes) -> None:
    model, images = tiny_vit().double(), torch.randn(IMAGES).double()
    saes = two_saes
    exact = explain(model, images, 1, saes, Settings())
    rounded = {block: sae.to(dtype) for block, sae in saes.items()}
    got = explain(model.to(dtype), images.to(dtype), 1, rounded, Settings())
    assert got.logits.dtype == dtype
    assert {got.relevance.dtype, got.scores[0].dtype, got.gates[1].dtype} == {torch.float32}
    error = (got.relevance.double() - exact.relevance).norm() / exact.relevance.norm()
    assert error < {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.3}[dtype]


@pytest.mark.parametrize("mode", ["combined", "activation_only", "gradient_only", "no_sae", "shuffled"])
def test_every_mode_changes_the_explanation(tiny_vit: Build, mode: Any, two_saes: Saes) -> None:
    model, images, saes = tiny_vit().double(), torch.randn(IMAGES).double(), two_saes
    ungated = explain(model, images, None, {}, Settings()).relevance
    gated = explain(model, images, None, saes, Settings(Gate(mode=mode, seed=3))).relevance
    assert not torch.allclose(gated, ungated)
    assert torch.equal(gated, explain(model, images, None, saes, Settings(Gate(mode=mode, seed=3))).relevance)
    neutral = explain(model, images, None, saes, Settings(Gate(mode=mode, base=1.0))).relevance
    torch.testing.assert_close(neutral, ungated)


def test_shuffled_uses_the_permutation_given(tiny_vit: Build, random_sae: Build) -> None:
    model, images, saes = tiny_vit().double(), torch.randn(IMAGES).double(), {1: random_sae("relu")}
    combined = explain(model, images, None, saes, Settings()).scores[1]
    gates = [Gate(mode="shuffled", permutation=order) for order in (torch.arange(40), torch.arange(40).flip(0))]
    identity, reverse = (explain(model, images, None, saes, Settings(gate)).scores[1] for gate in gates)
    assert torch.equal(combined, identity)
    assert not torch.allclose(combined, reverse)


def test_given_gates_take_the_place_of_the_scores(tiny_vit: Build, random_sae: Build) -> None:
    model, images, saes = tiny_vit().double(), torch.randn(IMAGES).double(), {1: random_sae("relu")}
    own = explain(model, images, None, saes, Settings())
    again = explain(model, images, None, saes, Settings(Gate(base=2.0)), given_gates={1: own.gates[1]})
    assert torch.equal(again.relevance, own.relevance)


def test_strongest_features_belong_to_the_scores(tiny_vit: Build, two_saes: Saes) -> None:
    model, images = tiny_vit(reg_tokens=1).double(), torch.randn(IMAGES).double()
    result = explain(model, images, None, two_saes, Settings(top_features=40))
    for block, top in result.features.items():
        assert top.patch_index.shape == (3, 6, 40)
        torch.testing.assert_close(top.patch_contribution.sum(dim=-1), result.scores[block])
        torch.testing.assert_close(top.image_contribution.sum(dim=-1), result.scores[block].sum(dim=1))
    few = explain(model, images, None, two_saes, Settings(top_features=3)).features[1]
    assert torch.equal(few.patch_index, result.features[1].patch_index[..., :3])
    assert explain(model, images, None, two_saes, Settings()).features == {}
    with pytest.raises(ValueError, match="'no_sae'"):
        explain(model, images, None, two_saes, Settings(Gate(mode="no_sae"), top_features=3))


class TextBeside(nn.Module):
    """A tower, and attention of the wrapper's own that is no part of it."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W]
        text = torch.ones(1, 1, 4, 5, dtype=images.dtype)
        weights = F.scaled_dot_product_attention(text, text, text).mean()
        return self.tower(images) * weights


def test_attention_outside_the_tower_is_left_alone(tiny_vit: Build) -> None:
    tower, images = tiny_vit().double(), torch.randn(IMAGES).double()
    want = explain(tower, images, None, {}, Settings()).relevance
    torch.testing.assert_close(explain(TextBeside(tower), images, None, {}, Settings()).relevance, want)


def test_refusals(tiny_vit: Build, random_sae: Build) -> None:
    images = torch.randn(IMAGES).double()
    model = tiny_vit().double()
    with pytest.raises(ValueError, match="expected blocks 0 to 2 as keys, got 3"):
        explain(model, images, None, {3: random_sae("relu")}, Settings())
    with pytest.raises(ValueError, match=r"saes\[1\]: .*width 8, the model's has width 16"):
        explain(model, images, None, {1: random_sae("relu", width=8)}, Settings())
    with pytest.raises(ValueError, match=r"dropout is active .*blocks.0.attn.attn_drop.*model.eval\(\)"):
        explain(tiny_vit(attn_drop_rate=0.1).double().train(), images, None, {}, Settings())
    model.head = nn.Unflatten(1, (4, 4))
    with pytest.raises(ValueError, match=r"expected logits \[B, classes\] from images, .*got \[3, 4, 4\]"):
        explain(model, images, None, {}, Settings())


@pytest.mark.parametrize("backward", ["exact", "conservative"])
def test_other_threads_may_use_the_model_meanwhile(tiny_vit: Build, backward: Any) -> None:
    model, images = tiny_vit(), torch.randn(IMAGES)
    want = explain(model, images, None, {}, Settings(backward=backward))
    plain, seen = model(images), []

    def interleave(module: nn.Module, inputs: Any) -> None:
        if threading.current_thread() is threading.main_thread() and not seen:
            thread = threading.Thread(target=lambda: seen.append(model(images)))
            thread.start()
            thread.join()

    handle = model.blocks[1].mlp.register_forward_pre_hook(interleave)
    got = explain(model, images, None, {}, Settings(backward=backward))
    handle.remove()
    assert torch.equal(got.relevance, want.relevance)
    assert torch.equal(seen[0], plain)
