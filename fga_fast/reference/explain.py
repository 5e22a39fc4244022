"""The whole explanation in plain PyTorch: record maps and residual streams, differentiate, multiply, gate, roll out.

Equations, with y the explained value and blocks l numbered in forward order from s, `start_block`:

    method "rollout":           Cbar_l = mean_h relu(A_l * dA_l), dA_l = d y / d A_l; without the relu if `signed`
                                R_l = (I + Cbar_l) ... (I + Cbar_s); the relevance is sum_l row_l R_l, with row_l what y
                                reads of the output of block l other than through block l + 1 (reference/starts.py):
                                for most models the class token, or all patches evenly, of the last block
    method "input_x_gradient":  x . d y / d x, x the input of block s
    method "block_x_gradient":  the mean of that over block s and all later ones, to the last that y reads

At blocks with an autoencoder, `w_l = base ** tanh(slope * z(s_l))` with s_l the score of x_l and `g_l = d y / d x_l` at
the patches. It multiplies the patch columns of Cbar_l, or the patches' x . g. All gradients are the model's own, or
those of the conservative backward pass (reference/conservative.py).

Memory grows with L * H * N^2 and P * F; use it to check numbers, not to explain many images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_map

from fga_fast.models import checks
from fga_fast.models.find import find_layout
from fga_fast.models.head import arriving, check_images_apart, differently, unevenly
from fga_fast.models.layout import ModelLayout
from fga_fast.models.maps import check_maps, check_paths
from fga_fast.models.naming import differentiating, running
from fga_fast.models.reads import Reads, find_reads
from fga_fast.question.readout import Readout, Targets, Tensors
from fga_fast.reference.attention import attention_relevance
from fga_fast.reference.gate import gate as gate_of
from fga_fast.reference.gate import unit
from fga_fast.reference.input_x_gradient import input_x_gradient
from fga_fast.reference.recording import Recording, recording
from fga_fast.reference.rollout import gate_columns, rollout
from fga_fast.reference.score import contributions, score, top_features
from fga_fast.reference.starts import start_rows
from fga_fast.sae.features import TopFeatures
from fga_fast.sae.hold import Hold
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder
from fga_fast.settings import Settings

Saes = Mapping[int, SparseAutoencoder]
Maps = dict[int, Tensor]  # block -> [B, P]
# What one explained value for each image gives: relevance [B, P], scores, gates, features, blocks and signal as in
# `Tensors`, and the starts [B, N].
Parts: TypeAlias = tuple[Tensor, Maps, Maps, dict[int, TopFeatures], Tensor | None, Tensor, Maps]


def explain(
    model: nn.Module,
    images: Tensor,  # [B, channels, height, width]
    targets: Targets,
    saes: Saes,
    settings: Settings,
    *,
    layout: ModelLayout | None = None,
    readout: Readout | None = None,
    given_gates: Mapping[int, Tensor] | None = None,  # block -> [B, P] or [B, K, P]
    held: Mapping[int, Hold] | None = None,
    first: bool = True,
) -> Tensors:
    """Explain one or K targets an image with full attention maps; returns `Tensors`, detached.

    Args:
        model: module from images to logits [B, classes], or what `readout` runs. It is left as it is; hooks are on it
            during the call only and do nothing in other threads.
        images: in the model's dtype and on its device.
        targets: what is explained for each image, [B] or [B, K]; see `Readout.answer`. None: the predicted class.
        saes: block -> autoencoder of the residual stream after that block; empty: the ungated method (TransMM).
        settings: all but its `backend` and `target_chunk`.
        layout: where the model's blocks and tokens are; None: `find_layout(model)`.
        readout: how the model's output answers the targets; None: `Readout(model)`.
        given_gates: gates in place of those computed from the scores, at blocks that have an autoencoder; for checking
            another implementation's rollout apart from its scores.
        held: block -> SAE features that are held in the residual stream after it, see `Explainer.ablate`.
        first: check that the model's blocks read each other, and its values the maps, as a rollout supposes.

    Raises:
        ValueError, TypeError: a model that cannot be followed; targets, autoencoders or settings that do not fit it.
    """
    layout, readout = layout or find_layout(model), readout or Readout(model)
    checks.check_eval(model)
    checks.check_saes(saes, layout, checks.typical_weight(model, layout))
    checks.check_fit(settings, saes, layout)
    saes = dict(sorted(saes.items()))
    wanted = () if settings.method == "rollout" else range(settings.start_block, len(layout.blocks))
    with torch.inference_mode(False), torch.enable_grad():
        conservative, start = settings.backward == "conservative", settings.start_block
        with recording(layout, images, conservative, start, wanted, held) as record:
            with running(record.passed):
                output = readout.run(images.detach())
            checks.check_finite(output.detach(), "the logits", readout.model, images)
            answer = readout.answer(targets, output)
        # Where the caller has autocast on, it is for the model: relevance is not computed in 16 bit.
        with differentiating(record.passed), torch.autocast(images.device.type, enabled=False):
            reads = find_reads(record.passed, answer.values, settings.method, saes)
            if first:
                _check(record, reads, answer.values, settings)
            relevance, scores, gates, features, blocks, signal, starts = _explain_values(
                record, reads, answer.values, saes, settings, dict(given_gates or {})
            )
    checks.check_finite(relevance, "the relevance", model, images, saes)
    constant = any(bool(row[..., layout.prefix_tokens :].any()) for row in starts.values())
    return Tensors(
        answer.logits, answer.targets, answer.values.detach(), answer.names, relevance, scores, gates, features, blocks,
        signal if constant else None, record.passed.first,
        (*reads.notices, *differently(starts, layout), *record.uneven),
    )  # fmt: skip


def _check(record: Recording, reads: Reads, values: Tensor, settings: Settings) -> None:  # values [B] or [B, K]
    """That blocks, maps and images are read as the equations suppose."""
    check_images_apart(record.passed, reads, values)
    if settings.method != "input_x_gradient":
        check_paths(record.passed)
    if settings.method == "rollout":
        check_maps(record.passed, values)


def _depths(settings: Settings, layout: ModelLayout, first: int) -> range:
    """The blocks at whose inputs relevance is wanted, `first` being the first that can be explained."""
    return range(first, len(layout.blocks) if settings.at_every_block else first + 1)


def _explain_values(
    record: Recording,
    reads: Reads,
    values: Tensor,  # [B] or [B, K]
    saes: Saes,
    settings: Settings,
    given_gates: Maps,  # or block -> [B, K, P]
) -> Parts:
    """One backward pass a column of `values`. K parts are stacked, K after B."""
    if values.dim() == 1:
        return _explain_one(record, reads, values, saes, settings, given_gates)
    parts = []
    for k in range(values.shape[1]):
        given = {block: gates[:, k] if gates.dim() == 3 else gates for block, gates in given_gates.items()}
        parts.append(_explain_one(record, reads, values[:, k], saes, settings, given))
    stacked: Parts = tree_map(lambda *same: None if same[0] is None else torch.stack(same, dim=1), *parts)
    return stacked


def _explain_one(
    record: Recording,
    reads: Reads,
    values: Tensor,  # [B]
    saes: Saes,
    settings: Settings,
    given_gates: Maps,
) -> Parts:
    gradients = differentiate(values.sum(), record, saes)  # images do not see each other, so each gets its own
    scores, units, features = _scores(record, reads, gradients, saes, settings)
    with torch.no_grad():
        base, slope = settings.gate.bound, settings.gate.slope
        gates = {block: gate_of(scores[block] / units[block], base, slope) for block in scores}
        gates |= {block: given.to(scores[block]) for block, given in given_gates.items()}
        depths = _depths(settings, record.layout, record.passed.first)
        starts: Maps = {}
        if settings.method == "rollout":
            starts = _starts(record, reads, values)
            signals = [_rolled_out(record, reads, gradients, gates, starts, d, settings.signed) for d in depths]
            found = [_with_starts(s, starts, d, record.layout) for s, d in zip(signals, depths, strict=True)]
        else:
            found = signals = [_contributed(record, gradients, gates, depth) for depth in depths]
            if settings.method == "block_x_gradient":
                read = [max(depth, reads.deepest) - depths.start for depth in depths]
                found = signals = [torch.stack(found[i : last + 1]).mean(0) for i, last in enumerate(read)]
    blocks = torch.stack(found, dim=1) if settings.per_block else None
    return found[0], scores, gates, features, blocks, signals[0], starts


@torch.enable_grad()
def _starts(record: Recording, reads: Reads, values: Tensor) -> Maps:  # values [B]; block -> [B, N]
    """The rows that enter after blocks; none where an attention pool starts the rollout."""
    if reads.pool:
        return {}
    arrived = arriving(
        record.passed, reads.blocks,
        lambda edges: torch.autograd.grad(values.sum(), edges, retain_graph=True, allow_unused=True),
    )  # fmt: skip
    record.uneven = record.uneven or unevenly(record.passed, arrived)
    return start_rows(arrived, record.layout)


class Gradients(NamedTuple):
    """Gradients of the explained values with respect to what was recorded, each shaped like it."""

    maps: dict[int | None, Tensor]  # block -> dA [B, H, N, N]; None: the attention pool's [B, H, 1, tokens]
    inputs: dict[int, Tensor]  # block -> g_{l-1}, at its input
    streams: dict[int, Tensor]  # block -> g_l, at its output


def differentiate(explained: Tensor, record: Recording, blocks: Iterable[int]) -> Gradients:
    """Gradients of a scalar, the explained value summed over images, with respect to maps and residual streams: those
    that were recorded before blocks, and those after `blocks`.
    """
    streams = {block: record.streams[block] for block in blocks}
    recorded = [*record.maps.values(), *record.inputs.values(), *streams.values()]
    # A block after which nothing reads a token (the last one's patches) still has a gradient: zeros.
    found = iter(torch.autograd.grad(explained, recorded, retain_graph=True, allow_unused=True, materialize_grads=True))
    maps = {block: next(found) for block in record.maps}
    inputs = {block: next(found) for block in record.inputs}
    return Gradients(maps, inputs, {block: next(found) for block in streams})


@torch.no_grad()
def _scores(
    record: Recording, reads: Reads, gradients: Gradients, saes: Saes, settings: Settings
) -> tuple[Maps, Maps, dict[int, TopFeatures]]:
    """Scores [B, P], the units [B, 1] that gates measure them in and, for k > 0, the k strongest features of the
    patches, after every block with an autoencoder. Where the values read no block so late, all are 0.
    """
    scores: Maps = {}
    units: Maps = {}
    features: dict[int, TopFeatures] = {}
    gate, prefix = settings.gate, record.layout.prefix_tokens
    for block, sae in saes.items():
        x = record.batch_first(record.streams[block])[:, prefix:]  # [B, P, C]
        g = record.batch_first(gradients.streams[block])[:, prefix:]  # [B, P, C]
        permutation = gate.decoder_permutation(sae.d_sae, x.device)
        scores[block] = score(x, g, sae, gate.mode, permutation=permutation) * (block <= reads.deepest)
        of_gradients = gate.mode != "activation_only"
        units[block] = unit(g).to(scores[block]) if of_gradients else torch.ones_like(scores[block][:, :1])
        if settings.top_features > 0:
            found = contributions(x, g, sae, gate.mode, permutation=permutation) * (block <= reads.deepest)
            features[block] = top_features(found, settings.top_features)
    return scores, units, features


def _rolled_out(
    record: Recording, reads: Reads, gradients: Gradients, gates: Maps, starts: Maps, first: int, signed: bool
) -> Tensor:
    """Relevance [B, P] that the starts send to the patches that enter block `first`, without the starts themselves.

    Equation: `sum_l row_l S_l`, `S_l = (I + Cbar_l) ... (I + Cbar_first) - I` and `row_l` what enters after block l.
    An attention pool starts with its own relevance, `row Cbar_pool (I + S)`.
    """
    layout = record.layout

    def relevance_of(block: int | None) -> Tensor:  # [B, N, N], or [B, 1, tokens] for the pool
        maps = record.maps[block].to(record.dtype)  # a model may compute its maps in another dtype than its own
        found = attention_relevance(maps, gradients.maps[block], signed)
        if block is None or block not in gates:
            return found
        return gate_columns(found, gates[block], layout.prefix_tokens)

    def rolled(last: int) -> Tensor:  # [B, N, N]
        maps = [relevance_of(block) for block in range(first, last + 1) if block in record.maps]
        return rollout(maps or [row.new_zeros(len(row), layout.tokens, layout.tokens)])

    row: Tensor
    if reads.pool:
        start, stop = layout.pooled
        row = pad(relevance_of(None).squeeze(1), (start, layout.tokens - stop))  # [B, N]
        signal = row + (row.unsqueeze(1) @ rolled(len(layout.blocks) - 1)).squeeze(1)
    else:
        row = next(iter(starts.values()))
        signal = torch.zeros_like(row)
        for last, row in starts.items():
            signal = signal + (row.unsqueeze(1) @ rolled(last)).squeeze(1)
    return signal[:, layout.prefix_tokens :].contiguous()


def _with_starts(signal: Tensor, starts: Maps, first: int, layout: ModelLayout) -> Tensor:  # [B, P] -> [B, P]
    """Relevance of the patches that enter block `first`: by the identity in R, what starts there stays there."""
    for block, row in starts.items():
        if block >= first:
            signal = signal + row[:, layout.prefix_tokens :]
    return signal


def _contributed(record: Recording, gradients: Gradients, gates: Maps, start: int) -> Tensor:
    """Relevance [B, P]: `x . g` at the input of block `start`, times the gates of the blocks from there on.

    Equation: `c_p = (x_p . g_p) * prod_{l >= start} w_lp`.
    """
    ran = [block for block in record.inputs if block >= start]  # if `start` did not run, the next one that did
    x, g = (record.batch_first(found[ran[0] if ran else max(found)]) for found in (record.inputs, gradients.inputs))
    contribution = input_x_gradient(x, g)[:, record.layout.prefix_tokens :] * bool(ran)
    for block, gate in gates.items():
        if block >= start:
            contribution = contribution * gate
    return contribution
