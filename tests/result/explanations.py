"""Explanations of random numbers, and their comparison, for the tests of what explanations can do."""

from __future__ import annotations

import torch
from torch import Tensor

from fga_fast.result.explanation import Explanation
from fga_fast.sae.features import TopFeatures


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


def tensors(explanation: Explanation) -> dict[str, Tensor]:
    found = {"relevance": explanation.relevance, "logits": explanation.logits, "targets": explanation.targets}
    if explanation.ungated is not None:
        found["ungated"] = explanation.ungated
    for name in ("scores", "gates"):
        found |= {f"{name}.{layer}": value for layer, value in getattr(explanation, name).items()}
    for layer, top in explanation.features.items():
        found |= {f"features.{layer}.{name}": value for name, value in top._asdict().items()}
    return found


def assert_same(one: Explanation, other: Explanation) -> None:
    assert (one.grid, one.image_size, one.backend) == (other.grid, other.image_size, other.backend)
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert torch.equal(value, right[name]), name
