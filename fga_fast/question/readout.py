"""How a model's output answers a question: a model, targets, and one differentiable number for each target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fga_fast.models.find import has_no_head
from fga_fast.models.layout import ModelLayout
from fga_fast.question import targets as kinds
from fga_fast.question.dual import DualEncoder, library_of
from fga_fast.question.targets import Answer, Difference, Embedding, Targets, Tensors

__all__ = ["Answer", "Difference", "Embedding", "Readout", "Targets", "Tensors"]


class Readout:
    """Runs a model and reads the numbers to be explained from its output.

    Args:
        model: module from images [B, channels, H, W] to logits [B, classes] (a tensor, or an output or dict that has
            them as `logits`), a tower without a head (features [B, E]), or a dual encoder (see `DualEncoder`).
        class_names: one a class, or a mapping that names some of them; None takes a transformers model's own
            `config.id2label` where it says more than LABEL_0. For a dual encoder: the prompts that None (the likeliest)
            and ints choose among.
        tokenizer: of a dual encoder, for prompts.
        layout: of the model, to tell features from logits; None: not known.

    Raises:
        TypeError, ValueError: class names that are not str or are empty, a tokenizer without a dual encoder.
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        tokenizer: Callable[..., Any] | None = None,
        layout: ModelLayout | None = None,
    ) -> None:
        self.model, self.layout = model, layout
        self.dual = DualEncoder(model, tokenizer) if library_of(model) else None
        if tokenizer is not None and self.dual is None:
            raise ValueError(
                "tokenizer: expected a dual encoder beside it (open_clip's CLIP, transformers' CLIPModel or "
                f"SiglipModel), got {type(model).__name__}, which takes no prompts; name its classes by class_names"
            )
        self._names = _checked_names(class_names)
        if self.dual is not None and self._names is not None:
            if isinstance(self._names, dict):
                raise TypeError("class_names: expected a list of prompts for a dual encoder, got a mapping")
            if len(set(self._names)) < len(self._names):
                raise ValueError("class_names: expected different prompts for a dual encoder, got one of them twice")
        self._own = _own_names(model)
        self._headless = False

    def run(self, images: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, classes] or [B, E]
        """The model's output: logits, or image features of a tower without a head or of a dual encoder.

        A dual encoder's features have length 1.

        Raises:
            ValueError: an output of another kind or shape; the message says what to do.
        """
        if self.dual is not None:
            return _checked_output(self.dual.image_features(images), len(images))
        found, headless = _logits_of(self.model(images))
        logits = _checked_output(found, len(images))
        # num_classes is timm's: 0 for a model without a head.
        self._headless = headless or getattr(self.model, "num_classes", None) == 0
        if not self._headless and self.layout is not None:
            self._headless = has_no_head(self.model, self.layout, logits.shape[1])
        return logits

    def logits(self, output: Tensor) -> Tensor:  # [B, classes] or [B, E] -> [B, classes]
        """What classes are predicted from: the model's logits, or a dual encoder's for its class names."""
        return output if self.dual is None else self._columns((None,), output)[0]

    def predicted(self, output: Tensor) -> Tensor | None:  # [B, classes] or [B, E] -> [B]
        """The likeliest class [B] int64 of each image, from `run`'s last output; None for a model without classes."""
        return self.logits(output).argmax(1) if self.predicts else None

    @property
    def predicts(self) -> bool:
        """Whether the model has classes, of which it predicts one; known after `run`."""
        return not self._headless and (self.dual is None or self._names is not None)

    def answer(self, targets: Targets, output: Tensor) -> Answer:  # [B, classes] or [B, E]
        """The numbers that `targets` ask for, from the model's output.

        A value depends on its own image only. Autograd differentiates the sum over images, so a function that mixes
        the logits of several images is refused.

        Args:
            targets: None: the predicted class. An int or str: this class, name or prompt for all images. A flat
                sequence [B] of them: one an image. Nested [B][K], or integers [B, K]: K an image; with a single row:
                the same K for all. `Difference`, `Embedding`, or a function from the output to values [B] or [B, K].
                A class's name may be a comma-separated synonym or in other letter case, see `names.class_number`.
            output: what `run` returned.

        Raises:
            TypeError, ValueError: naming `targets`: what was expected, what came and what to do.
        """
        if isinstance(targets, Embedding):
            return kinds.likeness(targets, output)
        if kinds.is_function(targets):
            return kinds.computed(targets, output, None if self.dual else self.names(output.shape[1]))
        parts = (targets.a, targets.b) if isinstance(targets, Difference) else (targets,)
        if self._headless and any(map(kinds.asks_for_predicted, parts)):
            raise ValueError(
                "targets: None is the predicted class, but the model has no classification head; give an Embedding, "
                "a function of the features, or a feature's number"
            )
        logits, names, classes = self._columns(parts, output)
        picked = [kinds.pick(part, logits, names, classes) for part in parts]
        if isinstance(targets, Difference):
            return Answer(logits.detach(), *kinds.difference(picked[0], picked[1], logits), names)
        return Answer(logits.detach(), picked[0], kinds.values_at(logits, picked[0]), names)

    def names(self, classes: int) -> tuple[str, ...] | None:
        """Names of all classes, or None where they have none."""
        given = self._names
        if given is None:
            return self._own if self._own is not None and len(self._own) == classes else None
        if isinstance(given, dict):
            outside = [number for number in given if number >= classes]
            if outside:
                raise ValueError(f"class_names: the model has classes 0 to {classes - 1}, got a name for {outside[0]}")
            return tuple(given.get(number, f"class {number}") for number in range(classes))
        if len(given) != classes:
            raise ValueError(
                f"class_names: expected {classes} names, one for each class of the model, got {len(given)}; give a "
                "dict from class number to name to name some of them"
            )
        return given

    def _columns(self, parts: tuple[Any, ...], output: Tensor) -> tuple[Tensor, tuple[str, ...] | None, int]:
        """Logits [B, T], the names of the T columns, and how many of the columns None and ints choose among."""
        if self.dual is None:
            return output, self.names(output.shape[1]), output.shape[1]
        own = self._names if isinstance(self._names, tuple) else ()
        asked = [leaf for part in parts for leaf in kinds.leaves(part)]
        if not own and not all(isinstance(leaf, str) for leaf in asked):
            raise TypeError(
                f"targets: expected prompts (str) for the dual encoder {type(self.model).__name__}, which has no "
                f"classes to number or predict, got {kinds.shown(parts[0] if len(parts) == 1 else parts)}; give e.g. "
                'targets="a photo of a cat", or prompts to choose among: Explainer(..., class_names=[...])'
            )
        prompts: tuple[str, ...] = tuple(dict.fromkeys([*own, *(leaf for leaf in asked if isinstance(leaf, str))]))
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("targets: expected prompts, got an empty one; name what to look for")
        if not prompts:  # no targets for no images
            return output.new_zeros(len(output), 0), (), 0
        return self.dual.logits(output, prompts), prompts, len(own)


