"""One pass over a harvest that says of every feature of an SAE when it is active, and where most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fga_fast.harvest.activations import Activations
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

BINS_AN_OCTAVE, _LOWEST, _OCTAVES = 4, -12, 24
BINS = BINS_AN_OCTAVE * _OCTAVES
_CODES = 2**24  # numbers that are encoded at once: 64 MB


@dataclass
class Census:
    """What was counted. A feature is active where its code is not 0; its strength is the code's magnitude.

    Attributes:
        images, tokens: how many were seen.
        active: tokens in which each feature is active, [F] int64.
        lit: images in which it is, in some patch, [F] int64.
        total: sum of its codes, [F] float64.
        code, image, patch: its strongest images, one entry an image, strongest first, [n, F]: the code, the number of
            the image (-1: there are fewer; of equal ones the first), the patch.
        histogram: active tokens by strength, [F, BINS] int64; see `bin_edges`. The outer bins take what is beyond.
        watched: features [S] of which more is counted.
        together: tokens in which a watched feature and another one are active, [S, F] int64.
        classes: images in which a watched feature is active, by predicted class, [S, K] int64; K = 0 without classes.
    """

    images: int
    tokens: int
    active: Tensor
    lit: Tensor
    total: Tensor
    code: Tensor
    image: Tensor
    patch: Tensor
    histogram: Tensor
    watched: Tensor
    together: Tensor
    classes: Tensor

    @property
    def density(self) -> Tensor:  # [F] float64
        """Share of the tokens in which each feature is active."""
        return self.active / max(self.tokens, 1)

    @torch.no_grad()
    def add(self, codes: Tensor, first: int, predicted: Tensor) -> None:
        """Counts images.

        Args:
            codes: [n, P, F], of images `first` and on.
            predicted: [n] int64, their classes, -1 where there is none.
        """
        strength, here = codes.abs(), codes != 0
        in_image = here.any(1)  # [n, F]
        self.images += len(codes)
        self.tokens += codes.shape[0] * codes.shape[1]
        self.active += here.sum((0, 1))
        self.lit += in_image.sum(0)
        self.total += codes.sum((0, 1), dtype=torch.float64)
        found = here.flatten(0, 1).nonzero(as_tuple=True)
        place = ((strength.flatten(0, 1)[found].double().log2() - _LOWEST) * BINS_AN_OCTAVE).floor().clamp(0, BINS - 1)
        where = found[1] * BINS + place.long()
        self.histogram.view(-1).index_add_(0, where, torch.ones_like(where))
        self._rank(codes, strength, first)
        flat = here.flatten(0, 1).float()  # a batch has fewer tokens than float32 can count
        self.together += (flat[:, self.watched].t() @ flat).long()
        if self.classes.shape[1]:
            known = predicted >= 0
            one_hot = torch.nn.functional.one_hot(predicted.clamp_min(0), self.classes.shape[1]) * known.unsqueeze(1)
            self.classes += (in_image[:, self.watched].float().t() @ one_hot.float()).long()

    def _rank(self, codes: Tensor, strength: Tensor, first: int) -> None:  # [n, P, F]
        largest, patch = strength.max(1)  # [n, F]
        code = codes.gather(1, patch.unsqueeze(1)).squeeze(1)
        image = torch.arange(first, first + len(codes), device=codes.device).unsqueeze(1).expand_as(patch)
        image = torch.where(largest > 0, image, -1)
        kept = len(self.code)
        codes, images, patches = (
            torch.cat(pair) for pair in ((self.code, code.to(self.code)), (self.image, image), (self.patch, patch))
        )
        # Stable, so that of equal ones the image that came first stays.
        order = codes.abs().sort(dim=0, descending=True, stable=True).indices[:kept]
        self.code, self.image, self.patch = (one.gather(0, order) for one in (codes, images, patches))


def bin_edges() -> Tensor:  # [BINS + 1] float64
    """Strengths at which the bins of a histogram begin and end; four bins double the strength."""
    return 2.0 ** (torch.arange(BINS + 1, dtype=torch.float64) / BINS_AN_OCTAVE + _LOWEST)


def take_census(
    activations: Activations, block: int, sae: SparseAutoencoder, *, strongest: int = 8,
    watched: Sequence[int] | None = None, progress: bool = True,
) -> Census:  # fmt: skip
    """Encodes a harvest once. Memory does not grow with its images.

    Args:
        activations: the harvest.
        block: one of its blocks.
        sae: of the stream after that block.
        strongest: n, images kept for each feature.
        watched: features whose company and classes are counted too, which takes S x F numbers; None: all.
        progress: show a bar.

    Raises:
        ValueError: an SAE of another width.
    """
    about = activations.about
    if sae.d_model != about.d_model:
        raise ValueError(
            f"saes[{block}]: expected width {about.d_model} as the harvest's streams, got {sae.d_model}; give the SAE "
            "that was trained on this model and block"
        )
    predicted = activations.predicted
    census = _empty(sae, strongest, watched, int(predicted.max()) + 1 if len(predicted) else 0)
    at_once = max(1, _CODES // (about.patches * sae.d_sae))
    with tqdm(total=len(activations), unit="image", desc=f"block {block}", disable=not progress) as bar:
        for start in range(0, len(activations), at_once):
            stop = min(start + at_once, len(activations))
            with torch.no_grad():
                codes = sae.encode(activations.read(block, start, stop).to(sae.device, sae.dtype))  # [n, P, F]
            census.add(codes, start, predicted[start:stop].to(sae.device))
            bar.update(stop - start)
    return census


def _empty(sae: SparseAutoencoder, strongest: int, watched: Sequence[int] | None, classes: int) -> Census:
    if strongest < 1:
        raise ValueError(f"strongest: expected at least 1 image, got {strongest}")
    device, features = sae.device, sae.d_sae
    chosen = torch.arange(features, device=device) if watched is None else torch.tensor([*watched], device=device)

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return Census(
        0, 0, zeros(features), zeros(features), zeros(features, dtype=torch.float64),
        zeros(strongest, features, dtype=sae.dtype), zeros(strongest, features) - 1, zeros(strongest, features),
        zeros(features, BINS), chosen.long(), zeros(len(chosen), features), zeros(len(chosen), classes),
    )  # fmt: skip
