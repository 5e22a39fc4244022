"""One pass of a model with all that methods need of it: attention maps, residual streams and their gradients."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from fga_fast.evaluation.subject import Subject
from fga_fast.models import checks
from fga_fast.models.head import arriving
from fga_fast.models.layout import ModelLayout
from fga_fast.models.naming import differentiating, running
from fga_fast.models.reads import Reads, find_reads
from fga_fast.reference.explain import differentiate
from fga_fast.reference.recording import Recording, recording
from fga_fast.reference.starts import start_rows
from fga_fast.settings import Backward

Pair: TypeAlias = tuple[Tensor, Tensor]


class Followed(NamedTuple):
    """A forward pass, still attached to its graph."""

    record: Recording
    reads: Reads
    values: Tensor  # [B], the targets' logits


class Record(NamedTuple):
    """What a pass brought, and the gradient of each image's target logit; detached, in `relevance_dtype`.

    Blocks that did not run, or that ran without gradients, are missing.
    """

    layout: ModelLayout
    deepest: int  # the last block whose output the head reads
    maps: dict[int, Tensor]  # block -> A [B, H, N, N], none that is after `deepest`
    inputs: dict[int, Pair]  # block -> x that enters it and g there, [B, N, C] each
    outputs: dict[int, Pair]  # block -> x after it and g there, [B, N, C] each
    rows: dict[int, Tensor]  # block -> [B, N], at least 0: how the head weighs the tokens that the block hands on

    def patches(self, tokens: Tensor) -> Tensor:  # [B, N, ...] -> [B, P, ...]
        """The patches among tokens."""
        return tokens[:, self.layout.prefix_tokens :]

    def before(self, block: int) -> Pair:  # [B, P, C] each
        """x and g at the patches that enter a block."""
        return self._at(block, self.inputs)

    def after(self, block: int) -> Pair:  # [B, P, C] each
        """x and g at the patches that leave a block.

        Raises:
            ValueError: the block is missing.
        """
        return self._at(block, self.outputs)

    def _at(self, block: int, streams: dict[int, Pair]) -> Pair:
        if block not in streams:
            known = ", ".join(map(str, sorted(streams)))
            raise ValueError(f"block: expected one that has a gradient ({known}), got {block}")
        x, g = streams[block]
        return self.patches(x), self.patches(g)


def usable(images: Tensor) -> Tensor:  # [B, channels, H, W] -> the same
    """Images without a graph, that autograd takes: a copy of those made under torch.inference_mode().

    Raises:
        ValueError: float16, in which gradients may underflow; `Explainer` alone scales them.
    """
    if images.dtype == torch.float16:
        raise ValueError("images: float16 is too narrow for the gradients of this method; use bfloat16 or float32")
    return images.clone() if images.is_inference() else images.detach()


def follow(
    subject: Subject,
    images: Tensor,  # [B, channels, H, W]
    targets: Tensor,  # [B]
    backward: Backward = "exact",
) -> Followed:
    """Runs the model once and keeps maps and streams of all blocks, in the graph. Hooks are gone afterwards.

    Call it with gradients on and inference mode off.

    Raises:
        TypeError, ValueError: images, targets or a model that do not fit, as `Explainer`.
    """
    plan = subject.explainer().plan
    layout = plan.check(images)
    blocks = range(len(layout.blocks))
    with recording(layout, images, backward == "conservative", wanted=blocks) as record, running(record.passed):
        output = plan.readout.run(images)
        checks.check_finite(output.detach(), "the logits", plan.model, images)
        values = plan.readout.answer(targets, output).values
    return Followed(record, find_reads(record.passed, values), values)


def record(
    subject: Subject,
    images: Tensor,  # [B, channels, H, W]
    targets: Tensor,  # [B]
    backward: Backward = "exact",
) -> Record:
    """Maps, streams and gradients of one forward and one backward pass. The memory grows with L * H * N^2.

    The rows are those that start a rollout (`reference.start_rows`): 1 at a class token, 1/n at each of n averaged
    patches. An attention pool reads a weighted average; its row is the mean of its heads' attention.

    Args:
        backward: "exact", or "conservative" (reference/conservative.py).

    Raises:
        TypeError, ValueError: images, targets or a model that do not fit, as `Explainer`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        found, reads, values = follow(subject, usable(images), targets, backward)
        passed, layout = found.passed, found.layout
        with differentiating(passed), torch.autocast(images.device.type, enabled=False):
            gradients = differentiate(values.sum(), found, found.streams)
            if reads.pool:
                start, stop = layout.pooled
                row = found.maps[None].detach().to(found.dtype).mean(1).squeeze(1)  # [B, pooled]
                rows = {reads.deepest: pad(row, (start, layout.tokens - stop))}
            else:
                arrived = arriving(
                    passed, reads.blocks,
                    lambda edges: torch.autograd.grad(values.sum(), edges, retain_graph=True, allow_unused=True),
                )  # fmt: skip
                rows = start_rows(arrived, layout)

    def tokens(stream: Tensor) -> Tensor:  # [B, N, C] or [N, B, C] -> [B, N, C]
        return found.batch_first(stream.detach()).to(found.dtype)

    kept = [block for block in found.maps if block is not None and passed.first <= block <= reads.deepest]
    maps = {block: found.maps[block].detach().to(found.dtype) for block in kept}
    inputs = {block: (tokens(x), tokens(gradients.inputs[block])) for block, x in found.inputs.items()}
    outputs = {block: (tokens(x), tokens(gradients.streams[block])) for block, x in found.streams.items()}
    return Record(layout, reads.deepest, maps, inputs, outputs, rows)
