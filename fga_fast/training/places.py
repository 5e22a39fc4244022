"""Products of a matrix of codes [T, F] that is zero nearly everywhere, and their gradients, at the price of its codes.

A step of a dense trainer is one product of T x C x F for the pre-activations and five more for reconstruction and
gradients. Only the first is needed: with k codes a token each of the others costs T x C x k.

Both classes know where the codes are, and take their values as a tensor of a shape of their own: `Sparse` [n], `Dense`
[T, F]. With them

    z = places.product(pre, x, W_enc, bias)    # pre-activations at the places, differentiable
    y = places.times(values, W_dec)            # codes @ W_dec, differentiable

For matryoshka SAEs a code of token t in group g is in row g T + t, so that one product gives each group's part.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Dense:
    """All of a matrix of codes [T, F]; for SAEs in the first steps, when many features fire, and for few features."""

    def __init__(self, features: int) -> None:
        self.features = features

    def product(self, pre: Tensor, x: Tensor, W_enc: Tensor, bias: Tensor) -> Tensor:
        """See `Sparse.product`; [T, F]."""
        z: Tensor = _Product.apply(pre, x, W_enc, bias, self)  # type: ignore[no-untyped-call]
        return z

    def times(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """See `Sparse.times`."""
        return values @ W_dec

    def transposed_times(self, values: Tensor, table: Tensor) -> Tensor:
        """See `Sparse.transposed_times`."""
        return values.t() @ table

    def sums(self, values: Tensor) -> Tensor:
        """See `Sparse.sums`."""
        return values.sum(0)

    def spread(self, one_each: Tensor) -> Tensor:
        """See `Sparse.spread`; [F]."""
        return one_each


class Sparse:
    """Places of codes, row by row.

    Args:
        feature: [n] int64.
        row: [n] int64, rising.
        rows: R, number of rows; T, or T times the number of groups.
        tokens: T.
        features: F.
    """

    def __init__(self, feature: Tensor, row: Tensor, rows: int, tokens: int, features: int) -> None:
        self.feature, self._row, self._tokens, self.features = feature, row, tokens, features
        self._starts = _starts(row, rows)

    def product(
        self,
        pre: Tensor,  # [T, F], without a gradient
        x: Tensor,  # [T, C]
        W_enc: Tensor,  # [F, C]
        bias: Tensor,  # [F]
    ) -> Tensor:
        """The values [n] of ``pre = x W_enc^T + bias`` at the places, with gradients of ``W_enc`` and ``bias``."""
        at = self._token * self.features + self.feature
        z: Tensor = _Product.apply(pre.flatten().index_select(0, at), x, W_enc, bias, self)  # type: ignore[no-untyped-call]
        return z

    def times(
        self,
        values: Tensor,  # [n]
        W_dec: Tensor,  # [F, C]
    ) -> Tensor:
        """Codes times W_dec [R, C], with gradients of both."""
        y = F.embedding_bag(
            self.feature, W_dec.detach(), self._starts, mode="sum", per_sample_weights=values, include_last_offset=True
        )
        # PyTorch's own gradient of the table adds up row by row; sorted by feature it is another sum of the same kind.
        with_gradient: Tensor = _TableGradient.apply(y, W_dec, values.detach(), self)  # type: ignore[no-untyped-call]
        return with_gradient

    def transposed_times(
        self,
        values: Tensor,  # [n]
        table: Tensor,  # [R, C], or [T, C] for all groups
    ) -> Tensor:
        """Codes' transpose times a table [F, C], without a gradient."""
        order, starts, by_token = self._by_feature
        row = by_token if len(table) == self._tokens else self._row.index_select(0, order)
        return F.embedding_bag(
            row, table, starts, mode="sum", per_sample_weights=values.index_select(0, order), include_last_offset=True
        )

    def sums(
        self,
        values: Tensor,  # [n]
    ) -> Tensor:
        """Sum over the tokens for each feature [F], without a gradient."""
        return self.transposed_times(values, values.new_ones(self._tokens, 1))[:, 0]

    def spread(
        self,
        one_each: Tensor,  # [F]
    ) -> Tensor:
        """Each feature's number at its places [n], with a gradient."""
        values: Tensor = _Spread.apply(one_each, self)  # type: ignore[no-untyped-call]
        return values

    @cached_property
    def _token(self) -> Tensor:
        return self._row % self._tokens

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        feature, order = self.feature.sort(stable=True)
        return order, _starts(feature, self.features), self._token.index_select(0, order)


def _starts(rising: Tensor, count: int) -> Tensor:
    """Where each of the numbers 0 ... count begins in a rising list [n]; [count + 1]."""
    return torch.searchsorted(rising, torch.arange(count + 1, device=rising.device))


class _Product(torch.autograd.Function):
    """Hands values of x W_enc^T + bias on, and has its gradients."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, W_enc: Tensor, bias: Tensor, places: Dense | Sparse) -> Tensor:
        ctx.save_for_backward(x)
        ctx.places = places
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        (dz,) = gradients
        return None, None, ctx.places.transposed_times(dz, x), ctx.places.sums(dz), None


class _Spread(torch.autograd.Function):
    """Picks each place's feature; its gradient adds up in a fixed order, unlike that of an index."""

    @staticmethod
    def forward(ctx: Any, one_each: Tensor, places: Sparse) -> Tensor:
        ctx.places = places
        return one_each.index_select(0, places.feature)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.places.sums(gradients[0]), None


class _TableGradient(torch.autograd.Function):
    """Hands y = codes W_dec on, and has the gradient of W_dec."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, W_dec: Tensor, values: Tensor, places: Sparse) -> Tensor:
        ctx.save_for_backward(values)
        ctx.places = places
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        (dy,) = gradients
        return dy, ctx.places.transposed_times(values, dy.contiguous()), None, None
