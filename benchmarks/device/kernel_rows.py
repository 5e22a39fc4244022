"""Rows of single stages on a device: time, operations, bytes, and the share of the device's measured ceiling.

Each contestant is first compared with the reference on the timed inputs; a wrong one gets no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import subjects
import torch
from device import Ceilings, Device
from rows import Row
from steadiness import failed
from torch import Tensor

from fga_fast import SparseAutoencoder, reference
from fga_fast.engine import backends

HEADS, HEAD_WIDTH = 12, 64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-2}
Stages = dict[str, backends.Stages]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def timed(
    blank: Row, device: Device, ceilings: Ceilings, work: Callable[[], Tensor], want: Tensor, dtype: torch.dtype
) -> Row:
    """The row of one contestant; if it fails or is wrong, a note instead of a time."""
    try:
        off = error(work(), want)
        if not off <= TOLERANCE[dtype]:
            return replace(blank, note=f"WRONG: relative error {off:.1e}")
        median, least = device.seconds(work)
    except Exception as problem:  # a failure must not end the run
        return failed(blank, problem)
    share = ceilings.share(median, blank.flops or 0.0, blank.bytes or 0.0, dtype)
    return replace(blank, median_s=median, min_s=least, share=share, note=f"relative error {off:.0e}")


def score_rows(device: Device, ceilings: Ceilings, stages: Stages) -> Iterator[Row]:
    features = 512 if device.small else 49_152
    for dtype in (torch.bfloat16, torch.float32):
        for images, patches in ((1, 32),) if device.small else ((1, 196), (21, 196), (1, 4096), (32, 196)):
            x = torch.randn(images, patches, subjects.WIDTH, device=device.kind).to(dtype)
            g = torch.randn_like(x)
            for name, sae in _saes(x, features).items():
                flops = 4.0 * images * patches * features * subjects.WIDTH  # encoder and gradient tiles
                moved = (2 * x.numel() + 2 * sae.W_dec.numel()) * x.element_size()
                if sae.k:
                    flops /= 2  # a gather has hardly any products
                want = reference.score(x[:1].float(), g[:1].float(), sae.to(torch.float32), "combined")
                sae.to(dtype)
                blank = Row("score", "", images, patches, _name(dtype), flops=flops, bytes=float(moved))
                for backend, stage in stages.items():
                    work: Callable[[], Tensor] = partial(_score, stage.score, x, g, sae)
                    first = partial(_first, work)
                    checked = timed(replace(blank, name=f"{name}, {backend}"), device, ceilings, first, want, dtype)
                    yield checked


def _score(function: Callable[..., Any], x: Tensor, g: Tensor, sae: SparseAutoencoder) -> Tensor:
    scores: Tensor = function(x, g, sae, "combined").scores
    return scores


def _first(work: Callable[[], Tensor]) -> Tensor:
    """Computes the whole batch; returns the first image's scores, to compare with the reference."""
    return work()[:1]


def _saes(x: Tensor, features: int) -> dict[str, SparseAutoencoder]:
    """SAEs of three densities, set on these activations."""
    flat = x.reshape(-1, subjects.WIDTH)[:512].float().cpu()
    dictionary = subjects.Dictionary(flat, features, seed=0)
    scale = features / 49_152
    made = {"relu 1700": dictionary.relu(1700 * scale)[0], "relu 64": dictionary.relu(max(1, 64 * scale))[0]}
    return {name: sae.to(x.device) for name, sae in (made | {"topk 64": dictionary.topk(min(64, features))}).items()}


def gate_rows(device: Device, ceilings: Ceilings, stages: Stages) -> Iterator[Row]:
    for images, patches in ((2, 16),) if device.small else ((1, 196), (32, 196), (32, 4096)):
        scores = torch.randn(images, patches, device=device.kind)
        want = reference.gate(scores, 10.0, 1.0)
        blank = Row("gate", "", images, patches, bytes=2.0 * scores.numel() * 4)
        for backend, stage in stages.items():
            work: Callable[[], Tensor] = partial(stage.gate, scores, 10.0, 1.0)
            yield timed(replace(blank, name=backend), device, ceilings, work, want, torch.float32)


