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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from fga_fast.models import checks
from fga_fast.models.find import find_layout
from fga_fast.models.layout import ModelLayout
from fga_fast.models.pooling import check_pooling
from fga_fast.question.readout import Answer, Readout, Targets
from fga_fast.reference.attention import attention_relevance
from fga_fast.reference.gate import gate as gate_of
from fga_fast.reference.input_x_gradient import gated, input_x_gradient
from fga_fast.reference.recording import Recording, recording
from fga_fast.reference.rollout import gate_columns, pooled_row, rollout
from fga_fast.reference.score import contributions, score
from fga_fast.reference.score import top_features as strongest
from fga_fast.sae.features import TopFeatures
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder
from fga_fast.settings import Backward, Gate, Method


class ReferenceResult(NamedTuple):
    """What `explain` returns; relevance, scores and gates are float64 for float64 models and float32 otherwise.

    With K targets an image, [B] is [B, K], [B, P] is [B, K, P], and features have a K after their B.
    """

    logits: Tensor  # [B, classes], in the model's dtype
    targets: Tensor  # [B] int64
    values: Tensor  # [B], what was explained
    relevance: Tensor  # [B, P]
    scores: dict[int, Tensor]  # block -> [B, P]
    gates: dict[int, Tensor]  # block -> [B, P], in [1 / base, base]
    features: dict[int, TopFeatures]  # block -> its strongest features, if they were asked for
    blocks: Tensor | None  # [B, L', P], relevance for every start_block from the given one on, if it was asked for
    names: tuple[str, ...] | None  # of the logits' columns, where known


@dataclass(frozen=True)
class _Settings:
    """What is asked for, apart from the targets."""

    saes: dict[int, SparseAutoencoder]
    gate: Gate
    given_gates: dict[int, Tensor]  # block -> [B, P] or [B, K, P]
    method: Method
    start_block: int
    signed: bool
    per_block: bool
    top_features: int

    def depths(self, layout: ModelLayout) -> range:
        """The blocks at whose inputs relevance is wanted."""
        return range(self.start_block, len(layout.blocks) if self.per_block else self.start_block + 1)


class _Parts(NamedTuple):
    """What follows from one explained value an image."""

    relevance: Tensor  # [B, P]
    scores: dict[int, Tensor]  # block -> [B, P]
    gates: dict[int, Tensor]  # block -> [B, P]
    features: dict[int, TopFeatures]
    blocks: Tensor | None  # [B, L', P]


def explain(
    model: nn.Module,
    images: Tensor,  # [B, channels, height, width]
    targets: Targets,
    saes: Mapping[int, SparseAutoencoder],
    gate: Gate,
    *,
    layout: ModelLayout | None = None,
    readout: Readout | None = None,
    method: Method = "rollout",
    backward: Backward = "exact",
    start_block: int = 0,
    signed: bool = False,
    per_block: bool = False,
    top_features: int = 0,
    given_gates: Mapping[int, Tensor] | None = None,  # block -> [B, P] or [B, K, P]
    pooling_checked: bool = False,
) -> ReferenceResult:
    """Explain one or K targets an image with full attention maps, by the equations of this module.

    Args:
        model: module from images to logits [B, classes], or what `readout` runs. Its parameters, their gradients and
            flags are left as they are; hooks are on it during the call only and do nothing in other threads.
        images: in the model's dtype and on its device.
        targets: what is explained for each image, [B] or [B, K]; see `Readout.answer`. None: the predicted class.
        saes: block -> autoencoder of the residual stream after that block; empty: the ungated method (TransMM).
        gate: score mode, base and slope.
        layout: where the model's blocks and tokens are; None: `find_layout(model)`.
        readout: how the model's output answers the targets; None: `Readout(model)`.
        method, backward, start_block, signed: the explanation's kind, see above.
        per_block: also report the relevance for every start_block from the given one on.
        top_features: k > 0 reports the k strongest features a patch and an image at every block with an autoencoder.
        given_gates: gates in place of those computed from the scores, at blocks that have an autoencoder; for checking
            another implementation's rollout apart from its scores.
        pooling_checked: what the values read is known to be what the layout pools, so it is not checked again.

    Returns:
        `ReferenceResult`, detached.

    Raises:
        TapeError: a model whose forward pass cannot be followed.
        ValueError, TypeError: an unsupported model or output, targets or autoencoders that do not fit, a block that
            does not exist or is below `start_block`, `top_features` for mode "no_sae", an unknown method or backward.
    """
    layout = find_layout(model) if layout is None else layout
    settings = _Settings(
        dict(sorted(saes.items())), gate, dict(given_gates or {}), method, start_block, signed, per_block, top_features
    )
    _check(settings, backward, layout)
    checks.check_eval(model)
    checks.check_saes(saes, layout, next((layout.tower or model).parameters()))
    with torch.inference_mode(False), torch.enable_grad():
        record, answer = _forward(
            readout or Readout(model), images, targets, layout, settings, backward == "conservative"
        )
        record.passed.check_complete(answer.values)
        if not pooling_checked:
            check_pooling(record.passed, answer.values)
        # Where the caller has autocast on, it is for the model: relevance is not computed in 16 bit.
        with torch.autocast(images.device.type, enabled=False):
            parts = _explain_values(record, answer.values, settings)
    return ReferenceResult(answer.logits.detach(), answer.targets, answer.values.detach(), *parts, answer.names)


