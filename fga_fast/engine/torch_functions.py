"""The torch functions that an explanation does not leave as they are, under every name they have.

One table for the engine and for the reference: a function is looked up here, and each side answers its kind in its own
way. `FunctionMode` is the part that both sides share: what a model calls, and what no explanation can take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]


class Kind(Enum):
    """What a function is to an explanation."""

    ATTENTION = auto()  # softmax(q k^T) v in one call
    HIDDEN_ATTENTION = auto()  # the kernels behind it, whose attention maps cannot be reached
    MULTI_HEAD_ATTENTION = auto()
    SOFTMAX = auto()  # over [B, H, N, N] in a block, it is the attention
    DROPOUT = auto()
    LINEAR = auto()
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
    Kind.LINEAR: ("linear",),
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
# A function is `torch.special.f` in Python and `special_f` in aten, `torch.linalg.f` likewise. A model's call of
# `torch.ops.aten.f` arrives as that object and one of `torch.ops.aten.f.overload` as the overload, with the arguments
# of `torch.f` apart from `self` for `input`. `torch._refs` and `torch.ops.prims` are left out: they are what compilers
# decompose functions into, after they have been seen here.
_NAMESPACES: tuple[Any, ...] = (torch, F, Tensor, torch.special, torch.linalg, torch._C._nn, torch.ops.aten)


def _found(name: str) -> Iterator[Function]:
    """Every function of this name."""
    for space in _NAMESPACES:
        for prefix in ("", "special_", "linalg_"):
            function = getattr(space, prefix + name, None)
            if function is None:
                continue
            yield function
            if space is torch.ops.aten:  # all but TorchScript's, of numbers and lists
                overloads = (getattr(function, overload) for overload in function.overloads())
                yield from (o for o in overloads if any(str(a.type) == "Tensor" for a in o._schema.arguments))


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


class Progress(Protocol):
    """What a mode asks of the pass that it follows; see `models.block_io.ForwardPass`."""

    @property
    def explaining(self) -> bool:
        """Whether what runs now is differentiated."""

    def check_dropout(self, probability: float) -> None:
        """Refuses dropout that is on."""

    def refuse_hidden(self, name: str) -> None:
        """Refuses attention whose maps cannot be reached, in a block."""

    def check_out(self, name: str) -> None:
        """Refuses a result that is written into another tensor."""


class FunctionMode(TorchFunctionMode):
    """Sees every function that a model calls, and lets a handler answer those whose kind has one.

    `handlers[kind](operation, function, *args, **kwargs)` answers from the first explained block to the model's end.
    Parameters take part without their gradient, so what requires one is what depends on the tokens.
    """

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self.handlers: dict[Kind, Function] = {}
        # id of a parameter -> the parameter, so that no other object gets this id, and its values without a gradient
        self._detached: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for a in args:
            if type(a) is nn.Parameter:
                args = tuple(self._detach(a) if type(a) is nn.Parameter else a for a in args)
                break
        for name, value in kwargs.items():
            if type(value) is nn.Parameter:
                kwargs = {**kwargs, name: self._detach(value)}
        operation = OPERATIONS.get(func)
        if operation is None:
            return func(*args, **kwargs)
        if operation.kind is Kind.DROPOUT:
            self._progress.check_dropout(_dropped(operation, args, kwargs))
            return func(*args, **kwargs)
        if not self._progress.explaining:
            return func(*args, **kwargs)
        if operation.kind is Kind.HIDDEN_ATTENTION:
            self._progress.refuse_hidden(operation.name)
        if kwargs.get("out") is not None or "out0" in kwargs:
            if torch.is_grad_enabled() and any(map(_depends, (*args, *kwargs.values()))):
                self._progress.check_out(operation.name)
            return func(*args, **kwargs)
        handler = self.handlers.get(operation.kind)
        if handler is None:
            return func(*args, **kwargs)
        if "self" in kwargs:
            args, kwargs = (kwargs["self"], *args), {name: kwargs[name] for name in kwargs if name != "self"}
        return handler(operation, func, *args, **kwargs)

    def clear(self) -> None:
        """Lets go of everything, at the end of a pass. Handlers are bound methods, which would keep cycles alive."""
        self._detached.clear()
        self.handlers.clear()

    def _detach(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's values without its gradient; one tensor a parameter, so the cost is paid once a pass."""
        if id(parameter) not in self._detached:
            self._detached[id(parameter)] = parameter, parameter.detach()
        return self._detached[id(parameter)][1]


def _dropped(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The probability of a dropout that is on, else 0. All forms begin with (input, p, training), or say `train`."""
    if operation.name == "_fused_dropout":  # (input, share that is kept), always on
        return float(1 - kwargs.get("p", args[1] if len(args) > 1 else 0.5))
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return 0.0 if training is False else float(p)  # None, which native_dropout takes, means on


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
