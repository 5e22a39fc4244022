"""The torch functions that an explanation answers itself, under all their names.

One table for the engine and for the reference: a function is looked up here, and each side answers its kind in its own
way. Both follow a forward pass with a `FunctionMode`, which finds the attentions and refuses what cannot be explained.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fga_fast.models.block_io import Arguments, ForwardPass, ordinary, with_stream
from fga_fast.models.layout import LISTS, ends
from fga_fast.models.multihead import open_multi_head_attention

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


_thread = threading.local()  # threads share the model and its hooks, which act only in the thread that runs the mode


class FunctionMode(TorchFunctionMode, ABC):
    """Follows one forward pass: sees the model's blocks begin and end, and every function that the model calls.

    `handlers[kind](operation, function, *args, **kwargs)` answers from the first explained block to the model's end.
    Parameters take part without their gradient, so what requires one is what depends on the tokens.
    """

    def __init__(self, passed: ForwardPass) -> None:
        super().__init__()
        self.passed = passed
        self.handlers: dict[Kind, Function] = {
            Kind.ATTENTION: self._attend,
            Kind.MULTI_HEAD_ATTENTION: self._open,
            Kind.SOFTMAX: self._softmax,
        }
        # Of a block that is a list of modules: what its last one returned, until it is added to the stream; and the
        # stream that enters it, with what takes its place until the block ends.
        self._unadded: tuple[int, Any] | None = None
        self._replaced: tuple[Any, Any] | None = None
        # id of a parameter -> the parameter, so that no other object gets this id, and its values without a gradient
        self._detached: dict[int, tuple[nn.Parameter, Tensor]] = {}

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

    # -- what both sides share ---------------------------------------------------------------------------------

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follows calls made in this thread. Hooks and mode are gone afterwards, whatever happens."""
        outer, handles = getattr(_thread, "mode", None), []
        try:
            _thread.mode = self
            for index, block in enumerate(self.passed.layout.blocks):
                first, last = ends(block)
                handles.append(first.register_forward_pre_hook(self._entering(index), with_kwargs=True))
                handles.append(last.register_forward_hook(self._leaving(index, whole=last is block)))
            with torch.enable_grad(), self:
                yield
            self._check_added()
        finally:
            for handle in handles:
                handle.remove()
            _thread.mode = outer
            self.clear()

    def clear(self) -> None:
        """Lets go of everything, at the end of a pass. Handlers are bound methods, which would keep cycles alive."""
        self._detached.clear()
        self.handlers.clear()
        self._unadded = self._replaced = None

    def _entering(self, index: int) -> Function:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if getattr(_thread, "mode", None) is not self:
                return None
            self._check_added()
            self.passed.enter(index, (args, kwargs))
            if not self.passed.live:
                return None
            arguments = ordinary((args, kwargs or {}))
            tapped = self.tap_input(index, arguments)
            if tapped is not None and isinstance(self.passed.layout.blocks[index], LISTS):
                pairs = zip(*((*a, *k.values()) for a, k in (arguments, tapped)), strict=True)
                self._replaced = next(pair for pair in pairs if pair[0] is not pair[1])
            return arguments if tapped is None else tapped

        return hook

    def _leaving(self, index: int, whole: bool) -> Function:
        """`whole`: the module is the block, and not the last one of a list."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if getattr(_thread, "mode", None) is not self:
                return None
            if whole:
                return self._left(index, output)
            self._unadded = index, output
            return None

        return hook

    def _left(self, index: int, output: Any) -> Any:
        """What the model goes on with in place of a block's output."""
        self._unadded = self._replaced = None
        x = self.passed.leave(index, output)
        if x is None:
            return output
        tapped = self.tap_output(index, x)
        if tapped is None and x._is_view():  # a change in place would replace its place in autograd's graph
            tapped = x.clone()
        self.passed.hand_on(index, x if tapped is None else tapped)
        return output if tapped is None else with_stream(output, tapped)

    def _check_added(self) -> None:
        if self._unadded is not None:
            self.passed.refuse_list(self._unadded[0])

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
        if not passed.live:
            out: Tensor = function(query, key, value, attn_mask, scale=scale)
            return out
        tapped = self.tap_attention(function, query, key, value, attn_mask, scale)
        passed.attended_with(tapped)
        return tapped

    def _softmax(self, _operation: Operation, function: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Taps the maps [B, H, Nq, N] or [B H, Nq, N] of a model that writes out its attention; others pass."""
        maps: Tensor = function(input, *args, **kwargs)
        by_head = self.passed.map_of(maps, kwargs.get("dim", args[0] if args else None))
        if by_head is None:
            return maps
        tapped = self.tap_map(by_head, input)
        self.passed.attended_with(tapped)
        self.passed.keep_map(tapped)
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
        for a in args:
            if type(a) is nn.Parameter:
                args = tuple(self._detach(a) if type(a) is nn.Parameter else a for a in args)
                break
        for name, value in kwargs.items():
            if type(value) is nn.Parameter:
                kwargs = {**kwargs, name: self._detach(value)}
        if self._replaced is not None:
            old, new = self._replaced
            args, kwargs = tree_map(lambda value: new if value is old else value, (args, kwargs))
        operation = OPERATIONS.get(func)
        if operation is None:
            return func(*args, **kwargs)
        if operation.kind is Kind.DROPOUT:
            self.passed.check_dropout(_dropped(operation, args, kwargs))
            return func(*args, **kwargs)
        if operation.kind is Kind.RANDOM and kwargs.get("generator") is None and torch.is_grad_enabled():
            drawn = None if "out" in kwargs else func(*args, **kwargs)
            if drawn is None or drawn.dim():  # single numbers are drawn by models that only may drop
                self.passed.refuse_random(operation.name)
            return drawn
        if operation.kind is Kind.ADDITION and self._unadded is not None:
            index, output = self._unadded
            if any(value is output for value in (*args, *kwargs.values())):
                return self._left(index, func(*args, **kwargs))
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
    return 0.0 if training is not None and not training else float(p)  # None, for native_dropout, means on


def depends(value: Any) -> bool:
    """Whether a value is a tensor with a gradient: one that depends on the tokens."""
    return isinstance(value, Tensor) and value.requires_grad
