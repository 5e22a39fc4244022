"""Train a linear head on the frozen transformer: is a solar cell sound or defective?

    python -m examples.solar.train_head --out examples/solar/runs

Writes `head.safetensors` and `head.json` with the accuracy on cells that were not trained on.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from examples.solar.data import Part, cells, preprocess
from examples.solar.model import solar_vit
from fga_fast.dataset.items import load

LOG = logging.getLogger("train_head")


@torch.no_grad()
def features(part: Part, image_size: int, flips: bool) -> tuple[Tensor, Tensor]:
    """What the head reads of each cell [M, 384], and the classes [M]; with flips, of four views of each cell."""
    model, how = solar_vit(image_size), preprocess(image_size)
    found, targets = [], []
    for item in tqdm(cells(part), desc=f"{part} at {image_size} px"):
        image = load(item, how).image
        views = [image, image.flip(1), image.flip(2), image.flip(1, 2)] if flips else [image]
        found.append(model.forward_head(model.forward_features(torch.stack(views)), pre_logits=True))
        targets += [int(item.target or 0)] * len(views)
    return torch.cat(found), torch.tensor(targets)


def fit(x: Tensor, y: Tensor, decay: float) -> tuple[Tensor, Tensor]:  # [M, C], [M] -> [2, C], [2]
    """Logistic regression with classes weighed alike, for features as they are."""
    centre, scale = x.mean(0), x.std(0)
    weight, bias = torch.zeros(2, x.shape[1], requires_grad=True), torch.zeros(2, requires_grad=True)
    share = len(y) / (2 * torch.bincount(y, minlength=2).float())
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")
    standard = (x - centre) / scale

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(standard @ weight.t() + bias, y, weight=share) + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return weight / scale, bias - (weight / scale) @ centre


def balanced(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> float:
    """Mean of the two classes' accuracies."""
    right = (x @ weight.t() + bias).argmax(1) == y
    return round(sum(right[y == kind].double().mean().item() for kind in (0, 1)) / 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--decay", type=float, default=1e-2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    x, y = features("train", arguments.image_size, flips=True)
    weight, bias = fit(x, y, arguments.decay)
    test = features("test", arguments.image_size, flips=False)
    about = {
        "image_size": arguments.image_size,
        "decay": arguments.decay,
        "trained_on": len(y) // 4,
        "tested_on": len(test[1]),
        "balanced_accuracy_train": balanced(weight, bias, x, y),
        "balanced_accuracy_test": balanced(weight, bias, *test),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight.contiguous(), "bias": bias.contiguous()}, arguments.out / "head.safetensors")
    (arguments.out / "head.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    LOG.info("%s", json.dumps(about))


if __name__ == "__main__":
    main()
