"""Computes ahead what depends only on weights or only on shapes, so that the graph does not repeat it in every call.

It also makes the graph independent of strides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

# Constructors that use only the shape of their operand -> the value that they fill in; None: their last argument.
_LIKE: dict[Any, float | None] = {
    aten.zeros_like.default: 0, aten.new_zeros.default: 0, aten.ones_like.default: 1, aten.new_ones.default: 1,
    aten.full_like.default: None, aten.new_full.default: None,
}  # fmt: skip
_IDENTITIES = (aten.detach.default, aten.lift_fresh_copy.default, aten.alias.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default)


class _Lifted(fx.Interpreter):
    """Runs a graph with the given weights instead of its own."""

    def __init__(self, module: fx.GraphModule, weights: dict[str, Tensor]) -> None:
        super().__init__(module)
        self._weights = weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self._weights[target]


def functional(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The same graph without in-place operators, which the passes cannot handle.

    Weights become inputs for a while: otherwise functionalize() does not see in-place changes of their copies.
    """
    if not any(_is_mutable(node) for node in module.graph.nodes):
        return module
    names = list(dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "get_attr"))
    weights = [attribute(module, name) for name in names]

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(names, tensors[len(inputs) :], strict=True))
        return _Lifted(module, given).run(*tensors[: len(inputs)])

    traced = make_fx(torch.func.functionalize(run), tracing_mode="fake")(*inputs, *weights)
    found = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node in [node for node in traced.graph.nodes if _is_mutable(node)]:
        if node.args[0] not in found[: len(inputs)]:
            raise ValueError(
                "model: its forward pass changes its weights or buffers in place, but a graph has fixed ones; explain "
                "it eagerly, or change the forward pass"
            )
        traced.graph.erase_node(node)  # the model overwrites its images; nobody reads them afterwards
    for node, name, weight in zip(found[len(inputs) :], names, weights, strict=True):
        if isinstance(weight, torch.nn.Parameter):
            traced.register_parameter(name, weight)
        else:
            traced.register_buffer(name, weight)
        with traced.graph.inserting_before(node):
            constant = traced.graph.get_attr(name)
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)
        traced.graph.erase_node(node)
    traced.recompile()
    return traced


def simplify(module: fx.GraphModule) -> None:
    """Changes the graph in place; its outputs stay bit-equal."""
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _VIEWS:
            # Autograd chose a view by the strides of fake tensors. Real ones may have others: PyTorch's are wrong for
            # the backward pass of layer_norm with a transposed gradient, and rows.py pads operands with zeros.
            node.target = aten.reshape.default
        elif node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
        elif node.target in _LIKE:
            _made_of_shape(module.graph, node)
        elif node.target is torch.ops.fga_fast.few_rows_product.default:  # it looks at values
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(made(module.graph, node, aten.mm.default, node.args))
    module.graph.eliminate_dead_code()
    fold(module)
    module.graph.eliminate_dead_code()
    module.recompile()


def made(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
    """A new call; its result has the shape and dtype of the result of `like`."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = like.meta["val"]
    return node


def _made_of_shape(graph: fx.Graph, node: fx.Node) -> None:
    value: Any = _LIKE[node.target]
    shown = node.meta["val"]
    if not shown.is_contiguous():  # it copies the operand's strides, and later views rely on them
        return
    if value is None:
        value = node.args[-1]
    with graph.inserting_before(node):
        node.replace_all_uses_with(
            made(graph, node, aten.full.default, (list(shown.shape), value), dtype=shown.dtype, device=shown.device)
        )


def fold(module: fx.GraphModule) -> None:
    """Computes once what depends only on weights: casts under autocast, position tables, concatenated biases.

    Views stay in the graph: they cost nothing, and folding them would store their tensor a second time.
    """
    known: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            known[node] = attribute(module, str(node.target))
        elif node.op == "call_function" and _is_pure(node) and node.all_input_nodes:
            if not all(n in known for n in node.all_input_nodes):
                continue
            with torch.no_grad():
                known[node] = node.target(*fx.map_arg(node.args, known.get), **fx.map_arg(node.kwargs, known.get))
    wanted = [node for node in known if node.op != "get_attr" and any(user not in known for user in node.users)]
    while wanted:
        node = wanted.pop()
        if node.op == "get_attr" or not isinstance(known[node], Tensor):
            continue
        if is_view(node):
            wanted += node.all_input_nodes
            continue
        name = f"_folded_{node.name}"
        module.register_buffer(name, known[node])
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)


def attribute(module: fx.GraphModule, name: str) -> Any:
    return operator.attrgetter(name)(module)


def is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.target is operator.getitem or any(r.alias_info is not None for r in getattr(schema, "returns", ()))


def _is_mutable(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _is_pure(node: fx.Node) -> bool:
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.target is operator.getitem or (hasattr(node.target, "_schema") and not _is_mutable(node) and not random)
