"""The whole explanation in plain PyTorch: record maps and residual streams, differentiate, multiply, gate, roll out.

Memory grows with L * H * N^2 and P * F; use it to check numbers, not to explain many images.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fga_fast import checks
from fga_fast.explanation import TopFeatures
from fga_fast.gate import Gate
from fga_fast.models.layout import ModelLayout, find_layout
from fga_fast.reference.attention import attention, attention_relevance
from fga_fast.reference.gate import gate as gate_of
from fga_fast.reference.rollout import gate_columns, pooled_row, rollout
from fga_fast.reference.score import contributions, score
from fga_fast.reference.score import top_features as strongest
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder


class ReferenceResult(NamedTuple):
    """What `explain` returns; relevance, scores and gates are float64 for float64 models and float32 otherwise."""

    logits: Tensor  # [B, classes], in the model's dtype
    targets: Tensor  # [B] int64
    relevance: Tensor  # [B, P]
    scores: dict[int, Tensor]  # block -> [B, P]
    gates: dict[int, Tensor]  # block -> [B, P], in [1 / base, base]
    features: dict[int, TopFeatures]  # block -> its strongest features, if they were asked for


@dataclass
class _Recording:
    """Tensors of one forward pass, still attached to its graph."""

    maps: dict[int, Tensor] = field(default_factory=dict)  # block -> A [B, H, N, N]
    streams: dict[int, Tensor] = field(default_factory=dict)  # block -> x_l [B, N, C]
    pool: Tensor | None = None  # [B, H, 1, tokens], the attention pool's A
    block: int | None = None  # block that is running
    in_tower: bool = False


class _AttentionMode(TorchFunctionMode):
    """Computes scaled_dot_product_attention with explicit probabilities and keeps those of the tower."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.recording.in_tower:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,  # [B, H, Nq, D]
        key: Tensor,  # [B, H, N, D]
        value: Tensor,  # [B, H, N, D]
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p > 0 or is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool):
            raise ValueError(
                "model: expected plain attention with at most an additive mask, got "
                f"dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa}, "
                f"mask dtype={None if attn_mask is None else attn_mask.dtype}"
            )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, probabilities = attention(query, key, value, scale, attn_mask)
        record = self.recording
        if record.block is None:
            if record.pool is not None:
                raise ValueError("model: expected at most one attention call outside the blocks, got a second one")
            record.pool = probabilities
        elif record.block in record.maps:
            raise ValueError(f"model: expected one attention call in block {record.block}, got a second one")
        else:
            record.maps[record.block] = probabilities
        return out


