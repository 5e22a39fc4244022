"""Explanations of random numbers, and their comparison, for the tests of what explanations can do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fga_fast.result.explanation import Explanation
from fga_fast.sae.features import TopFeatures

NAMES = ("cat", "dog", "a photo of an owl on a branch", "cow", "fox", "hen", "ant")


def example(
    batch: int = 2, targets: int | None = None, layers: tuple[int, ...] = (2, 5), dtype: torch.dtype = torch.float32
) -> Explanation:
    generator = torch.Generator().manual_seed(3)
    leading = (batch,) if targets is None else (batch, targets)
    shape = (*leading, 12)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    def features() -> TopFeatures:
        def index(*size: int) -> Tensor:
            return torch.randint(0, 99, size, generator=generator)

        return TopFeatures(index(*shape, 4), draw(*shape, 4), index(*leading, 4), draw(*leading, 4))

    return Explanation(
        relevance=draw(*shape).abs(),
        logits=draw(batch, 7),
        targets=torch.randint(0, 7, leading, generator=generator),
        grid=(3, 4),
        image_size=(24, 32),
        scores={layer: draw(*shape) for layer in layers},
        gates={layer: 10 ** draw(*shape).tanh() for layer in layers},
        backend="native",
        ungated=draw(*shape).abs() if layers else None,
        features={layer: features() for layer in layers},
    )


def full(batch: int = 2, targets: int | None = 3, signed: bool = False) -> Explanation:
    """An example with every field set."""
    plain = example(batch, targets)
    leading = plain.targets.shape
    blocks = torch.randn(*leading, 4, 12)
    relevance = blocks[..., 0, :] if signed else blocks[..., 0, :].abs()
    return replace(
        plain, relevance=relevance, values=torch.randn(leading), blocks=blocks, names=NAMES, start_block=2,
        backend_reason="compiled", signal=None if signed else relevance / 2,
        ungated_signal=None if signed else relevance / 3, notices=("one", "two"), signed=signed,
    )  # fmt: skip


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of an explanation by its place."""
    if isinstance(value, Tensor):
        return {name: value}
    parts = vars(value) if isinstance(value, Explanation) else value
    parts = parts._asdict() if isinstance(parts, TopFeatures) else parts
    if not isinstance(parts, dict):
        return {}
    return {place: tensor for key, part in parts.items() for place, tensor in tensors(part, f"{name}.{key}").items()}


def plain(explanation: Explanation) -> dict[str, Any]:
    return {name: value for name, value in vars(explanation).items() if not isinstance(value, (Tensor, dict))}


def assert_same(one: Explanation, other: Explanation) -> None:
    left, right = tensors(one), tensors(other)
    assert plain(one) == plain(other) and left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert torch.equal(value, right[name]), name
