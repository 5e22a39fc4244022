"""What `Explainer` does where it is not told: the presets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explaining import Build, sae_for

from fga_fast import Explainer, Gate
from fga_fast.settings import PRESETS, Preset, Settings


def test_the_presets_are_what_the_documentation_says() -> None:
    assert dict(PRESETS) == {
        "faithful": Settings(Gate(base=2.0), "block_x_gradient", "conservative"),
        "published": Settings(Gate("combined", base=10.0, slope=1.0), "rollout", "exact"),
    }
    assert Settings().gate.bound == 10.0


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, PRESETS["faithful"]),
        ({"preset": "published"}, PRESETS["published"]),
        ({"gate": Gate("no_sae", slope=2.0)}, Settings(Gate("no_sae", 2.0, 2.0), "block_x_gradient", "conservative")),
        ({"preset": "published", "gate": Gate("no_sae")}, Settings(Gate("no_sae", 10.0))),
        ({"preset": "published", "gate": Gate(base=3.0), "method": "input_x_gradient", "backward": "conservative"},
         Settings(Gate(base=3.0), "input_x_gradient", "conservative")),
        ({"method": "rollout"}, Settings(Gate(base=2.0), "rollout", "conservative")),
        ({"backward": "exact", "target_chunk": 4}, Settings(Gate(base=2.0), "block_x_gradient", target_chunk=4)),
    ],
)  # fmt: skip
def test_what_is_given_wins(tiny_vit: Build, given: dict[str, Any], want: Settings) -> None:
    assert Explainer(tiny_vit(), **given).settings == want


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("gated", [False, True])
def test_a_preset_is_its_settings(tiny_vit: Build, preset: Preset, gated: bool) -> None:
    model, images = tiny_vit().double(), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    saes, one = {1: sae_for(model)} if gated else {}, PRESETS[preset]
    got = Explainer(model, saes, preset=preset)(images)
    want = Explainer(
        model, saes, gate=one.gate, method=one.method, backward=one.backward, backend="reference"
    )(images)  # fmt: skip
    torch.testing.assert_close(got.relevance, want.relevance, rtol=1e-9, atol=1e-12)
    assert bool((got.relevance < 0).any()) is (preset == "faithful")


def test_an_unknown_preset(tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match="preset: expected one of 'faithful', 'published', got 'best'"):
        Explainer(tiny_vit(), preset="best")  # type: ignore[arg-type]
