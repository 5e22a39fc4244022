"""Biases of q, k and v as one more column of their product.

A compiler fuses the addition of a bias into the next operator, at no cost. It cannot fuse into attention, so there the
addition was a loop of its own that wrote q, k and v a second time.
"""

from __future__ import annotations

import torch
from torch import fx

from fga_fast.graph.passes.simplify import attribute, is_view, made

aten = torch.ops.aten

_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)


def fold_biases(module: fx.GraphModule) -> None:
    """Turns x W^T + b into [x 1] [W b]^T where only attention reads it; changes the graph in place.

    The sums are the same, in another order. Only for float32 on the CPU: elsewhere a product adds its bias while it
    writes. It copies weights, so use it only for graphs that are compiled with their own weights.
    """
    widened: dict[fx.Node, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.target is not aten.addmm.default or node.kwargs:
            continue
        shown = node.meta["val"]
        if shown.dtype == torch.float32 and shown.device.type == "cpu" and _only_attention_reads(node):
            _fold(module, node, widened)
    module.graph.eliminate_dead_code()
    _delete_unread(module)
    module.recompile()


def _delete_unread(module: fx.GraphModule) -> None:
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        if name not in read and "." not in name:
            delattr(module, name)


def _only_attention_reads(node: fx.Node) -> bool:
    return bool(node.users) and all(
        _only_attention_reads(user) if is_view(user) else _is_attention(user) for user in node.users
    )


def _is_attention(user: fx.Node) -> bool:
    # After pruning, the queries of the one token reach attention through a clone.
    return user.target is aten.clone.default or getattr(user.target, "namespace", "") == "fga_fast"


def _fold(module: fx.GraphModule, node: fx.Node, widened: dict[fx.Node, fx.Node]) -> None:
    bias, x, transposed = node.args
    assert isinstance(bias, fx.Node) and isinstance(x, fx.Node) and isinstance(transposed, fx.Node)
    weight = _transposed(transposed)
    if weight is None or bias.op != "get_attr":
        return
    matrix, column = (attribute(module, str(part.target)) for part in (weight, bias))  # [out, C], [out]
    if column.shape != matrix.shape[:1]:
        return
    graph, name = module.graph, f"_folded_with_bias_{node.name}"
    module.register_buffer(name, torch.cat([matrix, column.unsqueeze(1)], dim=1).detach())
    with graph.inserting_before(weight):
        both = graph.get_attr(name)
        both.meta["val"] = weight.meta["val"].new_empty(len(column), matrix.shape[1] + 1)
        alone = made(graph, weight, aten.slice.Tensor, (both, 1, 0, matrix.shape[1]))
    weight.replace_all_uses_with(alone)  # the backward pass reads the same copy
    if x not in widened:
        with graph.inserting_after(x):
            widened[x] = made(graph, x, aten.constant_pad_nd.default, (x, [0, 1], 1.0))
    with graph.inserting_before(node):
        turned = made(graph, transposed, aten.t.default, (both,))
        turned.meta["val"] = both.meta["val"].t()
        node.replace_all_uses_with(made(graph, node, aten.mm.default, (widened[x], turned)))


def _transposed(node: fx.Node) -> fx.Node | None:
    """The weight [out, C] of which `node` is the transpose, if only products and transposes read it."""
    weight = node.args[0] if node.target in _TRANSPOSES else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    shown = weight.meta["val"]
    turned = shown.dim() == 2 and node.meta["val"].stride() == shown.stride()[::-1]
    plain = all(user.target in (*_TRANSPOSES, aten.mm.default) for user in weight.users)
    return weight if turned and plain else None
