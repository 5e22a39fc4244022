"""Explanations as plain modules: the explainer's numbers, exported by torch alone, weights shared and left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import families
import pytest
import torch
from drawn_vit import DrawnViT, Read, Shape
from explaining import PIXELS, Build, sae_for
from torch import Tensor

from fga_fast import Explainer
from fga_fast.graph.module import ExplanationModule


class Subject(NamedTuple):
    explainer: Explainer
    module: ExplanationModule
    images: Tensor

    def assert_same(self, got: dict[str, Tensor], targets: Any = None) -> None:
        want = self.explainer(self.images, targets)
        bound = 1e-9 if self.images.dtype == torch.float64 else 1e-4
        assert families.error(got["relevance"], want.relevance) < bound
        assert torch.equal(got["targets"], want.targets)


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def subject(request: pytest.FixtureRequest, tiny_vit: Build) -> Subject:
    torch.manual_seed(0)
    model = tiny_vit(depth=2).to(request.param)
    explainer, images = (
        Explainer(model, {0: sae_for(model)}, preset="published"),
        torch.randn(2, *PIXELS).to(request.param),
    )
    return Subject(explainer, explainer.module(images), images)


def test_a_module_gives_the_explainers_numbers(subject: Subject) -> None:
    got = subject.module(subject.images.clone().requires_grad_())
    subject.assert_same(got)
    assert tuple(got) == subject.module.names
    assert {"relevance", "logits", "targets", "values", "scores.0", "gates.0"} <= set(got)
    assert not any(tensor.requires_grad for tensor in got.values())


def test_it_follows_what_is_written_into_an_encoder(subject: Subject) -> None:
    """Bounds of the encoder as it was would lose features."""
    weights = subject.explainer.saes[0].W_enc
    try:
        weights.neg_()
        assert (
            families.error(subject.module(subject.images)["relevance"], subject.explainer(subject.images).relevance)
            < 1e-4
        )
    finally:
        weights.neg_()


WITHOUT_LIBRARY = """
import torch
from timm.models.vision_transformer import VisionTransformer
from fga_fast import Explainer

model = VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=5).eval()
explainer, images = Explainer(model, backend="composite"), torch.randn(1, 3, 32, 32)
torch.testing.assert_close(explainer.module(images)(images)["relevance"], explainer(images).relevance)
"""


def test_composite_operators_need_no_native_library() -> None:
    pytest.importorskip("timm")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY], env={**os.environ, "FGA_FAST_LIBRARY": "none.so"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_given_classes(subject: Subject) -> None:
    module = subject.explainer.module(subject.images, target_mode="given")
    subject.assert_same(module(subject.images, torch.tensor([3, 0])), [3, 0])


@pytest.mark.parametrize("what", ["token", "all"])
def test_norms_of_queries_and_keys_in_attention_that_is_written_out(what: Any) -> None:
    """The gradient of q and k is transposed there, and fake tensors have other strides behind it than real ones."""
    model = DrawnViT(Shape(depth=2, heads=3, head_width=5, reads=(Read(2, what),), form="F.softmax", qk_norm=True))
    explainer, images = Explainer(model, layout=model.layout(), preset="published"), torch.randn(2, 1, 2, 4).double()
    subject = Subject(explainer, explainer.module(images), images)
    subject.assert_same(subject.module(images))


def test_torch_exports_saves_and_loads_it(subject: Subject, tmp_path: Path) -> None:
    program = torch.export.export(subject.module, (subject.images,))
    torch.export.save(program, tmp_path / "explanation.pt2")
    subject.assert_same(torch.export.load(tmp_path / "explanation.pt2").module()(subject.images))


@pytest.mark.slow
@pytest.mark.parametrize("subject", [torch.float32], indirect=True, scope="module")
def test_torch_compiles_it(subject: Subject) -> None:
    subject.assert_same(torch.compile(subject.module, fullgraph=True)(subject.images))


def test_weights_are_the_models_own(subject: Subject) -> None:
    model, module = subject.explainer.model, subject.module
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    assert weights and weights <= {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    subject.assert_same(module(subject.images))