def _forward(
    readout: Readout, images: Tensor, targets: Targets, layout: ModelLayout, settings: _Settings, conservative: bool
) -> tuple[Recording, Answer]:
    """The model's answer, attached to the graph of everything that was recorded on the way."""
    wanted = () if settings.method == "rollout" else settings.depths(layout)
    with recording(layout, images, conservative, settings.start_block, wanted) as record:
        output = readout.run(images.detach())
        checks.check_finite(output.detach(), "the logits", readout.model, images)
        return record, readout.answer(targets, output)


def _explain_values(record: Recording, values: Tensor, settings: _Settings) -> _Parts:  # values [B] or [B, K]
    """One backward pass a column of `values`; images do not see each other, so each gets its own value's gradient."""
    if values.dim() == 1:
        gradients = differentiate(values.sum(), record, settings.saes)
        return _explain_one(record, gradients, settings, settings.given_gates)
    parts = []
    for k in range(values.shape[1]):
        given = {block: gates[:, k] if gates.dim() == 3 else gates for block, gates in settings.given_gates.items()}
        gradients = differentiate(values[:, k].sum(), record, settings.saes)
        parts.append(_explain_one(record, gradients, settings, given))
    return _stack(parts)


def _explain_one(
    record: Recording,
    gradients: Gradients,
    settings: _Settings,
    given_gates: Mapping[int, Tensor],  # block -> [B, P]
) -> _Parts:
    gate = settings.gate
    scores, features = _scores(record, gradients, settings)
    with torch.no_grad():
        gates = {block: gate_of(scores[block], gate.base, gate.slope) for block in scores}
        gates |= {block: given.to(scores[block]) for block, given in given_gates.items()}
        depths = settings.depths(record.layout)
        if settings.method == "rollout":
            found = [_rolled_out(record, gradients, gates, depth, settings.signed) for depth in depths]
        else:
            found = [_contributed(record, gradients, gates, depth) for depth in depths]
    return _Parts(found[0], scores, gates, features, torch.stack(found, dim=1) if settings.per_block else None)


class Gradients(NamedTuple):
    """Gradients of the explained values with respect to what was recorded."""

    maps: dict[int, Tensor]  # block -> dA [B, H, N, N]
    inputs: dict[int, Tensor]  # block -> g_{l-1}, at its input, shaped like it
    streams: dict[int, Tensor]  # block -> g_l, at its output, shaped like it
    pool: Tensor | None  # [B, H, 1, tokens]


