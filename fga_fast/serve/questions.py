"""What can be asked of one picture, and the targets that explain a batch of such questions in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fga_fast.question.targets import Difference


class Question(NamedTuple):
    """What to explain of one picture; made by `Engine.question`."""

    targets: tuple[int, ...] = ()  # none: the predicted class
    rather_than: int | None = None
    prompts: tuple[str, ...] = ()
    top_features: int = 0


class Picks:
    """A function target: the value of each image's own classes, where none is given of the predicted one.

    One call so explains predicted, given and compared classes together. Its questions have equally many targets.
    """

    def __init__(self, questions: Sequence[Question], device: torch.device) -> None:
        asked = [question.targets or (-1,) for question in questions]
        against = [-1 if question.rather_than is None else question.rather_than for question in questions]
        self._asked = torch.tensor(asked, device=device)  # [B, K]
        self._against = torch.tensor(against, device=device)[:, None]  # [B, 1]
        self.picked = self._asked  # [B, K], known after the call

    def __call__(self, logits: Tensor) -> Tensor:  # [B, classes] -> [B], or [B, K]
        predicted = logits.detach().argmax(-1, keepdim=True)
        self.picked = torch.where(self._asked < 0, predicted, self._asked)
        values = logits.gather(1, self.picked)
        other = logits.gather(1, self._against.clamp(min=0))
        values = torch.where(self._against < 0, values, values - other)
        return values[:, 0] if values.shape[1] == 1 else values


def one_each(questions: Sequence[Question]) -> list[int | None] | None:
    """The class of each question, None where it asks for the predicted one; None if all do."""
    asked = [question.targets[0] if question.targets else None for question in questions]
    return asked if any(target is not None for target in asked) else None


def plain_targets(questions: Sequence[Question]) -> Any:
    """Targets of questions of one kind, as an explainer takes them."""
    first = questions[0]
    if not first.targets:
        return None
    if len(first.targets) > 1:
        return [list(question.targets) for question in questions]
    one = [question.targets[0] for question in questions]
    return one if first.rather_than is None else Difference(one, [question.rather_than for question in questions])
