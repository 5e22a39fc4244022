"""What an explanation is, and how to look at it, keep it and read it back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fga_fast.question.names import label
from fga_fast.result.heatmap import paint, to_picture
from fga_fast.sae.features import TopFeatures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fga_fast.io.images import ImageInput


class FeatureContribution(NamedTuple):
    """One SAE feature and what it contributes to the score."""

    feature: int
    contribution: float


@dataclass(eq=False, repr=False)
class Explanation:
    """Relevance of every patch for one or K targets of each image, with all that led to it.

    `len(e)` is B; `e[i]`, `e[i:j]` and iteration give explanations of a batch of one or more images.

    Attributes:
        relevance: [B,P] or [B,K,P] float32 (float64 for float64 models), the pooled token's row of R at the patches.
            At least 0, unless signed relevance or input x gradient was asked for: then evidence against is below 0.
        logits: [B,classes]; similarities to the T prompts of a call, [B,T], or to embeddings.
        targets: [B] or [B,K] int64, the explained classes: columns of `logits`; -1 where a function was explained. Of a
            difference the class that was preferred.
        grid: patches (rows, columns); P = rows * columns, row by row.
        image_size: (height, width) of the model's input in pixels.
        scores, gates: per gated layer, like `relevance`; gates lie in [1/base, base].
        backend: what computed it: "native", "triton", "composite" or "reference", with the reason in brackets where
            "auto" could not take native kernels.
        ungated: like `relevance` but without gates (TransMM), if it was computed.
        features: per gated layer the strongest SAE features, if they were asked for.
        values: like `targets`, the explained numbers: a logit, a difference of two, a cosine, a function's value.
        blocks: [B,L',P] or [B,K,L',P], if asked for: entry i is the relevance of the patches that enter block
            start_layer + i, so entry 0 equals `relevance`.
        names: of the columns of `logits`, where known: class names or prompts.
        start_layer: the first block that was rolled out.

    Raises:
        ValueError: shapes that do not fit together.
    """

    relevance: Tensor  # [B, P] or [B, K, P]
    logits: Tensor  # [B, classes]
    targets: Tensor  # [B] or [B, K]
    grid: tuple[int, int]
    image_size: tuple[int, int]
    scores: dict[int, Tensor] = field(default_factory=dict)  # [B, P] or [B, K, P]
    gates: dict[int, Tensor] = field(default_factory=dict)  # [B, P] or [B, K, P]
    backend: str = "reference"
    backend_reason: str = ""
    ungated: Tensor | None = None  # [B, P] or [B, K, P]
    features: dict[int, TopFeatures] = field(default_factory=dict)
    values: Tensor | None = None  # [B] or [B, K]
    blocks: Tensor | None = None  # [B, L', P] or [B, K, L', P]
    names: tuple[str, ...] | None = None
    start_layer: int = 0

    def __post_init__(self) -> None:
        self.grid = (int(self.grid[0]), int(self.grid[1]))
        self.image_size = (int(self.image_size[0]), int(self.image_size[1]))
        shape = tuple(self.relevance.shape)
        if len(shape) not in (2, 3) or shape[-1] != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"relevance: expected [B,P] or [B,K,P] with P = {self.grid[0]} * {self.grid[1]}, got {shape}"
            )
        if tuple(self.targets.shape) != shape[:-1]:
            raise ValueError(f"targets: expected shape {shape[:-1]} beside {shape}, got {tuple(self.targets.shape)}")
        if self.logits.dim() != 2 or self.logits.shape[0] != shape[0]:
            raise ValueError(f"logits: expected [{shape[0]}, classes], got {tuple(self.logits.shape)}")
        alike = {f"scores[{layer}]": value for layer, value in self.scores.items()}
        alike |= {f"gates[{layer}]": value for layer, value in self.gates.items()}
        alike |= {} if self.ungated is None else {"ungated": self.ungated}
        for name, value in alike.items():
            if tuple(value.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape} like relevance, got {tuple(value.shape)}")
        self._check_extras(shape)
        for layer, top in self.features.items():
            k = top.image_index.shape[-1]
            for name, value in top._asdict().items():
                expected = (*(shape if name.startswith("patch") else shape[:-1]), k)
                if tuple(value.shape) != expected:
                    raise ValueError(f"features[{layer}].{name}: expected {expected}, got {tuple(value.shape)}")

    def _check_extras(self, shape: tuple[int, ...]) -> None:
        if self.values is not None and tuple(self.values.shape) != shape[:-1]:
            raise ValueError(f"values: expected shape {shape[:-1]} like targets, got {tuple(self.values.shape)}")
        if self.blocks is not None:
            found = tuple(self.blocks.shape)
            if len(found) != len(shape) + 1 or (*found[:-2], found[-1]) != shape or found[-2] == 0:
                raise ValueError(f"blocks: expected shape {(*shape[:-1], 'blocks', shape[-1])}, got {found}")
        if self.names is not None:
            self.names = tuple(self.names)
            if len(self.names) != self.logits.shape[1] or not all(isinstance(name, str) for name in self.names):
                raise ValueError(
                    f"names: expected {self.logits.shape[1]} str, one a column of logits, got {self.names!r:.80}"
                )
        if isinstance(self.start_layer, bool) or not isinstance(self.start_layer, int) or self.start_layer < 0:
            raise ValueError(f"start_layer: expected a block number from 0, got {self.start_layer!r}")

    def __repr__(self) -> str:
        batch, patches = self.relevance.shape[0], f"{self.grid[0]}x{self.grid[1]} patches"
        few = self.targets.reshape(-1)[: 8 if self.names is None else 4].tolist()
        targets = [str(target) if self.names is None and target >= 0 else label(target, self.names) for target in few]
        more = ", ..." if self.targets.numel() > len(targets) else ""
        start = f", from block {self.start_layer}" if self.start_layer else ""
        gated = f"gated layers {sorted(self.gates)}" if self.gates else "ungated"
        features = f", top features of layers {sorted(self.features)}" if self.features else ""
        return (
            f"Explanation({batch} image{'' if batch == 1 else 's'} of {self.image_size[0]}x{self.image_size[1]} px, "
            f"{patches}, targets [{', '.join(targets)}{more}], {gated}{features}{start}, "
            f"backend {self.backend!r}, {str(self.relevance.dtype).removeprefix('torch.')} on {self.relevance.device})"
        )

    def __len__(self) -> int:
        return self.relevance.shape[0]

    def __getitem__(self, index: int | slice) -> Explanation:
        """The explanation of image `index`, still with a batch dimension, or of a slice of the images.

        Raises:
            IndexError: there is no such image.
        """
        if not isinstance(index, slice):
            if not -len(self) <= index < len(self):
                raise IndexError(f"image {index} of an explanation of {len(self)} image(s)")
            index = slice(index % len(self), index % len(self) + 1)
        return self._map(lambda tensor: tensor[index])

    def __iter__(self) -> Iterator[Explanation]:
        return (self[index] for index in range(len(self)))

    def to(self, device: torch.device | str) -> Explanation:
        """A copy with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Explanation:
        return replace(
            self,
            relevance=change(self.relevance),
            logits=change(self.logits),
            targets=change(self.targets),
            scores={layer: change(value) for layer, value in self.scores.items()},
            gates={layer: change(value) for layer, value in self.gates.items()},
            ungated=None if self.ungated is None else change(self.ungated),
            features={layer: TopFeatures(*map(change, top)) for layer, top in self.features.items()},
            values=None if self.values is None else change(self.values),
            blocks=None if self.blocks is None else change(self.blocks),
        )

    def heatmap(self, size: int | tuple[int, int] | None = None) -> Tensor:  # -> [B, H, W] or [B, K, H, W]
        """Relevance as a picture: bilinear (`align_corners=False`), then per map `(h - min) / (max - min + 1e-8)`.

        Args:
            size: side or (height, width) in pixels; None is the model's input size.

        Returns:
            [B,H,W], or [B,K,H,W] with K targets an image: float32 in [0,1]; float64 if the relevance is float64.

        Raises:
            ValueError: a size below 1 pixel.
        """
        return to_picture(self.relevance, self.grid, self._size(size))

    def _size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        if size is None:
            return self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"size: expected at least 1 pixel a side, got {size}")
        return height, width

    def overlay(self, image: ImageInput, colormap: str = "turbo", alpha: float = 0.5) -> Tensor:  # -> [B, (K,) H, W, 3]
        """The heat map painted over the picture, at the picture's own resolution.

        Args:
            image: what the model saw (its resized and cropped view, at any resolution), one for each image: PIL
                image(s), [B,3,H,W] or [3,H,W] floats in [0,1], or uint8 arrays with channels first or last.
            colormap: turbo, viridis, magma or gray.
            alpha: weight of the colours in [0,1].

        Returns:
            [B,H,W,3] uint8, or [B,K,H,W,3]; `PIL.Image.fromarray(overlay[0].cpu().numpy())` is a picture.

        Raises:
            TypeError, ValueError: not such an image, another number of them, values outside [0,1], relevance that is
                not finite, no such colour map.
        """
        from fga_fast.io.images import as_rgb

        return paint(self.relevance, self.grid, as_rgb(image, len(self)), colormap, alpha)

    def plot(
        self,
        image: ImageInput,
        *,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        colormap: str = "turbo",
    ) -> Figure:
        """A matplotlib figure, one row per image and target: image, TransMM (if `ungated` is there), gates, result.

        Relevance with evidence against (values below 0) is coloured on a scale with 0 in its middle.

        Args:
            image: as for `overlay`.
            class_names: names for the row labels, by class number; else the explanation's own `names`.
            colormap: as for `overlay`; gates are always blue (below 1: damped) to red (above 1: amplified).

        Returns:
            matplotlib.figure.Figure, not registered with pyplot: `figure.savefig("figure.png")`.

        Raises:
            ImportError: matplotlib is missing.
            TypeError, ValueError: as for `overlay`; or no image, or more than 64 rows.
        """
        from fga_fast.io.images import as_rgb
        from fga_fast.result.figure import draw

        return draw(self, as_rgb(image, len(self)), class_names, colormap)

    def top_features(self, layer: int, k: int | None = None, patch: tuple[int, int] | None = None) -> list[Any]:
        """The strongest features of a layer, largest contribution in magnitude first.

        Args:
            layer: a gated layer.
            k: how many at most; None is all that were recorded.
            patch: (row, column) in the grid for one patch's features; None is those of the whole image.

        Returns:
            A list over images (with K targets: of lists over targets) of lists of (feature, contribution), shorter
            than k where fewer features contribute.

        Raises:
            ValueError: no features recorded for this layer, fewer than k recorded, or a patch outside the grid.
        """
        if layer not in self.features:
            recorded = f"only for layers {sorted(self.features)}" if self.features else "for no layer"
            raise ValueError(
                f"layer: features were recorded {recorded}, got {layer}; "
                f"construct Explainer(..., saes={{{layer}: sae}}, top_features=k)"
            )
        top = self.features[layer]
        recorded_k = top.image_index.shape[-1]
        if k is not None and not 0 < k <= recorded_k:
            raise ValueError(
                f"k: expected 1 to {recorded_k}, got {k}; construct Explainer(..., top_features=k) for more"
            )
        index, contribution = top.image_index, top.image_contribution  # [B, (K,) k]
        if patch is not None:
            (row, column), (rows, columns) = patch, self.grid
            if not (0 <= row < rows and 0 <= column < columns):
                raise ValueError(f"patch: expected a (row, column) inside the {rows}x{columns} grid, got {patch}")
            index = top.patch_index[..., row * columns + column, :]
            contribution = top.patch_contribution[..., row * columns + column, :]
        return _ranked(index.tolist(), contribution.tolist(), k)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one safetensors file, whole or not at all; `load` reads it back.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        from fga_fast.result.file import write

        return write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Reads what `save` wrote, onto the CPU; nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not an explanation, truncated, an oversized header, missing or unknown or misshapen entries.
        """
        from fga_fast.result.file import read

        return read(cls, path)


def _ranked(index: list[Any], contribution: list[Any], k: int | None) -> list[Any]:
    if index and isinstance(index[0], list):
        return [_ranked(i, c, k) for i, c in zip(index, contribution, strict=True)]
    pairs = [FeatureContribution(i, c) for i, c in zip(index, contribution, strict=True) if i >= 0]  # -1: none
    return sorted(pairs, key=lambda pair: -abs(pair.contribution))[:k]
