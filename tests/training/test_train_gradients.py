"""Losses and gradients of training, on sparse products, against the same in dense textbook PyTorch."""

from __future__ import annotations

import pytest
import torch
from learning import RECIPES, made, trainee
from torch import Tensor

from fga_fast.training.places import Dense, Sparse
from fga_fast.training.recipe import Recipe
from fga_fast.training.select import above, top, top_of_batch
from fga_fast.training.straight_through import jump, step
from fga_fast.training.trainee import Trainee


def unexplained_by(own: Trainee, x: Tensor, codes: Tensor, variance: Tensor) -> Tensor:
    return (x - own.b_dec - codes @ own.W_dec).square().mean() / variance


def textbook(own: Trainee, x: Tensor, variance: Tensor, pressure: float) -> tuple[Tensor, Tensor]:
    """The loss and the share that the whole SAE does not explain, dense and by autograd alone.

    Thresholds get their gradient by the formula of the paper.
    """
    recipe, k = own.recipe, own.recipe.k
    pre = (x - own.b_dec) @ own.W_enc.t() + own.b_enc
    penalty = torch.zeros(())
    if recipe.kind == "topk":
        assert k is not None
        codes = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, pre.topk(k).values.relu())
    elif recipe.kind in ("batch_topk", "matryoshka"):
        assert k is not None
        least = pre.flatten().topk(k * len(x)).values[-1]
        codes = torch.where(pre >= least, pre, 0).relu()
    elif recipe.kind == "relu":
        codes = pre.relu()
        assert recipe.l1 is not None
        penalty = recipe.l1 * codes.sum(1).mean() / x.shape[1] ** 0.5
    else:
        assert k is not None
        theta, width = own.log_theta.exp(), recipe.bandwidth
        opens = (pre > theta).float()
        near = ((pre - theta).abs() < width / 2).float().detach() / width
        # Zero, with the gradients of a step and of a jump with respect to theta.
        of_theta = theta - theta.detach()
        count = ((opens - near * of_theta).sum(1)).mean()
        codes = pre * opens - theta.detach() * near * of_theta
        penalty = recipe.l0 * (count / k - 1) ** 2
    sizes = recipe.prefixes or (recipe.features,)
    errors = [x - own.b_dec - codes[:, :size] @ own.W_dec[:size] for size in sizes]
    loss = torch.stack([error.square().mean() for error in errors]).mean() / variance + pressure * penalty
    if recipe.kind == "relu":  # whose dead features have nothing above 0 to explain with
        return loss, unexplained_by(own, x, codes, variance)
    dead = (codes <= 0).all(0)
    assert 8 <= dead.sum() < recipe.features
    of_dead = pre[:, dead]
    kept = of_dead.topk(min(int(dead.sum()), x.shape[1] // 2))
    spare = torch.zeros_like(of_dead).scatter(1, kept.indices, kept.values.relu()) @ own.W_dec[dead]
    loss = loss + recipe.aux * (errors[-1].detach() - spare).square().mean() / variance
    return loss, unexplained_by(own, x, codes, variance)


@pytest.mark.parametrize("name", [*RECIPES])
def test_loss_and_gradients_are_those_of_the_textbook(name: str) -> None:
    x = made(16)[0]
    scale, own = trainee(RECIPES[name], x)
    x = scale(x)
    if name == "jumprelu":
        own.log_theta.data += 0.4  # so that some features are silent
    expected, share = textbook(own, x, scale.variance, 0.7)
    gradients = torch.autograd.grad(expected, [*own.parameters()])
    own.threshold.fill_(0.6)  # a guess
    own.silent.fill_(1e9)  # all that do not fire now are dead
    loss, unexplained = own.loss(x, torch.tensor(0.7))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert 0 < unexplained < loss and not unexplained.requires_grad
    torch.testing.assert_close(unexplained, share.detach(), rtol=1e-5, atol=1e-6)
    loss.backward()
    for (label, parameter), gradient in zip(own.named_parameters(), gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=label: f"{n}: {m}")


@pytest.mark.parametrize("groups", [1, 3])
def test_sparse_products_are_the_dense_ones(groups: int) -> None:
    tokens, features, width = 7, 11, 5
    own = torch.rand(tokens, features) < 0.3
    own[2], own[:, 4] = False, False  # a token and a feature without codes
    group = torch.arange(features) * groups // features
    row, feature = (group[None] * tokens + torch.arange(tokens)[:, None])[own], own.nonzero()[:, 1]
    row, order = row.sort(stable=True)
    feature = feature[order]
    places = Sparse(feature, row, groups * tokens, tokens, features)
    dense = torch.zeros(groups * tokens, features)
    values = torch.randn(len(row), requires_grad=True)
    dense = dense.index_put((row, feature), values)
    W_dec, weight = torch.randn(features, width, requires_grad=True), torch.randn(groups * tokens, width)
    y, expected = places.times(values, W_dec), dense @ W_dec
    torch.testing.assert_close(y, expected)
    for found, right in zip(
        torch.autograd.grad(y, (values, W_dec), weight), torch.autograd.grad(expected, (values, W_dec), weight),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, right)
    x, W_enc, bias = torch.randn(tokens, width), torch.randn(features, width), torch.randn(features)
    inputs = (W_enc.requires_grad_(), bias.requires_grad_())
    pre = x @ W_enc.t() + bias
    z, right = places.product(pre.detach(), x, W_enc, bias), pre[row % tokens, feature]
    torch.testing.assert_close(z, right)
    weight = torch.randn(len(row))
    for one, other in zip(
        torch.autograd.grad(z, inputs, weight), torch.autograd.grad(right, inputs, weight), strict=True
    ):
        torch.testing.assert_close(one, other)
    spread = places.spread(bias)
    torch.testing.assert_close(spread, bias[feature])
    torch.testing.assert_close(
        torch.autograd.grad(spread, bias, weight)[0], torch.zeros(features).index_add(0, feature, weight)
    )


def test_no_code_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    places, values = Sparse(none, none, 3, 3, 4), torch.zeros(0, requires_grad=True)
    W_dec = torch.randn(4, 2, requires_grad=True)
    y = places.times(values, W_dec)
    y.sum().backward()
    assert not y.any() and W_dec.grad is not None and not W_dec.grad.any() and not places.sums(values).any()


def _placed(places: Dense | Sparse, shape: torch.Size) -> Tensor:
    """Where the places are, as a mask [T, F]."""
    assert isinstance(places, Sparse)
    pre = torch.arange(1.0, shape.numel() + 1).view(shape)
    at = places.product(pre, torch.zeros(shape[0], 1), torch.zeros(shape[1], 1), torch.zeros(shape[1])).long() - 1
    assert len(at.unique()) == len(at)
    return torch.zeros(shape.numel(), dtype=torch.bool).index_fill(0, at, True).view(shape)


@pytest.mark.parametrize(("features", "k"), [(64, 3), (64, 4), (64, 5), (67, 3), (8, 8), (3, 1)])
def test_the_largest_of_each_token(features: int, k: int) -> None:
    pre = torch.randn(20, features)
    expected = torch.zeros(20, features, dtype=torch.bool).scatter(1, pre.topk(k).indices, True)
    assert torch.equal(_placed(top(pre, k), pre.shape), expected)


@pytest.mark.parametrize("guess", [0.0, 0.7, 100.0])
@pytest.mark.parametrize("prefixes", [(), (5, 9, 30)])
def test_the_largest_of_a_batch(guess: float, prefixes: tuple[int, ...]) -> None:
    pre = torch.randn(20, 30)
    for wanted, k in ((80, 4), (int((pre > 0).sum()), 29)):  # more than there are above 0
        least = pre.flatten().topk(wanted).values[-1]
        places = top_of_batch(pre, k, torch.tensor(guess), prefixes)
        assert torch.equal(_placed(places, pre.shape), pre >= least)
        parts = places.times(torch.ones(wanted), torch.eye(30)).view(-1, 20, 30)
        edges = (0, *(prefixes or (30,)))
        for part, start, stop in zip(parts, edges, edges[1:], strict=False):
            inside = (torch.arange(30) >= start) & (torch.arange(30) < stop)
            assert torch.equal(part > 0, (pre >= least) & inside)


def test_what_is_above_a_threshold() -> None:
    pre, theta = torch.randn(50, 40), torch.linspace(1.8, 3, 40)
    assert torch.equal(_placed(above(pre, theta), pre.shape), pre > theta)
    assert isinstance(above(pre, 0.0), Dense)


def test_step_and_jump_by_finite_differences() -> None:
    """Over many z, the mean of a step falls by as much as the window has z; this is exact where theta moves by it."""
    z, width = torch.linspace(0, 3, 3001, dtype=torch.float64), 0.5
    theta = torch.tensor(1.2003, dtype=torch.float64, requires_grad=True)
    ends = (theta.detach() + width / 2, theta.detach() - width / 2)
    for function in (step, jump):
        value = function(z, theta, width)
        (found,) = torch.autograd.grad(value.mean(), theta)
        expected = (function(z, ends[0], width).mean() - function(z, ends[1], width).mean()) / width
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
        assert found < -0.3


def test_step_and_jump_by_their_formula() -> None:
    z, theta = torch.randn(6, 4, requires_grad=True), (0.3 * torch.rand(4) + 0.1).requires_grad_()
    weight, width = torch.randn(6, 4), 0.8
    jumped, stepped = jump(z, theta, width), step(z, theta, width)
    dz, dtheta = torch.autograd.grad(jumped, (z, theta), weight)
    (of_step,) = torch.autograd.grad(stepped, theta, weight)
    for f in range(4):
        right = right_step = 0.0
        for t in range(6):
            opens = bool(z[t, f] > theta[f])
            assert jumped[t, f] == (z[t, f] if opens else 0) and stepped[t, f] == opens
            assert dz[t, f] == (weight[t, f] if opens else 0)
            if abs(z[t, f] - theta[f]) < width / 2:
                right -= (theta[f] * weight[t, f]).item() / width
                right_step -= weight[t, f].item() / width
        assert dtheta[f].item() == pytest.approx(right, abs=1e-5)
        assert of_step[f].item() == pytest.approx(right_step, abs=1e-5)


def test_the_decoder_turns_and_keeps_its_length() -> None:
    x = made(64)[0]
    scale, own = trainee(Recipe("topk", 32, 2), x)
    own.loss(scale(x), torch.zeros(()))[0].backward()
    assert own.W_dec.grad is not None
    whole = own.W_dec.grad.clone()
    others = [one.grad.square().sum() for one in own.parameters() if one.grad is not None and one is not own.W_dec]
    rows = torch.nn.functional.normalize(own.W_dec.detach(), dim=1)
    turned = whole - (whole * rows).sum(1, keepdim=True) * rows
    length = (torch.stack(others).sum() + turned.square().sum()).sqrt()
    own.level_gradient()
    torch.testing.assert_close(own.W_dec.grad, turned / length, rtol=1e-4, atol=1e-6)
    assert ((whole * rows).sum(1).abs() > 1e-3).any() and abs(length - 1) > 0.1
