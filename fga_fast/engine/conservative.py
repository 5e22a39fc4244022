"""The conservative backward pass: functions of the model whose non-linear factor is held constant in it.

With the scale of LayerNorm and RMSNorm, the gate act(z) / z of an activation, the attention map and the norm of a
feature vector constant, the model is linear in its tokens, so that at every block the sum over tokens of x . g, plus
the contributions of all bias terms, is the logit (A. Ali et al., XAI for Transformers: Better Explanations through
Conservative Propagation, ICML 2022; for activations cf. LibraGrad, CVPR 2025). The forward pass is not changed.

In a gated MLP, act(a) * b, all of act(a) is the gate, and b carries everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fga_fast.precision import relevance_dtype

Function = Callable[..., Any]


class _Norm(torch.autograd.Function):
    """y = (x - mean) / scale * weight + bias with a constant scale; without the mean for RMSNorm.

    `norm` computes y and 1 / scale from x. It is called here, so that y is no view and may be changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor | None,
        dims: tuple[int, ...], centred: bool,
    ) -> Tensor:  # fmt: skip
        y, inverse = norm(x)
        ctx.save_for_backward(inverse, *([] if weight is None else [weight]))
        ctx.dims, ctx.centred, ctx.dtype = dims, centred, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, *weight = ctx.saved_tensors
        g = grads[0].to(inverse.dtype)
        g = (g * weight[0] if weight else g) * inverse
        if ctx.centred:
            g = g - g.mean(ctx.dims, keepdim=True)
        return g.to(ctx.dtype), None, None, None, None


