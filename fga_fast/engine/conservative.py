"""The conservative backward pass: the non-linear factors of a model's functions are held constant in it.

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

from fga_fast.engine.torch_functions import Function, Kept, Kind, Operation, depends
from fga_fast.models.block_io import ForwardPass
from fga_fast.precision import relevance_dtype


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
    """Handlers of one forward pass, for the kinds of function that have a non-linear factor."""

    def __init__(self, passed: ForwardPass) -> None:
        self._passed = passed
        self._activations = Kept()  # outputs, which a product with something else makes the gate of a gated MLP
        self._constants = Kept()  # results computed in place: constants, although they still require a gradient

    def handlers(self) -> dict[Kind, Function]:
        """What answers each kind of function. Made anew, since methods kept in the object would be a cycle."""
        return {
            Kind.LAYER_NORM: self._layer_norm,
            Kind.NATIVE_LAYER_NORM: self._native_layer_norm,
            Kind.RMS_NORM: self._rms_norm,
            Kind.FUSED_RMS_NORM: self._fused_rms_norm,
            Kind.ACTIVATION: self._activation,
            Kind.RELU: self._relu,
            Kind.CONSTANT: self._constant,
            Kind.FACTOR: self._factor,
            Kind.STD_MEAN: self._std_mean,
            Kind.POWER: self._power,
            Kind.NORMALIZE: self._normalize,
            Kind.COSINE: self._cosine,
            Kind.GLU: self._glu,
            Kind.PRODUCT: self._product,
            Kind.QUOTIENT: self._quotient,
        }

    def forget(self) -> None:
        """Lets go of the tensors of a block that has ended."""
        self._activations.clear()
        self._constants.clear()

    def _layer_norm(
        self, _operation: Operation, _function: Function, input: Tensor, normalized_shape: Any,
        weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any, **__: Any,
    ) -> Tensor:  # fmt: skip
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        # On CUDA autocast lets layer_norm compute in float32, and does not know this form of it.
        cast = input.is_cuda and torch.is_autocast_enabled("cuda") and input.dtype != torch.float64

        def norm(x: Tensor) -> tuple[Tensor, Tensor]:
            w, b = (t.float() if cast and t is not None else t for t in (weight, bias))
            y, _, inverse = torch.native_layer_norm(x.float() if cast else x, shape, w, b, eps)
            return y, inverse

        return _norm(input, norm, weight, len(shape), centred=True)

    def _native_layer_norm(self, operation: Operation, function: Function, *args: Any, **kwargs: Any) -> Any:
        _, mean, inverse = function(*args, **kwargs)
        return self._layer_norm(operation, function, *args, **kwargs), mean.detach(), inverse.detach()

    def _rms_norm(
        self, _operation: Operation, _function: Function, input: Tensor, normalized_shape: Any,
        weight: Tensor | None = None, eps: float | None = None,
    ) -> Tensor:  # fmt: skip
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)

        def norm(x: Tensor) -> tuple[Tensor, Tensor]:
            wide = x.to(relevance_dtype(x.dtype))
            square = wide.square().mean(tuple(range(-len(shape), 0)), keepdim=True)
            inverse = (square + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
            return F.rms_norm(x, shape, weight, eps), inverse

        return _norm(input, norm, weight, len(shape), centred=False)

    def _fused_rms_norm(self, operation: Operation, function: Function, *args: Any, **kwargs: Any) -> Any:
        _, inverse = function(*args, **kwargs)
        return self._rms_norm(operation, function, *args, **kwargs), inverse.detach()

    def _activation(self, operation: Operation, function: Function, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        in_place = operation.in_place or kwargs.get("inplace")

        def act(x: Tensor) -> Tensor:
            y: Tensor = function(x.clone() if in_place else x, *args, **kwargs)
            return y

        out: Tensor = _Gate.apply(input, act, operation.limit)  # type: ignore[no-untyped-call]
        # In place the model may go on with either name.
        return self._activations.add(input.copy_(out) if in_place else out)

    def _relu(self, _operation: Operation, function: Function, *args: Any, **kwargs: Any) -> Tensor:
        """Its gate is 0 or 1, constant as it is; it is only remembered, for the gated MLPs that it may open."""
        return self._activations.add(function(*args, **kwargs))

    def _constant(self, operation: Operation, function: Function, *args: Any, **kwargs: Any) -> Any:
        if not (operation.in_place or kwargs.get("inplace")) or not args[0].requires_grad:
            found = function(*args, **kwargs)
            return found.detach() if isinstance(found, Tensor) else found
        out = args[0].copy_(function(args[0].detach().clone(), *args[1:], **kwargs))  # its gradient ends here
        return self._constants.add(out)

    def _factor(self, operation: Operation, function: Function, *args: Any, **kwargs: Any) -> Any:
        """A head that ends in a sigmoid or tanh would have no gradient left."""
        if self._passed.block is None:
            return function(*args, **kwargs)
        return self._constant(operation, function, *args, **kwargs)

    def _std_mean(self, _operation: Operation, function: Function, *args: Any, **kwargs: Any) -> Any:
        std, mean = function(*args, **kwargs)
        return (std if self._passed.block is None else std.detach()), mean

    def _power(
        self, operation: Operation, function: Function, input: Any, exponent: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """sqrt and rsqrt by another name, or an ordinary function."""
        if isinstance(exponent, float) and abs(exponent) == 0.5:
            root = self._factor if exponent > 0 else self._constant
            return root(operation, function, input, exponent, *args, **kwargs)
        return function(input, exponent, *args, **kwargs)

    def _normalize(
        self, _operation: Operation, _function: Function, input: Tensor, p: float = 2.0, dim: int = 1,
        eps: float = 1e-12, out: None = None,
    ) -> Tensor:  # fmt: skip
        length: Tensor = torch.linalg.vector_norm(input, p, dim, keepdim=True)
        return input / length.clamp_min(eps).detach()

    def _cosine(
        self, _operation: Operation, _function: Function, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8
    ) -> Tensor:
        lengths = [torch.linalg.vector_norm(x, 2, dim, keepdim=True).clamp_min(eps).detach() for x in (x1, x2)]
        cosines: Tensor = (x1 / lengths[0] * (x2 / lengths[1])).sum(dim)
        return cosines

    def _glu(self, _operation: Operation, _function: Function, input: Tensor, dim: int = -1) -> Tensor:
        carrying, gate = input.chunk(2, dim)
        return carrying * gate.sigmoid().detach()

    def _quotient(self, _operation: Operation, function: Function, input: Any, other: Any, **kwargs: Any) -> Any:
        """An activation divided by a number is still one."""
        still = input in self._activations and not isinstance(other, Tensor)
        out = function(input, other, **kwargs)
        return self._activations.add(out) if still else out

    def _product(self, operation: Operation, function: Function, input: Any, other: Any, **kwargs: Any) -> Any:
        """`act(a) * b` in a gated MLP with a constant act(a); any other product as it is."""
        acts = [factor in self._activations for factor in (input, other)]
        carrying = [depends(factor) and factor not in self._constants for factor in (input, other)]
        if acts[0] and carrying[1] and input is not other:
            if operation.in_place:
                return input.copy_(input.detach().clone() * other)
            return function(input.detach(), other, **kwargs)
        if acts[1] and carrying[0] and input is not other:
            return function(input, other.detach(), **kwargs)
        # Still an activation: 2 * act(a), and one that is written out, as z times a constant of the tokens' own shape.
        tensors = [factor for factor in (input, other) if isinstance(factor, Tensor)]
        written_out = len(tensors) == 2 and input.dim() > 2 and input.shape == other.shape and sum(carrying) == 1
        out = function(input, other, **kwargs)
        return self._activations.add(out) if written_out or (any(acts) and len(tensors) == 1) else out


def _norm(
    x: Tensor, norm: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor | None, count: int, centred: bool
) -> Tensor:
    """What `norm` computes, with the gradient of a norm over the last `count` dimensions with a constant scale."""
    out: Tensor = _Norm.apply(x, norm, weight, tuple(range(-count, 0)), centred)  # type: ignore[no-untyped-call]
    return out
