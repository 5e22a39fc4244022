"""Whether the attention map that was tapped is the one that multiplies the values.

A model that writes out its attention is tapped at its softmax, and may change the map afterwards: mix its heads, add
to it, normalise it again. Relevance needs `A * dA` of the map A' that multiplies the values v. For A' = c * A with
factors c that do not depend on A (a mask, a gate, a selection) it is the same: `A' * dA' = c A * dA / c`. For other
changes it is not, so they are refused.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fga_fast.models.block_io import ForwardPass, TapeError
from fga_fast.models.reads import FORMS, PRODUCTS, kind

# What may happen to a map on the way to its values, by the names of autograd's nodes. Other layouts and types of it,
# parts of it, and products with a factor.
_SAME = {
    *FORMS,
    *("NanToNum", "Slice", "Select", "Split", "SplitWithSizes", "Unbind", "Index", "IndexSelect", "Gather", "Topk"),
    *("Scatter", "MaskedFill", "Where", "Tril", "Triu", "Mul", "Div"),
}

Edge = tuple[Node, int]  # a node and the number of one of its outputs, or of one of its inputs


def check_paths(passed: ForwardPass) -> None:
    """Refuses blocks that read the output of another block than the one before, as in U-shaped transformers:
    rollouts and means over blocks would pass this path by. It walks the whole graph once.

    Raises:
        TapeError: naming the blocks.
    """
    streams = {edge.node: block for block, edge in passed.streams.items()}
    before: int | None = None
    for block, edge in sorted(passed.streams.items()):
        seen, stack = {edge.node, *passed.carriers}, [edge.node]
        while stack:
            for node, _ in stack.pop().next_functions:
                if node is None or node in seen:
                    continue
                seen.add(node)
                if node in streams:
                    if before is None or node is not passed.streams[before].node:
                        raise TapeError(
                            f"model: {passed.name(block)} reads what block {streams[node]} hands on, not only the "
                            "output of the block before it, and relevance would pass this path by; use "
                            "method='input_x_gradient', which follows every path"
                        )
                else:
                    stack.append(node)
        before = block


def check_maps(passed: ForwardPass, values: Tensor) -> None:  # values [B] or [B, K], attached to the pass
    """Refuses maps that change before they multiply the values, and maps that belong to other images.

    It walks the graph of the values once, and differentiates one element of each product of a map with values.

    Raises:
        TapeError: naming the block, and what happens to its map.
    """
    if not passed.maps or values.grad_fn is None:
        return
    readers = _readers(values.grad_fn)
    for where, block, edge in passed.maps:
        _check_map(where, edge, readers, has_gradient=block != passed.first)
    _check_images(passed)


def _readers(end: Node) -> dict[Edge, list[Edge]]:
    """For each output of each node below `end`, which inputs of which nodes read it."""
    readers: dict[Edge, list[Edge]] = defaultdict(list)
    seen, stack = {end}, [end]
    while stack:
        node = stack.pop()
        for number, (source, output) in enumerate(node.next_functions):
            if source is None:
                continue
            readers[source, output].append((node, number))
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return readers


def _check_map(where: str, edge: GradientEdge, readers: dict[Edge, list[Edge]], has_gradient: bool) -> None:
    """Follows a map from its softmax to the products with its values. `has_gradient`: whether the values have one."""
    forms, stack = {edge.node}, [(edge.node, edge.output_nr)]
    while stack:
        for node, number in readers.get(stack.pop(), ()):
            what = kind(node)
            others = [source for at, (source, _) in enumerate(node.next_functions) if at != number]
            if what in PRODUCTS:
                if has_gradient and others[-1 if number else 0] is None:
                    raise _changed(where, "it is multiplied by a fixed matrix")
                _check_product(where, node, edge)
            elif what not in _SAME:
                raise _changed(where, f"it goes through {what!r}")
            elif what == "Div" and number == 1:
                raise _changed(where, "something is divided by it")
            elif node not in forms:
                forms.add(node)
                stack.extend((node, output) for output in range(len(node._input_metadata)))
            if any(other in forms for other in others):
                raise _changed(where, f"it goes through {what!r} together with another form of itself")


def _check_product(where: str, node: Node, edge: GradientEdge) -> None:
    """A product with values sums over the keys of one query of one head: its elements depend on one row of the map."""
    (out,) = node._input_metadata
    size = math.prod(out.shape)
    for element in {0, size // 2, size - 1}:
        seed = torch.zeros(size, dtype=out.dtype, device=out.device)
        seed[element] = 1
        seeds = [seed.view(out.shape)]
        (rows,) = torch.autograd.grad([GradientEdge(node, 0)], [edge], seeds, retain_graph=True)
        if int((rows != 0).any(-1).sum()) > 1:
            raise _changed(where, "a product mixes its heads or queries")


def _check_images(passed: ForwardPass) -> None:
    """Refuses maps whose images are not where they are expected. All blocks are alike, so it looks at the last one."""
    x, last = passed.stream, len(passed.layout.blocks) - 1
    edges = [edge for _, block, edge in passed.maps if block == last]
    if x is None or not edges:
        return
    first = x[:, 0] if passed.layout.tokens_first else x[0]  # [N, C]
    weight = torch.linspace(1, 2, first.shape[-1], dtype=x.dtype, device=x.device)
    (maps,) = torch.autograd.grad((first * weight).sum(), edges, retain_graph=True, allow_unused=True)
    if maps is not None and bool((maps[1:] != 0).any()):  # [B, H, N, N]
        raise TapeError(
            "model: the first image reads an attention map that was taken for another image's; maps must have images "
            "in front of heads, [B, H, N, N] or [B H, N, N], and images must not attend to each other"
        )


def _changed(where: str, what: str) -> TapeError:
    return TapeError(
        f"model: {where} changes its attention map between the softmax and the product with the values: {what}. The "
        "rollout needs the map that multiplies the values; only factors that do not depend on the map may change it. "
        "Use method='block_x_gradient' or 'input_x_gradient', which need no maps"
    )
