"""The conservative backward pass: the model's non-linear factors are constants in it, so it is linear in its tokens.

Written with `.detach()`: what stands detached in a formula below is held constant. At every block the sum over tokens
of `x . g`, plus `b . dy/db` of all bias terms b after it, is then the explained value y. The forward pass is unchanged.

A. Ali, T. Schnake, O. Eberle, G. Montavon, K.-R. Müller, L. Wolf: XAI for Transformers: Better Explanations through
Conservative Propagation, ICML 2022 (attention map and LayerNorm); for activations and gated MLPs cf. F. Mehri, M. S.
Baghshah, M. T. Pilehvar: LibraGrad, CVPR 2025. ReLU and all other piecewise linear functions are conservative already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fga_fast.engine.torch_functions import Function, Kept, Kind, Operation, depends
from fga_fast.models.block_io import ForwardPass
from fga_fast.precision import relevance_dtype

# Every rule takes the table's entry and the function that the model calls, then its arguments.


def layer_norm(
    _operation: Operation,
    _func: Function,
    input: Tensor,  # [..., C]
    normalized_shape: Any,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
    *_rest: Any,
    **_more: Any,
) -> Tensor:
    """`y = (x - mean(x)) * [1 / sqrt(var(x) + eps)].detach() * weight + bias`; the mean is not constant."""
    shape = _shape(normalized_shape)
    dtype = F.layer_norm(input.detach(), shape, weight, bias, eps).dtype
    dims = tuple(range(-len(shape), 0))
    x = input.to(relevance_dtype(input.dtype))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt().detach()
    return _affine(y, weight, bias).to(dtype)


def rms_norm(
    _operation: Operation,
    _func: Function,
    input: Tensor,  # [..., C]
    normalized_shape: Any,
    weight: Tensor | None = None,  # [C]
    eps: float | None = None,
) -> Tensor:
    """`y = x * [1 / sqrt(mean(x^2) + eps)].detach() * weight`."""
    shape = _shape(normalized_shape)
    dtype = F.rms_norm(input.detach(), shape, weight, eps).dtype
    x = input.to(relevance_dtype(input.dtype))
    square = x.square().mean(tuple(range(-len(shape), 0)), keepdim=True)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(x * (square + eps).rsqrt().detach(), weight, None).to(dtype)


def with_statistics(rule: Function) -> Function:
    """Rule of a norm that also returns its statistics, which are constants."""

    def both(operation: Operation, func: Function, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        _, *statistics = func(*args, **kwargs)
        return rule(operation, func, *args, **kwargs), *(value.detach() for value in statistics)

    return both


def activation(operation: Operation, func: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`act(z) = z * [act(z) / z].detach()`."""
    z = input.detach().to(relevance_dtype(input.dtype))
    gate = torch.where(z == 0, operation.limit, func(z.clone(), *args, **kwargs) / z).to(input.dtype)
    return input.mul_(gate) if _in_place(operation, kwargs) else input * gate


def normalize(
    _operation: Operation, _func: Function, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12,
    out: None = None,
) -> Tensor:  # fmt: skip
    """`y = x / max(|x|, eps).detach()`."""
    length: Tensor = input.detach().norm(p, dim, keepdim=True)
    return input / length.clamp_min(eps)


def cosine_similarity(
    operation: Operation, func: Function, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8
) -> Tensor:
    """`y = a . b / (|a| |b|).detach()`."""
    a, b = (normalize(operation, func, x, 2.0, dim, eps) for x in (x1, x2))
    return (a * b).sum(dim)


def glu(_operation: Operation, _func: Function, input: Tensor, dim: int = -1) -> Tensor:
    """`y = a * sigmoid(b).detach()`, a and b the halves of the input."""
    a, b = input.chunk(2, dim)
    return a * b.sigmoid().detach()


RULES: dict[Kind, Function] = {
    Kind.LAYER_NORM: layer_norm,
    Kind.NATIVE_LAYER_NORM: with_statistics(layer_norm),
    Kind.RMS_NORM: rms_norm,
    Kind.FUSED_RMS_NORM: with_statistics(rms_norm),
    Kind.NORMALIZE: normalize,
    Kind.COSINE: cosine_similarity,
    Kind.GLU: glu,
}


