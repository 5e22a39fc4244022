"""Sensitivity to noise and randomisation of weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fga_fast import Explainer, metrics


def pooled(images: Tensor) -> Tensor:  # a map that is linear in the image
    return images.mean(1).flatten(1)


def test_sensitivity_of_a_linear_map() -> None:
    images = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.rand(images.shape, generator=generator) * 2 - 1 for _ in range(4)]).double() * 0.1
    change = noise.mean(2).flatten(2).norm(dim=-1).amax(0)
    options = {"runs": 4, "radius": 0.1, "seed": 5}
    found = metrics.sensitivity(pooled, images, normalise=False, **options)
    torch.testing.assert_close(found, change)
    found = metrics.sensitivity(pooled, images, pooled(images), **options)
    torch.testing.assert_close(found, change / pooled(images).norm(dim=-1))


def test_sensitivity_is_captums() -> None:
    captum = pytest.importorskip("captum.metrics")
    images, generator = torch.randn(2, 3, 2, 2), torch.Generator().manual_seed(0)

    def noisy(inputs: Tensor, radius: float) -> Tensor:
        return inputs + radius * (torch.rand(inputs.shape, generator=generator) * 2 - 1)

    def explain(inputs: Tensor | tuple[Tensor]) -> Tensor | tuple[Tensor]:  # a tuple for a tuple
        return (pooled(inputs[0]).square(),) if isinstance(inputs, tuple) else pooled(inputs).square()

    want = captum.sensitivity_max(explain, images, noisy, 0.02, 1)
    found = metrics.sensitivity(lambda x: pooled(x).square(), images, runs=1)
    torch.testing.assert_close(found, want.double(), rtol=1e-3, atol=1e-6)


def test_sensitivity_of_constant_maps_and_of_several() -> None:
    images = torch.randn(2, 3, 2, 2)

    def several(x: Tensor) -> Tensor:
        return torch.stack([pooled(x), torch.ones(2, 4), torch.zeros(2, 4)])

    found = metrics.sensitivity(several, images, runs=3)
    assert torch.equal(found[0], metrics.sensitivity(pooled, images, runs=3))
    assert found[1].tolist() == [0, 0]
    assert bool(found[2].isnan().all())
    assert bool((metrics.sensitivity(pooled, images, runs=6) >= found[0]).all())


def test_an_images_noise_is_drawn_by_its_own_seed() -> None:
    images = torch.randn(3, 3, 2, 2)
    together = metrics.sensitivity(pooled, images, seed=[4, 5, 6])
    alone = [metrics.sensitivity(pooled, images[n : n + 1], seed=[4 + n]) for n in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, metrics.sensitivity(pooled, images, seed=[7, 8, 9]))
    assert metrics.sensitivity(pooled, images[:0], seed=[]).shape == (0,)


def test_sensitivity_errors() -> None:
    images = torch.randn(2, 3, 2, 2)
    for message, call in (
        ("runs: expected at least 1", lambda: metrics.sensitivity(pooled, images, runs=0)),
        ("radius: expected", lambda: metrics.sensitivity(pooled, images, radius=0.0)),
        ("explain: expected maps", lambda: metrics.sensitivity(pooled, images, torch.randn(2, 5))),
        ("relevance: expected", lambda: metrics.sensitivity(lambda x: x, images)),
        ("seed: expected one, .* of the 2 images, got 3", lambda: metrics.sensitivity(pooled, images, seed=[1, 2, 3])),
    ):
        with pytest.raises(ValueError, match=message):
            call()


class Deep(nn.Module):
    """Numbered blocks, a head, and a loose parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(4))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = images.mean(1).flatten(1) + self.token
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale


