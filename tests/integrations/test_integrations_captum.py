"""FGA behind captum's interface, with the real captum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters import assert_shared, images, upsampled
from explaining import PIXELS, Build, sae_for
from torch import Tensor, nn

from fga_fast import Explainer

pytest.importorskip("captum")
from captum._utils.common import _select_targets
from captum.attr import Attribution, NoiseTunnel, visualization
from captum.metrics import infidelity, sensitivity_max

from fga_fast.integrations.captum import FeatureGradientAttribution


@pytest.fixture
def model(tiny_vit: Build) -> nn.Module:
    return tiny_vit()


@pytest.fixture
def fga(model: nn.Module) -> FeatureGradientAttribution:
    return FeatureGradientAttribution(model, saes={1: sae_for(model, activation="relu")})


def noise(inputs: Tensor) -> tuple[Tensor, Tensor]:
    drawn = 0.1 * torch.randn_like(inputs)
    return drawn, inputs - drawn


def test_it_is_the_explainers_relevance_at_every_pixel(model: nn.Module, fga: FeatureGradientAttribution) -> None:
    assert isinstance(fga, Attribution)
    assert fga.get_name() == "Feature Gradient Attribution"
    attributions = fga.attribute(images(), target=2)
    expected = Explainer(model, saes=fga.explainer.saes)(images(), 2).relevance
    assert torch.equal(attributions, upsampled(expected).expand(-1, 3, -1, -1))
    assert attributions.shape == (2, *PIXELS)
    assert attributions.is_contiguous()
    assert not attributions.requires_grad
    assert float(attributions.max()) < 1, "raw relevance is not rescaled"
    assert not torch.equal(attributions, FeatureGradientAttribution(model).attribute(images(), target=2))


@pytest.mark.parametrize(
    "target",
    [3, torch.tensor(3), torch.tensor([3]), (3,), torch.tensor([4, 1]), [4, 1], [(4,), (1,)]],
    ids=str,
)
def test_targets_mean_what_captum_means(fga: FeatureGradientAttribution, target: Any) -> None:
    logits = torch.arange(10.0).reshape(2, 5)
    chosen = (_select_targets(logits, target) - logits[:, 0]).long()  # captum's own reading, as columns
    attributions = fga.attribute(images(), target=target)
    assert torch.equal(attributions, fga.attribute(images(), target=chosen))
    assert not torch.equal(attributions, fga.attribute(images(), target=(chosen + 1) % 5))


def test_without_a_target_the_predicted_class_is_explained(model: nn.Module, fga: FeatureGradientAttribution) -> None:
    predicted = model(images()).argmax(1)
    assert torch.equal(fga.attribute(images()), fga.attribute(images(), target=predicted))


def test_a_tuple_gives_a_tuple(fga: FeatureGradientAttribution) -> None:
    (attributions,) = fga.attribute((images(),), target=0)
    assert torch.equal(attributions, fga.attribute(images(), target=0))


def test_noise_tunnel_averages_over_noisy_copies(fga: FeatureGradientAttribution) -> None:
    def smooth() -> Tensor:
        torch.manual_seed(7)
        return NoiseTunnel(fga).attribute(images(), nt_samples=3, stdevs=0.2, target=[4, 1])

    torch.manual_seed(7)
    noisy = torch.normal(0, torch.full((6, *PIXELS), 0.2)) + images().repeat_interleave(3, dim=0)
    each = fga.attribute(noisy, target=[4, 4, 4, 1, 1, 1])
    torch.testing.assert_close(smooth(), each.reshape(2, 3, *PIXELS).mean(1))
    assert torch.equal(smooth(), smooth())


def test_sensitivity_max(fga: FeatureGradientAttribution) -> None:
    def sensitivity(radius: float) -> Tensor:
        torch.manual_seed(7)
        return sensitivity_max(fga.attribute, images(), perturb_radius=radius, n_perturb_samples=3, target=[4, 1])

    # Close, not equal: products of matrices round by where their inputs lie in memory.
    torch.testing.assert_close(sensitivity(0), torch.zeros(2), rtol=0, atol=1e-5)
    found = sensitivity(0.1)
    torch.testing.assert_close(found, sensitivity(0.1), rtol=1e-3, atol=0)
    assert bool((found > 0).all())
    assert bool((found < sensitivity(1.0)).all())


def test_infidelity(model: nn.Module, fga: FeatureGradientAttribution) -> None:
    def found(attributions: Tensor) -> Tensor:
        torch.manual_seed(7)
        return infidelity(
            model, noise, images(), attributions, target=[4, 1], n_perturb_samples=20, normalize=True
        ).detach()

    attributions = fga.attribute(images(), target=[4, 1])
    torch.testing.assert_close(found(attributions), found(attributions))
    assert bool(torch.isfinite(found(attributions)).all())
    # Normalised, infidelity does not see a factor, and no map can be worse than one that says nothing.
    torch.testing.assert_close(found(attributions), found(1000 * attributions))
    assert bool((found(attributions) < found(torch.zeros_like(attributions))).all())


def test_visualization_draws_it(fga: FeatureGradientAttribution, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    picture, attributions = images()[0].movedim(0, -1).sigmoid().numpy(), fga.attribute(images(), target=2)
    figure, axes = visualization.visualize_image_attr(
        attributions[0].movedim(0, -1).numpy(), picture, method="heat_map", sign="positive", use_pyplot=False
    )
    drawn = axes.images[0].get_array()
    expected = attributions[0].sum(0).numpy()
    peak = expected.argmax()
    assert drawn.shape == PIXELS[1:]
    assert drawn.reshape(-1)[peak] == drawn.max()
    figure.clear()


def test_the_model_is_left_as_it_came_and_threads_share_it(model: nn.Module, fga: FeatureGradientAttribution) -> None:
    assert_shared(model, lambda batch: fga.attribute(batch.requires_grad_(), target=2))


def test_float64_models_give_float64(model: nn.Module) -> None:
    assert FeatureGradientAttribution(model.double()).attribute(images().double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": (images(), images())}, "inputs: expected one tensor"),
        ({"inputs": images().numpy()}, "images: expected a tensor"),
        ({"inputs": images(), "target": (1, 2)}, r"target: .*one index an image.*\(1, 2\)"),
        ({"inputs": images(), "target": [1, 2, 3]}, "targets: "),
        ({"inputs": images(), "target": 5}, "targets: "),
        ({"inputs": images(), "target": torch.tensor([[0, 1], [2, 3]])}, "targets: expected one an image"),
        ({"inputs": images(), "additional_forward_args": 1}, "additional_forward_args: expected None"),
    ],
)
def test_errors_name_the_argument(fga: FeatureGradientAttribution, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fga.attribute(**arguments)
