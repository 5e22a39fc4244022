"""Runs a model on images with patches removed: each distinct perturbed image once, in batches, without gradients.

All metrics that remove patches go through `Trial.respond`. Time is that of the forward passes. Memory is that of one
batch of perturbed images, besides one byte for each patch of each perturbation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional

from fga_fast.metrics import checks
from fga_fast.metrics.fills import FillLike, fill_images

Probability = Literal["softmax", "sigmoid"]
Model: TypeAlias = Callable[[Tensor], Any]
# (owner [b] int64, removed [b, P] bool) -> what replaces removed patches, broadcastable to [b, C, gh, ph, gw, pw]
Fill: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Responses(NamedTuple):
    """What the model says of each perturbed image, float64."""

    logit: Tensor  # of the target
    probability: Tensor  # of the target
    largest: Tensor  # probability, of any class


@dataclass(frozen=True)
class Trial:
    """A model, the images that it is asked about, and the maps that are measured; made by `prepare`."""

    model: Model
    images: Tensor  # [B, C, H, W]
    maps: Tensor  # [M, B, P] float64
    single: bool  # whether the caller gave one map an image, [B, P]
    grid: tuple[int, int]
    targets: Tensor  # [B] int64
    clean: Responses  # [B] each
    batch_size: int
    probability: Probability

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.images.shape[2] // self.grid[0], self.images.shape[3] // self.grid[1]

    def shaped(self, values: Tensor) -> Tensor:  # [M, B] -> [B] or [M, B], as the relevance was given
        return values[0] if self.single else values

    def fill(self, fill: FillLike, seed: int) -> Fill:
        """Replaces patches by what does not depend on the other removed ones; `owner` is the image."""
        values = self.tiles(fill_images(fill, self.images, self.patch, seed))
        return lambda owner, _removed: values[owner]

    def tiles(self, values: Tensor) -> Tensor:  # [b, c, H, W] or [b, c, 1, 1] -> [b, c, gh, ph, gw, pw] or ones
        """A view of pixels as patches."""
        if values.shape[2:] == (1, 1):
            return values[..., None, None]
        (rows, columns), (tall, wide) = self.grid, self.patch
        return values.view(*values.shape[:2], rows, tall, columns, wide)

    def respond(
        self,
        removed: Tensor,  # [..., B, P] bool
        fill: Fill,
        owners: int | None = None,
    ) -> Responses:  # [..., B] each
        """The model's answer to every perturbed image.

        Equal perturbations of an image are run once, whichever method asks for them. Where nothing is removed, the
        answer is that to the clean image, which is known.

        Args:
            owners: how many different fills there are. A row of `removed`, flattened to [R, P], has the owner
                `row % owners`, and its image is `row % B`. By default one for each image.

        Raises:
            ValueError: the model's numbers are NaN or Inf.
        """
        batch, (leading, patches) = len(self.images), (removed.shape[:-1], removed.shape[-1])
        rows = removed.reshape(-1, patches)
        owner = torch.arange(len(rows), device=rows.device) % (owners or max(batch, 1))
        key = torch.cat([owner[:, None], _packed(rows)], dim=1)
        distinct, inverse = torch.unique(key, dim=0, return_inverse=True)
        # Any row of each kind stands for it.
        of = inverse.new_zeros(len(distinct)).scatter_(0, inverse, torch.arange(len(rows), device=rows.device))
        found = torch.stack(self.clean)[:, of % max(batch, 1)]  # [3, U]
        for part in torch.split(rows[of].any(1).nonzero()[:, 0], self.batch_size):
            row = of[part]
            perturbed = self._perturbed(row % batch, rows[row], fill(owner[row], rows[row]))
            logits = logits_of(self.model, perturbed)
            found[:, part] = torch.stack(read(logits, self.targets[row % batch], self.probability))
        _check_answers(found, "with patches removed")
        return Responses(*found[:, inverse].view(3, *leading))

    def _perturbed(self, image: Tensor, removed: Tensor, fill: Tensor) -> Tensor:  # [b], [b, P] -> [b, C, H, W]
        rows, columns = self.grid
        mask = removed.view(-1, 1, rows, 1, columns, 1)
        return torch.where(mask, fill, self.tiles(self.images[image])).reshape(-1, *self.images.shape[1:])


def prepare(
    model: Model,
    images: Tensor,  # [B, C, H, W]
    targets: Any,
    relevance: Tensor,  # [B, P] or [M, B, P]
    grid: tuple[int, int] | None,
    batch_size: int,
    probability: Probability = "softmax",
) -> Trial:
    """Checks the arguments that these metrics share, and runs the clean images.

    Raises:
        TypeError, ValueError: an argument is wrong; its name comes first.
    """
    checks.check_model(model)
    checks.check_images(images)
    checks.check_number("batch_size", batch_size, 1)
    checks.check_among("probability", probability, get_args(Probability))
    images = images.detach().contiguous()
    maps = checks.as_maps(relevance, len(images)).to(images.device)
    grid = checks.grid_of(grid, maps.shape[2], (images.shape[2], images.shape[3]))
    if len(images):
        logits = torch.cat([logits_of(model, part) for part in torch.split(images, batch_size)])
    else:
        logits = images.new_zeros(0, 1, dtype=torch.float64)
    picked = checks.targets_of(targets, logits)
    clean = read(logits, picked, probability)
    _check_answers(torch.stack(clean), "without change")
    return Trial(model, images, maps, relevance.dim() == 2, grid, picked, clean, batch_size, probability)


def logits_of(model: Model, images: Tensor) -> Tensor:  # [b, C, H, W] -> [b, classes] float64
    """The model's logits, without gradients."""
    # Not inference mode: what a model keeps of such a pass, as rotary tables are, would be of no use to autograd later.
    with torch.no_grad():
        output = model(images)
    logits = getattr(output, "logits", output)  # Hugging Face models return an object
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(
            f"model: expected logits [B, classes], got {type(logits).__name__}; wrap the model in a function or module "
            "that returns them"
        )
    if logits.dim() != 2 or len(logits) != len(images) or not logits.shape[1]:
        raise ValueError(f"model: expected logits [{len(images)}, classes], got {list(logits.shape)}; wrap the model")
    return logits.detach().double()


def read(logits: Tensor, targets: Tensor, probability: Probability) -> Responses:  # [b, classes] float64, [b]
    """What metrics read of logits."""
    probabilities = logits.softmax(1) if probability == "softmax" else logits.sigmoid()
    at = targets[:, None]
    return Responses(logits.gather(1, at)[:, 0], probabilities.gather(1, at)[:, 0], probabilities.amax(1))


def _packed(rows: Tensor) -> Tensor:  # [R, P] bool -> [R, ceil(P / 64)] int64
    """The bits of each row in words, so that comparing rows costs little."""
    padded = functional.pad(rows, (0, -rows.shape[1] % 64))
    bits = padded.view(len(rows), padded.shape[1] // 64, 64)
    words = torch.zeros(bits.shape[:2], dtype=torch.int64, device=rows.device)
    for bit in range(64):
        words |= bits[..., bit].long() << bit
    return words


def _check_answers(found: Tensor, how: str) -> None:
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"model: gave NaN or Inf for images {how}; check its weights, or run it in a wider dtype: float16 ends at "
            "65504"
        )
