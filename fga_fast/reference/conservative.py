"""The conservative backward pass: the model's non-linear factors are constants in it, so it is linear in its tokens.

Written with `.detach()`: what stands detached in a formula below is held constant. At every block the sum over tokens
of `x . g`, plus `b . dy/db` of all bias terms b after it, is then the explained value y. The forward pass is unchanged.

A. Ali, T. Schnake, O. Eberle, G. Montavon, K.-R. Müller, L. Wolf: XAI for Transformers: Better Explanations through
Conservative Propagation, ICML 2022 (attention map and LayerNorm); for activations and gated MLPs cf. F. Mehri, M. S.
Baghshah, M. T. Pilehvar: LibraGrad, CVPR 2025. ReLU and all other piecewise linear functions are conservative already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fga_fast.precision import relevance_dtype

if TYPE_CHECKING:
    from fga_fast.reference.recording import Recording

Function = Callable[..., Any]


def layer_norm(
    func: Function,
    input: Tensor,  # [..., C]
    normalized_shape: Any,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
    *rest: Any,
    **more: Any,
) -> Tensor:
    """`y = (x - mean(x)) * [1 / sqrt(var(x) + eps)].detach() * weight + bias`; the mean is not constant."""
    dtype = func(input.detach(), normalized_shape, weight, bias, eps, *rest, **more).dtype
    dims = _last_dims(normalized_shape)
    x = input.to(relevance_dtype(input.dtype))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt().detach()
    return _affine(y, weight, bias).to(dtype)


def rms_norm(
    func: Function,
    input: Tensor,  # [..., C]
    normalized_shape: Any,
    weight: Tensor | None = None,  # [C]
    eps: float | None = None,
) -> Tensor:
    """`y = x * [1 / sqrt(mean(x^2) + eps)].detach() * weight`."""
    dtype = func(input.detach(), normalized_shape, weight, eps).dtype
    x = input.to(relevance_dtype(input.dtype))
    square = x.square().mean(_last_dims(normalized_shape), keepdim=True)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(x * (square + eps).rsqrt().detach(), weight, None).to(dtype)


def activation(limit: float) -> Function:
    """Rule of an activation with `act(z) / z -> limit` at z = 0."""

    def rule(func: Function, input: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Tensor:
        """`act(z) = z * [act(z) / z].detach()`."""
        z = input.detach().to(relevance_dtype(input.dtype))
        gate = torch.where(z == 0, limit, func(z, *args, **kwargs) / z).to(input.dtype)
        return input.mul_(gate) if inplace else input * gate

    return rule


def constant(func: Function, *args: Any, **kwargs: Any) -> Any:
    """`[f(x)].detach()`, where the model itself writes `x * f(x)` (RMSNorm) or `x / f(x)` (feature normalisation)."""
    return func(*args, **kwargs).detach()


def exact(func: Function, *args: Any, **kwargs: Any) -> Tensor:
    """`y = max(z, 0)`, whose gate is 0 or 1 and so constant as it is; known for the gated MLPs it may open."""
    out: Tensor = func(*args, **kwargs)
    return out


def normalize(
    func: Function, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """`y = x / max(|x|, eps).detach()`."""
    length: Tensor = input.detach().norm(p, dim, keepdim=True)
    return input / length.clamp_min(eps)


def cosine_similarity(func: Function, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """`y = a . b / (|a| |b|).detach()`."""
    return (normalize(func, x1, 2.0, dim, eps) * normalize(func, x2, 2.0, dim, eps)).sum(dim)


def glu(func: Function, input: Tensor, dim: int = -1) -> Tensor:
    """`y = a * sigmoid(b).detach()`, a and b the halves of the input."""
    a, b = input.chunk(2, dim)
    return a * b.sigmoid().detach()


RULES: dict[Function, Function] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.gelu: activation(0.5),
    F.silu: activation(0.5),
    F.hardswish: activation(0.5),
    F.mish: activation(0.6),  # tanh(log(2))
    F.relu: exact,
    torch.relu: exact,
    Tensor.relu: exact,
    torch.rsqrt: constant,
    Tensor.rsqrt: constant,
    torch.norm: constant,
    Tensor.norm: constant,
    torch.linalg.norm: constant,
    torch.linalg.vector_norm: constant,
    F.normalize: normalize,
    F.cosine_similarity: cosine_similarity,
    F.glu: glu,
}
ACTIVATIONS = (F.gelu, F.silu, F.hardswish, F.mish, F.relu, torch.relu, Tensor.relu)
# What a composed activation multiplies z by: QuickGELU z * sigmoid(1.702 z), GELU z * (1 + erf(z / sqrt(2))) / 2 and
# its tanh form. In blocks only: where a head's output is a sigmoid or tanh, a constant would leave no gradient.
GATES = (
    *(torch.sigmoid, Tensor.sigmoid, torch.special.expit, F.hardsigmoid),
    *(torch.tanh, Tensor.tanh),
    *(torch.sqrt, Tensor.sqrt, torch.std, Tensor.std),  # of a LayerNorm that is written out
    *(torch.erf, Tensor.erf, torch.special.erf),
)
# x * y, 2 * x and x *= y arrive as Tensor.mul and Tensor.mul_ too.
PRODUCTS = (torch.mul, Tensor.mul, torch.multiply, Tensor.multiply)
QUOTIENTS = (torch.div, Tensor.div, torch.true_divide, Tensor.true_divide, Tensor.__truediv__)
PRODUCTS_IN_PLACE = (Tensor.mul_, Tensor.multiply_)


class ConservativeMode(TorchFunctionMode):
    """Answers the functions of `RULES` by their formulas, and products in gated MLPs."""

    def __init__(self, record: Recording) -> None:
        super().__init__()
        self.record = record
        self._block: int | None = None
        self._activated: dict[int, Tensor] = {}  # by id; the tensors are kept, so that no other takes their ids

    def __torch_function__(
        self,
        func: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._block != self.record.block:
            self._block = self.record.block
            self._activated.clear()
        # Without its parameters, what requires a gradient is what depends on the tokens.
        args = tuple(_without_gradient(value) for value in args)
        kwargs = {name: _without_gradient(value) for name, value in (kwargs or {}).items()}
        if func in PRODUCTS or func in PRODUCTS_IN_PLACE:
            return self._multiply(func, *args, **kwargs)
        if func in QUOTIENTS and self._is_activated(args[0]) and not isinstance(args[1], Tensor):
            out = func(*args, **kwargs)  # an activation divided by a number is still one
            self._activated[id(out)] = out
            return out
        if func in GATES and self._block is not None:
            return constant(func, *args, **kwargs)
        if func not in RULES:
            return func(*args, **kwargs)
        out = RULES[func](func, *args, **kwargs)
        if func in ACTIVATIONS:
            self._activated[id(out)] = out
        return out

    def _multiply(self, func: Function, input: Any, other: Any, **kwargs: Any) -> Any:
        """`act(a).detach() * b` in a gated MLP, where b carries everything; any other product as it is."""
        if self._is_activated(input) and _depends(other) and input is not other:
            if func not in PRODUCTS_IN_PLACE:
                return func(input.detach(), other, **kwargs)
            del self._activated[id(input)]
            return input.copy_(input.detach().clone() * other)
        if self._is_activated(other) and _depends(input) and input is not other:
            return func(input, other.detach(), **kwargs)
        out = func(input, other, **kwargs)
        scaled = any(map(self._is_activated, (input, other))) and not all(isinstance(x, Tensor) for x in (input, other))
        if scaled or _is_composed_activation(input, other):
            self._activated[id(out)] = out
        return out

    def _is_activated(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._activated


def _depends(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_composed_activation(a: Any, b: Any) -> bool:
    """z * [act(z) / z].detach(), element by element: a product with a constant of the tokens' own shape."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dim() < 3 or a.shape != b.shape:
        return False
    return _depends(a) != _depends(b)


def _without_gradient(value: Any) -> Any:
    return value.detach() if type(value) is nn.Parameter else value


def _last_dims(normalized_shape: Any) -> tuple[int, ...]:
    return tuple(range(-len(normalized_shape), 0))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:  # [..., C] [C] [C]
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
