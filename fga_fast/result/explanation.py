"""What an explanation is, and how to look at it, keep it and read it back."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fga_fast.question.names import label
from fga_fast.result.features import ranked, strongest
from fga_fast.result.figure import draw
from fga_fast.result.file import read, write
from fga_fast.result.heatmap import paint, to_picture
from fga_fast.sae.features import TopFeatures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fga_fast.io.images import ImageInput
    from fga_fast.sae.notes import Note


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Relevance of every patch for one or K targets of each image, with all that led to it.

    `len(e)` is B; `e[i]`, `e[i:j]` and iteration give explanations of a batch of one or more images. An explanation
    does not change; `dataclasses.replace(e, ungated=...)` makes another one.

    The K axis is there exactly if the call asked for K targets an image ([B,K] numbers, nested lists and so on), even
    if K is 1: then shapes are [B,K,...], otherwise [B,...]. `single()` takes away an axis of K = 1.

    Attributes:
        relevance: [B,(K,)P] float32 (float64 for float64 models), of each patch. At least 0, except where `signed`:
            there, evidence against the target is below 0.
        logits: [B,classes]; similarities to the T prompts of a call, [B,T], or to embeddings.
        targets: [B,(K)] int64, the explained classes: columns of `logits`; -1 where a function was explained. For a
            difference, the class that was preferred.
        grid: patches (rows, columns); P = rows * columns, row by row.
        image_size: (height, width) of the model's input in pixels.
        scores, gates: per gated block, like `relevance`; gates lie in [1/base, base].
        backend: what computed it: "native", "triton", "composite" or "reference".
        backend_reason: why "auto" could not take native kernels, or how they ran ("compiled", "package"); else empty.
        signal: like `relevance`, without the constant that it holds where the model pools patches (1 / n at each of n
            averaged patches); None where there is none. Heat maps show it, since float32 rounds small relevance away
            beside the constant.
        ungated, ungated_signal: like `relevance` and `signal` but without gates, if they were computed.
        features: per gated block the strongest SAE features, if they were asked for.
        values: like `targets`, the explained numbers: a logit, a difference of two, a cosine, a function's value.
        blocks: [B,(K,)L',P], if asked for: entry i is the relevance of the patches that enter block start_block + i,
            so entry 0 equals `relevance`.
        names: of the columns of `logits`, where known: class names or prompts.
        start_block: the first block that was explained: the one asked for, or the first after it with a gradient.
        signed: whether relevance may be below 0.
        notices: what one must know to read this explanation; also logged, once for each explainer.

    Raises:
        ValueError: shapes that do not fit together.
    """

    relevance: Tensor  # [B, (K,) P]
    logits: Tensor  # [B, classes]
    targets: Tensor  # [B, (K)]
    grid: tuple[int, int]
    image_size: tuple[int, int]
    scores: dict[int, Tensor] = field(default_factory=dict)  # [B, (K,) P]
    gates: dict[int, Tensor] = field(default_factory=dict)  # [B, (K,) P]
    backend: str = "reference"
    backend_reason: str = ""
    ungated: Tensor | None = None  # [B, (K,) P]
    features: dict[int, TopFeatures] = field(default_factory=dict)
    values: Tensor | None = None  # [B, (K)]
    blocks: Tensor | None = None  # [B, (K,) L', P]
    names: tuple[str, ...] | None = None
    start_block: int = 0
    signal: Tensor | None = None  # [B, (K,) P]
    ungated_signal: Tensor | None = None  # [B, (K,) P]
    notices: tuple[str, ...] = ()
    signed: bool = False

    def __post_init__(self) -> None:
        for name in ("grid", "image_size"):
            pair = tuple(getattr(self, name))
            if len(pair) != 2 or not all(isinstance(n, numbers.Integral) and int(n) >= 1 for n in pair):
                raise ValueError(f"{name}: expected two whole numbers of at least 1, got {pair}")
            object.__setattr__(self, name, (int(pair[0]), int(pair[1])))
        shape = tuple(self.relevance.shape)
        if len(shape) not in (2, 3) or shape[-1] != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"relevance: expected [B,P] or [B,K,P] with P = {self.grid[0]} * {self.grid[1]}, got {shape}"
            )
        if not self.relevance.is_floating_point() or self.targets.dtype != torch.int64:
            raise ValueError(
                f"relevance, targets: expected floats and int64, got {self.relevance.dtype} and {self.targets.dtype}"
            )
        if self.logits.dim() != 2 or self.logits.shape[0] != shape[0]:
            raise ValueError(f"logits: expected [{shape[0]}, classes], got {tuple(self.logits.shape)}")
        for name, tensor, expected in self._expected(shape):
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ValueError(
                    f"{name}: expected shape {expected} beside relevance {shape}, got {tuple(tensor.shape)}"
                )
        if self.names is not None:
            object.__setattr__(self, "names", tuple(self.names))
            if len(self.names) != self.logits.shape[1] or not all(isinstance(name, str) for name in self.names):
                raise ValueError(
                    f"names: expected {self.logits.shape[1]} str, one a column of logits, got {self.names!r:.80}"
                )
        object.__setattr__(self, "notices", tuple(self.notices))
        if not all(isinstance(notice, str) for notice in self.notices):
            raise ValueError(f"notices: expected str, got {self.notices!r:.80}")
        if isinstance(self.start_block, bool) or not isinstance(self.start_block, int) or self.start_block < 0:
            raise ValueError(f"start_block: expected a block number from 0, got {self.start_block!r}")

    def _expected(self, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor | None, tuple[int, ...]]]:
        """Name, tensor and its right shape, beside relevance of shape (B, (K,) P)."""
        leading = shape[:-1]
        yield from (("targets", self.targets, leading), ("values", self.values, leading))
        for name in ("ungated", "signal", "ungated_signal"):
            yield name, getattr(self, name), shape
        for kind, maps in (("scores", self.scores), ("gates", self.gates)):
            yield from ((f"{kind}[{block}]", tensor, shape) for block, tensor in maps.items())
        if self.blocks is not None:
            yield "blocks", self.blocks, (*leading, *(max(n, 1) for n in self.blocks.shape[-2:-1]), shape[-1])
        for block, top in self.features.items():
            for name, tensor in top._asdict().items():
                before = shape if name.startswith("patch") else leading
                yield f"features[{block}].{name}", tensor, (*before, *top.image_index.shape[-1:])

    def __repr__(self) -> str:
        batch, patches = self.relevance.shape[0], f"{self.grid[0]}x{self.grid[1]} patches"
        few = self.targets.reshape(-1)[: 8 if self.names is None else 4].tolist()
        targets = [str(target) if self.names is None and target >= 0 else label(target, self.names) for target in few]
        more = ", ..." if self.targets.numel() > len(targets) else ""
        start = f", from block {self.start_block}" if self.start_block else ""
        gated = f"gated blocks {sorted(self.gates)}" if self.gates else "ungated"
        features = f", top features of blocks {sorted(self.features)}" if self.features else ""
        reason = f" ({self.backend_reason})" if self.backend_reason else ""
        said = f"; notices: {'; '.join(self.notices)}" if self.notices else ""
        return (
            f"Explanation({batch} image{'' if batch == 1 else 's'} of {self.image_size[0]}x{self.image_size[1]} px, "
            f"{patches}, targets [{', '.join(targets)}{more}], {gated}{features}{start}, backend {self.backend!r}"
            f"{reason}, {str(self.relevance.dtype).removeprefix('torch.')} on {self.relevance.device}{said})"
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

    def single(self) -> Explanation:
        """This explanation without the K axis, for code that takes one target an image: relevance is [B,P].

        Raises:
            ValueError: several targets an image.
        """
        if self.targets.dim() == 1:
            return self
        if self.targets.shape[1] != 1:
            raise ValueError(
                f"targets: expected one an image here, got {list(self.targets.shape)}; explain one at a time, or use "
                "fga_fast.Explainer, whose relevance is [B,K,P]"
            )
        return self._map(lambda tensor: tensor[:, 0], but="logits")

    def _map(self, change: Callable[[Tensor], Tensor], but: str = "") -> Explanation:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, TopFeatures):
                return TopFeatures(*map(change, value))
            return {key: changed(entry) for key, entry in value.items()} if isinstance(value, dict) else value

        return replace(self, **{name: changed(value) for name, value in vars(self).items() if name != but})

    def heatmap(self, size: int | tuple[int, int] | None = None) -> Tensor:  # -> [B, H, W] or [B, K, H, W]
        """Relevance as a picture: bilinear (`align_corners=False`), then per map `(h - min) / (max - min)`.

        What speaks against the target (below 0) counts as 0; `overlay` and `plot` show it. The scale is each map's own,
        however small its values are. A map that is the same everywhere is 0 everywhere.

        Args:
            size: side or (height, width) in pixels; None is the model's input size.

        Returns:
            [B,H,W], or [B,K,H,W] with K targets an image: float32 in [0,1]; float64 if the relevance is float64.

        Raises:
            ValueError: a size below 1 pixel.
        """
        height, width = self.image_size if size is None else (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"size: expected at least 1 pixel a side, got {size}")
        return to_picture(self.shown.clamp(min=0), self.grid, (height, width))

    @property
    def shown(self) -> Tensor:  # [B, (K,) P]
        """What pictures show: `signal` where there is one, else `relevance`."""
        return self.relevance if self.signal is None else self.signal

    def overlay(  # -> [B, (K,) H, W, 3]
        self, image: ImageInput, colormap: str | None = None, alpha: float = 0.5
    ) -> Tensor:
        """The heat map painted over the picture, at the picture's own resolution.

        Signed relevance is coloured on a scale with 0 in its middle.

        Args:
            image: what the model saw (its resized and cropped view, at any resolution), one for each image: PIL
                image(s), [B,3,H,W] or [3,H,W] floats in [0,1], or uint8 arrays with channels first or last.
            colormap: turbo, viridis, magma, gray or diverging, which lets the picture through where relevance is 0.
                None: diverging for signed relevance, else turbo.
            alpha: weight of the colours in [0,1].

        Returns:
            [B,H,W,3] uint8, or [B,K,H,W,3]; `PIL.Image.fromarray(overlay[0].cpu().numpy())` is a picture.

        Raises:
            TypeError, ValueError: not such an image, another number of them, values outside [0,1], relevance that is
                not finite, no such colour map.
        """
        pictures = self._pictures(image)
        painted = paint(self.shown.flatten(0, -2), self.grid, pictures, self._colours(colormap), alpha, self.signed)
        return painted.reshape(*self.targets.shape, *pictures.shape[1:])

    def _colours(self, colormap: str | None) -> str:
        return colormap or ("diverging" if self.signed else "turbo")

    def _pictures(self, image: ImageInput) -> Tensor:  # -> [M, H, W, 3], one for each image and target
        from fga_fast.io.images import as_rgb  # needs PIL

        return as_rgb(image, len(self)).repeat_interleave(self.targets.shape[1:].numel(), 0)

    def plot(
        self,
        image: ImageInput,
        *,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        colormap: str | None = None,
        notes: Mapping[tuple[int, int], Note] | None = None,
    ) -> Figure:
        """A matplotlib figure, one row per image and target: image, `ungated` if it is there, gates, result.

        Signed relevance is coloured on a scale with 0 in its middle.

        Args:
            image: as for `overlay`.
            class_names: names for the row labels, by class number; else the explanation's own `names`.
            colormap: as for `overlay`; gates are always blue (below 1: damped) to red (above 1: amplified).
            notes: names of features, by block and feature, as `sae.notes.read_notes` gives them. Gates then say what
                the strongest feature that was recorded there is called, or its number where it has no name.

        Returns:
            matplotlib.figure.Figure, not registered with pyplot: `figure.savefig("figure.png")`.

        Raises:
            ImportError: matplotlib is missing.
            TypeError, ValueError: as for `overlay`; or no image, or more than 64 rows.
        """

        def rows(values: Tensor) -> Tensor:  # [B, (K,) P] -> [M, P]
            return values.flatten(0, -2).cpu()

        ungated = self.ungated if self.ungated_signal is None else self.ungated_signal
        return draw(
            self._pictures(image).cpu(), rows(self.shown), None if ungated is None else rows(ungated),
            {block: rows(gate) for block, gate in self.gates.items()}, self.grid,
            [label(target, class_names, self.names) for target in self.targets.flatten().tolist()],
            self._colours(colormap), self.signed, strongest(self.features, notes) if notes else {},
        )  # fmt: skip

    def top_features(self, block: int, k: int | None = None, patch: tuple[int, int] | None = None) -> list[Any]:
        """The strongest features of a block, largest contribution in magnitude first.

        Args:
            block: a gated block.
            k: how many at most; None is all that were recorded.
            patch: (row, column) in the grid for one patch's features; None is those of the whole image.

        Returns:
            A list over images (with K targets: of lists over targets) of lists of (feature, contribution), shorter
            than k where fewer features contribute.

        Raises:
            ValueError: no features recorded for this block, fewer than k recorded, or a patch outside the grid.
        """
        return ranked(self.features, self.grid, block, k, patch)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one safetensors file, whole or not at all; `load` reads it back.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        return write(path, vars(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Reads what `save` wrote, onto the CPU; nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not an explanation, of another version, truncated, an oversized header, missing or unknown or
                misshapen entries.
        """
        return read(path, cls)
