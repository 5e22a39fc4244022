"""What features do: against `Explainer`, against single numbers, and on the shipped demo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from carding import sae
from own_vit import IMAGES, own_vit
from pair_vit import PairViT, plainly
from torch import Tensor, nn
from torch.nn.functional import pad

from fga_fast import Explainer
from fga_fast.assets import fashion_config, fashion_model, fashion_saes, fashion_scenes
from fga_fast.cards.effects import effects
from fga_fast.engine.streams import edited
from fga_fast.harvest.source import source_of
from fga_fast.io.images import Preprocess, load_image
from fga_fast.metrics.correlation import pearson, spearman
from fga_fast.sae.hold import Hold

FEATURES, PATCHES = [8, 11, 5], [0, 4, 3]


def images() -> Tensor:
    return torch.randn(3, *IMAGES[1:], generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("returns", ("tensor", "tokens first"))
def test_measured_and_predicted_are_those_of_the_explainer(returns: str) -> None:
    model, own = own_vit(returns=returns), sae(dtype=torch.float64)
    found = effects(source_of(model, [1], model.layout(), IMAGES[2:]), own, 1, images(), FEATURES, PATCHES)
    explainer = Explainer(model, {1: own}, layout=model.layout(), top_features=own.d_sae, preset="published")
    assert found.target is not None and found.predicted is not None
    assert found.lost is not None and found.measured is not None
    for row, feature in enumerate(FEATURES):
        plain = explainer(images()[row : row + 1])
        without = explainer.ablate({1: [feature]})(images()[row : row + 1], found.target[row : row + 1])
        torch.testing.assert_close(found.lost[row].double(), (plain.logits - without.logits)[0], rtol=1e-5, atol=1e-6)
        assert found.target[row] == plain.targets[0] and found.measured[row] == found.lost[row, found.target[row]]
        contributions = {one.feature: one.contribution for one in plain.top_features(1)[0]}
        assert float(found.predicted[row]) == pytest.approx(contributions.get(feature, 0.0), rel=1e-5, abs=1e-7)
        code = explainer_code(model, own, images()[row], feature, PATCHES[row])
        assert float(found.code[row]) == pytest.approx(code)
    assert float(found.code[0]) > 0 and float(found.code[1]) > 0
    assert float(found.code[2]) == float(found.measured[2]) == 0  # never active
    assert not any(module._forward_hooks for module in model.modules()) and model.head.weight.requires_grad


def explainer_code(model: Any, own: Any, image: Tensor, feature: int, patch: int) -> float:
    """A code at a patch after block 1, from a hook."""
    found: list[Tensor] = []
    handle = model.layers[1].register_forward_hook(lambda _m, _i, output: found.append(output.detach()))
    model(image[None])
    handle.remove()
    x = found[0].transpose(0, 1) if model.returns == "tokens first" else found[0]
    return float(own.encode(x)[0, 1 + patch, feature])


def test_pixels_that_drive_a_code() -> None:
    """The gradient's magnitude by finite differences, in a model whose blocks are lists."""
    inner, own = own_vit(), sae(dtype=torch.float64)
    model = PairViT(inner, plainly).eval()
    source = source_of(model, [1], model.layout(), IMAGES[2:])
    image, feature, patch = images()[:1], 8, 2
    found = effects(source, own, 1, image, [feature], [patch])
    assert found.drive is not None
    assert found.drive.shape == (1, *IMAGES[2:]) and bool((found.drive >= 0).all()) and float(found.drive.max()) > 0
    for row, column in ((0, 0), (5, 11), (15, 23)):
        slopes = []
        for channel in range(3):
            codes = []
            for step in (1e-5, -1e-5):
                moved = image.clone()
                moved[0, channel, row, column] += step
                codes.append(explainer_code(inner, own, moved[0], feature, patch))
            slopes.append(abs(codes[0] - codes[1]) / 2e-5)
        assert float(found.drive[0, row, column]) == pytest.approx(sum(slopes), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits_do_not_lose_small_effects(dtype: torch.dtype) -> None:
    """Gradients and changes of 1e-4 have a product that float16 does not know."""
    low, own = own_vit().to(dtype), sae(dtype=dtype)
    with torch.no_grad():
        low.head.weight *= 2.0**-11
        own.W_dec.mul_(2.0**-11)
    found = effects(source_of(low, [1], low.layout(), IMAGES[2:]), own, 1, images(), FEATURES, PATCHES)
    high, wide = own_vit().float(), own.to(torch.float32)
    high.load_state_dict(low.state_dict())
    assert found.target is not None and found.predicted is not None
    want = effects(source_of(high, [1], high.layout(), IMAGES[2:]), wide, 1, images(), FEATURES, PATCHES)
    assert want.predicted is not None and want.target is not None and torch.equal(found.target, want.target)
    assert 0 < float(want.predicted[:2].abs().max()) < 1e-5
    torch.testing.assert_close(found.predicted, want.predicted, rtol=0.1, atol=0.02 * float(want.predicted.abs().max()))


class Headless(nn.Module):
    """The model as a tower without classes."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = own_vit()
        self.inner.head = nn.Identity()  # type: ignore[assignment]

    def forward(self, given: Tensor) -> Tensor:
        return self.inner(given)  # type: ignore[no-any-return]


def test_a_model_without_classes() -> None:
    model = Headless().eval()
    source = source_of(model, [1], model.inner.layout(), IMAGES[2:])
    found = effects(source, sae(dtype=torch.float64), 1, images(), FEATURES, PATCHES)
    assert found[2:] == (None, None, None, None) and found.drive is not None and float(found.drive.abs().sum()) > 0


def test_an_sae_with_normalisation_predicts_at_the_scale_of_the_stream() -> None:
    """To first order the prediction is what a little less of the feature costs."""
    model, own = own_vit(), sae(dtype=torch.float64, normalize="layer_norm")
    source = source_of(model, [1], model.layout(), IMAGES[2:])
    image = images()[:1]
    found = effects(source, own, 1, image, [8], [0])
    assert found.predicted is not None and found.target is not None

    def a_little(x: Tensor) -> Tensor:
        return x + 1e-6 * pad(Hold(own, {8: 0.0}).change(x[:, 1:]), (0, 0, 1, 0))

    with torch.no_grad(), edited(model.layout(), {1: a_little}, 1):
        after = model(image)
    with torch.no_grad():
        slope = (model(image) - after)[0, int(found.target)] / 1e-6
    assert float(found.predicted[0]) == pytest.approx(float(slope), rel=1e-3)


def test_contributions_predict_the_logit_that_is_lost() -> None:
    """On the shipped demo: the contributions f_k (D_k . g) that explanations list, against what the logit of the
    predicted class loses without feature k, in 240 pairs of an image and a feature."""
    pytest.importorskip("timm")
    config, model, saes = fashion_config(), fashion_model(), fashion_saes()
    preprocess = Preprocess((config.model_args["img_size"],) * 2, config.mean, config.std)
    scenes = torch.stack([preprocess(load_image(path)) for path in fashion_scenes()])
    found = Explainer(model, saes, top_features=20, preset="published")(scenes)
    source, each = source_of(model, list(saes), None, preprocess.image_size), scenes.repeat_interleave(20, 0)
    predicted, measured = [], []
    for block, top in found.features.items():
        features = top.image_index.flatten().tolist()
        lost = effects(source, saes[block], block, each, features, [0] * len(features)).measured
        assert lost is not None and -1 not in features
        predicted.append(top.image_contribution.flatten())
        measured.append(lost)
    a, b = torch.cat(predicted), torch.cat(measured)
    assert len(a) == 240 and float(pearson(a, b)) > 0.75 and float(spearman(a, b)) > 0.85
    shuffled = a[torch.randperm(240)]  # what the bounds rule out, as a wrong sign
    assert float(pearson(shuffled, b)) < 0.3 and float(spearman(shuffled, b)) < 0.3