def gradient(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def explain(images: Tensor) -> Tensor:
        leaf = images.detach().requires_grad_()
        (found,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
        return found.mean(1).flatten(1)

    return explain


def bits(model: nn.Module) -> list[bytes]:
    return [value.numpy().tobytes() for value in model.state_dict().values()]


def test_randomisation_goes_from_the_head_down() -> None:
    model, images = Deep(), torch.randn(2, 3, 2, 2)
    before, seen = bits(model), []
    explain = gradient(model)

    def watched(x: Tensor) -> Tensor:
        names = dict(model.named_parameters())
        kept = [i for i, name in enumerate(model.state_dict()) if name in names]
        now = bits(model)
        seen.append({list(model.state_dict())[i] for i in kept if now[i] != before[i]})
        return explain(x)

    found = metrics.randomisation(watched, model, images)
    assert found.stages == ("head", "blocks.1", "blocks.0", "token")
    assert found.whole.shape == (2,)
    assert found.cascade.shape == (4, 2)
    assert seen[0] == set()
    assert seen[1] == {"head.weight", "head.bias"}
    assert seen[2] == seen[1] | {"blocks.1.0.weight", "blocks.1.0.bias"}
    assert seen[4] == seen[5] == {name for name, _ in model.named_parameters()}
    assert bits(model) == before
    assert bool((found.cascade.abs() <= 1).all())
    again = metrics.randomisation(explain, model, images, explain(images))
    assert torch.equal(again.cascade, found.cascade)
    assert not torch.equal(metrics.randomisation(explain, model, images, seed=1).cascade, found.cascade)


def test_a_wrapped_model_has_the_same_stages() -> None:
    model, images = Deep(), torch.randn(2, 3, 2, 2)
    found = metrics.randomisation(pooled, torch.nn.Sequential(torch.nn.Identity(), model).eval(), images)
    assert found.stages == ("1.head", "1.blocks.1", "1.blocks.0", "1.token")
    assert metrics.randomisation(pooled, torch.nn.Sequential(torch.nn.Linear(2, 2)).eval(), images).stages == ("0",)


def test_without_stages_only_the_whole_is_measured() -> None:
    model, images = Deep(), torch.randn(2, 3, 2, 2)
    explain, calls = gradient(model), []

    def several(x: Tensor) -> Tensor:
        calls.append(1)
        return torch.stack([explain(x), pooled(x)])

    found = metrics.randomisation(several, model, images, stages=())
    assert len(calls) == 2 and found.cascade.shape == (0, 2, 2) and found.stages == ()
    assert torch.equal(found.whole, metrics.randomisation(several, model, images).whole)
    assert torch.equal(found.whole, metrics.randomisation(several, model, images, stages=["head"]).whole)


def test_a_map_that_ignores_the_model_is_caught() -> None:
    found = metrics.randomisation(pooled, Deep(), torch.randn(2, 3, 2, 2))
    torch.testing.assert_close(found.whole, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(found.cascade, torch.ones(4, 2, dtype=torch.float64))


def test_absolute_values_several_methods_and_given_stages() -> None:
    model, images = Deep(), torch.randn(2, 3, 2, 2)
    explain = gradient(model)

    def several(x: Tensor) -> Tensor:
        return torch.stack([explain(x), -explain(x), explain(x).abs()])

    found = metrics.randomisation(several, model, images, stages=["head", "blocks"])
    assert found.cascade.shape == (2, 3, 2)
    torch.testing.assert_close(found.cascade[:, 0], found.cascade[:, 1])
    absolute = metrics.randomisation(several, model, images, stages=["head", "blocks"], absolute=True)
    torch.testing.assert_close(absolute.cascade[:, 0], found.cascade[:, 2])


@pytest.mark.parametrize("at", range(1, 6))
def test_weights_come_back_after_an_exception(at: int) -> None:
    model, calls = Deep(), []
    with torch.no_grad():
        model.token[0] = float("nan")  # bit for bit, this too
    before = bits(model)

    def failing(images: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt
        return pooled(images)

    with pytest.raises(KeyboardInterrupt):
        metrics.randomisation(failing, model, torch.randn(2, 3, 2, 2))
    assert bits(model) == before


def test_randomisation_of_an_explainer(tiny_vit: Callable[..., nn.Module]) -> None:
    model, images = tiny_vit(), torch.randn(2, 3, 32, 48)
    before = bits(model)
    explainer = Explainer(model, backend="reference", preset="published")
    found = metrics.randomisation(lambda x: explainer(x, 1).relevance, model, images)
    assert found.stages == (
        "head",
        "norm",
        "blocks.2",
        "blocks.1",
        "blocks.0",
        "patch_embed.proj",
        "pos_embed",
        "cls_token",
    )
    assert float(found.whole.abs().max()) < 1
    assert bits(model) == before


def test_randomisation_errors() -> None:
    images = torch.randn(2, 3, 2, 2)
    for message, call in (
        ("model: expected eval mode", lambda: metrics.randomisation(pooled, Deep().train(), images)),
        ("model: expected a model with parameters", lambda: metrics.randomisation(pooled, nn.Tanh().eval(), images)),
        (r"stages: .*\['heads'\]", lambda: metrics.randomisation(pooled, Deep(), images, stages=["heads"])),
        ("explain: expected maps", lambda: metrics.randomisation(pooled, Deep(), images, torch.randn(2, 5))),
    ):
        with pytest.raises(ValueError, match=message):
            call()
