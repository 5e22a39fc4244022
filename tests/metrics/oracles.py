"""The metrics again, as plainly as possible: one image, one perturbation and one patch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Seeded nonlinear model of flattened images, float64."""

    def __init__(self, numbers: int, classes: int = 4, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(numbers)
        first = torch.randn(numbers, 16, generator=generator, dtype=torch.float64) / numbers**0.5
        self.first = nn.Parameter(first.to(dtype))
        self.second = nn.Parameter((2 * torch.randn(16, classes, generator=generator).double()).to(dtype))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        return torch.tanh(images.flatten(1) @ self.first) @ self.second


class Linear(nn.Module):
    """Two classes over patches: logits (sum_p weight_p * mean of patch p, 0)."""

    def __init__(self, weight: Tensor, grid: tuple[int, int]) -> None:  # [P]
        super().__init__()
        self.weight, self.grid = nn.Parameter(weight.double()), grid
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = self.grid
        means = images.reshape(len(images), images.shape[1], rows, -1, columns, images.shape[3] // columns)
        logit = means.mean((1, 3, 5)).flatten(1) @ self.weight
        return torch.stack([logit, torch.zeros_like(logit)], 1)


class Counting(nn.Module):
    """Counts the images that a model is run on, and keeps them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return self.model(images)

    @property
    def images(self) -> Tensor:
        return torch.cat(self.seen)


def box(patch: int, grid: tuple[int, int], size: Sequence[int]) -> tuple[slice, slice, slice]:
    """Pixels of a patch in [C, H, W]."""
    tall, wide = size[-2] // grid[0], size[-1] // grid[1]
    row, column = divmod(patch, grid[1])
    return slice(None), slice(row * tall, (row + 1) * tall), slice(column * wide, (column + 1) * wide)


def without(image: Tensor, patches: Sequence[int], fill: float | Tensor, grid: tuple[int, int]) -> Tensor:
    """A copy of [C, H, W] with patches replaced."""
    changed = image.clone()
    for patch in patches:
        at = box(int(patch), grid, image.shape)
        changed[at] = fill if isinstance(fill, (float, int)) else fill.expand_as(image)[at]
    return changed


def logits(model: nn.Module, image: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(image[None])[0].double().numpy()


def softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max())
    return raised / raised.sum()


def falling(relevance: Tensor) -> np.ndarray:
    return np.argsort(-relevance.double().numpy(), kind="stable")


def saco(model, image, target, relevance, grid, bins, variant) -> float:
    fill = float(image.double().mean())
    clean = softmax(logits(model, image))
    groups = np.array_split(falling(relevance), bins)
    s = [float(relevance[list(group)].sum()) for group in groups]
    v = []
    for group in groups:
        found = softmax(logits(model, without(image, group, fill, grid)))
        v.append(clean[target] - found[target] if variant == "paper" else clean.max() - found.max())
    signed, total = 0.0, 0.0
    for i in range(bins):
        for j in range(i + 1, bins):
            weight = s[i] - s[j] if v[i] >= v[j] else -(s[i] - s[j])
            signed, total = signed + weight, total + abs(weight)
    return signed / total


def faithfulness_correlation(model, image, target, relevance, grid, subsets, variant) -> float:
    from scipy.stats import pearsonr, spearmanr

    fill, clean = float(image.double().mean()), logits(model, image)[target]
    totals = [float(relevance[subset].sum()) for subset in subsets]
    drops = [clean - logits(model, without(image, subset, fill, grid))[target] for subset in subsets]
    return float((pearsonr if variant == "paper" else spearmanr)(totals, drops)[0])


def pixel_flipping(model, image, target, order, grid, variant, step=1) -> float:
    changed, curve, at = image.clone(), [softmax(logits(model, image))[target]], [0]
    clean = float(image.double().mean())
    for start in range(0, len(order), step):
        fill = clean if variant == "paper" else float(changed.double().mean())
        changed = without(changed, order[start : start + step], fill, grid)
        curve.append(softmax(logits(model, changed))[target])
        at.append(min(start + step, len(order)))
    return float(np.trapezoid(curve, at))


def insertion_deletion(model, image, target, order, grid, canvas, fill) -> tuple[float, float]:
    inserted, deleted = [], []
    for count in range(len(order) + 1):
        inserted.append(softmax(logits(model, without(image, order[count:], canvas, grid)))[target])
        deleted.append(softmax(logits(model, without(image, order[:count], fill, grid)))[target])
    return float(np.trapezoid(inserted) / len(order)), float(np.trapezoid(deleted) / len(order))


def imputed(image: Tensor, removed: Tensor) -> Tensor:  # [C, H, W], [H, W] bool
    """Dense equations of the removed pixels."""
    _, height, width = image.shape
    unknown = [tuple(at) for at in removed.nonzero().tolist()]
    number = {at: index for index, at in enumerate(unknown)}
    matrix, right = np.zeros((len(unknown),) * 2), np.zeros((len(unknown), len(image)))
    for (y, x), row in number.items():
        for dy, dx in ((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)):
            if not (0 <= y + dy < height and 0 <= x + dx < width):
                continue
            weight = 1 / 6 if 0 in (dy, dx) else 1 / 12
            matrix[row, row] += weight
            if (y + dy, x + dx) in number:
                matrix[row, number[y + dy, x + dx]] -= weight
            else:
                right[row] += weight * image[:, y + dy, x + dx].double().numpy()
    found, filled = np.linalg.solve(matrix, right), image.double().clone()
    for (y, x), row in number.items():
        filled[:, y, x] = torch.from_numpy(found[row])
    return filled
