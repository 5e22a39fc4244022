"""What the head does with what it reads: the gradients that arrive at outputs of blocks, and what they tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fga_fast.models.block_io import ForwardPass, TapeError
from fga_fast.models.layout import ModelLayout
from fga_fast.models.reads import Reads

# Tokens of an average have gradients of one length, or, where each is normalised, of one length times their own.
# Beyond this ratio between the largest and the smallest, a head weighs them.
_EVEN = 2.0


def arriving(
    passed: ForwardPass,
    blocks: Sequence[int],
    gradients: Callable[[Sequence[GradientEdge]], Sequence[Tensor | None]],
) -> dict[int, Tensor]:
    """The gradient at each of the blocks' outputs that comes from outside the next block.

    Args:
        blocks: `Reads.blocks`.
        gradients: gives the gradients of the explained values at some edges, each [..., B, N, C] or [..., N, B, C].

    Returns:
        block -> [..., B, N, C]; without the blocks where no gradient arrives.
    """
    edges = [passed.streams[block] for block in blocks]
    with _stopped(edges):
        found = gradients(edges)
    return {block: _images_first(g, passed.layout) for block, g in zip(blocks, found, strict=True) if g is not None}


def groups(layout: ModelLayout) -> list[tuple[int, int]]:
    """Token ranges that pool together: the patches, what the layout averages, and each other token alone."""
    patches, pooled = (layout.prefix_tokens, layout.tokens), layout.pooled
    ranges = [patches]
    if layout.pooling == "average":
        apart = pooled[1] <= patches[0]
        ranges = [pooled, patches] if apart else [(min(pooled[0], patches[0]), patches[1])]
    together = {token for first, last in ranges for token in range(first, last)}
    return sorted(ranges + [(token, token + 1) for token in range(layout.tokens) if token not in together])


def laid_out(like: Tensor, layout: ModelLayout) -> Tensor:  # [M, N] -> [M, N]
    """The row that the layout's pooling promises: 1 / n at each of the n pooled tokens."""
    first, last = layout.pooled
    pooled = like.new_full((len(like), last - first), 1.0 / (last - first))
    return F.pad(pooled, (first, like.shape[1] - last))


def differently(starts: Mapping[int, Tensor], layout: ModelLayout) -> tuple[str, ...]:
    """A notice where the rollout starts after the last block, but not as the layout's pooling says.

    Args:
        starts: block -> [..., B, N], the rows that start the rollout. The host waits for their values.
    """
    last, (first, stop) = len(layout.blocks) - 1, layout.pooled
    if starts.keys() != {last}:
        return ()
    rows = starts[last].reshape(-1, layout.tokens)
    if bool((rows - laid_out(rows, layout)).abs().le(1e-6).all()):
        return ()
    read = (rows > 0).any(0).nonzero().flatten().tolist()
    return (
        f"the explained values read {len(read)} of the {layout.tokens} tokens that block {last} hands on, from "
        f"{read[0]} to {read[-1]}, not as the layout says ({layout.pooling!r} pooling of tokens {first} to {stop - 1})"
        ": the rollout starts from what they read",
    )


def read_as_laid_out(gradients: Mapping[int, Tensor], layout: ModelLayout) -> bool:
    """Whether, of the last block alone, just the pooled tokens have a gradient. The host waits for values.

    Args:
        gradients: as from `arriving`.
    """
    last = len(layout.blocks) - 1
    if gradients.keys() != {last}:
        return False
    read = (gradients[last] != 0).any(-1).flatten(0, -2)  # [M, N]
    return bool((read == (laid_out(gradients[last][..., 0].flatten(0, -2), layout) > 0)).all())


def unevenly(passed: ForwardPass, gradients: Mapping[int, Tensor]) -> tuple[str, ...]:
    """A notice where the head weighs tokens of the last block that the start of the rollout counts alike.

    Args:
        gradients: as from `arriving`.
    """
    layout, last = passed.layout, len(passed.layout.blocks) - 1
    if gradients.keys() != {last} or passed.stream is None:
        return ()
    d = gradients[last].detach().float().norm(dim=-1)  # [..., B, N]
    x = _images_first(passed.stream.detach(), layout).float().norm(dim=-1)  # [B, N]
    for first, stop in groups(layout):
        lengths = d[..., first:stop]
        if stop - first > 1 and _ratio(lengths) > _EVEN and _ratio(lengths * x[:, first:stop]) > _EVEN:
            return (
                f"the head weighs the tokens {first} to {stop - 1} that it reads, by a pooling that is no plain "
                "average (attention, a maximum, a power): the rollout starts from all of them alike, so the map is "
                "approximate; ModelLayout(pooling='attention') follows a pool that is an attention with one query",
            )
    return ()


def _ratio(lengths: Tensor) -> float:  # [..., n]; of the largest and the smallest of an image that are not 0
    smallest = lengths.where(lengths > 0, torch.inf).amin(-1)
    return float((lengths.amax(-1) / smallest).amax()) if lengths.numel() else 1.0


def check_images_apart(
    passed: ForwardPass,
    reads: Reads,
    values: Tensor,  # [B] or [B, K]
    ports: Sequence[Tensor] = (),
) -> None:
    """Refuses a model whose head mixes images: autograd would add up their explanations.

    With weights on the images' values, the gradients of an image must be its own weight times as large. Images with the
    same digit to base 4 have the same weight; a pass for each digit tells any two apart.

    Args:
        ports: what else wants a gradient where autograd runs blocks on its way, with zeros.

    Raises:
        TapeError: the value of an image depends on what blocks, or the pool, hand on for another one.
    """
    count = len(values)
    edges = [passed.attentions[None]] if reads.pool else [passed.streams[block] for block in reads.blocks]
    dim = 1 if passed.layout.tokens_first and not reads.pool else 0

    def gradients(weights: Tensor) -> list[Tensor]:  # [B] -> each [B, ...]
        # Large, because tiny gradients have few digits in float16.
        seed = (1024 * weights).to(values).view(-1, *[1] * (values.dim() - 1)).expand_as(values)
        seeds = [seed, *map(torch.ones_like, ports)]
        found = torch.autograd.grad([values, *ports], edges, seeds, retain_graph=True, allow_unused=True)
        return [g.transpose(0, dim).flatten(1).double() for g in found if g is not None]

    with _stopped(edges):
        plain, digit = gradients(torch.ones(count, device=values.device)), 0
        while 4**digit < count:
            weights = 2.0 ** (torch.arange(count, device=values.device) // 4**digit % 4)
            for g, weighted in zip(plain, gradients(weights), strict=True):
                expected = g * weights.to(g).unsqueeze(1)
                if float((weighted - expected).norm()) > 1e-2 * float(expected.norm()):
                    raise TapeError(
                        "model: the explained value of an image depends on other images of the batch (a mean, a "
                        "softmax or a normalisation over images), which would mix their explanations; explain one "
                        "image at a time, or change it"
                    )
            digit += 1


def _images_first(tensor: Tensor, layout: ModelLayout) -> Tensor:
    return tensor.transpose(-3, -2) if layout.tokens_first else tensor


@contextmanager
def _stopped(edges: Sequence[GradientEdge]) -> Iterator[None]:
    """Inside, gradients that arrive at several edges end there. Zeros go on, since not all can do without."""

    def stop(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else torch.zeros_like(g) for g in grads)

    handles = [edge.node.register_prehook(stop) for edge in edges] if len(edges) > 1 else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
