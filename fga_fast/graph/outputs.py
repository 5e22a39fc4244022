"""From a call to a graph and back: target classes, batches of fixed sizes, and results by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fga_fast.question.targets import asks_for_predicted, named, picks_classes
from fga_fast.settings import TargetMode

ALIGNMENT = 64  # bytes; PyTorch's own allocations have it, and compiled code may rely on it


def in_batches(
    run: Callable[[int, tuple[Tensor, ...]], Sequence[Tensor]], sizes: Sequence[int], inputs: tuple[Tensor, ...]
) -> list[Tensor]:
    """Runs any number of images on graphs of fixed batch sizes.

    Args:
        run: (batch size, inputs of that many rows) -> outputs of that many rows.
        sizes: the graphs' batch sizes, in ascending order. Images that do not fit the largest take several runs. Each
            run takes the smallest size that fits and repeats its last image to fill it; zeros might give NaN.
        inputs: tensors [B, ...] with B at least 1.
    """
    count, parts = len(inputs[0]), list[list[Tensor]]()
    for first in range(0, count, sizes[-1]):
        given = tuple(t[first : first + sizes[-1]] for t in inputs)
        rows = len(given[0])
        size = next(size for size in sizes if size >= rows)
        if rows < size:
            given = tuple(torch.cat([t, t[-1:].expand(size - rows, *t.shape[1:])]) for t in given)
        parts.append([t[:rows] for t in run(size, given)])
    return parts[0] if len(parts) == 1 else [torch.cat(found) for found in zip(*parts, strict=True)]


def given_classes(
    what: str,
    target_mode: TargetMode,
    targets: Any,
    images: Tensor,
    classes: int,
    names: Sequence[str] | None,
    *,
    predicts: bool,
    ranged: bool = True,
) -> tuple[Tensor, ...]:
    """The inputs of a graph besides the images: none, or one class for each image, [B] int64, on the images' device.

    -1 stands for the predicted class.

    Args:
        what: "graph" or "package", for messages.
        target_mode: the mode that the graph was made with.
        predicts: the model has classes, so targets may be None.
        ranged: check the range of class numbers in a tensor on a device, although the host has to wait for it. If
            False, the graph gives NaN for numbers out of range, and explains the predicted class for -1.
    """
    if target_mode == "predicted":
        if targets is not None:
            raise ValueError(
                f'targets: this {what} explains the predicted class; make one with target_mode="given" to choose'
            )
        return ()
    if not picks_classes(targets):
        raise TypeError(f"targets: a {what} explains classes, got {type(targets).__name__}; Explainer takes it")
    if not predicts and asks_for_predicted(targets):
        raise ValueError(
            f"targets: None is the predicted class, but this {what} is of a model without a classification head; give "
            "a feature's number"
        )
    host = not isinstance(targets, Tensor) or targets.device.type == "cpu"
    picked = named(targets, len(images), names, classes, ranged=ranged or host)
    if picked.dim() != 1:
        raise ValueError(
            f"targets: expected one class an image, [{len(images)}], got {list(picked.shape)}; a {what} explains one, "
            "Explainer takes several"
        )
    return (picked.to(images.device, non_blocking=True),)


def packed(outputs: Sequence[Tensor]) -> Tensor:
    """All tensors as bytes in one buffer, so that one copy moves them."""
    flat = torch.empty(_places(outputs)[1], dtype=torch.uint8, device=outputs[0].device)
    for place, tensor in zip(unpacked(flat, outputs), outputs, strict=True):
        place.copy_(tensor)
    return flat


def unpacked(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the result of `packed`, with the shapes and dtypes of `like`."""
    return [
        flat[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, first in zip(like, _places(like)[0], strict=True)
    ]


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins in the buffer, and the buffer's size, in bytes. All are multiples of `ALIGNMENT`."""
    ends = list(itertools.accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors))
    return [0, *ends[:-1]], ends[-1]
