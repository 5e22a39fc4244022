"""Explanations traced into one graph: the same numbers for every family and setting, less work, nothing changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
from explaining import PIXELS, Build, sae_for
from families import Family
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fga_fast import Explainer, Explanation, Gate
from fga_fast.graph import rows
from fga_fast.graph.outputs import explanation, in_batches
from fga_fast.graph.trace import Flat, flatten

FAMILIES = [pytest.param(family, id=family.id) for family in families.registry()]
DOUBLE = torch.float64


def run(flat: Flat, *inputs: Tensor) -> Explanation:
    with torch.no_grad():
        found = dict(zip(flat.outputs, flat.module(*inputs), strict=True))
    return explanation(found, grid=(1, found["relevance"].shape[-1]), image_size=(1, 1), backend="graph")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: Family) -> None:
    pytest.importorskip(families.LIBRARIES[family.library])
    model = family.build()
    layout = families.layout_of(family, model)
    names: dict[str, Any] = (
        {"class_names": list(dict.fromkeys([*family.prompts, "a chair"])), "tokenizer": families.tokenize}
        if family.prompts
        else {}
    )
    explainer = Explainer(model, families.autoencoders(layout), Gate(base=4.0), layout=layout, **names)
    images = family.images()
    want = explainer(images, 1)
    got = run(flatten(explainer, images, "given"), images, want.targets)
    start = families.seed(layout)
    assert families.error(got.relevance - start, want.relevance - start) < 1e-4
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert all(families.error(got.gates[layer], want.gates[layer]) < 1e-4 for layer in want.gates)


@pytest.fixture
def subject(tiny_vit: Build) -> tuple[nn.Module, Tensor]:
    return tiny_vit(depth=3).to(DOUBLE), torch.randn(2, *PIXELS, dtype=DOUBLE)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"method": "input_x_gradient"}, {"backward": "conservative"}, {"signed": True}, {"start_layer": 1},
        {"per_block": True}, {"top_features": 3}, {"gate": Gate(mode="shuffled")}, {"gate": Gate(mode="no_sae")},
        {"backend": "composite"}, {"method": "input_x_gradient", "backward": "conservative", "per_block": True},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_every_setting(tiny_vit: Build, settings: dict[str, Any], pooling: str) -> None:
    model = tiny_vit(depth=3, global_pool=pooling).to(DOUBLE)
    images = torch.randn(2, *PIXELS, dtype=DOUBLE)
    # Before block 2, patches are read through a LayerNorm alone, and g . x there is rounding.
    layers = (0,) if settings.get("gate") == Gate(mode="no_sae") else (1,) if "start_layer" in settings else (0, 1)
    explainer = Explainer(model, {layer: sae_for(model) for layer in layers}, **settings)
    want, got = explainer(images), run(flatten(explainer, images), images)
    assert torch.equal(got.targets, want.targets)
    assert families.error(got.relevance, want.relevance) < 1e-9
    for layer in want.scores:
        torch.testing.assert_close(got.scores[layer], want.scores[layer], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got.gates[layer], want.gates[layer], rtol=1e-9, atol=1e-12)
    assert (got.blocks is None) == (want.blocks is None)
    if want.blocks is not None:
        torch.testing.assert_close(got.blocks, want.blocks, rtol=1e-9, atol=1e-12)
    for layer, features in want.features.items():
        assert torch.equal(got.features[layer].patch_index, features.patch_index)
        torch.testing.assert_close(
            got.features[layer].image_contribution, features.image_contribution, rtol=1e-9, atol=1e-12
        )


def test_an_autoencoder_after_the_last_block(subject: tuple[nn.Module, Tensor]) -> None:
    """It reads all tokens of the last residual stream, whose gradient is that of one."""
    model, images = subject
    explainer = Explainer(model, {2: sae_for(model)})
    assert families.error(run(flatten(explainer, images), images).relevance, explainer(images).relevance) < 1e-9


def test_given_targets_and_another_image(subject: tuple[nn.Module, Tensor]) -> None:
    model, images = subject
    explainer = Explainer(model, {0: sae_for(model)})
    flat = flatten(explainer, images, "given")
    other, targets = torch.randn_like(images), torch.tensor([4, 0])
    assert families.error(run(flat, other, targets).relevance, explainer(other, targets).relevance) < 1e-9


def test_a_wrapped_tower_and_gradients_switched_off(subject: tuple[nn.Module, Tensor]) -> None:
    model, images = subject
    wrapped = nn.Sequential(model, nn.LogSoftmax(-1)).requires_grad_(False)
    explainer = Explainer(wrapped)
    assert families.error(run(flatten(explainer, images), images).relevance, explainer(images).relevance) < 1e-9


def flops(module: nn.Module, *inputs: Tensor) -> int:
    """Of the matrix products; tapped attention is not counted."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def test_last_block_works_for_the_pooled_token_only(tiny_vit: Build) -> None:
    """Forward and backward: projection and both products of the MLP."""
    model = tiny_vit(depth=2).to(DOUBLE)
    images = torch.randn(1, *PIXELS, dtype=DOUBLE)
    explainer = Explainer(model)
    tokens = explainer.layout.tokens
    whole, less = (flops(flatten(explainer, images, prune=p).module, images) for p in (False, True))
    width = int(model.embed_dim)  # type: ignore[arg-type]
    hidden = model.blocks[0].mlp.fc1.out_features  # type: ignore[union-attr,index]
    saved = 2 * (tokens - 1) * 2 * (width * width + 2 * width * hidden)
    assert whole - less == pytest.approx(saved, rel=1e-9)


