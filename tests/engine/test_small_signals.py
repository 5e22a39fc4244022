"""Values of any size are explained alike, and what rounding has taken away is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explaining import sae_for
from headed import BACKENDS, HEADS, TARGET, Headed, images
from own_vit import WIDTH
from torch import Tensor, nn

from fga_fast import Explainer, Explanation


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("scale", (1e-6, 1e-12, 1e-20))
def test_small_values_keep_their_digits_in_float32(name: str, scale: float) -> None:
    read, vectors, _ = HEADS[name]
    model, x = Headed(read, vectors * WIDTH), images()
    saes = {0: sae_for(model)}

    def explain(dtype: torch.dtype, backend: Any) -> Explanation:
        low = {block: sae.to(dtype) for block, sae in saes.items()}
        explainer = Explainer(model.to(dtype), low, layout=model.layout(), backend=backend, preset="published")
        return explainer(x.to(dtype), lambda y: scale * y[:, TARGET])

    want = explain(torch.float64, "reference")
    for backend in BACKENDS:
        e = explain(torch.float32, backend)
        error = e.shown.double() / scale - want.shown / scale
        varies = want.shown / scale - want.shown.mean(-1, keepdim=True) / scale
        assert float(error.norm()) <= 1e-3 * float(varies.norm())
        assert e.heatmap().amax((1, 2)).tolist() == [1.0, 1.0]
        torch.testing.assert_close(e.gates[0], want.gates[0].float(), rtol=1e-3, atol=1e-3)


def test_gates_do_not_fade_with_the_values() -> None:
    model = Headed(HEADS["class token of the last block"][0])
    explainer = Explainer(model, {0: sae_for(model)}, layout=model.layout(), backend="native", preset="published")
    gates = [explainer(images(), lambda y, k=k: k * y[:, TARGET]).gates[0] for k in (1, 1e-7, 1e-14)]  # type: ignore[misc]
    torch.testing.assert_close(gates[1], gates[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gates[2], gates[0], rtol=1e-3, atol=1e-3)


def test_saturated_probabilities_and_maps_of_zeros_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Headed(HEADS["class token of the last block"][0]).float()
    x, layout = images().float(), model.layout()

    class Probabilities(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.model, self.factor = model, factor

        def forward(self, x: Tensor) -> Tensor:
            return (self.factor * self.model(x)).softmax(-1)

    explainer = Explainer(Probabilities(200.0), layout=layout, preset="published")
    notices = explainer(x).notices
    assert "probability that rounding cannot tell from 1" in notices[0]
    explainer(x)
    assert sum("cannot tell from 1" in record.getMessage() for record in caplog.records) == 1
    assert Explainer(Probabilities(0.1), layout=layout, preset="published")(x).notices == ()
    zeros = Explainer(model, layout=layout, preset="published")(x, lambda y: y[:, 0] * 0)
    assert "a map is zero everywhere" in zeros.notices[0]
    assert not zeros.heatmap().any()
