"""From a plan and images to the tensors of an explanation: one forward pass and one backward pass.

The explainer runs this code and graph/ traces it, so both give the same explanation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fga_fast.engine.plan import Plan
from fga_fast.engine.records import Gating, gated_map
from fga_fast.engine.tape import Tape
from fga_fast.models.checks import check_finite
from fga_fast.models.layout import ModelLayout
from fga_fast.models.pooling import check_pooling
from fga_fast.precision import relevance_dtype
from fga_fast.question.readout import Answer, Targets
from fga_fast.sae.features import TopFeatures


class Tensors(NamedTuple):
    """An explanation without its settings. With K targets per image, [B] becomes [B, K], [B, P] becomes [B, K, P]."""

    logits: Tensor  # [B, classes]
    targets: Tensor  # [B] int64
    values: Tensor  # [B]
    names: tuple[str, ...] | None  # of the columns of the logits, if known
    relevance: Tensor  # [B, P]
    scores: dict[int, Tensor]  # block -> [B, P]
    gates: dict[int, Tensor]  # block -> [B, P]
    features: dict[int, TopFeatures]  # block -> its strongest features, if asked for
    blocks: Tensor | None  # [B, L', P], relevance of the patches that enter each block, if asked for


def explain(
    plan: Plan,
    layout: ModelLayout,
    images: Tensor,  # [B, channels, H, W]
    answer: Callable[[Tensor], Answer],
    *,
    look_at_values: bool = True,
    first: bool = False,
) -> Tensors:
    """Explains one or more images with any backend but the reference.

    Args:
        layout: the result of `plan.check(images)`.
        answer: from the model's output to the explained values.
        look_at_values: look for NaN and Inf; False while a graph is traced.
        first: also check that the model pools as its layout says, at the cost of part of a backward pass.

    Raises:
        TypeError, ValueError: the model cannot be tapped, or a tensor has NaN or Inf; the message says what to do.
    """
    settings, prefix = plan.settings, layout.prefix_tokens
    tape = _tape(plan, layout)
    with tape.attached(images):
        output = plan.readout.run(images)
        if look_at_values:
            check_finite(output.detach(), "the logits", plan.model, images)
        asked = answer(output)
    if first:
        check_pooling(tape.passed, asked.values)
    found = tape.backward(asked.values, settings.target_chunk)
    read = {block: Gating.read(slots) for block, slots in sorted(found.recorded.items())}
    gates = {block: gate for block, (_, gate, _) in read.items()}
    blocks = {block: row[..., prefix:].contiguous() for block, row in sorted(found.rows.items())}
    if settings.method == "input_x_gradient":
        blocks = {block: gated_map(row, gates, block) for block, row in blocks.items()}
    relevance = blocks[settings.start_block]
    if look_at_values:
        check_finite(relevance, "the relevance", plan.model, images, plan.saes)
    return Tensors(
        asked.logits, asked.targets, asked.values.detach(), asked.names, relevance,
        {block: scores for block, (scores, _, _) in read.items()}, gates,
        {block: features for block, (_, _, features) in read.items() if features is not None},
        torch.stack(list(blocks.values()), dim=-2) if settings.per_block else None,
    )  # fmt: skip


def _tape(plan: Plan, layout: ModelLayout) -> Tape:
    settings, stages = plan.settings, plan.choice().stages
    if stages is None:
        raise RuntimeError("backend: expected one with stages, got 'reference'; call fga_fast.reference.explain")
    records = {
        block: Gating(
            sae, settings.gate, plan.permutations[block], layout.prefix_tokens, settings.top_features, stages
        )
        for block, sae in plan.saes.items()
    }  # fmt: skip
    return Tape(
        layout, records, stages.attention,
        method=settings.method, conservative=settings.backward == "conservative", signed=settings.signed,
        start_block=settings.start_block, per_block=settings.per_block,
    )  # fmt: skip


def nothing(plan: Plan, layout: ModelLayout, images: Tensor, targets: Targets) -> Tensors:
    """The explanation of no images. Runs one blank image to learn the number of classes."""
    settings = plan.settings
    with torch.no_grad():
        output = plan.readout.run(images.new_zeros(1, *images.shape[1:]))[:0]
        answer = plan.readout.answer(targets, output)
    none = images.new_zeros(*answer.targets.shape, layout.patches, dtype=relevance_dtype(images.dtype))
    features = {}
    if settings.top_features:
        value = none.new_zeros(*none.shape, settings.top_features)
        index = value.long()
        features = dict.fromkeys(plan.saes, TopFeatures(index, value, index[..., 0, :], value[..., 0, :]))
    depth = len(layout.blocks) - settings.start_block
    blocks = none.new_zeros(*none.shape[:-1], depth, none.shape[-1]) if settings.per_block else None
    maps = dict.fromkeys(plan.saes, none)
    return Tensors(
        answer.logits, answer.targets, answer.values.detach(), answer.names, none, maps, dict(maps), features, blocks
    )