def _logits_of(output: Any) -> tuple[Any, bool]:
    """The tensor in a model's output, and whether it certainly holds features instead of logits."""
    if isinstance(output, Tensor):
        return output, False
    # transformers' towers return `pooler_output`, or `image_embeds` if they project it.
    for name in ("logits", "image_embeds", "pooler_output"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found, name != "logits"
    return output, False


def _checked_output(output: Any, batch: int) -> Tensor:
    if isinstance(output, Tensor) and output.dim() == 2 and len(output) == batch and output.is_floating_point():
        if output.shape[1]:
            return output
        raise ValueError(f"model: expected logits [{batch}, classes], got {list(output.shape)}; give it a head")
    raise ValueError(
        f"model: expected logits [B, classes] from images, with B = {batch}, got {_kind(output)}; "
        f"{_advice(output, batch)}"
    )


def _kind(output: Any) -> str:
    """A model's output for an error message: the shapes of tensors, the entries of others."""
    if isinstance(output, Tensor):
        return f"{list(output.shape)} {output.dtype}"
    name = type(output).__name__
    if isinstance(output, (tuple, list)):
        entries = [_entry(part) for part in output]
    else:
        parts = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
        entries = [f"{key} {_entry(part)}" for key, part in parts.items()]
    return f"{name} of {', '.join(entries[:8])}" if entries else name


def _entry(part: Any) -> str:
    return str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__


def _advice(output: Any, batch: int) -> str:
    """What to do about an output that is no logits. docs/your_model.md has such wrappers."""
    if not isinstance(output, Tensor):
        return "wrap it in a module that returns the entry with the logits"
    if output.dim() == 4 and len(output) == batch:
        return (
            "if these are logits of pixels, wrap it in a module that picks one or averages a region: "
            "model(images)[:, :, row, column] or model(images)[:, :, rows, columns].mean((2, 3))"
        )
    if output.dim() == 3 and len(output) == batch:
        return "if these are tokens, wrap it in a module that picks or averages some"
    if output.dim() == 1 and len(output) == batch and output.is_floating_point():
        return "wrap it in a module that returns model(images)[:, None]"
    return "wrap it in a module that does"


def _checked_names(names: Any) -> tuple[str, ...] | dict[int, str] | None:
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, (Sequence, Mapping)):
        raise TypeError(
            f"class_names: expected a sequence of str or a mapping from int to str, got {kinds.shown(names)}"
        )
    pairs = list(names.items()) if isinstance(names, Mapping) else list(enumerate(names))
    for number, name in pairs:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise TypeError(f"class_names: expected class numbers (int from 0) as keys, got {kinds.shown(number)}")
        if not isinstance(name, str) or not name.strip():
            raise TypeError(f"class_names: expected a name (str) for class {number}, got {kinds.shown(name)}")
    if not pairs:
        raise ValueError("class_names: got none; leave the argument out where there are no names")
    return dict(pairs) if isinstance(names, Mapping) else tuple(name for _, name in pairs)


def _own_names(model: nn.Module) -> tuple[str, ...] | None:
    """The class names in a transformers model's configuration, unless they are mere numbers."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(labels, Mapping) or not labels:
        return None
    found = tuple(str(labels.get(number, labels.get(str(number), ""))) for number in range(len(labels)))
    known = all(found) and any(name != f"LABEL_{number}" for number, name in enumerate(found))
    return found if known else None
