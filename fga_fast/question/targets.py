"""What can be asked of a model: targets of every kind, and the differentiable numbers that they stand for.

To add a kind of target: give it a type here, beside `Difference` and `Embedding`, and name it in `Targets` and in
`picks_classes`. Write what turns the model's output into its `Answer`, like `likeness`. Call that in `Readout.answer`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from fga_fast.models.follower import followed_by
from fga_fast.question.names import class_number
from fga_fast.sae.features import TopFeatures

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Difference:
    """Why `a` rather than `b`: the value explained is the logit of `a` minus the logit of `b`.

    Args:
        a: what picks classes or prompts, as in `targets`: None (the predicted class), an int, a name, [B] or [B, K].
        b: likewise. If one of the two picks one class an image and the other K, the one is compared with each of the K.
    """

    a: Any
    b: Any


@dataclass(frozen=True, eq=False)
class Embedding:
    """Likeness to a vector: the value explained is the cosine similarity of the model's output [B, E] with it.

    Args:
        vector: [E] for all images, [B, E] one an image, or [B, K, E] (a first dimension of 1 means: for all images);
            a tensor, an array or nested lists. Meant for models that return features: dual encoders and towers
            without a head. A classifier's output is its logits, so there E is the number of classes.
    """

    vector: Any


# What explanations take as targets; see `Readout.answer`.
Targets: TypeAlias = (
    "int | str | Sequence[Any] | Tensor | npt.NDArray[np.integer[Any]] | Difference | Embedding "
    "| Callable[[Tensor], Tensor] | None"
)


def is_function(targets: object) -> TypeGuard[Callable[[Tensor], Tensor]]:
    """Whether the targets are a function of the model's output. A class is not one, although it can be called."""
    return callable(targets) and not isinstance(targets, type)


def picks_classes(targets: object) -> bool:
    """Whether the targets are classes by number, name or prediction, or prompts, and not one of the other kinds."""
    return not (isinstance(targets, (Difference, Embedding)) or is_function(targets))


def asks_for_predicted(targets: object) -> bool:
    """Whether the targets are None, or a list with None in it."""
    return not isinstance(targets, Tensor) and any(leaf is None for leaf in leaves(targets))


class Answer(NamedTuple):
    """What a model says to the question of `targets`."""

    logits: Tensor  # [B, classes] ([B, T] similarity of T prompts; [B, K] cosines), detached
    targets: Tensor  # [B] or [B, K] int64, columns of logits; -1 where there is none
    values: Tensor  # [B] or [B, K], the explained numbers, attached to the graph
    names: tuple[str, ...] | None  # of the columns of logits, where known


class Tensors(NamedTuple):
    """The detached `Answer` and what explains it. Relevance, scores and gates are float64 for float64 models, else
    float32. With K targets an image [B, P] is [B, K, P], and features have a K after their B.
    """

    logits: Tensor  # [B, classes]
    targets: Tensor  # [B] or [B, K] int64
    values: Tensor  # [B] or [B, K]
    names: tuple[str, ...] | None
    relevance: Tensor  # [B, P]
    scores: dict[int, Tensor]  # block -> [B, P]
    gates: dict[int, Tensor]  # block -> [B, P], in [1 / base, base]
    features: dict[int, TopFeatures]  # block -> its strongest features, if asked for
    blocks: Tensor | None  # [B, L', P], relevance of the patches that enter each block, if asked for
    signal: Tensor | None  # [B, P], relevance without the constant that the pooling gave patches; None: there is none
    start_block: int  # first block that was explained
    notices: tuple[str, ...]  # what a reader must know
    ungated: Tensor | None = None  # [B, P], relevance without gates, if asked for
    ungated_signal: Tensor | None = None  # [B, P], the same without the constant


def pick(
    targets: Any,
    logits: Tensor,  # [B, T]
    names: Sequence[str] | None,
    classes: int,
) -> Tensor:
    """Columns [B] or [B, K] int64 of `logits` that `targets` name; None and ints choose among the first `classes`."""
    if targets is None:
        return logits[:, :classes].detach().argmax(-1)
    picked = named(targets, len(logits), names, classes).to(logits.device)
    if not asks_for_predicted(targets):
        return picked
    predicted = logits[:, :classes].detach().argmax(-1)
    return picked.where(picked >= 0, predicted.view(-1, *[1] * (picked.dim() - 1)))


