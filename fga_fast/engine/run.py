"""From a plan and images to the tensors of an explanation: one forward pass and one backward pass.

The explainer runs this code and graph/ traces it, so both give the same explanation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fga_fast.engine.plan import Plan
from fga_fast.engine.records import Gating, gated_map
from fga_fast.engine.tape import Found, Tape
from fga_fast.models.checks import check_finite
from fga_fast.models.layout import ModelLayout
from fga_fast.models.naming import differentiating, running
from fga_fast.precision import relevance_dtype
from fga_fast.question.readout import Answer, Tensors
from fga_fast.sae.features import TopFeatures


def explain(
    plan: Plan,
    layout: ModelLayout,
    images: Tensor,  # [B, channels, H, W]
    answer: Callable[[Tensor], Answer],
    *,
    look_at_values: bool = True,
    as_laid_out: bool = False,
    first: bool = False,
) -> Tensors:
    """Explains images with any backend but the reference.

    Relevance without gates (settings.ungated) is given for methods whose gates only multiply in the end.

    Args:
        layout: the result of `plan.check(images)`.
        answer: from the model's output to the explained values.
        look_at_values: look for NaN and Inf; False while a graph is traced.
        as_laid_out: start the rollout where the layout says, without a look at the gradients.
        first: also check that the model's blocks read each other, and its values the maps, as the method supposes.

    Raises:
        TypeError, ValueError: the model cannot be tapped, or a tensor has NaN or Inf; the message says what to do.
    """
    if len(images) == 0:
        return _nothing(plan, layout, images, answer)
    tape = _tape(plan, layout)
    with tape.attached(images):
        with running(tape.passed):
            output = plan.readout.run(images)
        if look_at_values:
            check_finite(output.detach(), "the logits", plan.model, images)
        asked = answer(output)
    # Where the caller has autocast on, it is for the model: relevance is not computed in 16 bit.
    with differentiating(tape.passed), torch.autocast(images.device.type, enabled=False):
        found = tape.backward(
            asked.values,
            plan.settings.target_chunk,
            as_laid_out=as_laid_out,
            look_at_values=look_at_values,
            first=first,
        )
    result = _tensors(plan, layout, asked, found, tape.passed.first)
    if plan.settings.ungated and plan.saes and plan.settings.method != "rollout":
        without = replace(plan, settings=replace(plan.settings, per_block=False))
        bare = _tensors(without, layout, asked, found._replace(recorded={}), tape.passed.first)
        result = result._replace(ungated=bare.relevance)
    if look_at_values:
        check_finite(result.relevance, "the relevance", plan.model, images, plan.saes)
    return result


def starts_as_laid_out(plan: Plan, layout: ModelLayout, images: Tensor) -> bool:  # [B, channels, H, W]
    """Whether the rollout starts where the layout says, for every class of every image."""
    tape = _tape(plan, layout)
    with tape.attached(images):
        logits = plan.readout.logits(plan.readout.run(images))
        # Classes may read different tokens, so all of them are explained at once, each with a weight of its own.
        weights = torch.linspace(1, 2, logits.shape[1], dtype=logits.dtype, device=logits.device)
        values = (logits * weights).sum(-1)
    with torch.autocast(images.device.type, enabled=False):
        return tape.backward(values).as_laid_out


def _tensors(plan: Plan, layout: ModelLayout, asked: Answer, found: Found, first: int) -> Tensors:
    """The explanation from what the backward pass brought."""
    settings, prefix = plan.settings, layout.prefix_tokens
    read = {block: Gating.read(slots) for block, slots in sorted(found.recorded.items())}
    gates = {block: gate for block, (_, gate, _) in read.items()}
    rows = {block: row[..., prefix:] for block, row in sorted(found.rows.items())}
    wanted = range(first, len(layout.blocks) if settings.at_every_block else first + 1)
    signal: Tensor | None = None
    if settings.method != "rollout":
        blocks = {block: gated_map(_entering(rows, block), gates, block) for block in wanted}
        if settings.method == "block_x_gradient":
            blocks = {block: _mean(blocks, block, found.reads.deepest) for block in wanted}
    else:
        starts = {block: row[..., prefix:] for block, row in found.starts.items()}
        blocks = {block: _with_starts(_entering(rows, block), starts, block) for block in wanted}
        signal = _entering(rows, first) if found.patches_start else None
    return Tensors(
        asked.logits, asked.targets, asked.values.detach(), asked.names, blocks[first].contiguous(),
        {block: scores for block, (scores, _, _) in read.items()}, gates,
        {block: features for block, (_, _, features) in read.items() if features is not None},
        torch.stack(list(blocks.values()), dim=-2) if settings.per_block else None,
        None if signal is None else signal.contiguous(), first, found.reads.notices,
    )  # fmt: skip


def _entering(rows: dict[int, Tensor], block: int) -> Tensor:
    """The row of the tokens that enter a block; if it did not run, those that enter the next one that did."""
    later = [found for found in rows if found >= block]
    return rows[later[0]] if later else torch.zeros_like(rows[max(rows)])


def _mean(maps: dict[int, Tensor], block: int, deepest: int) -> Tensor:  # block -> [..., B, P]
    """Of the maps from this block to the last one that is read."""
    return torch.stack([maps[later] for later in range(block, max(block, deepest) + 1)]).mean(0)


def _with_starts(row: Tensor, starts: dict[int, Tensor], block: int) -> Tensor:  # [..., B, P]
    """Adds what entered after `block` and later ones, and stays where it was."""
    for start, entered in starts.items():
        if start >= block:
            row = row + entered
    return row


def _tape(plan: Plan, layout: ModelLayout) -> Tape:
    settings, stages = plan.settings, plan.choice().stages
    if stages is None:
        raise RuntimeError("backend: expected one with stages, got 'reference'; call fga_fast.reference.explain")
    records = {}
    for block, sae in plan.saes.items():
        shuffled = plan.permutations[block]
        permutation = None if shuffled is None else shuffled.to(sae.device)
        records[block] = Gating(sae, settings.gate, permutation, layout.prefix_tokens, settings.top_features, stages)
    return Tape(layout, records, stages.attention, settings, plan.held)


def _nothing(plan: Plan, layout: ModelLayout, images: Tensor, answer: Callable[[Tensor], Answer]) -> Tensors:
    """The explanation of no images. Runs one blank image to learn the number of classes."""
    settings = plan.settings
    with torch.no_grad():
        asked = answer(plan.readout.run(images.new_zeros(1, *images.shape[1:]))[:0])
    none = images.new_zeros(*asked.targets.shape, layout.patches, dtype=relevance_dtype(images.dtype))
    features = {}
    if settings.top_features:
        value = none.new_zeros(*none.shape, settings.top_features)
        index = value.long()
        features = dict.fromkeys(plan.saes, TopFeatures(index, value, index[..., 0, :], value[..., 0, :]))
    depth = len(layout.blocks) - settings.start_block
    blocks = none.new_zeros(*none.shape[:-1], depth, none.shape[-1]) if settings.per_block else None
    maps = dict.fromkeys(plan.saes, none)
    return Tensors(*asked, none, maps, dict(maps), features, blocks, None, settings.start_block, ())
