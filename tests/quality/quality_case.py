"""Small models and autoencoders, and every number of a `Quality` from all tokens at once, in the plainest way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from own_vit import CLASSES, GRID, TOKENS, WIDTH, OwnViT, own_vit
from torch import Tensor

from fga_fast.dataset.items import Item
from fga_fast.sae import SparseAutoencoder

PATCHES = TOKENS - 1


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def items(count: int, classes: tuple[int | None, ...] = (None,)) -> list[Item]:
    """Images of an `OwnViT`, whose classes come round."""
    images = draw(count, 3, 16, 24, seed=5)
    return [Item(f"image {n}", image, classes[n % len(classes)]) for n, image in enumerate(images)]


def random_sae(activation: str = "relu", features: int = 24, seed: int = 1, **settings: Any) -> SparseAutoencoder:
    """Its bias makes some features rare and some dead."""
    bias = torch.linspace(-40.0, 2.0, features, dtype=torch.float64)
    rows = draw(features, WIDTH, seed=seed)
    return SparseAutoencoder(
        draw(WIDTH, features, seed=seed + 1), bias, 0.05 * rows, draw(WIDTH, seed=seed + 2), activation, **settings
    )


def exact_sae() -> SparseAutoencoder:
    """Features +e_i and -e_i, which reconstruct everything."""
    signs = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)], dim=1).double()
    return SparseAutoencoder(signs, None, signs.t(), torch.zeros(WIDTH).double())


def constant_sae(value: Tensor) -> SparseAutoencoder:  # [C]
    """Reconstructs the same token from everything."""
    encoder = torch.zeros(WIDTH, 3).double()
    return SparseAutoencoder(encoder, torch.full((3,), -1.0).double(), torch.ones(3, WIDTH).double(), value)


def stream(model: OwnViT, images: Tensor, block: int) -> Tensor:  # -> [B, N, C]
    x = model.patches(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.token.expand(len(x), -1, -1), x], dim=1) + model.position
    for layer in model.layers[: block + 1]:
        x = layer(x)
    return x


def logits_from(model: OwnViT, x: Tensor, block: int) -> Tensor:
    for layer in model.layers[block + 1 :]:
        x = layer(x)
    return model.head(model.norm(x)[:, 0])  # type: ignore[no-any-return]


@torch.no_grad()
def oracle(given: list[Item], sae: SparseAutoencoder, block: int, output: str = "softmax") -> dict[str, Any]:
    """Every number, by name."""
    model = own_vit()
    images = torch.stack([one.image for one in given])  # type: ignore[misc]
    x = stream(model, images, block)
    patches = x[:, 1:]
    codes = sae.encode(patches)
    found = sae.decode(codes, patches)
    mean = patches.reshape(-1, WIDTH).mean(0)
    error, distance = ((patches - found) ** 2).sum(-1), ((patches - mean) ** 2).sum(-1)  # [B, P]
    active = (codes != 0).reshape(-1, sae.d_sae)
    lengths = sorted(active.sum(1).tolist())
    rate = active.double().mean(0)
    outputs = [
        logits_from(model, torch.cat([x[:, :1], new], 1), block) for new in (patches, found, mean.expand_as(patches))
    ]
    return {
        "images": len(given),
        "tokens": len(given) * PATCHES,
        "explained_variance": 1 - float(error.sum() / distance.sum()),
        "unexplained": (error.sum(0) / distance.sum(0)).view(GRID).tolist(),
        "l0": float(active.sum(1).double().mean()),
        "l0_percentiles": [lengths[-(-len(lengths) * percent // 100) - 1] for percent in (5, 50, 95)],
        "lengths": lengths,
        "dead": float((rate == 0).double().mean()),
        "density": rate[rate > 0].log10().tolist(),
        "cosines": nearest(sae.W_dec),
        **effects(given, outputs, output),
    }


def nearest(rows: Tensor) -> list[float]:
    found = []
    for i, a in enumerate(rows.numpy()):
        others = [b for j, b in enumerate(rows.numpy()) if j != i]
        found.append(max(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in others))
    return found


def effects(given: list[Item], outputs: list[Tensor], output: str) -> dict[str, list[float] | None]:
    """Loss, accuracy, agreement and divergence of the three, one image after another."""
    plain = outputs[0]
    named: dict[str, list[list[float]]] = {"loss": [], "accuracy": [], "agreement": [], "divergence": []}
    for of_run in outputs:
        values: dict[str, list[float]] = {name: [] for name in named}
        for item, a, b in zip(given, plain, of_run, strict=True):
            if output == "sigmoid":
                p, q = 1 / (1 + (-a).exp()), 1 / (1 + (-b).exp())
                values["divergence"].append(float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()))
                values["agreement"].append(float(((p > 0.5) == (q > 0.5)).double().mean()))
                if item.target is not None:
                    truth = torch.eye(CLASSES)[item.target].double()
                    values["loss"].append(float(-(truth * q.log() + (1 - truth) * (1 - q).log()).mean()))
                    values["accuracy"].append(float(((q > 0.5) == (truth > 0.5)).double().mean()))
            elif output == "softmax":
                p, q = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
                values["divergence"].append(float((p * (p / q).log()).sum()))
                values["agreement"].append(float(int(p.argmax()) == int(q.argmax())))
                if item.target is not None:
                    values["loss"].append(-float(q[item.target].log()))
                    values["accuracy"].append(float(int(q.argmax()) == item.target))
            else:
                values["divergence"].append(1 - float(a @ b / a.norm() / b.norm()))
        for name, of_images in values.items():
            named[name].append(of_images)
    return {name: [sum(one) / len(one) for one in of_runs] if of_runs[0] else None for name, of_runs in named.items()}
