"""One sparse autoencoder in training: its parameters, its loss on a batch, one step, and what is frozen at the end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fga_fast.sae.sparse_autoencoder import SparseAutoencoder
from fga_fast.training.places import Dense, Sparse
from fga_fast.training.recipe import Recipe
from fga_fast.training.select import above, top, top_of_batch
from fga_fast.training.straight_through import jump, step

_MEMORY = 0.95  # of running means over steps
_FEW = 8  # fewer dead features than this are left alone
_FIRST_L0 = 2  # of jumprelu, in units of its k


class Scale:
    """Centre and size of a block's tokens; training sees ``(x - mean) / scale``, so one learning rate fits all blocks.

    Args:
        sample: [T, C] float32, at least two tokens that differ.

    Attributes:
        mean: [C].
        scale: [], mean length of ``x - mean`` divided by sqrt(C): elements of what training sees are about 1.
        variance: [], mean square of the elements of what training sees.

    Raises:
        ValueError: NaN or Inf, or no variance.
    """

    def __init__(self, sample: Tensor) -> None:
        if not bool(torch.isfinite(sample).all()):
            raise ValueError(
                "tokens: the sample holds NaN or Inf; look for the images that give them and leave them out"
            )
        self.mean = sample.mean(0)
        centred = sample - self.mean
        self.scale = centred.norm(dim=1).mean() / sample.shape[1] ** 0.5
        if not self.scale > 0:
            raise ValueError(f"tokens: expected tokens that differ, got {len(sample)} equal ones in the sample")
        self.variance = (centred / self.scale).square().mean()

    def __call__(
        self,
        x: Tensor,  # [T, C]
    ) -> Tensor:
        """``(x - mean) / scale`` [T, C]."""
        return (x - self.mean).div_(self.scale)


class Trainee(nn.Module):
    """One SAE in training.

    Args:
        recipe: see `Recipe`.
        width: C.
        variance: [], of the tokens it will see.
        generator: on the CPU, of the starting point.
        device: where it is trained.
    """

    silent: Tensor  # [F], tokens since the feature last fired
    threshold: Tensor  # [], running mean of a batch's smallest code
    active: Tensor  # [], running mean of the features a token

    def __init__(
        self, recipe: Recipe, width: int, variance: Tensor, generator: torch.Generator, device: torch.device
    ) -> None:
        super().__init__()
        self.recipe, self._variance = recipe, variance.to(device)
        decoder = F.normalize(torch.randn(recipe.features, width, generator=generator), dim=1).to(device)
        self.W_dec = nn.Parameter(decoder)  # [F, C]
        self.W_enc = nn.Parameter(decoder.clone())  # [F, C], one row a feature
        self.b_enc = nn.Parameter(torch.zeros(recipe.features, device=device))
        self.b_dec = nn.Parameter(torch.zeros(width, device=device))
        if recipe.kind == "jumprelu":
            self.log_theta = nn.Parameter(_first_theta(recipe).log().to(device))
        self.register_buffer("silent", torch.zeros(recipe.features, device=device))
        self.register_buffer("threshold", torch.zeros((), device=device))
        self.register_buffer("active", torch.zeros((), device=device))

    def loss(
        self,
        x: Tensor,  # [T, C]
        pressure: Tensor,  # []
        cast: AbstractContextManager[object] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What is minimised, and the share of the variance that the whole SAE leaves unexplained, both [].

        Args:
            x: tokens as `Scale` gives them.
            pressure: 0 to 1, share of the penalty for many features ("relu", "jumprelu").
            cast: a context in which the pre-activations are computed.
        """
        bias = self.b_enc - self.W_enc @ self.b_dec
        with torch.no_grad(), cast or nullcontext():
            pre = torch.addmm(bias, x, self.W_enc.t()).float()  # [T, F]
        places = self._places(pre)
        z = places.product(pre, x, self.W_enc, bias)
        values, penalty = self._codes(z, places, x)
        parts = places.times(values, self.W_dec).view(-1, *x.shape)  # [groups, T, C]
        left = x - self.b_dec - (parts if len(parts) == 1 else parts.cumsum(0))
        errors = left.square().mean((1, 2)) / self._variance  # [groups], the last that of the whole SAE
        self._remember(values, places, len(x))
        loss = errors.mean() + pressure * penalty
        if self.recipe.aux and self.recipe.kind != "relu":  # whose dead features have no pre-activation above 0
            loss = loss + self.recipe.aux * self._spare(x, pre, bias, left[-1].detach())
        return loss, errors[-1].detach()

    def _places(self, pre: Tensor) -> Dense | Sparse:
        recipe = self.recipe
        if recipe.kind == "relu":
            return above(pre, 0.0)
        if recipe.kind == "jumprelu":
            return above(pre, self.log_theta.detach().exp() - recipe.bandwidth / 2)
        assert recipe.k is not None
        if recipe.kind == "topk":
            return top(pre, recipe.k)
        return top_of_batch(pre, recipe.k, self.threshold, recipe.prefixes)

    def _codes(self, z: Tensor, places: Dense | Sparse, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """Codes of the places' pre-activations, and the penalty for being many or large."""
        recipe = self.recipe
        if recipe.kind == "relu":
            values = z.relu()
            assert recipe.l1 is not None
            return values, recipe.l1 * values.sum() / len(x) / x.shape[1] ** 0.5
        if recipe.kind == "jumprelu":
            assert recipe.k is not None
            theta = places.spread(self.log_theta.exp())
            count = step(z.detach(), theta, recipe.bandwidth).sum() / len(x)
            return jump(z, theta, recipe.bandwidth), recipe.l0 * (count / recipe.k - 1).square()
        return z.relu(), 0.0

    @torch.no_grad()
    def _remember(self, values: Tensor, places: Dense | Sparse, tokens: int) -> None:
        fires = values > 0
        counts = places.sums(fires.float())  # [F]
        self.silent += tokens
        self.silent.masked_fill_(counts > 0, 0)
        self._mean("active", counts.sum() / tokens)
        if self.recipe.kind in ("batch_topk", "matryoshka") and len(values):
            self._mean("threshold", torch.where(fires, values, torch.inf).amin())

    def _mean(self, name: str, new: Tensor) -> None:
        """Takes a batch's value into a running mean; the first one as it is, and none that is infinite."""
        old = self.get_buffer(name)
        mixed = torch.where(old == 0, new, _MEMORY * old + (1 - _MEMORY) * new)
        old.copy_(torch.where(mixed == torch.inf, old, mixed))

    def _spare(self, x: Tensor, pre: Tensor, bias: Tensor, left: Tensor) -> Tensor | float:
        """The share of `left` that dead features do not explain; 0 if there are few."""
        dead = (self.silent > self.recipe.dead_after).nonzero()[:, 0]
        if len(dead) < _FEW:
            return 0.0
        k = max(1, min(len(dead), x.shape[1] // 2))
        pre = pre[:, dead]
        least = pre.topk(k, dim=1).values[:, -1:]
        places = Dense(len(dead))
        z = places.product(pre, x, self.W_enc[dead], bias[dead])
        spare = places.times(z.relu() * (pre >= least), self.W_dec[dead])
        return (left - spare).square().mean() / self._variance

    @torch.no_grad()
    def level_gradient(self) -> None:
        """Removes the part of each decoder row's gradient that would only change its length, and scales the gradient
        of all weights to length 1.

        The first gradients are many times larger than the later ones. Adam divides by a mean that remembers them for
        some 1,000 steps, which makes the steps in between too small.
        """
        gradient = self.W_dec.grad
        if gradient is not None:
            gradient.addcmul_((gradient * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)
        found = [one.grad for one in self.parameters() if one.grad is not None]
        length = torch.stack(torch._foreach_norm(found)).norm()
        torch._foreach_div_(found, length.clamp(min=1e-30))

    @torch.no_grad()
    def unit_decoder(self) -> None:
        """Scales each decoder row to length 1, so that a code is the size of what its feature adds; and keeps the
        thresholds of "jumprelu" from e^-10 to e^10, so that none becomes 0 or Inf.
        """
        if self.recipe.kind == "jumprelu":
            self.log_theta.clamp_(-10, 10)
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8))

    @torch.no_grad()
    def frozen(self, scale: Scale, metadata: Mapping[str, str]) -> SparseAutoencoder:
        """The same SAE on the CPU for tokens as the model has them: the same codes, and decoder rows of their size."""
        recipe, size, mean = self.recipe, scale.scale.cpu(), scale.mean.cpu()
        activation = "batch_topk" if recipe.kind == "matryoshka" else recipe.kind
        threshold = None
        if recipe.kind == "jumprelu":
            threshold = self.log_theta.exp().cpu()
        elif activation == "batch_topk":
            threshold = self.threshold.cpu()
        active = self.active.item()
        return SparseAutoencoder(
            self.W_enc.t().cpu() / size, self.b_enc.cpu(), self.W_dec.cpu() * size, self.b_dec.cpu() * size + mean,
            activation=activation, k=None if recipe.kind == "jumprelu" else recipe.k, threshold=threshold,
            metadata=metadata, expected_l0=active if active > 0 else None,
        )  # fmt: skip


def _first_theta(recipe: Recipe) -> Tensor:
    """Thresholds [F] with about `_FIRST_L0` k features a token: pre-activations are about normal at first."""
    assert recipe.k is not None
    share = torch.full((recipe.features,), min(0.4, _FIRST_L0 * recipe.k / recipe.features))
    return 2**0.5 * torch.erfinv(1 - 2 * share)