class _Gate(torch.autograd.Function):
    """y = x * (act(x) / x) with the second factor constant; `limit` is its value at 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Callable[[Tensor], Tensor], limit: float) -> Tensor:
        y = act(x)  # made here, so that it is no view and the model may change it in place
        ctx.save_for_backward((y / x).nan_to_num_(nan=limit))  # 0 / 0; other NaN is in y, where it is found
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gate,) = ctx.saved_tensors
        return grads[0] * gate, None, None


class Conservative:
    """Handlers of one forward pass: `handlers[function](function, *args, **kwargs)` answers a call of the model's."""

    def __init__(self) -> None:
        # Outputs of activations, which a product with something else makes the gate of a gated MLP. Kept here so that
        # no other tensor takes their ids, for one block at a time (see `forget`).
        self._activations: dict[int, Tensor] = {}
        self.in_block = False  # set by the tape
        self.handlers: dict[Function, Function] = {
            F.layer_norm: self._layer_norm,
            torch.layer_norm: self._layer_norm,
            F.rms_norm: self._rms_norm,
            torch.rms_norm: self._rms_norm,
            F.normalize: self._normalize,
            F.cosine_similarity: self._cosine,
            F.glu: self._glu,
        }
        limits: dict[Function, float] = {F.gelu: 0.5, F.silu: 0.5, F.hardswish: 0.5, F.mish: 0.6}  # of act(z) / z at 0
        self.handlers |= {act: self._activation(limit) for act, limit in limits.items()}
        self.handlers |= dict.fromkeys((F.relu, torch.relu, Tensor.relu), self._relu)
        # Factors of activations, scales and norms that a model writes out itself.
        for name in ("rsqrt", "norm"):
            self.handlers |= dict.fromkeys((getattr(torch, name), getattr(Tensor, name)), self._constant)
        self.handlers |= dict.fromkeys((torch.linalg.vector_norm, torch.linalg.norm), self._constant)
        # sqrt and std: of a LayerNorm that divides by them.
        for name in ("sigmoid", "tanh", "erf", "sqrt", "std"):
            self.handlers |= dict.fromkeys((getattr(torch, name), getattr(Tensor, name)), self._constant_in_blocks)
        others = (F.sigmoid, F.tanh, torch.special.erf, torch.special.expit, F.hardsigmoid)
        self.handlers |= dict.fromkeys(others, self._constant_in_blocks)
        quotients = (torch.div, torch.true_divide, Tensor.div, Tensor.true_divide, Tensor.__truediv__)
        self.handlers |= dict.fromkeys(quotients, self._quotient)
        products = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
        self.handlers |= dict.fromkeys((*products, Tensor.mul_, Tensor.__imul__), self._product)

    def forget(self) -> None:
        """Lets go of the activations of a block that has ended."""
        self._activations.clear()

    def _layer_norm(
        self, function: Function, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
        bias: Tensor | None = None, eps: float = 1e-5, *_: Any, **__: Any,
    ) -> Tensor:  # fmt: skip
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        # On CUDA autocast lets layer_norm compute in float32, and does not know this form of it.
        cast = input.is_cuda and torch.is_autocast_enabled("cuda") and input.dtype != torch.float64

        def norm(x: Tensor) -> tuple[Tensor, Tensor]:
            w, b = (t.float() if cast and t is not None else t for t in (weight, bias))
            y, _, inverse = torch.native_layer_norm(x.float() if cast else x, shape, w, b, eps)
            return y, inverse

        return _norm(input, norm, weight, len(shape), centred=True)

    def _rms_norm(
        self, function: Function, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:  # fmt: skip
        count = 1 if isinstance(normalized_shape, int) else len(normalized_shape)

        def norm(x: Tensor) -> tuple[Tensor, Tensor]:
            wide = x.to(relevance_dtype(x.dtype))
            square = wide.square().mean(tuple(range(-count, 0)), keepdim=True)
            inverse = (square + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
            return function(x, normalized_shape, weight, eps), inverse

        return _norm(input, norm, weight, count, centred=False)

    def _activation(self, limit: float) -> Function:
        def handler(function: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            def act(x: Tensor) -> Tensor:
                y: Tensor = function(x.clone() if kwargs.get("inplace") else x, *args, **kwargs)
                return y

            out: Tensor = _Gate.apply(input, act, limit)  # type: ignore[no-untyped-call]
            if kwargs.get("inplace"):
                out = input.copy_(out)  # the model may go on with either name
            self._activations[id(out)] = out
            return out

        return handler

    def _relu(self, function: Function, *args: Any, **kwargs: Any) -> Tensor:
        """Its gate is 0 or 1, constant as it is; it is only remembered, for the gated MLPs that it may open."""
        out: Tensor = function(*args, **kwargs)
        self._activations[id(out)] = out
        return out

    def _constant(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs).detach()

    def _constant_in_blocks(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        """A head that ends in a sigmoid or tanh would have no gradient left."""
        return function(*args, **kwargs).detach() if self.in_block else function(*args, **kwargs)

    def _normalize(
        self, _function: Function, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
    ) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(input, p, dim, keepdim=True)
        return input / length.clamp_min(eps).detach()

    def _cosine(self, _function: Function, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
        lengths = [torch.linalg.vector_norm(x, 2, dim, keepdim=True).clamp_min(eps).detach() for x in (x1, x2)]
        cosines: Tensor = (x1 / lengths[0] * (x2 / lengths[1])).sum(dim)
        return cosines

    def _glu(self, _function: Function, input: Tensor, dim: int = -1) -> Tensor:
        carrying, gate = input.chunk(2, dim)
        return carrying * gate.sigmoid().detach()

    def _quotient(self, function: Function, input: Any, other: Any, **kwargs: Any) -> Any:
        """An activation divided by a number is still one."""
        out = function(input, other, **kwargs)
        if id(input) in self._activations and not isinstance(other, Tensor):
            self._activations[id(out)] = out
        return out

    def _product(self, function: Function, input: Any, other: Any, **kwargs: Any) -> Any:
        """`act(a) * b` in a gated MLP with a constant act(a); any other product as it is."""
        tensors = [factor for factor in (input, other) if isinstance(factor, Tensor)]
        acts = [id(factor) in self._activations for factor in (input, other)]
        carrying = [isinstance(factor, Tensor) and factor.requires_grad for factor in (input, other)]
        if acts[0] and carrying[1] and input is not other:
            if function not in (Tensor.mul_, Tensor.__imul__):
                return function(input.detach(), other, **kwargs)
            del self._activations[id(input)]
            return input.copy_(input.detach().clone() * other)
        if acts[1] and carrying[0] and input is not other:
            return function(input, other.detach(), **kwargs)
        out = function(input, other, **kwargs)
        # Still an activation: 2 * act(a), and one that is written out, as z times a constant of the tokens' own shape.
        written_out = len(tensors) == 2 and input.dim() > 2 and input.shape == other.shape and sum(carrying) == 1
        if written_out or (any(acts) and len(tensors) == 1):
            self._activations[id(out)] = out
        return out


def _norm(
    x: Tensor, norm: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor | None, count: int, centred: bool
) -> Tensor:
    """What `norm` computes, with the gradient of a norm over the last `count` dimensions with a constant scale."""
    out: Tensor = _Norm.apply(x, norm, weight, tuple(range(-count, 0)), centred)  # type: ignore[no-untyped-call]
    return out
