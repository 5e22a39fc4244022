"""From a plan and images to the tensors of an explanation: one forward pass and one backward pass.

The explainer runs this code and graph/ traces it, so both give the same explanation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fga_fast.engine.plan import Plan
from fga_fast.engine.records import Gating, gated_map
from fga_fast.engine.tape import Tape
from fga_fast.models.checks import check_finite
from fga_fast.models.layout import ModelLayout
from fga_fast.models.maps import check_maps
from fga_fast.models.pooling import check_pooling
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
    first: bool = False,
) -> Tensors:
    """Explains images with any backend but the reference.

    Args:
        layout: the result of `plan.check(images)`.
        answer: from the model's output to the explained values.
        look_at_values: look for NaN and Inf; False while a graph is traced.
        first: also check that the model pools as its layout says, at the cost of part of a backward pass.

    Raises:
        TypeError, ValueError: the model cannot be tapped, or a tensor has NaN or Inf; the message says what to do.
    """
    if len(images) == 0:
        return _nothing(plan, layout, images, answer)
    settings, prefix = plan.settings, layout.prefix_tokens
    tape = _tape(plan, layout)
    with tape.attached(images):
        output = plan.readout.run(images)
        if look_at_values:
            check_finite(output.detach(), "the logits", plan.model, images)
        asked = answer(output)
    if first:
        check_pooling(tape.passed, asked.values)
        if settings.method == "rollout":
            check_maps(tape.passed, asked.values)
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
    records = {}
    for block, sae in plan.saes.items():
        shuffled = plan.permutations[block]
        permutation = None if shuffled is None else shuffled.to(sae.device)
        records[block] = Gating(sae, settings.gate, permutation, layout.prefix_tokens, settings.top_features, stages)
    return Tape(layout, records, stages.attention, settings)


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
    return Tensors(*asked, none, maps, dict(maps), features, blocks)
