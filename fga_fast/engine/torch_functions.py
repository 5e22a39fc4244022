"""The torch functions that an explanation answers itself, under all their names.

One table for the engine and for the reference: a function is looked up here, and each side answers its kind in its own
way. Both follow a forward pass with a `FunctionMode` (function_mode.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]


class Kind(Enum):
    """What a function is to an explanation."""

    ATTENTION = auto()  # softmax(q k^T) v in one call
    HIDDEN_ATTENTION = auto()  # the kernels behind it, whose attention maps cannot be reached
    MULTI_HEAD_ATTENTION = auto()
    SOFTMAX = auto()  # over [B, H, N, N] in a block, it is the attention
    DROPOUT = auto()
    RANDOM = auto()
    LINEAR = auto()
    ADDITION = auto()  # it may end a block that is a list of modules
    # The following matter to the conservative backward pass only.
    LAYER_NORM = auto()
    NATIVE_LAYER_NORM = auto()  # also returns mean and 1 / scale
    RMS_NORM = auto()
    FUSED_RMS_NORM = auto()  # also returns 1 / scale
    ACTIVATION = auto()  # act(z) = z * gate
    RELU = auto()  # its gate is 0 or 1
    CONSTANT = auto()  # a scale or a length
    FACTOR = auto()  # a factor of an activation or norm that is written out; constant in blocks only
    STD_MEAN = auto()  # the first of its two results is such a factor
    POWER = auto()  # with the exponents 0.5 and -0.5, sqrt and rsqrt
    NORMALIZE = auto()
    COSINE = auto()
    GLU = auto()
    PRODUCT = auto()
    QUOTIENT = auto()


class Operation(NamedTuple):
    """What the table says of a function."""

    kind: Kind
    name: str  # as in torch, without the underscore of the form that works in place
    in_place: bool  # it always works in place; others may be told to by `inplace=True`
    limit: float  # of act(z) / z at z = 0, for an activation


_LIMITS = {"gelu": 0.5, "silu": 0.5, "hardswish": 0.5, "mish": 0.6}  # mish: tanh(log(2))
_NAMES: dict[Kind, tuple[str, ...]] = {
    Kind.ATTENTION: ("scaled_dot_product_attention",),
    Kind.MULTI_HEAD_ATTENTION: ("multi_head_attention_forward",),
    Kind.SOFTMAX: ("softmax", "_softmax", "_safe_softmax"),
    Kind.DROPOUT: (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"),
        *("feature_alpha_dropout", "native_dropout", "_fused_dropout"),
    ),
    Kind.RANDOM: (
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "binomial"),
        *("multinomial", "poisson", "normal", "uniform", "exponential", "random", "cauchy", "geometric", "log_normal"),
    ),
    Kind.LINEAR: ("linear",),
    Kind.ADDITION: ("add", "__add__", "__radd__", "__iadd__"),
    Kind.LAYER_NORM: ("layer_norm",),
    Kind.NATIVE_LAYER_NORM: ("native_layer_norm",),
    Kind.RMS_NORM: ("rms_norm",),
    Kind.FUSED_RMS_NORM: ("_fused_rms_norm",),
    Kind.ACTIVATION: tuple(_LIMITS),
    Kind.RELU: ("relu",),
    Kind.CONSTANT: ("rsqrt", "norm", "vector_norm", "frobenius_norm"),
    Kind.FACTOR: ("sigmoid", "expit", "hardsigmoid", "tanh", "erf", "sqrt", "std"),
    Kind.STD_MEAN: ("std_mean",),
    Kind.POWER: ("pow", "float_power", "__pow__", "__ipow__"),
    Kind.NORMALIZE: ("normalize",),
    Kind.COSINE: ("cosine_similarity",),
    Kind.GLU: ("glu",),
    Kind.PRODUCT: ("mul", "multiply", "__mul__", "__rmul__", "__imul__"),
    Kind.QUOTIENT: ("div", "divide", "true_divide", "__truediv__", "__itruediv__", "__div__", "__idiv__"),
}
# `torch.special.f` is `special_f` in aten, and `torch.linalg.f` is `linalg_f`. A call of `torch.ops.aten.f` arrives as
# that object, a call of `torch.ops.aten.f.overload` as the overload. Both take the arguments of `torch.f`, with `self`
# for `input`. `torch._refs` and `torch.ops.prims` are left out: compilers make them of functions seen here before.
_NAMESPACES: tuple[Any, ...] = (torch, F, Tensor, torch.special, torch.linalg, torch._C._nn, torch.ops.aten)


def _found(name: str) -> Iterator[Function]:
    """Every function of this name."""
    for space in _NAMESPACES:
        for prefix in ("", "special_", "linalg_"):
            function = getattr(space, prefix + name, None)
            if not callable(function):  # there is none, or it is the module torch.random
                continue
            yield function
            if space is torch.ops.aten:  # not TorchScript's, of numbers and lists
                overloads = (getattr(function, overload) for overload in function.overloads())
                tensors = ((o, (*o._schema.arguments, *o._schema.returns)) for o in overloads)
                yield from (o for o, parts in tensors if any(str(part.type) == "Tensor" for part in parts))


def _hidden() -> tuple[str, ...]:
    """Kernels of attention, forward: torch has many, and each version others."""
    names = {name.removeprefix("aten::").split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    private = (name for name in names if name.startswith("_") and not name.endswith("backward"))
    return tuple(n for n in private if "attention" in n or "encoder_layer" in n or n == "_masked_softmax")


def _table() -> dict[Function, Operation]:
    table: dict[Function, Operation] = {}
    for kind, names in {**_NAMES, Kind.HIDDEN_ATTENTION: _hidden()}.items():
        for name in names:
            plain = Operation(kind, name, name.startswith("__i"), _LIMITS.get(name, 0.0))
            table |= dict.fromkeys(_found(name), plain)
            if not name.endswith("_"):
                table |= dict.fromkeys(_found(name + "_"), plain._replace(in_place=True))
    return table


OPERATIONS: dict[Function, Operation] = _table()


class Kept:
    """A set of tensors by identity, until they are changed in place. It holds them, so no new tensor gets an old id."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, int]] = {}  # with the version, which counts changes in place
        self.clear = self._tensors.clear

    def add(self, tensor: Tensor) -> Tensor:
        if not tensor.is_inference():  # one has no version, and no gradient either
            self._tensors[id(tensor)] = tensor, tensor._version
        return tensor

    def __contains__(self, value: Any) -> bool:
        return id(value) in self._tensors and value._version == self._tensors[id(value)][1]


def depends(value: Any) -> bool:
    """Whether a value is a tensor with a gradient: one that depends on the tokens."""
    return isinstance(value, Tensor) and value.requires_grad
