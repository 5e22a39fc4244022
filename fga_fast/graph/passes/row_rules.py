"""Rules for operators that work token by token: what they need to compute the row of one token.

If only one token of an operator's result is wanted, its rule says where that token lies in each operand; operands that
the rule does not name are needed whole. If operands are zero at all other tokens and the result is then zero there too,
the rule says where the token lies in the result. Operators without a rule are not pruned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

aten = torch.ops.aten


class Place(NamedTuple):
    """Where the tokens lie in a tensor: in dimension `dim`, of size outer * N, with the token as the fast index."""

    dim: int
    outer: int = 1


Operands = dict[fx.Node, Place]
Sparse = Callable[[fx.Node, Mapping[fx.Node, Place], int], Place | None]


class Rule(NamedTuple):
    """`operands`: (node, place in the result, N) -> places in the operands, or None if the operator mixes tokens.
    `sparse`: (node, operands that are zero at all other tokens, N) -> place in the result, or None if unknown.
    """

    operands: Callable[[fx.Node, Place, int], Operands | None]
    sparse: Sparse = lambda *_: None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor, or of the first if it has several."""
    value = node.meta["val"]
    return tuple((value if isinstance(value, torch.Tensor) else value[0]).shape)


def shrunk(shape: tuple[int, ...], place: Place) -> list[int]:
    """The shape with one token left of N."""
    return [*shape[: place.dim], place.outer, *shape[place.dim + 1 :]]


def _args(node: fx.Node) -> tuple[Any, ...]:
    """The arguments, typed loosely: the operator's schema says what they are."""
    return node.args


def _axis(node: fx.Node, position: int, default: int | None = None) -> int:
    dim = _args(node)[position] if len(_args(node)) > position else default
    assert isinstance(dim, int)
    first = _args(node)[0]
    rank = len(shape_of(first if isinstance(first, fx.Node) else first[0]))
    return dim % max(rank, 1)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def _if_first(then: Callable[[fx.Node, Place, int], Place | None]) -> Sparse:
    """Sparse if the first operand is; `then` turns the place there into the place in the result."""

    def sparse(node: fx.Node, zeros: Mapping[fx.Node, Place], tokens: int) -> Place | None:
        operand = _args(node)[0]
        place = zeros.get(operand) if isinstance(operand, fx.Node) else None
        return None if place is None else then(node, place, tokens)

    return sparse


# -- element by element, with broadcasting ----------------------------------------------------------------------------


def _elementwise(node: fx.Node, place: Place, tokens: int) -> Operands | None:
    out, found = shape_of(node), {}
    for operand in _tensors(node):
        shape = shape_of(operand)
        dim = place.dim - (len(out) - len(shape))
        if dim >= 0 and shape[dim] == out[place.dim]:
            found[operand] = Place(dim, place.outer)
    return found


def _placed(node: fx.Node, operand: fx.Node, place: Place) -> Place | None:
    out, shape = shape_of(node), shape_of(operand)
    dim = place.dim + len(out) - len(shape)
    return Place(dim, place.outer) if dim >= 0 and out[dim] == shape[place.dim] else None


def _elementwise_any(node: fx.Node, zeros: Mapping[fx.Node, Place], tokens: int) -> Place | None:
    return next((_placed(node, operand, zeros[operand]) for operand in _tensors(node) if operand in zeros), None)


def _elementwise_all(node: fx.Node, zeros: Mapping[fx.Node, Place], tokens: int) -> Place | None:
    operands = _tensors(node)
    if len(operands) < 2 or not all(operand in zeros for operand in operands):
        return None
    places = {_placed(node, operand, zeros[operand]) for operand in operands}
    return places.pop() if len(places) == 1 else None


# -- the same numbers in another shape --------------------------------------------------------------------------------