def relevance_rows(device: Device, ceilings: Ceilings) -> Iterator[Row]:
    """The row of relevance alone, without the gradients of q, k and v: what an explanation adds to a backward pass."""
    for dtype in (torch.bfloat16, torch.float32):
        for images, tokens in ((1, 17),) if device.small else ((1, 197), (32, 197), (4, 1025), (1, 4097)):
            grad, q, k, v, row, gate, want = _attention_inputs(device, dtype, images, tokens)
            options = (HEAD_WIDTH**-0.5, False, False, False)
            out, lse, *_ = torch.ops.fga_fast.attention(q, k, v, row, None, options[0], True, False, False)
            given = (grad, row, gate, q, k, v, None, out, lse, None)
            work = partial(_relevance, given, options)
            flops = 4.0 * images * HEADS * tokens**2 * HEAD_WIDTH  # q k^T and dO v^T
            blank = Row("relevance", "native", images, tokens, _name(dtype), flops=flops)
            yield timed(replace(blank, bytes=4.0 * q.numel() * q.element_size()), device, ceilings, work, want, dtype)


def _relevance(given: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    left: Tensor = torch.ops.fga_fast.attention_backward(*given, *options)[3]
    return left[:1]


def _attention_inputs(device: Device, dtype: torch.dtype, images: int, tokens: int) -> tuple[Tensor, ...]:
    """dO, q, k, v [B, H, N, D], relevance and gates [B, N], and the reference's answer for the first image."""
    shape = (images, tokens, HEADS, HEAD_WIDTH)
    grad, q, k, v = (torch.randn(shape, device=device.kind).to(dtype).transpose(1, 2) for _ in range(4))
    row, gate = (torch.rand(images, tokens, device=device.kind) for _ in range(2))
    first = [t[:1].float() for t in (grad, q, k, v)]
    want = reference.attention_backward(first[0], row[:1], gate[:1], *first[1:], None, HEAD_WIDTH**-0.5)[3]
    return grad, q, k, v, row, gate, want


def attention_rows(device: Device, ceilings: Ceilings, stages: Stages) -> Iterator[Row]:
    """Forward and backward of tapped attention, beside PyTorch's own, which knows no relevance."""
    for dtype in (torch.bfloat16, torch.float32):
        for images, tokens in ((1, 17),) if device.small else ((1, 197), (32, 197), (4, 1025), (1, 4097)):
            grad, q, k, v, row, gate, want = _attention_inputs(device, dtype, images, tokens)
            tensors = [t.detach().requires_grad_() for t in (q, k, v)]
            flops = 14.0 * images * HEADS * tokens**2 * HEAD_WIDTH  # two products forward, five backward
            blank = Row("attention", "", images, tokens, _name(dtype), flops=flops, bytes=8.0 * q.numel() * 2)
            for backend, stage in stages.items():
                work = partial(_step, stage.attention, tensors, grad, row, gate)
                yield timed(replace(blank, name=backend), device, ceilings, work, want, dtype)
            plain = partial(_plain, tensors, grad)
            median, least = device.seconds(plain)
            yield replace(blank, name="plain attention", median_s=median, min_s=least, note="no relevance")


def _step(attention: Callable[..., Any], qkv: list[Tensor], grad: Tensor, row: Tensor, gate: Tensor) -> Tensor:
    carrier = torch.zeros_like(row).requires_grad_()
    out, _, carried, port = attention(*qkv, carrier, scale=HEAD_WIDTH**-0.5, gated=True)
    *_, leaving = torch.autograd.grad([out, carried, port], [*qkv, carrier], [grad, row, gate])
    return leaving[:1]


def _plain(qkv: list[Tensor], grad: Tensor) -> object:
    out = torch.nn.functional.scaled_dot_product_attention(*qkv)
    return torch.autograd.grad(out, qkv, grad)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
