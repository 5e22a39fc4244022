"""What the explained values read of a model's blocks: found from the graph that autograd recorded, not assumed.

A rollout starts where gradients enter: at the outputs of those blocks that the head reads. For most models that is the
last block. A probe reads an earlier one, other heads read several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from fga_fast.models.block_io import ForwardPass, TapeError
from fga_fast.settings import Method

# Kinds of autograd's nodes that change a tensor's form alone, and those that multiply an attention map by its values.
FORMS = {
    *("View", "UnsafeView", "Reshape", "ReshapeAlias", "Flatten", "Permute", "Transpose", "T", "Unsqueeze", "Squeeze"),
    *("Expand", "Alias", "Clone", "ToCopy"),
}
PRODUCTS = {"Bmm", "Mm", "Baddbmm", "Addmm", "Addbmm"}


def kind(node: Node) -> str:
    """What a node differentiates: "Bmm" of BmmBackward0."""
    return node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


class Reads(NamedTuple):
    """Where gradients enter."""

    blocks: tuple[int, ...]  # blocks whose output the head reads, or anything else behind the blocks; ascending
    deepest: int  # the last block that is read
    pool: bool = False  # the layout's attention pool is read
    notices: tuple[str, ...] = ()  # what a reader of the explanation must know


def find_reads(
    passed: ForwardPass,
    values: Tensor,  # [B] or [B, K], attached to the pass
    method: Method = "rollout",
    saes: Iterable[int] = (),
) -> Reads:
    """Walks from the explained values back to the nearest outputs of blocks. No gradient is computed.

    It also sets `passed.first`, the first block that can be explained.

    Args:
        passed: the forward pass, at its end.
        values: what is explained.
        method, saes: of the explanation; for the checks.

    Raises:
        TapeError: too few blocks ran or have gradients, or the values read what no rollout can start from.
    """
    _check_ran(passed, values)
    blocks, pools, mixed = _walked(passed, values)
    _check_reads(passed, blocks, pools)
    deepest = max(passed.streams) if pools else blocks[-1]
    passed.first = max(cut for cut in passed.cuts if cut <= deepest)
    if blocks and blocks[0] < passed.first:
        raise TapeError(
            f"model: the explained values read the output of {_named(blocks)}, but gradients end before block "
            f"{passed.first} (torch.no_grad() or detach()), so no map holds all; explain a model that reads one side"
        )
    _check_first(passed, method, saes)
    return Reads(blocks, deepest, bool(pools), _notices(passed, method, blocks, bool(pools), mixed))


def _walked(passed: ForwardPass, values: Tensor) -> tuple[tuple[int, ...], list[Node], bool]:
    """The blocks whose outputs are read, where the attention pool is read, and whether other attention is read."""
    streams = {edge.node: block for block, edge in passed.streams.items()}
    inside = {edge.node: block for block, edge in passed.attentions.items()}
    outside = {found.edge.node: found for found in passed.outside if found.edge is not None}
    written = any(block is None for _, block, _ in passed.maps)
    blocks, pools, mixed = set[int](), list[Node](), False
    stack = [] if values.grad_fn is None else [values.grad_fn]
    seen = set[Node](stack)
    while stack:
        node = stack.pop()
        following = [after for after, _ in node.next_functions if after is not None]
        if node in streams:
            blocks.add(streams[node])
        elif node in inside and inside[node] is not None:
            raise TapeError(
                f"model: the explained values read the attention inside {passed.name(inside[node] or 0)}, not only "
                "what blocks hand on, so no rollout can start there; let the head read outputs of blocks"
            )
        elif node in inside or (
            written and kind(node) in {*PRODUCTS, "Mul"} and any(_from_pool(n, inside) for n in following)
        ):
            pools.append(node)
        else:
            found = outside.get(node)
            mixed |= found is not None
            if found is not None and found.queries == 1 < found.keys:
                raise TapeError(
                    f"model: '{passed.layout.pooling}' pooling, but the explained values read another attention with "
                    "one query over the tokens after the blocks; check the layout's pooling and pooled"
                )
            stack += [after for after in following if after not in seen]
            seen.update(following)
    return tuple(sorted(blocks)), pools, mixed


def _below(passed: ForwardPass, nodes: list[Node]) -> set[int]:
    """The blocks whose outputs an attention pool reads."""
    streams = {edge.node: block for block, edge in passed.streams.items()}
    found, stack, seen = set[int](), list(nodes), {*nodes, *passed.carriers}
    while stack:
        node = stack.pop()
        if node in streams:
            found.add(streams[node])
        else:
            following = [after for after, _ in node.next_functions if after is not None and after not in seen]
            stack += following
            seen.update(following)
    return found


def _from_pool(node: Node, inside: Mapping[Node, int | None]) -> bool:
    """Whether this is the attention pool's map, perhaps reshaped or cast on its way."""
    while node not in inside:
        before = node.next_functions[0][0] if kind(node) in FORMS else None
        if before is None:
            return False
        node = before
    return inside[node] is None