class Conservative:
    """The rules of one forward pass: those above, and those that depend on where they are and on what came before.

    Args:
        passed: tells whether a block is running.
    """

    def __init__(self, passed: ForwardPass) -> None:
        self._passed = passed
        self._activated = Kept()
        self._constants = Kept()  # results in place, which still require a gradient

    def handlers(self) -> dict[Kind, Function]:
        """What answers each kind of function. Made anew, since methods kept in the object would be a cycle."""
        return {
            **RULES,
            Kind.ACTIVATION: lambda *args, **kwargs: self._activated.add(activation(*args, **kwargs)),
            # max(z, 0), whose gate is 0 or 1 and so constant as it is
            Kind.RELU: lambda _, func, *args, **kwargs: self._activated.add(func(*args, **kwargs)),
            Kind.CONSTANT: self._constant,
            Kind.FACTOR: self._factor,
            Kind.STD_MEAN: self._std_mean,
            Kind.POWER: self._power,
            Kind.PRODUCT: self._multiply,
            Kind.QUOTIENT: self._divide,
        }

    def forget(self) -> None:
        """To be called where a block ends."""
        self._activated.clear()
        self._constants.clear()

    def _constant(self, operation: Operation, func: Function, *args: Any, **kwargs: Any) -> Any:
        """`[f(x)].detach()`, where the model itself writes `x * f(x)` (RMSNorm) or `x / f(x)` (length of x)."""
        if not _in_place(operation, kwargs) or not args[0].requires_grad:
            out = func(*args, **kwargs)
            return out.detach() if isinstance(out, Tensor) else out
        x, *rest = args
        return self._constants.add(x.copy_(func(x.detach().clone(), *rest, **kwargs)))

    def _factor(self, operation: Operation, func: Function, *args: Any, **kwargs: Any) -> Any:
        """What a composed activation multiplies z by, such as QuickGELU's sigmoid(1.702 z), or a norm divides by.

        In blocks only: where a head's output is a sigmoid or tanh, a constant would leave no gradient.
        """
        in_block = self._passed.block is not None
        return self._constant(operation, func, *args, **kwargs) if in_block else func(*args, **kwargs)

    def _std_mean(self, operation: Operation, func: Function, *args: Any, **kwargs: Any) -> Any:
        """`std(x).detach(), mean(x)` in blocks."""
        std, mean = func(*args, **kwargs)
        return (std if self._passed.block is None else std.detach()), mean

    def _power(self, operation: Operation, func: Function, input: Any, exponent: Any, *args: Any, **kwargs: Any) -> Any:
        """`x ** 0.5` and `x ** -0.5` are sqrt and rsqrt."""
        rules = {0.5: self._factor, -0.5: self._constant} if isinstance(exponent, float) else {}
        if exponent in rules:
            return rules[exponent](operation, func, input, exponent, *args, **kwargs)
        return func(input, exponent, *args, **kwargs)

    def _divide(self, operation: Operation, func: Function, input: Any, other: Any, **kwargs: Any) -> Any:
        """An activation divided by a number is still one."""
        activated = input in self._activated and not isinstance(other, Tensor)
        out = func(input, other, **kwargs)
        return self._activated.add(out) if activated else out

    def _multiply(self, operation: Operation, func: Function, input: Any, other: Any, **kwargs: Any) -> Any:
        """`act(a).detach() * b` in a gated MLP, where b carries everything; any other product as it is."""
        if input in self._activated and self._depends(other) and input is not other:
            if operation.in_place:
                return input.copy_(input.detach().clone() * other)
            return func(input.detach(), other, **kwargs)
        if other in self._activated and self._depends(input) and input is not other:
            return func(input, other.detach(), **kwargs)
        numbers = not (isinstance(input, Tensor) and isinstance(other, Tensor))
        scaled = numbers and (input in self._activated or other in self._activated)
        activated = scaled or self._is_composed_activation(input, other)
        out = func(input, other, **kwargs)
        return self._activated.add(out) if activated else out

    def _is_composed_activation(self, a: Any, b: Any) -> bool:
        """z * [act(z) / z].detach(), element by element: a product with a constant of the tokens' own shape."""
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dim() < 3 or a.shape != b.shape:
            return False
        return self._depends(a) != self._depends(b)

    def _depends(self, value: Any) -> bool:
        return depends(value) and value not in self._constants


def _in_place(operation: Operation, kwargs: dict[str, Any]) -> bool:
    return operation.in_place or bool(kwargs.get("inplace"))


def _shape(normalized_shape: Any) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:  # [..., C] [C] [C]
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
