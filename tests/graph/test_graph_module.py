"""Explanations as plain modules: the explainer's numbers, exported by torch alone, weights shared and left alone."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from explaining import PIXELS, Build, sae_for
from torch import Tensor, nn

from fga_fast import Explainer


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def subject(request: pytest.FixtureRequest, tiny_vit: Build) -> tuple[nn.Module, Explainer, Tensor]:
    model = tiny_vit(depth=3).to(request.param)
    return model, Explainer(model, {0: sae_for(model)}), torch.randn(2, *PIXELS).to(request.param)


def test_a_module_gives_the_explainers_numbers(subject: tuple[nn.Module, Explainer, Tensor]) -> None:
    _, explainer, images = subject
    module, want = explainer.module(images), explainer(images)
    got = module(images.requires_grad_())
    assert tuple(got) == module.names
    assert {"relevance", "logits", "targets", "values", "scores.0", "gates.0"} <= set(got)
    assert families.error(got["relevance"], want.relevance) < (1e-9 if images.dtype == torch.float64 else 1e-4)
    assert not any(tensor.requires_grad for tensor in got.values())


def test_given_classes(subject: tuple[nn.Module, Explainer, Tensor]) -> None:
    _, explainer, images = subject
    got = explainer.module(images, target_mode="given")(images, torch.tensor([3, 0]))
    assert got["targets"].tolist() == [3, 0]
    assert families.error(got["relevance"], explainer(images, [3, 0]).relevance) < (
        1e-9 if images.dtype == torch.float64 else 1e-4
    )


def test_torch_exports_saves_and_loads_it(subject: tuple[nn.Module, Explainer, Tensor], tmp_path: Path) -> None:
    _, explainer, images = subject
    program = torch.export.export(explainer.module(images), (images,))
    torch.export.save(program, tmp_path / "explanation.pt2")
    got = torch.export.load(tmp_path / "explanation.pt2").module()(images)
    assert families.error(got["relevance"], explainer(images).relevance) < (
        1e-9 if images.dtype == torch.float64 else 1e-4
    )


def test_torch_compiles_it(subject: tuple[nn.Module, Explainer, Tensor]) -> None:
    _, explainer, images = subject
    got = torch.compile(explainer.module(images), fullgraph=True)(images)
    assert families.error(got["relevance"], explainer(images).relevance) < (
        1e-9 if images.dtype == torch.float64 else 1e-4
    )


def test_weights_are_the_models_own(subject: tuple[nn.Module, Explainer, Tensor]) -> None:
    model, explainer, images = subject
    module = explainer.module(images)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in module.parameters()} <= own
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    assert families.error(module(images)["relevance"], explainer(images).relevance) < 1e-4
