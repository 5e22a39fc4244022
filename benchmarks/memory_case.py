"""Peak memory of one explanation in its own process: `python memory_case.py WAY SIDE FEATURES` prints bytes.

WAY: forward_backward, TransMM, FGA, "reference TransMM" or "reference FGA". SIDE: the image's side in pixels.
"""

from __future__ import annotations

import sys

import subjects
import torch
from peak import peak_bytes
from torch import Tensor, nn

from fga_fast import Explainer, SparseAutoencoder

DEPTH = 2
BLOCK = 0  # the block with the SAE; after the last block no patch has a gradient


def forward_backward(model: nn.Module, images: Tensor) -> None:
    """Gradient of the winning logit with respect to the image, no gradients of weights."""
    images = images.clone().requires_grad_()
    torch.autograd.grad(model(images).amax(dim=1).sum(), images)


def explain(way: str, side: int, saes: dict[int, SparseAutoencoder]) -> int | None:
    model, images = subjects.vit(side, DEPTH), subjects.images(1, side)
    if way == "forward_backward":
        return peak_bytes(lambda: forward_backward(model, images))
    explainer = Explainer(
        model, saes, backend="reference" if way.startswith("reference") else "native", preset="published"
    )
    return peak_bytes(lambda: explainer(images))


def main() -> None:
    way, side, features = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    saes: dict[int, SparseAutoencoder] = {}
    if way.endswith("FGA"):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(features, subjects.WIDTH, generator=generator).div_(27.7) for _ in range(2)]
        bias, zeros = torch.full((features,), -1.8), torch.zeros(subjects.WIDTH)  # about 1,700 of 49,152 fire
        saes = {BLOCK: SparseAutoencoder(weights[0].t(), bias, weights[1], zeros)}
    explain(way, 64, saes)  # do not count what is allocated once, on first use
    print(explain(way, side, saes))


if __name__ == "__main__":
    main()