@contextmanager
def _recording(layout: ModelLayout) -> Iterator[_Recording]:
    """Hooks that follow the forward pass through the tower; all of them are gone afterwards, whatever happens."""
    record = _Recording()
    owner = threading.get_ident()  # the hooks are on a shared model; in other threads they must do nothing

    def mine() -> bool:
        return threading.get_ident() == owner

    def enter_block(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            if mine():
                record.block = index

        return hook

    def leave_block(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if mine():
                record.streams[index] = output
                record.block = None

        return hook

    def enter_tower(module: nn.Module, inputs: Any) -> None:
        if mine():
            record.in_tower = True

    def leave_tower(module: nn.Module, inputs: Any, output: Any) -> None:
        if mine():
            record.in_tower = False

    handles = []
    try:
        handles.append(layout.tower.register_forward_pre_hook(enter_tower))
        handles.append(layout.tower.register_forward_hook(leave_tower))
        for index, block in enumerate(layout.blocks):
            handles.append(block.register_forward_pre_hook(enter_block(index)))
            handles.append(block.register_forward_hook(leave_block(index)))
        with _AttentionMode(record):
            yield record
    finally:
        for handle in handles:
            handle.remove()


def explain(
    model: nn.Module,
    images: Tensor,  # [B, channels, height, width]
    targets: int | Sequence[int] | Tensor | None,  # [B]
    saes: Mapping[int, SparseAutoencoder],
    gate: Gate,
    *,
    top_features: int = 0,
    given_gates: Mapping[int, Tensor] | None = None,  # block -> [B, P]
) -> ReferenceResult:
    """Explain one target an image with full attention maps.

    Equations, for every block l (numbered from the first): `Cbar_l = mean_h relu(A_l * dA_l)`; at blocks with an
    autoencoder the patch columns of Cbar_l are multiplied by `w_l = base ** tanh(slope * z(s_l))`, with `s_l` the score
    of x_l and `g_l = d y / d x_l` at the patches; `R = (I + Cbar_L) ... (I + Cbar_1)`; the relevance is R's row for the
    pooled vector, at the patches.

    Args:
        model: module from images to logits [B, classes] with one supported tower (`find_layout`). Its parameters,
            their gradients and flags are left as they are; hooks are on it during the call only and do nothing in
            other threads.
        images: in the model's dtype and on its device.
        targets: class explained for each image; None: the predicted class; an int: the same class for all.
        saes: block -> autoencoder of the residual stream after that block; empty: the ungated method (TransMM).
        gate: score mode, base and slope.
        top_features: k > 0 reports the k strongest features a patch and an image at every block with an autoencoder.
        given_gates: gates that take the place of those computed from the scores, at blocks that have an autoencoder;
            for checking another implementation's rollout apart from its scores.

    Returns:
        `ReferenceResult`, detached.

    Raises:
        ValueError: an unsupported model, logits that are not [B, classes], a block that does not exist, an autoencoder
            of another width, targets of the wrong shape or out of range, `top_features` for mode "no_sae".
        TypeError: targets that are no integers.
    """
    layout = find_layout(model)
    checks.check_eval(model)
    checks.check_saes(saes, layout, next(layout.tower.parameters()))
    with torch.inference_mode(False), torch.enable_grad(), _recording(layout) as record:
        # The graph hangs on the images, so that frozen models work and parameters stay out of it.
        logits = checks.check_logits(model(images.detach().clone().requires_grad_()))
        _check_recording(record, layout, logits)
        checks.check_finite(logits.detach(), "the logits", model, images)
        chosen = checks.resolve_targets(targets, logits)
        explained = logits.gather(1, chosen.unsqueeze(1)).sum()
        gradients = _differentiate(explained, record, saes)
    scores, features = _scores(layout, record, gradients, saes, gate, top_features)
    with torch.no_grad():
        gates = {block: gate_of(scores[block], gate.base, gate.slope) for block in scores}
        gates |= {block: given.to(scores[block]) for block, given in (given_gates or {}).items()}
        relevance = _relevance(layout, record, gradients, gates)
    return ReferenceResult(logits.detach(), chosen, relevance, scores, gates, features)


class _Gradients(NamedTuple):
    maps: dict[int, Tensor]  # block -> dA [B, H, N, N]
    streams: dict[int, Tensor]  # block -> g [B, N, C]
    pool: Tensor | None  # [B, H, 1, tokens]


def _differentiate(explained: Tensor, record: _Recording, saes: Mapping[int, SparseAutoencoder]) -> _Gradients:
    """Gradients of the summed target logits; images do not see each other, so each gets its own logit's gradient."""
    blocks = sorted(record.maps)
    inputs = [record.maps[block] for block in blocks] + [record.streams[block] for block in saes]
    if record.pool is not None:
        inputs.append(record.pool)
    # A block after which nothing reads a token (the last one's patches) still has a gradient: zeros.
    found = torch.autograd.grad(explained, inputs, allow_unused=True, materialize_grads=True)
    maps = dict(zip(blocks, found, strict=False))
    streams = dict(zip(saes, found[len(blocks) :], strict=False))
    return _Gradients(maps, streams, found[-1] if record.pool is not None else None)


@torch.no_grad()
def _scores(
    layout: ModelLayout,
    record: _Recording,
    gradients: _Gradients,
    saes: Mapping[int, SparseAutoencoder],
    gate: Gate,
    k: int,
) -> tuple[dict[int, Tensor], dict[int, TopFeatures]]:
    """Scores [B, P] and, for k > 0, the k strongest features of the patches after every block with an autoencoder."""
    scores: dict[int, Tensor] = {}
    features: dict[int, TopFeatures] = {}
    for block, sae in sorted(saes.items()):
        x = record.streams[block][:, layout.prefix_tokens :]  # [B, P, C]
        g = gradients.streams[block][:, layout.prefix_tokens :]  # [B, P, C]
        permutation = gate.decoder_permutation(sae.d_sae, x.device)
        scores[block] = score(x, g, sae, gate.mode, permutation=permutation)
        if k > 0:
            features[block] = strongest(contributions(x, g, sae, gate.mode, permutation=permutation), k)
    return scores, features


@torch.no_grad()
def _relevance(
    layout: ModelLayout,
    record: _Recording,
    gradients: _Gradients,
    gates: Mapping[int, Tensor],  # block -> [B, P]
) -> Tensor:
    """Relevance [B, P] of the patches for the pooled vector: its row of R."""
    maps: list[Tensor] = []
    for block in range(len(layout.blocks)):
        relevance = attention_relevance(record.maps[block], gradients.maps[block])  # [B, N, N]
        if block in gates:
            relevance = gate_columns(relevance, gates[block], layout.prefix_tokens)
        maps.append(relevance)
    pool = None
    if record.pool is not None and gradients.pool is not None:
        pool = attention_relevance(record.pool, gradients.pool)  # [B, 1, tokens]
    row = pooled_row(rollout(maps), layout, pool)
    return row[:, layout.prefix_tokens :].contiguous()


def _check_recording(record: _Recording, layout: ModelLayout, logits: Tensor) -> None:
    """The forward pass must have been the one that the layout promised."""
    for block in range(len(layout.blocks)):
        if block not in record.maps:
            raise ValueError(f"model: expected one scaled_dot_product_attention call in block {block}, got none")
        shape = record.maps[block].shape
        if shape[-2:] != (layout.tokens, layout.tokens):
            raise ValueError(
                f"model: expected attention over {layout.tokens} tokens in block {block}, got a map of shape "
                f"{list(shape)}"
            )
    if (record.pool is not None) != (layout.pooling == "attention"):
        raise ValueError(f"model: attention outside the blocks does not fit '{layout.pooling}' pooling")
    if not logits.requires_grad:
        raise ValueError("model: its logits carry no gradient; its forward must not run under torch.no_grad()")
