"""Removes work for tokens that nobody reads. If a model pools one token, then in its last block queries, projection and
MLP matter for that token only, and gradients that return there are zero at all other tokens.

The pass finds two facts about every tensor and then writes a new graph:

- *sparse*: the tensor is zero at all other tokens, as the gradient of one selected token is (found from the inputs on);
- *wanted*: its readers look at one token only (found from the outputs back).

In both cases one row per image is enough. Operators that work token by token (row_rules.py) run on that row. Where a
whole tensor meets a row, the pass takes the row out of the tensor or puts zeros around the row. Every other operator
gets the same operands as before. So the result is the same for any model; an operator without a rule is not pruned.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx

from fga_fast.graph.passes.row_rules import Operands, Place, rule_of, shape_of, shrunk

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def prune(module: fx.GraphModule, row: int, tokens: int) -> int:
    """Changes the graph in place.

    Args:
        row: the pooled token.
        tokens: N, tokens per image.

    Returns:
        How many operators now work on one row per image.
    """
    module.graph.eliminate_dead_code()
    pruner = _Pruner(module.graph, row, tokens)
    module.graph = pruner.written()
    module.graph.eliminate_dead_code()
    module.recompile()
    return len(pruner.runs)


def _is(node: fx.Node, name: str) -> bool:
    """Whether it calls this operator of ours. Compares names: other backends run without the native library."""
    return str(node.target) == f"fga_fast.{name}.default"


class _Pruner:
    def __init__(self, graph: fx.Graph, row: int, tokens: int) -> None:
        self.graph, self.row, self.tokens = graph, row, tokens
        self.zero: dict[fx.Node, Place] = {}  # sparse tensors
        self.want: dict[fx.Node, Place | None] = {}  # None: wanted whole
        self.runs: dict[fx.Node, Place] = {}  # operators that work on one row per image
        for node in graph.nodes:
            self._find_sparse(node)
        for node in reversed(graph.nodes):
            self._find_wanted(node)

    # -- zeros -----------------------------------------------------------------------------------------------------

    def _find_sparse(self, node: fx.Node) -> None:
        if node.op != "call_function":
            return
        if node.target is operator.getitem:
            source, index = cast(tuple[fx.Node, int], node.args)
            # Attention's gradient of the queries is sparse; those of keys and values are not.
            if source in self.runs and (index == 0 or not _is(source, "attention_backward")):
                self.zero[node] = self.runs[source]
            return
        place = self._sparse_source(node)
        if place is None and _is(node, "attention_backward"):
            found = [self.zero.get(cast(fx.Node, node.args[i])) for i in (0, 1)]
            if found == [Place(2), Place(1)] and self._operands(node, Place(2)) is not None:
                self.runs[node] = Place(2)
            return
        rule = rule_of(node)
        if place is None and rule is not None:
            place = rule.sparse(node, self.zero, self.tokens)
        if place is None:
            return
        if isinstance(node.meta["val"], Tensor):
            self.zero[node] = place
        self.runs[node] = place

    def _sparse_source(self, node: fx.Node) -> Place | None:
        """The place of the row in an operator that puts one row among zeros."""
        if node.target is aten.select_backward.default:
            _, sizes, dim, index = cast(tuple[Any, list[int], int, int], node.args)
            if sizes[dim] == self.tokens and index % self.tokens == self.row:
                return Place(dim % len(sizes))
        elif node.target is aten.constant_pad_nd.default:
            operand, pads, *value = cast(tuple[Any, ...], node.args)
            around = [self.row, self.tokens - self.row - 1]
            if list(pads) == around and shape_of(operand)[-1] == 1 and not any(value):
                return Place(len(shape_of(node)) - 1)
        return None

    # -- readers ---------------------------------------------------------------------------------------------------

    def _find_wanted(self, node: fx.Node) -> None:
        if node.op == "call_function" and node.target is operator.getitem:
            return  # belongs to the operator that made it
        if node.op == "call_function" and node not in self.runs:
            place = self._wanted_place(node)
            if place is not None and self._operands(node, place) is not None:
                self.runs[node] = place
        needs = self._needs(node)
        for operand in node.all_input_nodes:
            place = needs.get(operand)
            self.want[operand] = place if self.want.get(operand, place) == place else None

    def _wanted_place(self, node: fx.Node) -> Place | None:
        """Where the token lies in the result, if its readers look at no other token."""
        if isinstance(node.meta.get("val"), Tensor):
            return self.want.get(node)
        parts = {cast(int, part.args[1]): self.want.get(part) for part in node.users}
        if _is(node, "attention"):
            expected = {0: Place(2), 1: Place(2), 2: Place(1)}
            return Place(2) if parts and all(expected.get(i) == place for i, place in parts.items()) else None
        places = set(parts.values())
        return places.pop() if len(places) == 1 else None

    def _needs(self, node: fx.Node) -> Operands:
        """The operands of which one row per image is enough."""
        if node.op != "call_function":
            return {}
        if node in self.runs:
            return self._operands(node, self.runs[node]) or {}
        if node.target is aten.select.int:
            operand, dim, index = cast(tuple[fx.Node, int, int], node.args)
            shape = shape_of(operand)
            if shape[dim] == self.tokens and index % self.tokens == self.row:
                return {operand: Place(dim % len(shape))}
        return {}

    def _operands(self, node: fx.Node, place: Place) -> Operands | None:
        if _is(node, "attention"):
            q, k, v = cast(tuple[fx.Node, ...], node.args[:3])
            return None if q in (k, v) else self._with_bias(node, {q: Place(2)}, 4)
        if _is(node, "attention_backward"):
            grad_out, row, gate, q, k, v, _, out, lse = cast(tuple[fx.Node, ...], node.args[:9])
            if {grad_out, row, q, out, lse} & {gate, k, v}:  # gate, k and v are needed for all tokens
                return None
            wide = dict.fromkeys((grad_out, q, out, lse), Place(2))
            return self._with_bias(node, {**wide, row: Place(1)}, 6)
        if self._sparse_source(node) is not None:
            return {}
        rule = rule_of(node)
        return None if rule is None else rule.operands(node, place, self.tokens)

    def _with_bias(self, node: fx.Node, operands: Operands, position: int) -> Operands:
        bias = node.args[position]
        if isinstance(bias, fx.Node) and shape_of(bias)[2] == self.tokens:
            operands[bias] = Place(2)
        return operands

    # -- the new graph ---------------------------------------------------------------------------------------------

    def written(self) -> fx.Graph:
        self.new, self.made = fx.Graph(), dict[tuple[fx.Node, Place | None], fx.Node]()
        for node in self.graph.nodes:
            source = node.args[0] if node.op == "call_function" and node.target is operator.getitem else None
            if isinstance(source, fx.Node) and source in self.runs:
                self._write_part(node, source)
            elif node in self.runs:
                self._write_row(node, self.runs[node])
            else:
                needs = self._needs(node)
                if needs:  # a select from a tensor that has only one token now: index 0
                    ((operand, place),) = needs.items()
                    made = self.new.call_function(aten.select.int, (self._at(operand, place), node.args[1], 0))
                    made.meta["val"] = node.meta["val"]
                else:
                    made = self.new.node_copy(node, lambda operand: self._at(operand, None))
                self.made[node, None] = made
        return self.new

    def _at(self, node: fx.Node, place: Place | None) -> fx.Node:
        """The tensor: whole for None, else one row per image at `place`."""
        if (node, place) not in self.made:
            shape = shape_of(node)
            if place is not None:
                whole = self._at(node, None)
                size = shape[place.dim]
                rows = self.new.call_function(aten.slice.Tensor, (whole, place.dim, self.row, size, self.tokens))
                # Contiguous, because PyTorch's layer norm ignores the strides of its statistics.
                self.made[node, place] = self.new.call_function(
                    aten.clone.default, (rows,), {"memory_format": torch.contiguous_format}
                )
            else:
                there = self.zero[node]  # no other kind of row is ever needed whole
                rows, size = self.made[node, there], shape[there.dim]
                self.made[node, place] = self.new.call_function(
                    aten.slice_backward.default, (rows, list(shape), there.dim, self.row, size, self.tokens)
                )
        return self.made[node, place]

    def _write_row(self, node: fx.Node, place: Place) -> None:
        if self._sparse_source(node) is not None:
            made = self._at(cast(fx.Node, node.args[0]), None)
            if node.target is aten.select_backward.default:
                made = self.new.call_function(aten.unsqueeze.default, (made, place.dim))
            self.made[node, place] = made
            return
        needs = self._needs(node)
        made = self.new.node_copy(node, lambda operand: self._at(operand, needs.get(operand)))
        if node.target in _VIEWS:
            made.target, made.args = aten.reshape.default, (made.args[0], shrunk(shape_of(node), place))
        elif node.target is aten.expand.default:
            made.args = (made.args[0], shrunk(shape_of(node), place))
        self.made[node, place if isinstance(node.meta["val"], Tensor) else None] = made

    def _write_part(self, node: fx.Node, source: fx.Node) -> None:
        """One of several results of an operator that works on one row per image."""
        index, place = cast(int, node.args[1]), self.runs[source]
        part = self.new.call_function(operator.getitem, (self.made[source, None], index))
        if _is(source, "attention"):
            self.made[node, Place(1) if index == 2 else Place(2)] = part
        elif _is(source, "attention_backward") and index:
            self.made[node, None] = part
        else:
            self.made[node, place] = part
