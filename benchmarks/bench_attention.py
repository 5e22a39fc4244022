"""Tapped attention, forward and backward, compared with PyTorch's fused attention (no relevance) and the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peak import peak_bytes
from rows import Row
from timing import Race, Work
from torch import Tensor

from fga_fast import ops, reference

HEADS, WIDTH = 12, 64
SCALE = WIDTH**-0.5


class Problem(NamedTuple):
    """q, k, v as in a ViT (views of one [B, N, 3, H, D] tensor), gradients to start backward, results of forward."""

    q: Tensor  # [B, H, N, D]
    k: Tensor  # [B, H, N, D]
    v: Tensor  # [B, H, N, D]
    grad_out: Tensor  # [B, H, N, D]
    row: Tensor  # [B, N]
    gate: Tensor  # [B, N]
    out: Tensor  # [B, H, N, D]
    lse: Tensor  # [B, H, N]


def problem(images: int, tokens: int) -> Problem:
    torch.manual_seed(0)
    q, k, v = torch.randn(images, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
    grad_out = torch.randn(images, tokens, HEADS, WIDTH).transpose(1, 2)
    row, gate = torch.rand(images, tokens), torch.rand(images, tokens)
    out, lse, _, _ = ops.attention(q, k, v, torch.zeros(images, tokens), scale=SCALE)
    return Problem(q, k, v, grad_out, row, gate, out, lse)


def forwards(p: Problem) -> dict[str, Work]:
    carrier = torch.zeros_like(p.row)
    return {
        "plain": partial(F.scaled_dot_product_attention, p.q, p.k, p.v, scale=SCALE),
        "native": partial(ops.attention, p.q, p.k, p.v, carrier, scale=SCALE),
        "reference": partial(reference.attention, p.q, p.k, p.v, SCALE),
    }


def backwards(p: Problem) -> dict[str, Work]:
    """Native and reference also propagate relevance; plain computes only the gradients."""
    q, k, v = (t.detach().requires_grad_() for t in (p.q, p.k, p.v))
    out = F.scaled_dot_product_attention(q, k, v, scale=SCALE)
    return {
        "plain": partial(torch.autograd.grad, out, (q, k, v), p.grad_out, retain_graph=True),
        "native": partial(ops.attention_backward, p.grad_out, p.row, p.gate, p.q, p.k, p.v, p.out, p.lse, scale=SCALE),
        "reference": partial(reference.attention_backward, p.grad_out, p.row, p.gate, p.q, p.k, p.v, None, SCALE),
    }


@pytest.mark.parametrize("pass_name", ("forward", "backward"))
@pytest.mark.parametrize(("images", "tokens"), ((1, 197), (8, 197), (1, 1025)))
def test_attention(
    images: int, tokens: int, pass_name: str, race: Callable[..., Race], record: Callable[[Row], None]
) -> None:
    ways = (forwards if pass_name == "forward" else backwards)(problem(images, tokens))
    found = race(ways["plain"], ways, seconds=2.0)
    timings = {name: found.result(name) for name in ways}
    for name, timing in timings.items():
        record(
            Row(
                "attention", f"{pass_name} {name}", images, tokens, threads=torch.get_num_threads(),
                rounds=timing.rounds, median_s=timing.median, min_s=timing.minimum,
                ratio_to_plain=timing.ratio, ratio_to_reference=timing.ratio / timings["reference"].ratio,
                peak_bytes=peak_bytes(ways[name]),
            )
        )  # fmt: skip