def named(
    targets: Any, batch: int, names: Sequence[str] | None, classes: int, *, ranged: bool = True
) -> Tensor:  # -> [B] or [B, K] int64  # fmt: skip
    """The classes that `targets` name, -1 for the predicted one (None); where `targets` is, or on the CPU.

    ranged: whether to look at the numbers of a tensor. The host waits for that if the tensor is on a GPU.
    """
    if targets is None:
        return torch.full((batch,), -1, device="cpu")
    if not picks_classes(targets):
        raise TypeError(
            f"targets: expected classes, names or prompts in a Difference, got {shown(targets)}; compute other "
            "differences in a function of the logits"
        )
    if hasattr(targets, "__array__") and not isinstance(targets, Tensor):  # NumPy's arrays and numbers
        # Text and objects; what else torch cannot take, it says itself.
        targets = targets.tolist() if targets.dtype.kind in "OUST" else torch.as_tensor(targets, device="cpu")
    if not isinstance(targets, Tensor):
        picked = torch.tensor(_numbered(targets, names, classes), dtype=torch.int64, device="cpu")
    elif targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        like = targets.dim() == 2 and targets.shape[1] == classes
        advice = "for one-hot rows or probabilities give targets.argmax(1)" if like else "convert them"
        raise TypeError(f"targets: expected integer class indices, got dtype {targets.dtype}; {advice}")
    else:
        picked = targets.to(dtype=torch.int64)
        if ranged and picked.numel() and not 0 <= int(picked.min()) <= int(picked.max()) < classes:
            raise _out_of_range(int(picked[(picked < 0) | (picked >= classes)].flatten()[0]), classes)
    if ranged and _looks_like_labels(picked, classes) and not any(isinstance(leaf, str) for leaf in leaves(targets)):
        raise ValueError(
            f"targets: expected class numbers, got rows of 0 and 1, as many as there are classes ({classes}), which "
            "look like one-hot or multi-label rows; give targets.argmax(1), or a function such as "
            "lambda logits: (logits * targets).sum(1)"
        )
    if picked.dim() == 0:
        picked = picked.expand(batch)
    elif picked.dim() == 2 and len(picked) == 1:
        picked = picked.expand(batch, -1)
    if picked.dim() > 2 or len(picked) != batch or 0 in picked.shape[1:]:
        raise ValueError(
            f"targets: expected one class an image, shape [{batch}], got {list(picked.shape)}; K classes an image are "
            f"[{batch}, K], the same K for all images [1, K] or a nested list [[...]]"
        )
    # Cloned, since the caller may change the original or be in inference mode.
    return picked.clone(memory_format=torch.contiguous_format)


def _looks_like_labels(picked: Tensor, classes: int) -> bool:
    """Rows [B, classes] of 0 and 1. Of two classes such a row may name both, so at least three are needed."""
    if picked.dim() != 2 or picked.shape[1] != classes or classes < 3 or not picked.numel():
        return False
    return int(picked.min()) >= 0 and int(picked.max()) <= 1


def values_at(logits: Tensor, picked: Tensor) -> Tensor:  # [B, T], [B] or [B, K] -> like picked
    """The logits at the picked columns."""
    if picked.dim() == 1:
        return logits.gather(1, picked[:, None])[:, 0]
    return logits.gather(1, picked)


def leaves(targets: Any) -> Iterator[Any]:
    """Single targets in reading order, through lists, tuples and arrays."""
    if hasattr(targets, "tolist"):
        targets = targets.tolist()
    if isinstance(targets, Sequence) and not isinstance(targets, (str, bytes)):
        for part in targets:
            yield from leaves(part)
    else:
        yield targets


