"""K targets at once: torch.autograd.grad(..., is_grads_batched=True) and torch.vmap against a loop over the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fga_fast import ops
from fga_fast.sae import SparseAutoencoder

F64 = torch.float64
ROWS = ("grad_out", "row", "gate")
OF_IMAGES = ("q", "k", "v", "bias", "out", "lse")


def at(t: Tensor, dim: int | None, k: int) -> Tensor:
    return t if dim is None else t.select(dim, k)


def check_against_loop(call: Callable[..., Any], arguments: list[Any], dims: list[int | None], count: int) -> None:
    """torch.vmap of `call` gives what `count` calls give; outputs may be empty or the same for each k."""
    batched = torch.vmap(call, in_dims=tuple(dims))(*arguments)
    for k in range(count):
        alone = call(*(at(a, d, k) for a, d in zip(arguments, dims, strict=True)))
        for got, want in zip(batched, alone, strict=True):
            torch.testing.assert_close(got[k], want, rtol=1e-12, atol=1e-12)


def attention_arguments(images: int, rows: int, queries: int = 6, keys: int = 6) -> dict[str, Tensor]:
    shapes = {
        "grad_out": (rows, 2, queries, 4), "row": (rows, queries), "gate": (rows, keys), "q": (images, 2, queries, 4),
        "k": (images, 2, keys, 4), "v": (images, 2, keys, 4), "bias": (1, 2, queries, keys),
        "out": (images, 2, queries, 4), "lse": (images, 2, queries),
    }  # fmt: skip
    return {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items()}


def attention_call(**flags: bool) -> Callable[..., tuple[Tensor, ...]]:
    def call(
        grad_out: Tensor, row: Tensor, gate: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor,
        lse: Tensor, image: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        result = ops.attention_backward(
            grad_out, row, gate, q, k, v, out, lse, scale=0.6, bias=bias, image=image, **flags
        )
        return tuple(t for t in result if t.dim() > 1)  # torch.vmap cannot give an output that is not wanted back

    return call


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize(
    "batched",
    (
        ROWS, ("grad_out",), ("row",), ("gate",), ("image",), ("q",), ("bias",), (*ROWS, "bias", "k"),
        (*ROWS, "image", "v"), (*ROWS, *OF_IMAGES, "image"),
    ),
)  # fmt: skip
def test_any_mix_of_batched_arguments(batched: tuple[str, ...], last: bool) -> None:
    images, rows, count = 2, 3, 4
    arguments: list[Tensor] = []
    dims: list[int | None] = []
    for name, t in {**attention_arguments(images, rows), "image": torch.tensor([1, 0, 1])}.items():
        if name not in batched:
            arguments, dims = [*arguments, t], [*dims, None]
            continue
        several = torch.randint(images, (count, rows)) if name == "image" else torch.randn(count, *t.shape, dtype=F64)
        dim = several.dim() - 1 if last else 0
        arguments, dims = [*arguments, several.movedim(0, dim)], [*dims, dim]
    check_against_loop(attention_call(), arguments, dims, count)


@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("flags", ({"need_qk": False}, {"need_v": False}, {"need_qk": False, "need_v": False}))
def test_what_is_not_needed(flags: dict[str, bool], count: int) -> None:
    a = attention_arguments(2, 2)
    for name in ROWS:
        a[name] = torch.randn(count, *a[name].shape, dtype=F64)
    image = torch.tensor([0, 1])
    check_against_loop(attention_call(signed=True, **flags), [*a.values(), image], [0] * 3 + [None] * 7, count)


def test_a_pool_of_one_query() -> None:
    a = attention_arguments(2, 2, queries=1)
    for name in ROWS:
        a[name] = torch.randn(3, *a[name].shape, dtype=F64)
    dims = [0] * 3 + [None] * 7
    check_against_loop(attention_call(), [*a.values(), torch.tensor([0, 1])], dims, 3)


@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("images", (0, 1, 2))
@pytest.mark.parametrize("start", (("out", "carried", "port"), ("carried", "port"), ("out", "port")))
@pytest.mark.parametrize("constant_map", (False, True))
def test_batched_gradients_of_the_graph(start: tuple[str, ...], constant_map: bool, images: int, count: int) -> None:
    """An output that is left out arrives as None in each of the K backward passes, batched or not."""
    q, k, v = (torch.randn(images, 2, 7, 4, dtype=F64, requires_grad=True) for _ in "qkv")
    carrier = torch.zeros(images, 7, dtype=F64, requires_grad=True)
    out, _, carried, port = ops.attention(
        q, k, v, carrier, scale=0.7, bias=torch.randn(7, 7, dtype=F64), gated=True, constant_map=constant_map
    )
    named = {"out": out, "carried": carried, "port": port}
    outputs = [named[name] for name in start]
    seeds = [torch.randn(count, *t.shape, dtype=F64) for t in outputs]

    def gradients(of: list[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            outputs, [q, k, v, carrier], of, is_grads_batched=batched, retain_graph=True, allow_unused=True
        )

    got = gradients(seeds, True)
    for i in range(count):
        for together, alone in zip(got, gradients([s[i] for s in seeds], False), strict=True):
            assert (together is None) == (alone is None)
            if alone is not None and together is not None:
                torch.testing.assert_close(together[i], alone, rtol=1e-12, atol=1e-12)
    assert (got[0] is None) == constant_map


class Scored(torch.autograd.Function):
    """As explaining does it: a gate from the gradient that arrives, sent on as the gradient of a port."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, port: Tensor, sae: SparseAutoencoder, mode: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sae, ctx.mode = sae, mode
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grads[0], ops.gate(ops.score(x, grads[0], ctx.sae, ctx.mode).scores), None, None


