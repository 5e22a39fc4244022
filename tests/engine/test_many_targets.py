"""Several targets of an image: one forward pass, gradients in chunks, and what each target alone would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explaining import PIXELS, Build, held, sae_for

from fga_fast import Difference, Explainer, Gate

TARGETS = torch.tensor([[0, 1, 4], [2, 2, 3]])  # the second image asks twice for the same


@pytest.mark.parametrize("chunk", (1, 2, 8))
@pytest.mark.parametrize("backward", ("exact", "conservative"))
@pytest.mark.parametrize("method", ("rollout", "input_x_gradient", "block_x_gradient"))
def test_each_target_is_explained_as_if_it_were_alone(tiny_vit: Build, method: Any, backward: Any, chunk: int) -> None:
    model = tiny_vit().double()
    saes = {0: sae_for(model), 1: sae_for(model, activation="topk", k=4, normalize="layer_norm")}
    settings: dict[str, Any] = {"method": method, "backward": backward, "top_features": 3, "per_block": True}
    explainer = Explainer(
        model, saes, gate=Gate(base=4.0), backend="native", target_chunk=chunk, **settings, preset="published"
    )
    images = torch.randn(2, *PIXELS, dtype=torch.float64)
    together = explainer(images, TARGETS)
    assert together.relevance.shape == (2, 3, 6) and together.targets.tolist() == TARGETS.tolist()
    for k in range(3):
        want = held(explainer(images, TARGETS[:, k]))
        got = {name: value[:, k] for name, value in held(together).items()}
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert got[name].dtype == value.dtype
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


FAMILIES: dict[str, dict[str, Any]] = {
    "average pooling": {"global_pool": "avg", "fc_norm": True},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "registers, q/k norm": {"reg_tokens": 4, "init_values": 0.5, "qk_norm": True},
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_dtypes(tiny_vit: Build, family: str, dtype: torch.dtype) -> None:
    model = tiny_vit(**FAMILIES[family]).to(dtype)
    explainer = Explainer(model, {1: sae_for(model)}, backend="native", preset="published")
    images = torch.randn(2, *PIXELS, dtype=dtype)
    together = explainer(images, TARGETS)
    for k in range(3):
        want = explainer(images, TARGETS[:, k]).relevance
        error = float((together.relevance[:, k] - want).norm() / want.norm())
        # 16 bits: other products of the same numbers are rounded otherwise, and gates are steep.
        assert error < (1e-5 if dtype == torch.float32 else 0.2)


def test_the_model_runs_once_and_gradients_in_chunks(tiny_vit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, forwards, passes = tiny_vit(), [], []
    model.register_forward_hook(lambda *_: forwards.append(1))
    original = torch.autograd.grad

    def counting(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_grads_batched"):
            passes.append(args[2][0].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    explainer = Explainer(model, {1: sae_for(model)}, backend="native", target_chunk=2, preset="published")
    explainer(torch.randn(2, *PIXELS), torch.randint(0, 5, (2, 5)))
    assert len(forwards) == 1
    # Rows differentiated together: each time from the head to the last block, then all the way.
    assert [shape[0] for shape in passes] == [2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("batch", (0, 1))
def test_few_images(tiny_vit: Build, batch: int) -> None:
    model = tiny_vit()
    explainer = Explainer(
        model, {1: sae_for(model)}, backend="native", top_features=2, per_block=True, preset="published"
    )
    e = explainer(torch.randn(batch, *PIXELS), torch.zeros(batch, 2, dtype=torch.int64))
    assert e.relevance.shape == (batch, 2, 6) and e.gates[1].shape == (batch, 2, 6)
    assert e.blocks is not None and e.blocks.shape == (batch, 2, 3, 6)
    assert e.features[1].patch_index.shape == (batch, 2, 6, 2)


@pytest.mark.parametrize("backend", ("native", "composite"))
def test_all_features_of_several_targets(tiny_vit: Build, backend: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Differentiated together also where every feature is reported."""
    model = tiny_vit()
    explainer = Explainer(model, {1: sae_for(model, features=4)}, backend=backend, top_features=4, preset="published")
    e = explainer(torch.randn(2, *PIXELS), TARGETS)
    assert e.features[1].patch_index.shape == (2, 3, 6, 4)
    assert not caplog.records


def test_a_single_target_in_a_list(tiny_vit: Build) -> None:
    model, images = tiny_vit(), torch.randn(2, *PIXELS)
    explainer = Explainer(model, {1: sae_for(model)}, backend="native", preset="published")
    many, one = explainer(images, [[3], [1]]), explainer(images, [3, 1])
    assert many.relevance.shape == (2, 1, 6)
    torch.testing.assert_close(many.relevance[:, 0], one.relevance)


def test_differences_and_functions_of_the_logits(tiny_vit: Build) -> None:
    """x . g is linear in the explained value, so the map of a difference is the difference of the maps."""
    model, images = tiny_vit().double(), torch.randn(2, *PIXELS, dtype=torch.float64)
    explainer = Explainer(model, method="input_x_gradient", backend="native", preset="published")
    maps = [explainer(images, k).relevance for k in range(5)]
    why = explainer(images, Difference(3, 1))
    torch.testing.assert_close(why.relevance, maps[3] - maps[1], rtol=1e-9, atol=1e-12)
    assert why.targets.tolist() == [3, 3]
    mean = explainer(images, lambda logits: logits.mean(-1))
    torch.testing.assert_close(mean.relevance, torch.stack(maps).mean(0), rtol=1e-9, atol=1e-12)
    both = explainer(images, lambda logits: torch.stack([logits[:, 0], logits.mean(-1)], dim=1))
    torch.testing.assert_close(both.relevance, torch.stack([maps[0], mean.relevance], 1), rtol=1e-9, atol=1e-12)
    assert why.values is not None
    logits = model(images).detach()
    torch.testing.assert_close(why.values, logits[:, 3] - logits[:, 1])
