"""What the explained values read of a model's blocks: found from the graph that autograd recorded, not assumed.

A rollout starts where gradients enter: at the outputs of those blocks that something besides the next block reads. For
most models that is the last block. A probe reads an earlier one, other heads read several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fga_fast.models.block_io import ForwardPass, TapeError
from fga_fast.models.layout import ModelLayout
from fga_fast.settings import Method

# Nodes of autograd that stand between a pool's maps and the product with its values.
_SHAPES = {
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "Reshape", "ReshapeAlias", "Expand", "Unsqueeze", "Squeeze", "Transpose",
                 "Permute", "ToCopy", "Clone", "Alias", "Flatten", "T")
}  # fmt: skip


class Reads(NamedTuple):
    """Where gradients enter."""

    blocks: tuple[int, ...]  # blocks whose output is read by something besides the next block, ascending
    pool: bool = False  # the layout's attention pool is read
    notices: tuple[str, ...] = ()  # what a reader of the explanation must know


def find_reads(
    passed: ForwardPass,
    values: Tensor,  # [B] or [B, K], attached to the pass
    method: Method = "rollout",
    saes: Iterable[int] = (),
) -> Reads:
    """Walks from the explained values back to the nearest outputs of blocks. No gradient is computed.

    Args:
        passed: the forward pass, at its end.
        values: what is explained.
        method, saes: of the explanation; for the checks.

    Raises:
        TapeError: too few blocks ran or have gradients, or the values read what no rollout can start from.
    """
    _check_complete(passed, values, method, saes)
    streams = {edge.node: block for block, edge in passed.streams.items()}
    inside = {edge.node: block for block, edge in passed.attentions.items()}
    outside = {found.edge.node: found for found in passed.outside if found.edge is not None}
    blocks, pool, mixed, seen = set[int](), False, False, set[object]()
    stack = [] if values.grad_fn is None else [values.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in streams:
            blocks.add(streams[node])
            continue
        if node in inside:
            block = inside[node]
            if block is not None:
                raise TapeError(
                    f"model: the explained values read the attention inside {passed.name(block)}, not only what blocks "
                    "hand on, so no rollout can start there; let the head read outputs of blocks"
                )
            pool = True
            continue
        following = [after for after, _ in node.next_functions if after is not None]
        if any(_comes_from_pool(after, inside) for after in following):  # the product of the pool's maps and values
            pool = True
            continue
        if node in outside:
            mixed = True
            if outside[node].queries == 1 < outside[node].keys:
                raise TapeError(
                    f"model: '{passed.layout.pooling}' pooling, but the explained values read another attention with "
                    "one query over the tokens after the blocks; check the layout's pooling and pooled"
                )
        stack += following
    found = tuple(sorted(blocks))
    _check_reads(passed, found, pool)
    return Reads(found, pool, _notices(passed, found, pool, mixed))


def _comes_from_pool(node: Node, inside: Mapping[Node, int | None]) -> bool:
    """Whether this is the attention pool's tensor, perhaps reshaped or cast on its way."""
    while node not in inside:
        before = node.next_functions[0][0] if node.name() in _SHAPES else None
        if before is None:
            return False
        node = before
    return inside[node] is None


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
        block -> [..., B, N, C].
    """
    edges = [passed.streams[block] for block in blocks]
    with _stopped(edges):
        found = gradients(edges)
    turned = passed.layout.tokens_first
    return {
        block: g.transpose(-3, -2) if turned else g for block, g in zip(blocks, found, strict=True) if g is not None
    }


def check_images_apart(
    passed: ForwardPass,
    reads: Reads,
    values: Tensor,  # [B] or [B, K]
) -> None:
    """Refuses a model whose head mixes images: autograd would add up their explanations.

    Raises:
        TapeError: the values of even images depend on what blocks, or the pool, hand on for odd images.
    """
    if len(values) < 2:
        return
    edges = [passed.attentions[None]] if reads.pool else [passed.streams[block] for block in reads.blocks]
    seed = torch.zeros_like(values)
    seed[::2] = 1
    with _stopped(edges):
        found = torch.autograd.grad(values, edges, seed, retain_graph=True, allow_unused=True)
    dim = 1 if passed.layout.tokens_first and not reads.pool else 0
    if any(g is not None and bool(g.transpose(0, dim)[1::2].any()) for g in found):
        raise TapeError(
            "model: the explained value of an image depends on other images of the batch (a mean, a softmax or a "
            "normalisation over images), which would mix their explanations; explain one image at a time, or change it"
        )


def differently(starts: Mapping[int, Tensor], layout: ModelLayout) -> tuple[str, ...]:
    """A notice where the rollout starts after the last block, but not as the layout's pooling says.

    Args:
        starts: block -> [..., B, N], the rows that start the rollout. The host waits for their values.
    """
    last = len(layout.blocks) - 1
    if starts.keys() != {last}:
        return ()
    rows, (first, stop) = starts[last].reshape(-1, layout.tokens), layout.pooled
    promised = torch.zeros_like(rows)
    promised[:, first:stop] = 1 / (stop - first)
    if bool((rows - promised).abs().le(1e-6).all()):
        return ()
    read = (rows > 0).any(0).nonzero().flatten().tolist()
    return (
        f"the explained values read {len(read)} of the {layout.tokens} tokens that block {last} hands on, from "
        f"{read[0]} to {read[-1]}, not as the layout says ({layout.pooling!r} pooling of tokens {first} to {stop - 1})"
        ": the rollout starts from what they read",
    )


@contextmanager
def _stopped(edges: Sequence[GradientEdge]) -> Iterator[None]:
    """Inside, gradients that arrive at several edges end there; nothing goes on to the edges below."""

    def stop(grads: Sequence[Tensor | None]) -> tuple[None, ...]:
        return (None,) * len(grads)

    handles = [edge.node.register_prehook(stop) for edge in edges] if len(edges) > 1 else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_complete(passed: ForwardPass, values: Tensor, method: Method, saes: Iterable[int]) -> None:
    """The pass must allow an explanation: blocks that ran, with a gradient all the way to the values."""
    layout = passed.layout
    if not passed.ran:
        raise TapeError(
            f"model: 0 of {len(layout.blocks)} blocks ran, {passed.name(0)} did not; give modules that the model "
            "itself calls as the layout's blocks, and call the tower once"
        )
    if layout.pooling == "attention" and None not in passed.attended:
        seen = ", ".join(f"one of {found.queries} queries over {found.keys} keys" for found in passed.outside)
        raise TapeError(
            f"model: 'attention' pooling, but no attention with one query over the "
            f"{layout.pooled[1] - layout.pooled[0]} pooled tokens was found after the blocks{seen and ', only ' + seen}"
            "; check the layout's pooling and pooled"
        )
    if method == "input_x_gradient" and passed.start < passed.first < len(layout.blocks):
        raise TapeError(
            f"model: method='input_x_gradient' needs the gradient of the tokens that enter block {passed.start}, but "
            f"{_named(range(passed.start, passed.first))} ran without gradients (torch.no_grad() or detach()); use "
            f"start_block={passed.first} or method='rollout'"
        )
    if not values.requires_grad or passed.first >= len(layout.blocks):
        raise TapeError(
            "model: its logits carry no gradient to the tower; its forward must not run under torch.no_grad(), "
            "torch.inference_mode() or detach the tower's output, and its attention not inside an autograd.Function or "
            "torch.utils.checkpoint"
        )
    for block in saes:
        if block < passed.first or block not in passed.ran:
            why = "it has no gradient (torch.no_grad() or detach())" if block in passed.ran else "it did not run"
            raise TapeError(f"saes[{block}]: would gate nothing at block {block}, because {why}; remove the SAE")


def _check_reads(passed: ForwardPass, blocks: tuple[int, ...], pool: bool) -> None:
    before = [found for found in passed.outside if found.before_pool and found.edge is not None]
    if pool and before:
        raise TapeError(
            f"model: attention with {before[0].queries} queries over {before[0].keys} keys runs between the last block "
            "of the layout and its attention pool, where relevance would pass it by; list all blocks, in forward order"
        )
    if passed.layout.pooling == "attention" and not pool:
        raise TapeError(
            "model: 'attention' pooling, but the explained values do not read the attention with one query over the "
            "tokens after the blocks; check the layout's pooling and pooled"
        )
    if pool and blocks:
        raise TapeError(
            f"model: the explained values read the attention pool and, beside it, what {_named(blocks)} hands on; how "
            "much each counts is not defined, so explain a model that reads one of them"
        )
    if not pool and not blocks:
        raise TapeError(
            f"model: the explained values read nothing that {_named(range(passed.first, passed.finished))} hands on; "
            "lower start_block, or let the head read an output of the tower's blocks"
        )


def _notices(passed: ForwardPass, blocks: tuple[int, ...], pool: bool, mixed: bool) -> tuple[str, ...]:
    found, count = [], len(passed.layout.blocks)
    if passed.first > passed.start:
        found.append(
            f"{_named(range(passed.start, passed.first))} ran without gradients (torch.no_grad() or detach()): "
            f"relevance is that of the tokens that enter block {passed.first}"
        )
    idle = [block for block in range(passed.first, count) if block not in passed.ran or block not in passed.attended]
    if idle:
        found.append(f"{_named(idle)} did not run, or handed the tokens on unchanged")
    if not pool and blocks != (count - 1,):
        found.append(f"the explained values read the output of {_named(blocks)}: the rollout starts there")
    if mixed:
        found.append(
            "the explained values read attention after the blocks that the layout does not know of: the map leaves out "
            "what it moves between patches; if it is a block, list it in ModelLayout(blocks=...)"
        )
    return tuple(found)


def _named(blocks: Iterable[int]) -> str:
    """As "block 3", "blocks 0 to 4" or "blocks 0, 2, 5"."""
    found = list(blocks)
    if len(found) == 1:
        return f"block {found[0]}"
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"blocks {found[0]} to {found[-1]}"
    return f"blocks {', '.join(map(str, found))}"
