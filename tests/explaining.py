"""What the tests of whole explanations share: the size of `tiny_vit`'s images, an SAE that fits, and a comparison."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fga_fast import Explanation, SparseAutoencoder

Build = Callable[..., nn.Module]
PIXELS = (3, 32, 48)


def where_installed(name: str) -> Any:
    """A module of a library that CI does not install. Where it is missing the test is skipped, in CI too; a stand-in
    beside it must have the same traits."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"needs {error.name}")


def sae_for(model: nn.Module, features: int = 40, **settings: Any) -> SparseAutoencoder:
    width = int(model.embed_dim)  # type: ignore[arg-type]
    parameter = next(model.parameters())

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(parameter.dtype)

    return SparseAutoencoder(
        random(width, features), random(features), random(features, width), random(width), **settings
    )


def held(e: Explanation) -> dict[str, Tensor]:
    """All tensors of an explanation but its logits, [B, ...] or [B, K, ...]."""
    found = {"relevance": e.relevance, "signal": e.signal, "ungated": e.ungated, "ungated_signal": e.ungated_signal}
    found |= {"targets": e.targets, "values": e.values, "blocks": e.blocks}
    for layer, scores in e.scores.items():
        found |= {f"scores.{layer}": scores, f"gates.{layer}": e.gates[layer]}
    for layer, top in e.features.items():
        found |= {f"features.{layer}.{name}": value for name, value in top._asdict().items()}
    return {name: value for name, value in found.items() if value is not None}


def agree(got: Explanation, want: Explanation, tolerance: float) -> None:
    """Every tensor's error is at most `tolerance` times its norm; that of a map, times the norm of what varies over its
    patches. Single numbers are compared as well: all of float64, and logits and values of other dtypes. All that is not
    floating point is equal."""
    assert (got.grid, got.image_size, got.names) == (want.grid, want.image_size, want.names)
    assert (got.start_block, got.notices) == (want.start_block, want.notices)
    found, expected = held(got) | {"logits": got.logits}, held(want) | {"logits": want.logits}
    assert found.keys() == expected.keys()
    for name, b in expected.items():
        a = found[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if name.endswith("_index"):  # where nothing contributes, the reference names any feature
            some = expected[name.replace("_index", "_contribution")] != 0
            assert torch.equal(a[some], b[some]), name
        elif not b.is_floating_point():
            assert torch.equal(a, b), name
        else:
            varies = b
            if name == "signal" or (name == "relevance" and want.signal is None):
                varies = b - b.mean(-1, keepdim=True)
            assert float((a - b).norm()) <= tolerance * float(varies.norm()), name
            double = b.dtype == torch.float64
            if double or name in ("logits", "values"):
                rtol, atol = (10 * tolerance, tolerance / 100) if double else (tolerance, tolerance)
                torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
