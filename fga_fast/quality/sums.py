"""What is added up over images, so that memory does not grow with their number and no digit is lost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

_CODES = 2**23  # codes computed at a time, 32 MB in float32


@dataclass(frozen=True)
class Spread:
    """Mean and spread of a stream at each of P positions, over images.

    Sums of squares would cancel where a stream's mean is far from 0, which it is in vision transformers. So groups are
    merged by their means (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979).
    """

    images: int
    mean: Tensor  # [P, C] float64
    squares: Tensor  # [P] float64, squared distances of the tokens at a position to their mean

    @staticmethod
    def of(x: Tensor) -> Spread:  # [B, P, C]
        """Of a batch."""
        exact = x.double()
        mean = exact.mean(0)
        return Spread(len(x), mean, ((exact - mean) ** 2).sum((0, 2)))

    def merged(self, other: Spread) -> Spread:
        """Of the images of both."""
        images, step = self.images + other.images, other.mean - self.mean
        between = (step**2).sum(1) * (self.images * other.images / images)
        return Spread(images, self.mean + step * (other.images / images), self.squares + other.squares + between)

    def total(self) -> Tensor:
        """[P] float64, squared distances of the tokens at a position to the mean of all tokens."""
        return self.squares + self.images * ((self.mean - self.mean.mean(0)) ** 2).sum(1)


@dataclass(frozen=True)
class CodeSums:
    """What an SAE did with tokens."""

    residual: Tensor  # [P] float64, squared error at each position
    fired: Tensor  # [F] int64, tokens that activated a feature
    lengths: Tensor  # [F + 1] int64, tokens with so many active features

    def merged(self, other: CodeSums) -> CodeSums:
        """Of the tokens of both."""
        return CodeSums(
            self.residual + other.residual, self.fired + other.fired, self.lengths + other.lengths
        )  # fmt: skip


def reconstruct(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, CodeSums]:  # [B, P, C]
    """The reconstruction [B, P, C] in the SAE's dtype, and what is to be added up."""
    tokens = x.to(sae.dtype).flatten(0, 1)
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=x.device)
    lengths = torch.zeros(sae.d_sae + 1, dtype=torch.int64, device=x.device)
    parts = []
    for part in torch.split(tokens, max(_CODES // sae.d_sae, 1)):
        codes = sae.encode(part)  # [rows, F]
        active = codes != 0  # signed codes count too
        fired += active.sum(0)
        lengths += torch.bincount(active.sum(1), minlength=len(lengths))
        parts.append(sae.decode(codes, part))
    found = torch.cat(parts).view(x.shape)
    residual = ((tokens.view(x.shape).double() - found.double()) ** 2).sum((0, 2))
    return found, CodeSums(residual, fired, lengths)