def differentiate(explained: Tensor, record: Recording, saes: Mapping[int, SparseAutoencoder]) -> Gradients:
    """Gradients of a scalar, the explained value summed over images, with respect to maps and residual streams."""
    wanted: dict[tuple[str, int], Tensor] = {("maps", block): tensor for block, tensor in record.maps.items()}
    wanted |= {("inputs", block): tensor for block, tensor in record.inputs.items()}
    wanted |= {("streams", block): record.streams[block] for block in saes}
    if record.pool is not None:
        wanted["pool", 0] = record.pool
    # A block after which nothing reads a token (the last one's patches) still has a gradient: zeros.
    gradients = torch.autograd.grad(
        explained, list(wanted.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    found = dict(zip(wanted, gradients, strict=True))
    maps, inputs, streams = (
        {block: gradient for (name, block), gradient in found.items() if name == group}
        for group in ("maps", "inputs", "streams")
    )
    return Gradients(maps, inputs, streams, found.get(("pool", 0)))


@torch.no_grad()
def _scores(
    record: Recording, gradients: Gradients, settings: _Settings
) -> tuple[dict[int, Tensor], dict[int, TopFeatures]]:
    """Scores [B, P] and, for k > 0, the k strongest features of the patches after every block with an autoencoder."""
    scores: dict[int, Tensor] = {}
    features: dict[int, TopFeatures] = {}
    gate, prefix = settings.gate, record.layout.prefix_tokens
    for block, sae in settings.saes.items():
        x = record.batch_first(record.streams[block])[:, prefix:]  # [B, P, C]
        g = record.batch_first(gradients.streams[block])[:, prefix:]  # [B, P, C]
        permutation = gate.decoder_permutation(sae.d_sae, x.device)
        scores[block] = score(x, g, sae, gate.mode, permutation=permutation)
        if settings.top_features > 0:
            found = contributions(x, g, sae, gate.mode, permutation=permutation)
            features[block] = strongest(found, settings.top_features)
    return scores, features


def _rolled_out(
    record: Recording,
    gradients: Gradients,
    gates: Mapping[int, Tensor],  # block -> [B, P]
    start: int,
    signed: bool,
) -> Tensor:
    """Relevance [B, P] of the patches for the pooled vector: its row of `R = (I + Cbar_{L-1}) ... (I + Cbar_start)`."""
    layout, maps = record.layout, []
    dtype = record.dtype  # a model may compute its maps in another one than its own
    for block in range(start, len(layout.blocks)):
        relevance = attention_relevance(record.maps[block].to(dtype), gradients.maps[block], signed)  # [B, N, N]
        if block in gates:
            relevance = gate_columns(relevance, gates[block], layout.prefix_tokens)
        maps.append(relevance)
    pool = None
    if layout.pooling == "attention" and record.pool is not None and gradients.pool is not None:
        pool = attention_relevance(record.pool.to(dtype), gradients.pool, signed)  # [B, 1, tokens]
    row = pooled_row(rollout(maps), layout, pool)
    return row[:, layout.prefix_tokens :].contiguous()


def _contributed(
    record: Recording,
    gradients: Gradients,
    gates: Mapping[int, Tensor],  # block -> [B, P]
    start: int,
) -> Tensor:
    """Relevance [B, P]: `x . g` at the input of block `start`, times the gates of the blocks from there on."""
    x, g = record.batch_first(record.inputs[start]), record.batch_first(gradients.inputs[start])
    contribution = input_x_gradient(x, g)[:, record.layout.prefix_tokens :]
    return gated(contribution, [gates[block] for block in gates if block >= start])


def _stack(parts: Sequence[_Parts]) -> _Parts:
    """The parts of K targets as one, K after B."""

    def by_block(maps: Sequence[dict[int, Tensor]]) -> dict[int, Tensor]:
        return {block: torch.stack([found[block] for found in maps], dim=1) for block in maps[0]}

    features = {
        block: TopFeatures(
            *(torch.stack(same, dim=1) for same in zip(*(p.features[block] for p in parts), strict=True))
        )
        for block in parts[0].features
    }
    per_block = [part.blocks for part in parts if part.blocks is not None]
    return _Parts(
        torch.stack([part.relevance for part in parts], dim=1),
        by_block([part.scores for part in parts]),
        by_block([part.gates for part in parts]),
        features,
        torch.stack(per_block, dim=1) if per_block else None,
    )


def _check(settings: _Settings, backward: str, layout: ModelLayout) -> None:
    for name, value, known in (("method", settings.method, Method), ("backward", backward, Backward)):
        if value not in get_args(known):
            raise ValueError(f"{name}: expected {' or '.join(map(repr, get_args(known)))}, got {value!r}")
    start, last = settings.start_block, len(layout.blocks) - 1
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= last:
        raise ValueError(f"start_block: expected a block, 0 to {last}, got {start!r}")
    below = [block for block in settings.saes if block in range(start)]
    if below:
        raise ValueError(f"saes: block {below[0]} is below start_block={start}, so its gates would gate nothing")