def test_nothing_is_pruned_where_all_tokens_are_read(tiny_vit: Build) -> None:
    model = tiny_vit(depth=2, global_pool="avg")
    explainer, images = Explainer(model), torch.randn(1, *PIXELS)
    whole, less = (flops(flatten(explainer, images, prune=p).module, images) for p in (False, True))
    assert whole == less


def test_first_block_has_no_gradients_of_its_own(subject: tuple[nn.Module, Tensor]) -> None:
    """No dq, dk, dv, and no gradient of the patch embedding."""
    flat = flatten(Explainer(subject[0]), subject[1])
    *_, first = (node for node in flat.module.graph.nodes if "attention_backward" in str(node.target))
    assert first.args[-2:] == (False, False)
    assert not any("convolution_backward" in str(node.target) for node in flat.module.graph.nodes)


def test_weights_are_shared_and_the_model_is_left_as_it_came(subject: tuple[nn.Module, Tensor]) -> None:
    model, images = subject
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    state = {name: (p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()}
    flat = flatten(Explainer(model, {0: sae_for(model)}), images)
    assert state == {name: (p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()}
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    own = {p.data_ptr() for p in model.parameters()}
    large = [p for p in flat.module.parameters() if p.dim() == 2]
    assert large and all(p.data_ptr() in own for p in large)


def test_casts_of_weights_are_made_once(tiny_vit: Build) -> None:
    model, images = tiny_vit(depth=2), torch.randn(1, *PIXELS)
    with torch.autocast("cpu", torch.bfloat16):
        flat = flatten(Explainer(model), images)
        want = Explainer(model)(images)
    weights = {node for node in flat.module.graph.nodes if node.op == "get_attr"}
    casts = [n for n in flat.module.graph.nodes if n.target is torch.ops.aten._to_copy.default]
    assert casts and not any(set(node.all_input_nodes) <= weights for node in casts)
    assert families.error(run(flat, images).relevance, want.relevance) < 2e-2


def test_the_graph_is_a_module_that_torch_exports(subject: tuple[nn.Module, Tensor]) -> None:
    model, images = subject
    explainer = Explainer(model, {0: sae_for(model)})
    flat = flatten(explainer, images)
    exported = torch.export.export(flat.module, (images,)).module()
    assert (
        families.error(dict(zip(flat.outputs, exported(images), strict=True))["relevance"], explainer(images).relevance)
        < 1e-9
    )


class _Counting(nn.Module):
    """A model that looks at values on the way."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits * 2 if float(logits.mean()) > 0 else logits


def refused(tiny_vit: Build) -> Iterator[tuple[Explainer, Tensor, str, str]]:
    model, images = tiny_vit(depth=2), torch.randn(1, *PIXELS)
    yield Explainer(_Counting(model)), images, "predicted", "cannot be traced .* looks at values"
    yield Explainer(model, backend="reference"), images, "predicted", "backend: 'reference' is not compiled"
    yield Explainer(model, {0: sae_for(model)}, ungated=True), images, "predicted", "ungated"
    yield Explainer(model), images, "all", 'targets: expected "predicted" or "given"'
    yield Explainer(model), images[:0], "given", r"example: .* got a tensor \[0, 3, 32, 48\]"
    yield Explainer(tiny_vit(depth=2).half()), images.half(), "given", "float16 gradients get a loss scale"


@pytest.mark.parametrize("case", range(6))
def test_refused_with_the_reason(tiny_vit: Build, case: int) -> None:
    explainer, images, targets, words = list(refused(tiny_vit))[case]
    with pytest.raises(ValueError, match=words):
        flatten(explainer, images, targets)  # type: ignore[arg-type]


def test_a_selected_row_is_computed_alone() -> None:
    """By hand: a product of all tokens of which one is read, beside a sum that reads them all."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.ops.aten.mm(x.reshape(10, 4), w).reshape(2, 5, 6)
        z = torch.ops.aten.mm(x.reshape(10, 4), w).reshape(2, 5, 6)
        return y.relu()[:, 3], z.sum()

    x, w = torch.randn(2, 5, 4, dtype=DOUBLE), torch.randn(4, 6, dtype=DOUBLE)
    module, other = (torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(x, w) for _ in range(2))
    want, before = module(x, w), flops(module, x, w)
    assert rows.prune(module, row=3, tokens=5) >= 3
    got = module(x, w)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    assert flops(module, x, w) == before // 2 + before // 10
    assert rows.prune(other, row=2, tokens=5) == 0  # nothing reads that one alone


def test_another_selected_row_is_not_taken_for_it() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y[:, 1], y[:, 2]

    module: fx.GraphModule = torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(torch.ones(1, 3))
    assert rows.prune(module, row=1, tokens=3) == 0


def test_batches_are_filled_and_cut() -> None:
    sizes: list[int] = []

    def double(size: int, given: tuple[Tensor, ...]) -> list[Tensor]:
        assert all(len(t) == size for t in given)
        sizes.append(size)
        return [given[0] * 2, given[0] + given[1]]

    x = torch.arange(11.0)
    a, b = in_batches(double, (1, 4), (x, -x))
    assert torch.equal(a, 2 * x) and not b.any() and sizes == [4, 4, 4]
    sizes.clear()
    in_batches(double, (1, 4), (x[:1], x[:1]))
    assert sizes == [1]