@pytest.mark.parametrize("mode", ("combined", "activation_only", "gradient_only", "no_sae"))
@pytest.mark.parametrize("images", (0, 1, 2))
def test_batched_gradients_through_score_and_gate(images: int, mode: str) -> None:
    x = torch.randn(images, 9, 6, dtype=F64, requires_grad=True)
    port = torch.zeros(images, 9, dtype=F64, requires_grad=True)
    y = Scored.apply(x, port, autoencoder(), mode)  # type: ignore[no-untyped-call]
    seeds = torch.randn(3, *y.shape, dtype=F64)
    got = torch.autograd.grad([y], [x, port], [seeds], is_grads_batched=True, retain_graph=True)
    for i in range(3):
        want = torch.autograd.grad([y], [x, port], [seeds[i]], retain_graph=True)
        for together, alone in zip(got, want, strict=True):
            torch.testing.assert_close(together[i], alone, rtol=1e-12, atol=1e-12)
    assert images == 0 or mode == "activation_only" or not torch.equal(got[1][0], got[1][1])


def autoencoder() -> SparseAutoencoder:
    return SparseAutoencoder(
        torch.randn(6, 20, dtype=F64), torch.randn(20, dtype=F64), torch.randn(20, 6, dtype=F64),
        torch.randn(6, dtype=F64),
    )  # fmt: skip


@pytest.mark.parametrize("top", (0, 3))
@pytest.mark.parametrize(
    ("x_dim", "g_dim", "image_dim"), ((None, 0, None), (None, 2, None), (0, None, None), (1, 0, None), (2, 1, 0))
)
def test_score_over_targets(x_dim: int | None, g_dim: int | None, image_dim: int | None, top: int) -> None:
    sae, count = autoencoder(), 4
    x, g, image = torch.randn(2, 9, 6, dtype=F64), torch.randn(3, 9, 6, dtype=F64), torch.tensor([1, 0, 1])
    if x_dim is not None:
        x = torch.randn(count, *x.shape, dtype=F64).movedim(0, x_dim)
    if g_dim is not None:
        g = torch.randn(count, *g.shape, dtype=F64).movedim(0, g_dim)
    if image_dim is not None:
        image = torch.randint(2, (count, 3))

    def call(x: Tensor, g: Tensor, image: Tensor) -> ops.Score:
        return ops.score(x, g, sae, image=image, top_features=top)

    check_against_loop(call, [x, g, image], [x_dim, g_dim, image_dim], count)


@pytest.mark.parametrize("count", (1, 4))
def test_gate_over_targets(count: int) -> None:
    scores = torch.randn(5, count, 11, dtype=F64)
    got = torch.vmap(ops.gate, in_dims=1, out_dims=1)(scores)
    assert torch.equal(got, torch.stack([ops.gate(scores[:, k]) for k in range(count)], 1))


def test_vmap_within_vmap() -> None:
    scores = torch.randn(2, 3, 4, 5)
    assert torch.equal(torch.vmap(torch.vmap(ops.gate))(scores), ops.gate(scores.view(24, 5)).view(2, 3, 4, 5))


def test_what_cannot_be_batched_is_named() -> None:
    sae = autoencoder()
    x = torch.randn(1, 9, 6, dtype=F64)
    permutations = torch.stack([torch.randperm(20) for _ in range(3)])
    with pytest.raises(ValueError, match="vmap over a dictionary or a permutation"):
        torch.vmap(lambda p: ops.score(x, x, sae, "shuffled", permutation=p))(permutations)
    with pytest.raises(ValueError, match="at least one target"):
        torch.vmap(ops.gate)(torch.zeros(0, 3, 4))
