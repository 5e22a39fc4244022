"""START HERE. `Explainer` runs Feature-Gradient Attribution on an unmodified vision transformer.

The stages, in the order in which they happen in `Explainer.__call__`:

1. forward    the model runs once while a `Tape` taps its attention and residual streams     (tape.py)
2. target     the logit to explain is chosen                                                 (checks.py)
3. backward   one call of autograd; on the way down, block by block from the last,
     score    at blocks with an SAE, features that are present and influential score a patch (ops/score.py)
     gate     scores become factors within [1/base, base]                                    (ops/gate.py)
     rollout  relevance takes one step:  v <- v + w * (v Cbar)                               (ops/attention.py)
4. result     relevance of the patches, with logits, scores and gates                        (explanation.py)

What each stage computes is written in plain PyTorch in the file of the same name under `reference/`;
`backend="reference"` runs that instead, slowly.

Sources: Chefer, Gur and Wolf, "Transformer Interpretability Beyond Attention Visualization" and "Generic
Attention-model Explainability" (2021) for TransMM; Šula, TU Wien 2026, doi 10.34726/hss.2026.132361 for the gate.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fga_fast import checks, ops
from fga_fast.explanation import Explanation, TopFeatures
from fga_fast.gate import Gate
from fga_fast.models.layout import find_layout
from fga_fast.sae import SparseAutoencoder
from fga_fast.tape import Gating, Tape

logger = logging.getLogger(__name__)

Backend = Literal["auto", "native", "triton", "reference"]
Targets = int | Sequence[int] | Tensor | None


class Explainer:
    """Explains the decisions of one model.

    Args:
        model: any module from images [B, channels, H, W] to logits [B, classes] with one supported vision transformer
            in it (see `find_layout`), in eval mode. It is never changed: hooks live only during a call, no
            `requires_grad`, mode or gradient is touched, and several threads may explain with it at once.
        saes: block (from 0) -> SAE of the residual stream after it. Empty: plain TransMM.
        gate: how SAE scores become gates.
        method: "rollout", the pooled row of TransMM's R.
        backward: "exact", the model's own gradient.
        backend: "native" kernels (CPU), "reference" (plain PyTorch, any device) or "auto", which takes native where it
            can; the result's `backend` says which ran, and why if not native. "triton" has no kernels in this version.
        top_features: report the k strongest features a patch and an image at every gated block.
        ungated: also explain without gates (TransMM), for the result's `ungated` and for `plot`. A second explanation
            without SAEs: about one more forward and backward pass.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
        RuntimeError: an explicit backend cannot run here.
    """

    def __init__(
        self,
        model: nn.Module,
        saes: Mapping[int, SparseAutoencoder] | None = None,
        gate: Gate | None = None,
        method: Literal["rollout"] = "rollout",
        backward: Literal["exact"] = "exact",
        backend: Backend = "auto",
        top_features: int = 0,
        ungated: bool = False,
    ) -> None:
        for name, value, known in (("method", method, "rollout"), ("backward", backward, "exact")):
            if value != known:
                raise ValueError(f"{name}: this version knows {known!r} only, got {value!r}")
        self.model = model
        self.layout = find_layout(model)
        self.gate = Gate() if gate is None else gate
        if not isinstance(self.gate, Gate):
            raise TypeError(f"gate: expected a Gate such as Gate(base=10.0), got {type(gate).__name__}")
        self.top_features = top_features
        like = self._parameter()
        checks.check_weights(model, self.layout)
        checks.check_saes({} if saes is None else saes, self.layout, like)
        self.saes = {int(layer): sae for layer, sae in sorted((saes or {}).items())}
        self._check_top_features()
        if self.layout.pooling == "token" and len(self.layout.blocks) - 1 in self.saes:
            logger.warning("the SAE after the last block gates nothing: only the class token is read there")
        self.backend, self._backend_reason = choose_backend(backend, like.device)
        self._ungated = Explainer(model, backend=backend) if ungated and self.saes else None
        self._permutations = {
            layer: self.gate.decoder_permutation(sae.d_sae, sae.device) for layer, sae in self.saes.items()
        }

    def __call__(self, images: Tensor, targets: Targets = None) -> Explanation:
        """Explains one class for each image.

        Args:
            images: [B, channels, H, W] as the model takes them (normalised), its dtype and device. B may be 0.
            targets: class to explain; None the predicted one, an int the same for all, or integers [B].

        Returns:
            An `Explanation`; relevance, scores and gates are float64 for float64 models, else float32.

        Raises:
            TypeError, ValueError: images, targets or model do not fit, or hold NaN or Inf; the message says which.
        """
        checks.check_eval(self.model)
        checks.check_images(images, self.layout, self._parameter())
        checks.check_saes(self.saes, self.layout, self._parameter())  # either may have been moved since
        with torch.inference_mode(False):
            images = images.clone() if images.is_inference() else images.detach()
            if len(images) == 0:
                return self._empty(images, targets)
            e = self._reference(images, targets) if self.backend == "reference" else self._native(images, targets)
        if self._ungated is not None:
            e.ungated = self._ungated(images, e.targets).relevance
        return e

    def _native(self, images: Tensor, targets: Targets) -> Explanation:
        scores: dict[int, Tensor] = {}  # block -> [B, P]
        gates: dict[int, Tensor] = {}  # block -> [B, P]
        features: dict[int, TopFeatures] = {}
        gatings: dict[int, Gating] = {
            layer: functools.partial(self._gating, layer, scores, gates, features) for layer in self.saes
        }
        tape = Tape(self.layout, gatings)
        with tape.attached(images):
            logits = checks.check_logits(self.model(images))
            chosen = checks.resolve_targets(targets, logits)
            checks.check_finite(logits.detach(), "the logits", self.model, images)
            row = tape.backward(logits.gather(1, chosen[:, None]).sum())
        relevance = row[:, self.layout.prefix_tokens :].contiguous()
        checks.check_finite(relevance, "the relevance", self.model, images, self.saes)
        return self._result(relevance, logits.detach(), chosen, scores, gates, features)

    def _gating(
        self,
        layer: int,
        scores: dict[int, Tensor],
        gates: dict[int, Tensor],
        features: dict[int, TopFeatures],
        x: Tensor,  # [B, N, C]
        g: Tensor,  # [B, N, C]
    ) -> Tensor:
        """Gate of every token [B, N] from the residual stream after a block and its gradient; 1 at prefix tokens."""
        prefix = self.layout.prefix_tokens
        found = ops.score(
            x[:, prefix:], g[:, prefix:], self.saes[layer], self.gate.mode,
            permutation=self._permutations[layer], top_features=self.top_features,
        )  # fmt: skip
        scores[layer] = found.scores
        gates[layer] = ops.gate(found.scores, self.gate.base, self.gate.slope)
        if self.top_features:
            features[layer] = TopFeatures(*found[1:])
        return torch.cat([gates[layer].new_ones(len(x), prefix), gates[layer]], dim=1)

    def _reference(self, images: Tensor, targets: Targets) -> Explanation:
        from fga_fast import reference

        found = reference.explain(self.model, images, targets, self.saes, self.gate, top_features=self.top_features)
        checks.check_finite(found.relevance, "the relevance", self.model, images, self.saes)
        return self._result(found.relevance, found.logits, found.targets, found.scores, found.gates, found.features)

    def _empty(self, images: Tensor, targets: Targets) -> Explanation:
        """No images, no explanations; one blank image tells how many classes there are."""
        with torch.no_grad():
            logits = checks.check_logits(self.model(images.new_zeros(1, *images.shape[1:])))[:0]
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        none = images.new_zeros(0, self.layout.patches, dtype=dtype)
        maps, k = dict.fromkeys(self.saes, none), self.top_features
        index = none.new_zeros(0, self.layout.patches, k, dtype=torch.int64)
        top = TopFeatures(index, index.to(dtype), index[:, 0], index[:, 0].to(dtype))
        features = dict.fromkeys(self.saes, top) if k else {}
        return self._result(none, logits, checks.resolve_targets(targets, logits), maps, dict(maps), features)

    def _result(
        self,
        relevance: Tensor,  # [B, P]
        logits: Tensor,  # [B, classes]
        targets: Tensor,  # [B]
        scores: dict[int, Tensor],  # block -> [B, P]
        gates: dict[int, Tensor],  # block -> [B, P]
        features: dict[int, TopFeatures],
    ) -> Explanation:
        return Explanation(
            relevance=relevance, logits=logits, targets=targets, grid=self.layout.grid,
            image_size=self.layout.image_size, scores=dict(sorted(scores.items())), gates=dict(sorted(gates.items())),
            backend=self.backend + (f" ({self._backend_reason})" if self._backend_reason else ""),
            features=dict(sorted(features.items())),
        )  # fmt: skip

    def _parameter(self) -> Tensor:
        return next(self.layout.tower.parameters())

    def _check_top_features(self) -> None:
        if isinstance(self.top_features, bool) or not isinstance(self.top_features, int):
            raise TypeError(f"top_features: expected an int, got {type(self.top_features).__name__}")
        if not self.top_features:
            return
        if self.gate.mode in ("gradient_only", "no_sae"):
            raise ValueError(f"top_features: gate mode {self.gate.mode!r} has no feature contributions to rank")
        if not self.saes:
            raise ValueError(f"top_features: got {self.top_features}, but there are no SAEs; give saes={{...}}")
        fewest = min(sae.d_sae for sae in self.saes.values())
        if not 0 < self.top_features <= fewest:
            raise ValueError(
                f"top_features: expected 0 to {fewest} (features of the smallest SAE), got {self.top_features}"
            )

    def __repr__(self) -> str:
        layers = ", ".join(f"{layer}: {sae.d_sae} features" for layer, sae in self.saes.items())
        return (
            f"Explainer({type(self.layout.tower).__name__}, {len(self.layout.blocks)} blocks, grid {self.layout.grid}, "
            f"{self.layout.pooling} pooling, saes {{{layers}}}, {self.gate}, backend={self.backend!r})"
        )


def explain(model: nn.Module, images: Tensor, targets: Targets = None, **settings: Any) -> Explanation:
    """One call for one explanation: `Explainer(model, **settings)(images, targets)`. See `Explainer` for all of it."""
    return Explainer(model, **settings)(images, targets)


def choose_backend(backend: Backend, device: torch.device) -> tuple[str, str]:
    """The backend that will run on `device`, and the reason where "auto" could not take the native one.

    Raises:
        ValueError: unknown name.
        RuntimeError: an explicit choice cannot run here; an explicit choice never falls back.
    """
    if backend not in ("auto", "native", "triton", "reference"):
        raise ValueError(f"backend: expected auto, native, triton or reference, got {backend!r}")
    if backend == "reference":
        return backend, ""
    if backend == "triton":
        raise RuntimeError('backend: there are no Triton kernels in this version; use "auto", "native" or "reference"')
    reason = ""
    if device.type != "cpu":
        reason = f"native kernels for a whole explanation run on the CPU only, the model is on {device}"
        if device.type == "cuda" and ops.cuda_error():
            reason += f"; the CUDA object did not load: {ops.cuda_error()}"
    else:
        try:
            ops.load()
        except ops.NativeLibraryError as error:
            reason = str(error)
    if not reason:
        return "native", ""
    if backend == "native":
        raise RuntimeError(f"backend: native cannot run: {reason}")
    return "reference", reason
