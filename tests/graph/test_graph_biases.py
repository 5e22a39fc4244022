"""Biases of q, k and v inside their product: only views between projection and attention, wherever that is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from explaining import PIXELS, Build, sae_for
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fga_fast import Explainer
from fga_fast.graph.passes.biases import fold_biases
from fga_fast.graph.trace import flatten

aten = torch.ops.aten
VIEWS = ("reshape", "view", "permute", "unbind", "transpose", "clone", "slice", "select")


def folded(tiny_vit: Build, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, fx.GraphModule]:
    """A model, its SAE, and the graph of both."""
    model = tiny_vit(depth=3).to(dtype)
    sae = sae_for(model)
    module = flatten(Explainer(model, {1: sae}, preset="published").plan, torch.randn(2, *PIXELS, dtype=dtype)).module
    fold_biases(module)
    return model, sae, module


def product(node: fx.Node) -> str:
    """The operator that made what views of show."""
    name = "getitem" if "getitem" in str(node.target) else str(node.target).split(".")[-2]
    if name not in (*VIEWS, "getitem"):
        return name
    assert isinstance(node.args[0], fx.Node)
    return product(node.args[0])


def made_of(module: fx.GraphModule) -> set[str]:
    """What makes the q, k and v of all attentions of a graph."""
    attentions = [node for node in module.graph.nodes if str(node.target).startswith("fga_fast.attention.")]
    assert len(attentions) == 3
    return {product(node.args[i]) for node in attentions for i in range(3)}


@pytest.mark.parametrize(
    ("dtype", "autocast", "made"),
    [
        (torch.float32, False, "mm"), (torch.bfloat16, False, "addmm"), (torch.float64, False, "addmm"),
        (torch.float32, True, "addmm"),
    ],
)  # fmt: skip
def test_attention_reads_plain_products_of_float32(
    tiny_vit: Build, dtype: torch.dtype, autocast: bool, made: str
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert made_of(folded(tiny_vit, dtype)[2]) == {made}


def test_weights_are_held_once(tiny_vit: Build) -> None:
    """The backward pass reads a slice of the same copy, and what nobody reads is gone."""
    model, sae, module = folded(tiny_vit)
    weights = {parameter.data_ptr() for name, parameter in model.named_parameters() if "qkv" in name}
    assert len(weights) == 6
    inside = [*module.parameters(), *module.buffers()]
    assert not weights & {tensor.data_ptr() for tensor in inside}
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in inside}
    given = sum(t.nbytes for part in (model, sae) for t in (*part.parameters(), *part.buffers()))
    assert sum(stored.values()) <= 1.05 * given
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    assert {name for name, _ in (*module.named_parameters(), *module.named_buffers())} <= read


class Product(nn.Module):
    """A product with a bias as a model may write it."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], Tensor], weight: tuple[int, ...], bias: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias, self.write = nn.Parameter(torch.randn(weight)), nn.Parameter(torch.randn(bias)), write

    def forward(self, x: Tensor) -> Tensor:  # [7, 6]
        return self.write(x, self.weight, self.bias)


def read(y: Tensor) -> Tensor:
    """Stands for attention: a clone of a view."""
    return y.view(7, 2, -1).clone()


OTHER = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
CASES: dict[str, tuple[bool, Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, ...], int]] = {
    "the usual": (True, lambda x, w, b: read(aten.addmm(b, x, w.t())), (12, 6), 12),
    "transposed by permute": (True, lambda x, w, b: read(aten.addmm(b, x, w.permute(1, 0))), (12, 6), 12),
    "two products of one input": (
        True, lambda x, w, b: read(aten.addmm(b, x, w.t())) + read(aten.addmm(b, x, OTHER.t())), (12, 6), 12
    ),
    "read elsewhere too": (False, lambda x, w, b: read(y := aten.addmm(b, x, w.t())) + y.view(7, 2, 6), (12, 6), 12),
    "a weight that lies transposed": (False, lambda x, w, b: read(aten.addmm(b, x, w)), (6, 12), 12),
    "a permutation of nothing": (False, lambda x, w, b: read(aten.addmm(b, x, w.permute(0, 1))), (6, 6), 6),
    "a bias of one number": (False, lambda x, w, b: read(aten.addmm(b, x, w.t())), (12, 6), 1),
    "factors": (False, lambda x, w, b: read(aten.addmm(b, x, w.t(), beta=0.5, alpha=2.0)), (12, 6), 12),
    "a weight that is read as a vector": (
        False, lambda x, w, b: read(aten.addmm(b, x, w.t())) * w.view(-1)[0], (12, 6), 12
    ),
}  # fmt: skip


def share_weights(module: fx.GraphModule) -> None:
    """One node a weight, as in a traced explanation."""
    first: dict[str, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            node.replace_all_uses_with(first.setdefault(str(node.target), node))


@pytest.mark.parametrize("name", CASES)
def test_as_models_write_it(name: str) -> None:
    folds, write, weight, bias = CASES[name]
    x, module = torch.randn(7, 6), Product(write, weight, bias)
    graph = make_fx(module)(x)
    share_weights(graph)
    assert any(node.target is aten.addmm.default for node in graph.graph.nodes)
    fold_biases(graph)
    targets = [node.target for node in graph.graph.nodes]
    assert (aten.addmm.default not in targets) == folds
    assert targets.count(aten.constant_pad_nd.default) == folds  # one input is widened once
    torch.testing.assert_close(graph(x), module(x))
