"""Biases of q, k and v inside their product: nothing between projection and attention but views."""

from __future__ import annotations

import pytest
import torch
from explaining import PIXELS, Build, sae_for
from torch import fx, nn

from fga_fast import Explainer
from fga_fast.graph.biases import fold_biases
from fga_fast.graph.trace import Flat, flatten

aten = torch.ops.aten


def traced(tiny_vit: Build, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Flat]:
    model = tiny_vit(depth=3).to(dtype)
    explainer = Explainer(model, {1: sae_for(model)})
    return model, flatten(explainer, torch.randn(2, *PIXELS, dtype=dtype))


def products(node: fx.Node) -> set[str]:
    """Operators other than views that made a tensor."""
    named = str(node.target).split(".")[-2:]
    if node.op == "call_function" and named[0] in (
        "reshape",
        "view",
        "permute",
        "unbind",
        "transpose",
        "clone",
        "slice",
    ):
        assert isinstance(node.args[0], fx.Node)
        return products(node.args[0])
    if "getitem" in str(node.target):
        assert isinstance(node.args[0], fx.Node)
        return products(node.args[0])
    return {named[0]}


def made_of(module: fx.GraphModule) -> set[str]:
    """What makes the q, k and v of all attentions of a graph."""
    found = set[str]()
    for node in module.graph.nodes:
        if str(node.target).startswith("fga_fast.attention."):
            found |= products(node.args[0]) | products(node.args[1]) | products(node.args[2])
    return found


def test_attention_reads_plain_products(tiny_vit: Build) -> None:
    _, flat = traced(tiny_vit)
    assert made_of(flat.module) == {"mm"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_keep_their_biases(tiny_vit: Build, dtype: torch.dtype) -> None:
    _, flat = traced(tiny_vit, dtype)
    assert made_of(flat.module) == {"addmm"}


def test_products_that_autocast_makes_16_bit_keep_theirs(tiny_vit: Build) -> None:
    explainer = Explainer(tiny_vit(depth=3))
    with torch.autocast("cpu", torch.bfloat16):
        assert made_of(flatten(explainer, torch.randn(2, *PIXELS)).module) == {"addmm"}


def test_weights_are_held_once(tiny_vit: Build) -> None:
    """The backward pass reads a slice of the same copy."""
    model, flat = traced(tiny_vit)
    weights = {parameter.data_ptr() for name, parameter in model.named_parameters() if "qkv" in name}
    assert len(weights) == 6
    read = [getattr(flat.module, str(node.target)) for node in flat.module.graph.nodes if node.op == "get_attr"]
    assert not weights & {tensor.data_ptr() for tensor in read}


class Attended(nn.Module):
    """One product, one reader of its views."""

    def __init__(self, reads_twice: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 5)), nn.Parameter(torch.randn(12))
        self.reads_twice = reads_twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = aten.addmm(self.bias, x, self.weight.t())
        read = aten.clone(y.view(-1, 3, 4))
        return read + y.view(-1, 3, 4) if self.reads_twice else read


@pytest.mark.parametrize("reads_twice", [False, True])
def test_only_where_nothing_else_reads(reads_twice: bool) -> None:
    module = Attended(reads_twice)
    x = torch.randn(7, 5)
    graph = torch.fx.experimental.proxy_tensor.make_fx(module)(x)
    names = {node.target for node in graph.graph.nodes}
    fold_biases(graph)
    folded = {node.target for node in graph.graph.nodes}
    assert aten.addmm.default in names
    assert (aten.addmm.default in folded) == reads_twice
    torch.testing.assert_close(graph(x), module(x))
