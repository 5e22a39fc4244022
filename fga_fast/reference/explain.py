"""The whole explanation in plain PyTorch: record maps and residual streams, differentiate, multiply, gate, roll out.

Equations, with y the explained value and blocks l numbered in forward order from s, `start_block`:

    method "rollout":           Cbar_l = mean_h relu(A_l * dA_l), dA_l = d y / d A_l; without the relu if `signed`
                                R = (I + Cbar_{L-1}) ... (I + Cbar_s), whose row for the pooled vector is the relevance
    method "input_x_gradient":  x . d y / d x, x the input of block s

At blocks with an autoencoder, `w_l = base ** tanh(slope * z(s_l))` with s_l the score of x_l and `g_l = d y / d x_l` at
the patches. It multiplies the patch columns of Cbar_l, or the patches' x . g. All gradients are the model's own, or
those of the conservative backward pass (reference/conservative.py).

Memory grows with L * H * N^2 and P * F; use it to check numbers, not to explain many images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fga_fast.models import checks
from fga_fast.models.find import find_layout
from fga_fast.models.layout import ModelLayout
from fga_fast.models.maps import check_maps
from fga_fast.models.pooling import check_pooling
from fga_fast.question.readout import Readout, Targets, Tensors
from fga_fast.reference.attention import attention_relevance
from fga_fast.reference.gate import gate as gate_of
from fga_fast.reference.input_x_gradient import input_x_gradient
from fga_fast.reference.recording import Recording, recording
from fga_fast.reference.rollout import gate_columns, pooled_row, rollout
from fga_fast.reference.score import contributions, score, top_features
from fga_fast.sae.features import TopFeatures
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder
from fga_fast.settings import Settings

Saes = Mapping[int, SparseAutoencoder]
Maps = dict[int, Tensor]  # block -> [B, P]
# What one explained value for each image gives: relevance [B, P], scores, gates, features and blocks as in `Tensors`.
Parts: TypeAlias = tuple[Tensor, Maps, Maps, dict[int, TopFeatures], Tensor | None]


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
    pooling_checked: bool = False,
) -> Tensors:
    """Explain one or K targets an image with full attention maps, by the equations of this module.

    Args:
        model: module from images to logits [B, classes], or what `readout` runs. Its parameters, their gradients and
            flags are left as they are; hooks are on it during the call only and do nothing in other threads.
        images: in the model's dtype and on its device.
        targets: what is explained for each image, [B] or [B, K]; see `Readout.answer`. None: the predicted class.
        saes: block -> autoencoder of the residual stream after that block; empty: the ungated method (TransMM).
        settings: all but its `backend` and `target_chunk`.
        layout: where the model's blocks and tokens are; None: `find_layout(model)`.
        readout: how the model's output answers the targets; None: `Readout(model)`.
        given_gates: gates in place of those computed from the scores, at blocks that have an autoencoder; for checking
            another implementation's rollout apart from its scores.
        pooling_checked: skip the check that the values read the pooled tokens; it was done before.

    Returns:
        `Tensors`, detached.

    Raises:
        TapeError: a model whose forward pass cannot be followed.
        ValueError, TypeError: an unsupported model or output; targets, autoencoders or settings that do not fit it.
    """
    layout = find_layout(model) if layout is None else layout
    readout = Readout(model) if readout is None else readout
    checks.check_eval(model)
    checks.check_saes(saes, layout, next((layout.tower or model).parameters()))
    checks.check_fit(settings, saes, layout)
    saes = dict(sorted(saes.items()))
    wanted = () if settings.method == "rollout" else _depths(settings, layout)
    with torch.inference_mode(False), torch.enable_grad():
        with recording(layout, images, settings.backward == "conservative", settings.start_block, wanted) as record:
            output = readout.run(images.detach())
            checks.check_finite(output.detach(), "the logits", readout.model, images)
            answer = readout.answer(targets, output)
        record.passed.check_complete(answer.values)
        if not pooling_checked:
            check_pooling(record.passed, answer.values)
            if settings.method == "rollout":
                check_maps(record.passed, answer.values)
        # Where the caller has autocast on, it is for the model: relevance is not computed in 16 bit.
        with torch.autocast(images.device.type, enabled=False):
            parts = _explain_values(record, answer.values, saes, settings, dict(given_gates or {}))
    checks.check_finite(parts[0], "the relevance", model, images, saes)
    return Tensors(answer.logits, answer.targets, answer.values.detach(), answer.names, *parts)


def _depths(settings: Settings, layout: ModelLayout) -> range:
    """The blocks at whose inputs relevance is wanted."""
    return range(settings.start_block, len(layout.blocks) if settings.per_block else settings.start_block + 1)


def _explain_values(
    record: Recording,
    values: Tensor,  # [B] or [B, K]
    saes: Saes,
    settings: Settings,
    given_gates: Maps,  # or block -> [B, K, P]
) -> Parts:
    """One backward pass a column of `values`. K parts are stacked, K after B."""
    if values.dim() == 1:
        return _explain_one(record, values, saes, settings, given_gates)
    parts = []
    for k in range(values.shape[1]):
        given = {block: gates[:, k] if gates.dim() == 3 else gates for block, gates in given_gates.items()}
        parts.append(_explain_one(record, values[:, k], saes, settings, given))
    stacked: Parts = tree_map(lambda *same: None if same[0] is None else torch.stack(same, dim=1), *parts)
    return stacked


def _explain_one(
    record: Recording,
    values: Tensor,  # [B]
    saes: Saes,
    settings: Settings,
    given_gates: Maps,
) -> Parts:
    gradients = differentiate(values.sum(), record, saes)  # images do not see each other, so each gets its own
    scores, features = _scores(record, gradients, saes, settings)
    with torch.no_grad():
        gates = {block: gate_of(scores[block], settings.gate.base, settings.gate.slope) for block in scores}
        gates |= {block: given.to(scores[block]) for block, given in given_gates.items()}
        depths = _depths(settings, record.layout)
        if settings.method == "rollout":
            found = [_rolled_out(record, gradients, gates, depth, settings.signed) for depth in depths]
        else:
            found = [_contributed(record, gradients, gates, depth) for depth in depths]
    return found[0], scores, gates, features, torch.stack(found, dim=1) if settings.per_block else None


class Gradients(NamedTuple):
    """Gradients of the explained values with respect to what was recorded, each shaped like it."""

    maps: dict[int | None, Tensor]  # block -> dA [B, H, N, N]; None: the attention pool's [B, H, 1, tokens]
    inputs: dict[int, Tensor]  # block -> g_{l-1}, at its input
    streams: dict[int, Tensor]  # block -> g_l, at its output


def differentiate(explained: Tensor, record: Recording, saes: Saes) -> Gradients:
    """Gradients of a scalar, the explained value summed over images, with respect to maps and residual streams."""
    streams = {block: record.streams[block] for block in saes}
    recorded = [*record.maps.values(), *record.inputs.values(), *streams.values()]
    # A block after which nothing reads a token (the last one's patches) still has a gradient: zeros.
    found = iter(torch.autograd.grad(explained, recorded, retain_graph=True, allow_unused=True, materialize_grads=True))
    maps = {block: next(found) for block in record.maps}
    inputs = {block: next(found) for block in record.inputs}
    return Gradients(maps, inputs, {block: next(found) for block in streams})


@torch.no_grad()
def _scores(
    record: Recording, gradients: Gradients, saes: Saes, settings: Settings
) -> tuple[dict[int, Tensor], dict[int, TopFeatures]]:
    """Scores [B, P] and, for k > 0, the k strongest features of the patches after every block with an autoencoder."""
    scores: dict[int, Tensor] = {}
    features: dict[int, TopFeatures] = {}
    gate, prefix = settings.gate, record.layout.prefix_tokens
    for block, sae in saes.items():
        x = record.batch_first(record.streams[block])[:, prefix:]  # [B, P, C]
        g = record.batch_first(gradients.streams[block])[:, prefix:]  # [B, P, C]
        permutation = gate.decoder_permutation(sae.d_sae, x.device)
        scores[block] = score(x, g, sae, gate.mode, permutation=permutation)
        if settings.top_features > 0:
            found = contributions(x, g, sae, gate.mode, permutation=permutation)
            features[block] = top_features(found, settings.top_features)
    return scores, features


def _rolled_out(record: Recording, gradients: Gradients, gates: Maps, start: int, signed: bool) -> Tensor:
    """Relevance [B, P] of the patches for the pooled vector: its row of `R = (I + Cbar_{L-1}) ... (I + Cbar_start)`."""
    layout = record.layout

    def relevance_of(block: int | None) -> Tensor:  # [B, N, N], or [B, 1, tokens] for the pool
        maps = record.maps[block].to(record.dtype)  # a model may compute its maps in another dtype than its own
        return attention_relevance(maps, gradients.maps[block], signed)

    relevance = {block: relevance_of(block) for block in range(start, len(layout.blocks))}
    for block in gates.keys() & relevance.keys():
        relevance[block] = gate_columns(relevance[block], gates[block], layout.prefix_tokens)
    pool = relevance_of(None) if layout.pooling == "attention" else None
    row = pooled_row(rollout(list(relevance.values())), layout, pool)
    return row[:, layout.prefix_tokens :].contiguous()


def _contributed(record: Recording, gradients: Gradients, gates: Maps, start: int) -> Tensor:
    """Relevance [B, P]: `x . g` at the input of block `start`, times the gates of the blocks from there on.

    Equation: `c_p = (x_p . g_p) * prod_{l >= start} w_lp`.
    """
    x, g = record.batch_first(record.inputs[start]), record.batch_first(gradients.inputs[start])
    contribution = input_x_gradient(x, g)[:, record.layout.prefix_tokens :]
    for block, gate in gates.items():
        if block >= start:
            contribution = contribution * gate
    return contribution