def _check_ran(passed: ForwardPass, values: Tensor) -> None:
    """Blocks must have run, and the values must have a gradient."""
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
    if not values.requires_grad:
        lower = f", and must read a block from start_block={passed.start} on" if passed.start else ""
        raise TapeError(
            "model: its logits carry no gradient to the tower; its forward must not run under torch.no_grad(), "
            "torch.inference_mode() or detach the tower's output, and its attention not inside an autograd.Function or "
            f"torch.utils.checkpoint{lower}"
        )


def _check_reads(passed: ForwardPass, blocks: tuple[int, ...], pools: list[Node]) -> None:
    before = [found for found in passed.outside if found.before_pool and found.edge is not None]
    if pools and before:
        raise TapeError(
            f"model: attention with {before[0].queries} queries over {before[0].keys} keys runs between the last block "
            "of the layout and its attention pool, where relevance would pass it by; list all blocks, in forward order"
        )
    if passed.layout.pooling == "attention" and not pools:
        raise TapeError(
            "model: 'attention' pooling, but the explained values do not read the attention with one query over the "
            "tokens after the blocks; check the layout's pooling and pooled"
        )
    if pools and blocks:
        raise TapeError(
            f"model: the explained values read the attention pool and, beside it, what {_named(blocks)} hands on; how "
            "much each counts is not defined, so explain a model that reads one of them"
        )
    pooled = _below(passed, pools) if pools else set()
    if pools and pooled != {max(passed.streams, default=0)}:
        raise TapeError(
            f"model: its attention pool reads the output of {_named(sorted(pooled))}, expected that of the last block "
            "alone; end the layout's blocks there, or explain a model whose pool reads one block"
        )
    if not pools and not blocks:
        raise TapeError(
            f"model: the explained values read nothing that {_named(range(passed.start, passed.finished))} hands on; "
            "lower start_block, or let the head read an output of the tower's blocks"
        )


def _check_first(passed: ForwardPass, method: Method, saes: Iterable[int]) -> None:
    """What needs a gradient must lie at or after the first block that has one."""
    start, first = passed.start, passed.first
    if method == "input_x_gradient" and start < first:
        raise TapeError(
            f"model: method='input_x_gradient' needs the gradient of the tokens that enter block {start}, but "
            f"{_named(range(start, first))} ran without gradients (torch.no_grad() or detach()); use "
            f"start_block={first} or method='block_x_gradient'"
        )
    for block in saes:
        if block < first or block not in passed.attended:
            why = "it did not run, or handed the tokens on unchanged"
            if block < first:
                why = "it has no gradient (torch.no_grad() or detach())"
            raise TapeError(f"saes[{block}]: would gate nothing at block {block}, because {why}; remove the SAE")


def _notices(passed: ForwardPass, method: Method, blocks: tuple[int, ...], pool: bool, mixed: bool) -> tuple[str, ...]:
    count = len(passed.layout.blocks)
    found = [hold.notice(block) for block, hold in sorted(passed.held.items())]
    if passed.first > passed.start:
        found.append(
            f"{_named(range(passed.start, passed.first))} ran without gradients (torch.no_grad() or detach()): "
            f"relevance is that of the tokens that enter block {passed.first}"
        )
    idle = [block for block in range(passed.first, count) if block not in passed.ran or block not in passed.attended]
    if idle:
        found.append(f"{_named(idle)} did not run, or handed the tokens on unchanged")
    if not pool and blocks != (count - 1,):
        found.append(f"the explained values read the output of {_named(blocks)}: relevance starts there")
    if method == "block_x_gradient" and len(blocks) > 1:
        found.append(
            f"what the explained values read of {_named(blocks[:-1])} alone is missing from the maps of later blocks, "
            "so the mean over blocks gives it too little weight; method='input_x_gradient' holds all"
        )
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