def _numbered(targets: Any, names: Sequence[str] | None, classes: int, depth: int = 0) -> Any:
    """Ints, names, None and lists of them as ints and lists of ints, checked; -1 for None."""
    if hasattr(targets, "tolist"):
        targets = targets.tolist()
    if isinstance(targets, Sequence) and not isinstance(targets, (str, bytes, bytearray)):
        if depth == 2:
            raise TypeError("targets: expected ints or names, a list of them, or a list of such lists, got deeper ones")
        rows = [_numbered(part, names, classes, depth + 1) for part in targets]
        sizes = {len(row) if isinstance(row, list) else -1 for row in rows}  # -1: a single target
        if len(sizes) > 1 or sizes == {0}:
            told = ", ".join("one without a list" if size < 0 else str(size) for size in sorted(sizes))
            raise TypeError(
                "targets: expected an int or a flat list of ints or names, one an image, or lists with equally many "
                f"for each image, got lists of different lengths or empty ones ({told})"
            )
        return rows
    if targets is None:
        return -1
    if isinstance(targets, str):
        if names is None:
            raise ValueError(
                f"targets: got the class name {targets!r}, but the model's classes have no names; construct "
                "Explainer(..., class_names=[...]) or give the number"
            )
        return class_number(targets, names)
    try:
        if isinstance(targets, bool):
            raise TypeError
        number = operator.index(targets)
    except TypeError:
        expected = "integer class indices, names or prompts"
        if depth == 0:
            expected = "None, an int or integers [B] or [B, K], names or prompts likewise, a Difference, an Embedding"
            expected += " or a function of the logits"
        raise TypeError(f"targets: expected {expected}, got {shown(targets)}") from None
    if not 0 <= number < classes:
        raise _out_of_range(number, classes)
    return number


def _out_of_range(number: int, classes: int) -> ValueError:
    hint = "classes are counted from 0"
    if classes == 1:
        hint = "the model has one output: 0 explains what raises it, the function `lambda y: -y[:, 0]` what lowers it"
    return ValueError(f"targets: expected classes 0 to {classes - 1}, got {number}; {hint}")


def shown(value: object) -> str:
    """A value for an error message: short, with its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def difference(a: Tensor, b: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and values, [B] or [B, K] each, of a `Difference` between the columns `a` and `b` ([B] or [B, K])."""
    if a.dim() != b.dim():  # one class an image against each of K
        a, b = (part[:, None] if part.dim() == 1 else part for part in (a, b))
    if a.shape != b.shape and 1 not in (a.shape[1], b.shape[1]):
        raise ValueError(
            f"targets: expected as many classes in both parts of a Difference, got {a.shape[1]} and {b.shape[1]} an "
            "image; give one class in one of them, or K in both"
        )
    a, b = a.expand_as(a + b), b.expand_as(a + b)
    same = (a == b).reshape(len(a), -1).any(-1).nonzero()[:, 0].tolist() if a.numel() else []
    if same:
        raise ValueError(
            "targets: expected two different classes in a Difference, got the same one twice for image "
            f"{', '.join(map(str, same[:8]))}; that is 0 and explains nothing, so choose another class"
        )
    return a.contiguous(), values_at(logits, a) - values_at(logits, b)


