"""Every family's own model definition, small and random, explained by the native path and by the reference."""

from __future__ import annotations

import families
import pytest
import torch
from families import Family

FAMILIES = [pytest.param(family, id=family.id) for family in families.registry()]


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> None:
    pytest.importorskip(families.LIBRARIES[request.getfixturevalue("family").library])


@pytest.mark.parametrize("family", FAMILIES)
def test_transmm(family: Family) -> None:
    model = family.build()
    got, want = families.explain(family, model, "native"), families.explain(family, model, "reference")
    start = families.seed(families.layout_of(family, model))  # left out, or it would hide errors in the rest
    assert families.error(got.relevance - start, want.relevance - start) < 1e-4
    rest = want.relevance - start
    assert float(rest.max()) > 1.5 * float(rest.mean())  # attention is not uniform


@pytest.mark.parametrize("backward", ["exact", "conservative"])
@pytest.mark.parametrize("method", ["rollout", "input_x_gradient"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_autoencoders(family: Family, method: str, backward: str) -> None:
    model = family.build()
    layout = families.layout_of(family, model)
    saes = families.autoencoders(layout)
    settings = {"saes": saes, "method": method, "backward": backward}
    got, want = (
        families.explain(family, model, "native", **settings),
        families.explain(family, model, "reference", **settings),
    )
    start = families.seed(layout) if method == "rollout" else 0
    assert families.error(got.relevance - start, want.relevance - start) < 1e-4
    for layer in saes:
        assert families.error(got.gates[layer], want.gates[layer]) < 1e-4
        assert want.gates[layer].unique().numel() > 2  # the gates do something


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_answers_as_before_and_keeps_nothing(family: Family) -> None:
    model = family.build()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # frozen: attention layers then look for shortcuts
    images = family.images()
    with torch.no_grad():
        before = families.logits_of(model, images)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    e = families.explain(family, model, "native")
    if not family.prompts:
        torch.testing.assert_close(e.logits, before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(families.logits_of(model, images), before)
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
