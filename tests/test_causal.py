"""Whether a feature's contribution says what the model does without the feature, on the shipped demo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fga_fast import Explainer
from fga_fast.assets import fashion_config, fashion_model, fashion_saes, fashion_scenes
from fga_fast.io.images import Preprocess, load_image
from fga_fast.metrics.correlation import pearson, spearman


@pytest.mark.parametrize(("block", "least"), ((2, (0.75, 0.85)), (3, (0.8, 0.9))))
def test_contributions_predict_the_logit_without_the_feature(block: int, least: tuple[float, float]) -> None:
    """Contribution f_k (D_k . g), summed over patches, against the logit that is lost without feature k; 240 pairs of
    an image and a feature."""
    pytest.importorskip("timm")
    config = fashion_config()
    preprocess = Preprocess((config.model_args["img_size"],) * 2, config.mean, config.std)
    images = torch.stack([preprocess(load_image(path)) for path in fashion_scenes()])
    explainer = Explainer(fashion_model(), {block: fashion_saes()[block]}, top_features=20)
    plain = explainer(images)
    wanted = plain.logits.topk(2).indices  # [B, 2], since a scene has several garments
    top = explainer(images, wanted).features[block]
    predicted, measured = [], []
    without = {k: explainer.ablate({block: [k]})(images).logits for k in top.image_index.unique().tolist()}
    for image, row in enumerate(wanted.tolist()):
        for place, target in enumerate(row):
            features = top.image_index[image, place].tolist()
            predicted += top.image_contribution[image, place].tolist()
            measured += [float(plain.logits[image, target] - without[k][image, target]) for k in features]
    a, b = torch.tensor(predicted), torch.tensor(measured)
    assert len(a) == 240
    assert (float(pearson(a, b)), float(spearman(a, b))) > least and float(spearman(a, b)) > least[1]
    assert float(pearson(_shuffled(a), b)) < 0.3 and float(spearman(_shuffled(a), b)) < 0.3  # what the bounds rule out


def _shuffled(values: Tensor) -> Tensor:  # [n]
    return values[torch.randperm(len(values))]