def _through(place: Place, before: tuple[int, ...], after: tuple[int, ...], tokens: int) -> Place | None:
    """Where the tokens lie after a change of shape."""
    left = math.prod(before[: place.dim]) * place.outer  # number of indices slower than the token's
    for dim in range(len(after)):
        slower = math.prod(after[:dim])
        if slower * after[dim] == left * tokens and left % slower == 0:
            return Place(dim, left // slower)
    return None


def _view(node: fx.Node, place: Place, tokens: int) -> Operands | None:
    operand = _args(node)[0]
    found = _through(place, shape_of(node), shape_of(operand), tokens)
    return None if found is None else {operand: found}


def _order(node: fx.Node) -> list[int]:
    """For each dimension of the result, the operand's dimension that it was."""
    dims = list(range(len(shape_of(node))))
    if node.target is aten.permute.default:
        return [dim % len(dims) for dim in _args(node)[1]]
    first, second = (0, 1) if node.target is aten.t.default else (_axis(node, 1), _axis(node, 2))
    dims[first], dims[second] = dims[second], dims[first]
    return dims


def _permuted(node: fx.Node, place: Place, tokens: int) -> Operands | None:
    return {_args(node)[0]: Place(_order(node)[place.dim], place.outer)}


def _unsqueeze(node: fx.Node, place: Place, tokens: int) -> Operands | None:
    new = _args(node)[1] % len(shape_of(node))
    return None if place.dim == new else {_args(node)[0]: Place(place.dim - (place.dim > new), place.outer)}


def _without(node: fx.Node, place: Place, tokens: int) -> Operands | None:
    """Rule for operators that take one index of another dimension: select, unbind."""
    gone = _axis(node, 1, 0)
    return {_args(node)[0]: Place(place.dim + (place.dim >= gone), place.outer)}


def _without_sparse(node: fx.Node, place: Place, tokens: int) -> Place | None:
    gone = _axis(node, 1, 0)
    return None if place.dim == gone else Place(place.dim - (place.dim > gone), place.outer)


def _beside(position: int) -> Rule:
    """Rule for operators that work along another dimension and keep zeros: slice, split. The argument at `position`
    is that dimension.
    """

    def sparse(node: fx.Node, place: Place, tokens: int) -> Place | None:
        return None if _axis(node, position, 0) == place.dim else place

    def operands(node: fx.Node, place: Place, tokens: int) -> Operands | None:
        return None if sparse(node, place, tokens) is None else {_args(node)[0]: place}

    return Rule(operands, _if_first(sparse))


def _cat(node: fx.Node, place: Place, tokens: int) -> Operands | None:
    if any(len(shape_of(operand)) != len(shape_of(node)) for operand in _tensors(node)):
        return None  # cat also accepts empty tensors of shape [0], which have no tokens
    return None if _axis(node, 1, 0) == place.dim else dict.fromkeys(_tensors(node), place)


# -- products, normalisation, reductions ------------------------------------------------------------------------------


def _product(position: int) -> Callable[[fx.Node, Place, int], Operands | None]:
    """Rule for a product of rows, the argument at `position`, and a matrix without tokens, the argument after it."""

    def operands(node: fx.Node, place: Place, tokens: int) -> Operands | None:
        bias = _args(node)[0]
        if place.dim != 0 or (position == 1 and len(shape_of(bias)) != 1):
            return None
        rows, matrix = _args(node)[position], _args(node)[position + 1]
        return None if rows is matrix else {rows: place}

    return operands


def _product_sparse(node: fx.Node, place: Place, tokens: int) -> Place | None:
    return place if place.dim == 0 and _args(node)[0] is not _args(node)[1] else None


def _norm(node: fx.Node, place: Place, tokens: int) -> Operands | None:
    rank = len(shape_of(node)) - len(_args(node)[1])
    return None if place.dim >= rank else {_args(node)[0]: place}


def _norm_backward(rows: tuple[int, ...]) -> Rule:
    """`rows`: positions of the arguments that have tokens. There is no rule if gradients of weights, sums over all
    tokens, are asked for.
    """

    def operands(node: fx.Node, place: Place, tokens: int) -> Operands | None:
        if list(_args(node)[-1])[1:] != [False] * (len(_args(node)[-1]) - 1):
            return None
        rank = len(shape_of(node)) - len(_args(node)[2])
        return None if place.dim >= rank else {_args(node)[i]: place for i in rows}

    return Rule(operands, _if_first(lambda node, place, tokens: place if operands(node, place, tokens) else None))


def _reduction(node: fx.Node, place: Place, tokens: int) -> Operands | None:
    operand, dims, keep = _args(node)[0], _args(node)[1], len(_args(node)) > 2 and bool(_args(node)[2])
    if not isinstance(operand, fx.Node) or not dims:
        return None
    rank = len(shape_of(operand))
    gone = sorted(dim % rank for dim in dims)
    kept = list(range(rank)) if keep else [dim for dim in range(rank) if dim not in gone]
    dim = kept[place.dim]
    return None if dim in gone else {operand: Place(dim, place.outer)}


_FIRST = Rule(_elementwise, _if_first(lambda node, place, _: _placed(node, _args(node)[0], place)))
_ALL = Rule(_elementwise, _elementwise_all)
_ANY = Rule(_elementwise, _elementwise_any)
_VIEW = Rule(_view, _if_first(lambda node, place, n: _through(place, shape_of(_args(node)[0]), shape_of(node), n)))
_PERMUTED = Rule(_permuted, _if_first(lambda node, place, _: Place(_order(node).index(place.dim), place.outer)))

RULES: dict[Any, Rule] = {
    aten.add.Tensor: _ALL, aten.sub.Tensor: _ALL, aten.mul.Tensor: _ANY, aten.div.Tensor: _FIRST,
    aten.neg.default: _FIRST, aten.clone.default: _FIRST, aten._to_copy.default: _FIRST, aten.mul.Scalar: _FIRST,
    aten.gelu_backward.default: _FIRST, aten.silu_backward.default: _FIRST, aten.sigmoid_backward.default: _FIRST,
    aten.tanh_backward.default: _FIRST,
    aten.view.default: _VIEW, aten._unsafe_view.default: _VIEW, aten.reshape.default: _VIEW,
    aten.expand.default: _FIRST, aten.permute.default: _PERMUTED, aten.transpose.int: _PERMUTED,
    aten.t.default: _PERMUTED, aten.unsqueeze.default: Rule(_unsqueeze),
    aten.select.int: Rule(_without, _if_first(_without_sparse)), aten.unbind.int: Rule(_without),
    aten.slice.Tensor: _beside(1), aten.split.Tensor: _beside(2), aten.split_with_sizes.default: _beside(2),
    aten._softmax.default: Rule(_beside(1).operands), aten.cat.default: Rule(_cat),
    aten.mm.default: Rule(_product(0), _if_first(_product_sparse)), aten.addmm.default: Rule(_product(1)),
    aten.native_layer_norm.default: Rule(_norm), aten._fused_rms_norm.default: Rule(_norm),
    aten.native_layer_norm_backward.default: _norm_backward((0, 1, 3, 4)),
    aten._fused_rms_norm_backward.default: _norm_backward((0, 1, 3)),
    aten.sum.dim_IntList: Rule(_reduction), aten.mean.dim: Rule(_reduction),
}  # fmt: skip


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of an operator: from the table, or from PyTorch's tag `pointwise`."""
    if node.op != "call_function" or any(isinstance(n, fx.Node) for n in node.kwargs.values()):
        return None
    schema, tags = getattr(node.target, "_schema", None), getattr(node.target, "tags", ())
    pointwise = torch.Tag.pointwise in tags and schema is not None and not schema.is_mutable
    return RULES.get(node.target) or (Rule(_elementwise) if pointwise else None)
