"""docs/troubleshooting.md quotes messages that the code has, in the order in which a reader looks for them."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from explaining import PIXELS, Build, sae_for
from torch import Tensor, nn

from fga_fast import Explainer, ModelLayout

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)
    for title, text in re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}
MESSAGES = [message for messages in SECTIONS.values() for message in messages]
HOLE = "\0"


@lru_cache(maxsize=1)
def templates() -> tuple[str, ...]:
    """Every text in the package's code, with a hole for each part that is filled in."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else HOLE

    found = []
    for file in (ROOT / "fga_fast").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings are no messages
        kinds = (ast.JoinedStr, ast.Constant, ast.BinOp)
        found += [text(node) for node in nodes if isinstance(node, kinds) and id(node) not in prose]
    return tuple(re.sub(r"%(\.\d)?[a-z]", HOLE, each) for each in found)  # the holes of log messages


def in_code(message: str) -> bool:
    """Whether the words between the "..." of a quoted message are in one text of the code, in this order."""
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    return any(re.search(".*".join(parts), template, re.DOTALL) for template in templates())


def pattern(message: str) -> str:
    return ".*".join(re.escape(part.strip()) for part in message.split("..."))


@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_messages_are_in_the_code(message: str) -> None:
    assert in_code(message), "the code says it differently now: quote it again"
    assert len(re.sub(r"\W|\d", "", message)) >= 12, "too short to search for"


def test_what_is_not_in_the_code_is_found_out() -> None:
    assert not in_code("images: expected shape ..., but got ...")
    assert not in_code("got ... images: expected shape ...")


def test_messages_are_in_the_order_of_the_alphabet() -> None:
    assert len(MESSAGES) == len(set(MESSAGES)) >= 30
    for title, messages in SECTIONS.items():
        assert messages == sorted(messages, key=lambda text: re.sub(r"[^a-z ]", "", text.lower()).split()), title


def quoted(beginning: str) -> str:
    found: str
    (found,) = [message for message in MESSAGES if message.startswith(beginning)]
    return found


class Around(nn.Module):
    """A tower and what is done with its output."""

    def __init__(self, tower: nn.Module, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.tower, self.then = tower, then

    def forward(self, images: Tensor) -> Any:
        return self.then(self.tower(images))


def laid_out(model: Any, prefix_tokens: int = 1, grid: tuple[int, int] = (2, 3), **settings: Any) -> ModelLayout:
    return ModelLayout(model.blocks, prefix_tokens, grid, **settings)


IMAGES = torch.randn(2, *PIXELS)
# How a quoted message begins -> settings of the tower, and what a user does with it.
CASES: dict[str, tuple[dict[str, Any], Callable[[nn.Module], Any]]] = {
    "images: expected shape": ({}, lambda model: Explainer(model, preset="published")(IMAGES.movedim(1, -1))),
    "... takes": ({}, lambda model: Explainer(model, preset="published")(torch.randn(2, 3, 48, 48))),
    "... pixels": (
        {"dynamic_img_size": True},
        lambda model: Explainer(model, preset="published")(torch.randn(2, 3, 40, 48)),
    ),
    "images: expected dtype": ({}, lambda model: Explainer(model, preset="published")(IMAGES.double())),
    "layout: ... returned": (
        {},
        lambda model: Explainer(model, layout=laid_out(model, tokens_first=True), preset="published")(IMAGES),
    ),
    "model: attention in ... has": (
        {},
        lambda model: Explainer(model, layout=laid_out(model, 5), preset="published")(IMAGES),
    ),
    "model: the ... failed": (
        {},
        lambda model: Explainer(model, layout=laid_out(model), preset="published")(IMAGES[..., 1:]),
    ),
    "model: expected logits": (
        {},
        lambda model: Explainer(Around(model, lambda y: (y, None)), preset="published")(IMAGES),
    ),
    "model: its logits carry": ({}, lambda model: Explainer(Around(model, Tensor.detach), preset="published")(IMAGES)),
    "saes[...]: is ... for": ({}, lambda model: Explainer(model, {1: sae_for(model).half()}, preset="published")),
    "saes: expected blocks": ({}, lambda model: Explainer(model, {3: sae_for(model)}, preset="published")),
    "targets: expected classes": ({"num_classes": 1}, lambda model: Explainer(model, preset="published")(IMAGES, 1)),
    "targets: None is": ({"num_classes": 0}, lambda model: Explainer(model, preset="published")(IMAGES)),
}


@pytest.mark.parametrize("beginning", CASES)
def test_users_see_the_quoted_message(beginning: str, tiny_vit: Build) -> None:
    settings, act = CASES[beginning]
    with pytest.raises((ValueError, TypeError), match=pattern(quoted(beginning))):
        act(tiny_vit(**settings))


@pytest.mark.parametrize(
    ("beginning", "act"),
    [
        ("images: values", lambda model: Explainer(model, preset="published")(100 * IMAGES)),
        (
            "layout: a grid",
            lambda model: Explainer(model, layout=laid_out(model, 1, (3, 2)), preset="published")(IMAGES),
        ),
        ("a map is zero", lambda model: Explainer(Around(model, lambda y: 0 * y), preset="published")(IMAGES)),
        ("the SAE after", lambda model: Explainer(model, {2: sae_for(model)}, preset="published")),
    ],
)
def test_users_see_the_quoted_warning(
    beginning: str, act: Callable[[nn.Module], Any], tiny_vit: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        act(tiny_vit())
    assert re.search(pattern(quoted(beginning)), caplog.text, re.DOTALL)