def likeness(target: Embedding, output: Tensor) -> Answer:  # [B, E]
    """The answer to an `Embedding`: cosines."""
    try:
        vector = target.vector if isinstance(target.vector, Tensor) else torch.as_tensor(target.vector, device="cpu")
        vector = vector.detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"targets: expected numbers [E], [B, E] or [B, K, E] in an Embedding, got {shown(target.vector)}: {error}"
        ) from error
    if vector.dtype == torch.bool or vector.is_complex():
        raise TypeError(f"targets: expected real numbers in an Embedding, got dtype {vector.dtype}; convert it")
    batch, width = output.shape
    fits = vector.dim() == 1 or (vector.dim() in (2, 3) and len(vector) in (1, batch))
    if not fits or vector.shape[-1] != width or 0 in vector.shape[1:]:
        raise ValueError(
            f"targets: expected an Embedding of shape [{width}], [{batch}, {width}] or [{batch}, K, {width}] for the "
            f"model's output [{batch}, {width}], got {list(vector.shape)}"
        )
    wide = torch.promote_types(output.dtype, torch.float32)
    vector = vector.to(device=output.device, dtype=wide)
    length = vector.norm(dim=-1, keepdim=True)
    if not bool((torch.isfinite(length) & (length > 0)).all()):
        raise ValueError(
            "targets: expected a finite vector other than 0 in an Embedding, got one that is zero, or holds NaN or "
            "Inf, so it has no direction; leave it out"
        )
    # F.normalize, which the conservative backward pass recognises as a norm.
    unit, direction = F.normalize(output.to(wide), dim=-1), vector / length
    if vector.dim() == 3:
        cosines = (unit[:, None] * direction).sum(-1)  # [B, K]
        columns = torch.arange(vector.shape[1], device=output.device).repeat(batch, 1)
        names = tuple(f"embedding {number}" for number in range(vector.shape[1]))
        return Answer(cosines.detach(), columns, cosines, names)
    cosines = (unit * direction).sum(-1)  # [B]
    columns = torch.zeros(batch, dtype=torch.int64, device=output.device)
    return Answer(cosines.detach()[:, None], columns, cosines, ("embedding",))


def computed(function: Callable[[Tensor], Tensor], output: Tensor, names: tuple[str, ...] | None) -> Answer:
    """The answer to a function of the output [B, classes]: what it returns, checked."""
    # A copy, since the function may work in place. Unseen by what follows the model, which would take the function's
    # own norms and activations for the model's. So it may also call the model, or an explainer.
    copy = output.clone()
    batch, name = len(output), getattr(function, "__name__", type(function).__name__)
    try:
        with followed_by(None):
            values: Any = function(copy)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"targets: {name} raised {type(error).__name__}: {error}; it gets the model's output {list(output.shape)} "
            "and must return one value an image"
        ) from error
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = str(values.dtype) if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"targets: expected {name} to return a floating-point tensor, one value an image, got {got}")
    if values.dim() not in (1, 2) or len(values) != batch or 0 in values.shape[1:]:
        raise ValueError(
            f"targets: expected {name} to return one value an image, shape [{batch}] (or [{batch}, K]), from logits "
            f"{list(output.shape)}, got {list(values.shape)}"
        )
    finite = bool(torch.isfinite(values).all())
    if not finite and bool(torch.isfinite(output).all()):
        raise ValueError(
            f"targets: {name} returned NaN or Inf for finite logits; look for a division by 0 or the log of 0 in it"
        )
    if finite and output.requires_grad:
        _check_gradients(values, output, name)
    columns = torch.full(values.shape, -1, dtype=torch.int64, device=values.device)
    return Answer(output.detach(), columns, values, names)


def _check_gradients(values: Tensor, output: Tensor, name: str) -> None:  # [B] or [B, K], [B, classes]
    """Refuses values without a gradient, and values of images that depend on the logits of others.

    Autograd differentiates the sum over images, so the latter would mix explanations. Two backward passes from the
    values to the logits, one for even and one for odd images, show whether they mix; the model takes no part in them.
    """
    weight = torch.linspace(1, 2, values[:1].numel(), dtype=values.dtype, device=values.device).view_as(values[:1])
    for start in range(min(len(values), 2)):
        seed = torch.zeros_like(values)
        seed[start::2] = weight
        found = None
        if values.requires_grad:
            (found,) = torch.autograd.grad(values, output, seed, retain_graph=True, allow_unused=True)
        if found is None:
            raise ValueError(
                f"targets: expected {name} to return values with a gradient, but what it returns carries no gradient "
                "to the logits; compute it with torch from its argument, without detach(), item(), NumPy, argmax or "
                "torch.no_grad()"
            )
        if bool((found[1 - start :: 2] != 0).any()):
            raise ValueError(
                f"targets: expected {name} to compute each image's value from its own logits, but a value depends on "
                "the logits of other images, which would mix their explanations; compute row by row (softmax(-1), not "
                "softmax(0) or a mean over images)"
            )
