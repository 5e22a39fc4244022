"""The torch functions that an explanation answers itself, under all their names.

One table for the engine and for the reference: a function is looked up here, and each side answers its kind in its own
way. Both follow a forward pass with a `FunctionMode`, which finds the attentions and refuses what cannot be explained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fga_fast.models.block_io import Arguments, ForwardPass, with_stream
from fga_fast.models.follower import followed_by, is_following
from fga_fast.models.multihead import open_multi_head_attention

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
# `torch.special.f` is `special_f` in aten, and `torch.linalg.f` is `linalg_f`. A call of `torch.ops.aten.f` arrives as
# that object, a call of `torch.ops.aten.f.overload` as the overload. Both take the arguments of `torch.f`, with `self`
# for `input`. `torch._refs` and `torch.ops.prims` are left out: compilers make them of functions seen here before.
_NAMESPACES: tuple[Any, ...] = (torch, F, Tensor, torch.special, torch.linalg, torch._C._nn, torch.ops.aten)


def _found(name: str) -> Iterator[Function]:
    """Every function of this name."""
    for space in _NAMESPACES:
        for prefix in ("", "special_", "linalg_"):
            function = getattr(space, prefix + name, None)
            if function is None:
                continue
            yield function
            if space is torch.ops.aten:  # not TorchScript's, of numbers and lists
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


class FunctionMode(TorchFunctionMode, ABC):
    """Follows one forward pass: sees the model's blocks begin and end, and every function that the model calls.

    `handlers[kind](operation, function, *args, **kwargs)` answers from the first explained block to the model's end.
    Parameters, and all else that has a gradient from before the pass, take part without it. So what requires a gradient
    is what depends on the tokens.
    """

    def __init__(self, passed: ForwardPass) -> None:
        super().__init__()
        self.passed = passed
        self.handlers: dict[Kind, Function] = {
            Kind.ATTENTION: self._attend,
            Kind.MULTI_HEAD_ATTENTION: self._open,
            Kind.SOFTMAX: self._softmax,
            Kind.LINEAR: self._linear,
        }
        # id of a weight -> the weight, so that no other object gets this id, and its values without a gradient
        self._detached: dict[int, tuple[Tensor, Tensor]] = {}
        self._first_node = 0  # autograd's number of the first node of the pass; a thread numbers its nodes in order

    # -- what each side answers in its own way -----------------------------------------------------------------

    @abstractmethod
    def tap_attention(
        self,
        function: Function,
        query: Tensor,  # [B, H, Nq, D]
        key: Tensor,  # [B, H, N, D]
        value: Tensor,  # [B, H, N, Dv]
        mask: Tensor | None,  # additive, broadcastable to [B, H, Nq, N]
        scale: float | None,
    ) -> Tensor:
        """The output [B, H, Nq, Dv] of an attention of the running block or of the pool."""

    @abstractmethod
    def tap_map(self, maps: Tensor, logits: Tensor) -> Tensor:  # [B, H, Nq, N]; before the softmax
        """What such an attention that the model writes out goes on with in place of its maps."""

    @abstractmethod
    def tap_input(self, index: int, arguments: Arguments) -> Arguments | None:
        """What block `index` is called with in place of `arguments`; None: these."""

    @abstractmethod
    def tap_output(self, index: int, x: Tensor) -> Tensor | None:  # [B, N, C], or [N, B, C]
        """What the model goes on with in place of the residual stream after block `index`; None: x."""

    def tap_linear(self, function: Function, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The output of a linear layer."""
        out: Tensor = function(*args, **kwargs)
        return out

    def is_own(self, leaf: Tensor) -> bool:
        """Whether this side made a leaf of the graph and handed it to the model."""
        return False

    # -- what both sides share ---------------------------------------------------------------------------------

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follows calls made in this thread. Hooks and mode are gone afterwards, whatever happens."""
        handles = []
        self._first_node = torch._C._autograd._get_sequence_nr()
        try:
            for index, block in enumerate(self.passed.layout.blocks):
                handles.append(block.register_forward_pre_hook(self._entering(index), with_kwargs=True))
                handles.append(block.register_forward_hook(self._leaving(index)))
            with followed_by(self), torch.enable_grad(), torch._C._EnableTorchFunction(), self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.clear()

    def clear(self) -> None:
        """Lets go of everything, at the end of a pass. Handlers are bound methods, which would keep cycles alive."""
        self._detached.clear()
        self.handlers.clear()

    def _entering(self, index: int) -> Function:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if not is_following(self):
                return None
            self.passed.enter(index)
            return self.tap_input(index, (args, kwargs or {}))

        return hook

    def _leaving(self, index: int) -> Function:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if not is_following(self):
                return None
            x = self.passed.leave(index, output)
            tapped = None if x is None else self.tap_output(index, x)
            if tapped is None:
                return None
            self.passed.stream = tapped
            return with_stream(output, tapped)

        return hook

    def _attend(
        self, _operation: Operation, function: Function, query: Tensor, key: Tensor, value: Tensor,
        attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Answers scaled_dot_product_attention. Grouped queries share repeated keys and values."""
        passed = self.passed
        if not passed.is_tapped(query.shape[-2], key.shape[-2]):
            settings = {"scale": scale, "enable_gqa": enable_gqa}
            outside: Tensor = function(query, key, value, attn_mask, dropout_p, is_causal, **settings)
            passed.pass_by(outside, query.shape[-2], key.shape[-2])
            return outside
        passed.check_call(attn_mask, dropout_p, is_causal)
        if enable_gqa:
            key, value = passed.share_heads(query, key, value)
        passed.attend(query.shape, key.shape)
        out = self.tap_attention(function, query, key, value, attn_mask, scale)
        if passed.block is None:
            passed.pool = out
        return out

    def _softmax(self, _operation: Operation, function: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Taps the maps [B, H, Nq, N] or [B H, Nq, N] of a model that writes out its attention; others pass."""
        maps: Tensor = function(input, *args, **kwargs)
        by_head = self.passed.map_of(maps, kwargs.get("dim", args[0] if args else None))
        if by_head is None:
            return maps
        tapped = self.tap_map(by_head, input)
        if self.passed.block is None:
            self.passed.pool = tapped
        return tapped if maps.dim() == 4 else tapped.flatten(0, 1)

    def _open(
        self, _operation: Operation, function: Function, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self.passed.is_tapped(len(query), len(key)):
            with self:  # its projections and its attention are to be seen
                return open_multi_head_attention(query, key, *args, **kwargs)
        found = function(query, key, *args, **kwargs)
        self.passed.pass_by(found[0], len(query), len(key))
        return found

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_following(self):
            return func(*args, **kwargs)
        args = tuple(map(self._without_gradient, args))
        if kwargs:
            kwargs = {name: self._without_gradient(value) for name, value in kwargs.items()}
        operation = OPERATIONS.get(func)
        if operation is None:
            return func(*args, **kwargs)
        if operation.kind is Kind.DROPOUT:
            self.passed.check_dropout(_dropped(operation, args, kwargs))
            return func(*args, **kwargs)
        if not self.passed.explaining:
            return func(*args, **kwargs)
        if operation.kind is Kind.HIDDEN_ATTENTION:
            self.passed.refuse_hidden(operation.name)
        if kwargs.get("out") is not None or "out0" in kwargs:
            if torch.is_grad_enabled() and any(map(depends, (*args, *kwargs.values()))):
                self.passed.check_out(operation.name)
            return func(*args, **kwargs)
        handler = self.handlers.get(operation.kind)
        if handler is None:
            return func(*args, **kwargs)
        if "self" in kwargs:
            args, kwargs = (kwargs["self"], *args), {name: kwargs[name] for name in kwargs if name != "self"}
        return handler(operation, func, *args, **kwargs)

    def _linear(self, _operation: Operation, function: Function, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Refuses weights of which another process has a part, and the product of activations that were quantised."""
        weight = kwargs["weight"] if "weight" in kwargs else args[1]
        self.passed.check_whole(weight)
        out = self.tap_linear(function, *args, **kwargs)
        if not out.requires_grad and torch.is_grad_enabled() and any(map(depends, (*args, *kwargs.values()))):
            self.passed.refuse_cut_linear(type(weight).__name__)
        return out

    def _without_gradient(self, value: Any) -> Any:
        """An argument of a function. What has a gradient that is not of this pass is replaced by its values."""
        if isinstance(value, Tensor):
            return self._detach(value) if value.requires_grad and self._is_older(value) else value
        if type(value) in (list, tuple):
            return type(value)(map(self._without_gradient, value))
        return value

    def _is_older(self, tensor: Tensor) -> bool:
        """Whether a tensor's gradient is from before this pass: a parameter, or made of one for all passes."""
        if tensor.grad_fn is None:
            return not self.is_own(tensor)
        return tensor.grad_fn._sequence_nr() < self._first_node

    def _detach(self, weight: Tensor) -> Tensor:
        """The weight's values without its gradient; one tensor a weight, so the cost is paid once a pass."""
        if id(weight) not in self._detached:
            self._detached[id(weight)] = weight, weight.detach()
        return self._detached[id(weight)][1]


def _dropped(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The probability of a dropout that is on, else 0. All forms begin with (input, p, training), or say `train`."""
    if operation.name == "_fused_dropout":  # (input, share that is kept), always on
        return float(1 - kwargs.get("p", args[1] if len(args) > 1 else 0.5))
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return 0.0 if training is not None and not training else float(p)  # None, for native_dropout, means on


def depends(value: Any) -> bool:
    """Whether a value is a tensor with a gradient: one that depends on the tokens."""
    return isinstance(value, Tensor) and value.requires_grad
