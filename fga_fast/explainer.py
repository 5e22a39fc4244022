"""START HERE. `Explainer` runs Feature-Gradient Attribution on an unmodified vision transformer.

The stages, in the order in which they happen in `Explainer.__call__`:

1. forward    the model runs once while a `Tape` taps its attention and residual streams     (tape.py)
2. target     the value to explain is read from the model's output                           (readout.py)
3. backward   one call of autograd; on the way down, block by block from the last,           (backward.py)
     score    at blocks with an SAE, features that are present and influential score a patch (ops/score.py)
     gate     scores become factors within [1/base, base]                                    (ops/gate.py)
     rollout  relevance takes one step:  v <- v + w * (v Cbar)                               (ops/attention.py)
4. result     relevance of the patches, with logits, scores and gates                        (explanation.py)

What each stage computes is written in plain PyTorch in the file of the same name under `reference/`;
`backend="reference"` runs that instead, slowly.

Sources: Chefer, Gur and Wolf, "Transformer Interpretability Beyond Attention Visualization" and "Generic
Attention-model Explainability" (2021) for TransMM; Šula, TU Wien 2026, doi 10.34726/hss.2026.132361 for the gate; Ali
et al., "XAI for Transformers: Better Explanations through Conservative Propagation", ICML 2022 for the conservative
backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fga_fast.engine import backends
from fga_fast.engine import plan as settings
from fga_fast.engine.backends import Backend
from fga_fast.engine.records import Gating, gated_map
from fga_fast.engine.tape import Tape
from fga_fast.models import checks
from fga_fast.models.find import find_layout
from fga_fast.models.layout import ModelLayout
from fga_fast.models.pooling import check_pooling
from fga_fast.precision import relevance_dtype
from fga_fast.question.readout import Answer, Readout, Targets
from fga_fast.result.explanation import Explanation
from fga_fast.sae import SparseAutoencoder
from fga_fast.settings import Gate

if TYPE_CHECKING:
    from fga_fast.graph.compiled import CompiledExplainer
    from fga_fast.graph.module import ExplanationModule


class Explainer:
    """Explains the decisions of one model.

    Args:
        model: any module from images [B, channels, H, W] to logits [B, classes] with one supported vision transformer
            in it (see `find_layout`), or a dual encoder such as CLIP; in eval mode. It is never changed: hooks live
            only during a call, no `requires_grad`, mode or gradient is touched, and several threads may explain with
            it at once.
        saes: block (from 0) -> SAE of the residual stream after it. Empty: plain TransMM.
        gate: how SAE scores become gates.
        method: "rollout", the pooled row of TransMM's R, never negative; or "input_x_gradient", x . g at the tokens
            that enter the first block, signed, multiplied by the gates of all blocks with an SAE.
        backward: "exact", the model's own gradient; or "conservative", for which norms, activations' gates and
            attention maps are constants, so that contributions add up to the logit (see docs/conservative.md).
        backend: "native" kernels (CPU), "composite" (PyTorch's operators in chunks, any device), "reference" (textbook
            PyTorch, any device) or "auto", which takes native where it can, else composite; the result's `backend` says
            which ran, and why if not native. "triton" has no kernels in this version.
        top_features: report the k strongest features a patch and an image at every gated block.
        ungated: also explain without gates (TransMM), for the result's `ungated` and for `plot`. A second explanation
            without SAEs: about one more forward and backward pass.
        layout: where the model's blocks and patches are, for models that `find_layout` does not know.
        class_names: names of the classes, so that targets may be given by name.
        tokenizer: for dual encoders, so that targets may be text prompts: open_clip's or Hugging Face's.
        start_layer: roll out the blocks from this one on only; relevance is that of the tokens that enter it.
        signed: keep the negative part of relevance maps, which speaks against the target. "input_x_gradient" always is.
        per_block: also report the relevance of the tokens that enter each block, as the result's `blocks`.
        target_chunk: how many targets an image are differentiated together; bounds the memory.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
        RuntimeError: an explicit backend cannot run here.
    """

    def __init__(
        self,
        model: nn.Module,
        saes: Mapping[int, SparseAutoencoder] | None = None,
        gate: Gate | None = None,
        method: Literal["rollout", "input_x_gradient"] = "rollout",
        backward: Literal["exact", "conservative"] = "exact",
        backend: Backend = "auto",
        top_features: int = 0,
        ungated: bool = False,
        *,
        layout: ModelLayout | None = None,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        tokenizer: Callable[..., Any] | None = None,
        start_layer: int = 0,
        signed: bool = False,
        per_block: bool = False,
        target_chunk: int = 8,
    ) -> None:
        self.model = model
        self.layout = find_layout(model) if layout is None else layout
        self._found, self._pooling_checked = layout is None, False
        settings.check_layout(self.layout, model)
        self.method, self.backward, self.gate = method, backward, Gate() if gate is None else gate
        self.start_layer, self.signed, self.per_block = start_layer, signed, per_block
        self.top_features, self.target_chunk = top_features, target_chunk
        checks.check_weights(model, self.layout)
        checks.check_saes({} if saes is None else saes, self.layout, self._parameter())
        self.saes = {int(layer): sae for layer, sae in sorted((saes or {}).items())}
        settings.check(self)
        self.readout = Readout(model, class_names, tokenizer)
        self._wanted: Backend = backend
        self._choose()  # now, so that a choice that cannot run is said here
        self._ungated = self._without_saes(backend) if ungated and self.saes else None
        self._permutations = {
            layer: self.gate.decoder_permutation(sae.d_sae, torch.device("cpu")) for layer, sae in self.saes.items()
        }

    def __call__(self, images: Tensor, targets: Targets = None) -> Explanation:
        """Explains one class for each image, or several.

        Args:
            images: [B, channels, H, W] as the model takes them (normalised), its dtype and device. B may be 0.
            targets: what to explain. None: the predicted class. An int or a class name: the same for all images.
                Ints or names [B]: one an image; [B, K]: K an image, in one forward pass. `Difference(a, b)`: why a
                rather than b. For dual encoders text prompts in place of names, or an `Embedding`. Or any function
                from logits [B, classes] to one scalar an image [B].

        Returns:
            An `Explanation`; relevance, scores and gates are float64 for float64 models, else float32.

        Raises:
            TypeError, ValueError: images, targets or model do not fit, or hold NaN or Inf; the message says which.
        """
        checks.check_eval(self.model)
        layout = self._layout_for(images)
        checks.check_images(images, layout, self._parameter())
        checks.check_saes(self.saes, self.layout, self._parameter())  # either may have been moved since
        with torch.inference_mode(False):
            images = images.clone() if images.is_inference() else images.detach()
            stages = self._choose().stages
            if len(images) == 0:
                e = self._empty(images, layout, targets)
            elif stages is None:
                e = self._reference(images, layout, targets)
            else:
                e = self._explain(images, layout, targets, stages)
        if self._ungated is not None:
            e.ungated = self._ungated(images, targets).relevance
        return e

    def compile(
        self, example: Tensor, targets: Literal["predicted", "given"] = "predicted", mode: str | None = None,
        batches: Sequence[int] | None = None,
    ) -> CompiledExplainer:  # fmt: skip
        """This explainer as one compiled graph, called like it, with the same result; takes a minute or so.

        Weights and SAEs are frozen into it. Other models, settings and image sizes are other graphs.

        Args:
            example: [B, channels, H, W], images of the size, dtype and device that are to be explained.
            targets: "predicted": the predicted class; "given": the call takes one class an image.
            mode: a mode of `torch.compile`, such as "max-autotune".
            batches: batch sizes to compile, by default the example's; others are filled up to the next, or cut.

        Raises:
            TypeError, ValueError: what cannot be one fixed graph (float16, `ungated`, the reference backend, a model
                whose forward pass looks at values); the message says why and what to do.
        """
        from fga_fast.graph.compiled import CompiledExplainer

        return CompiledExplainer(self, example, targets, mode, batches)

    def module(self, example: Tensor, targets: Literal["predicted", "given"] = "predicted") -> ExplanationModule:
        """This explainer as a plain module of operators, which `torch.export` and other compilers take as it is.

        `example` and `targets`, and what is refused, are as for `compile`. Called with images of the example's shape,
        and class numbers [B] int64 if they are given, it returns a dict of tensors: "relevance" [B, P], "logits",
        "targets", "values", "scores.9", "gates.9" and so on. It shares the model's weights, so that a change of either
        reaches the other, and checks nothing.
        """
        from fga_fast.graph.module import ExplanationModule

        return ExplanationModule(self, example, targets)

    def export(self, path: str | os.PathLike[str], example: Tensor | None = None, **settings: Any) -> Path:
        """This explainer as a package NAME.pt2 with NAME.json, which Python and C++ run without the model.

        `fga_fast.load_package(path)` loads it. `example` and what is refused are as for `compile`; without an example
        the package takes one image at a time, of the model's size. `settings`, and all that is raised, are those of
        `graph.package.export`: `targets`, `preprocessing`, `class_names`.
        """
        from fga_fast.graph.package.export import export

        if example is None:
            if self.layout.image_size is None:
                raise ValueError("example: the model does not say what size of images it takes; give some")
            example = self._parameter().new_zeros(1, self.layout.in_chans, *self.layout.image_size)
        return export(self, path, example, **settings)

    def _explain(self, images: Tensor, layout: ModelLayout, targets: Targets, stages: backends.Stages) -> Explanation:
        prefix, tape = layout.prefix_tokens, self._tape(layout, stages)
        with tape.attached(images):
            output = self.readout.run(images)
            checks.check_finite(output.detach(), "the logits", self.model, images)
            answer = self.readout.answer(targets, output)
        if not self._pooling_checked:
            check_pooling(tape.passed, answer.values)
            self._pooling_checked = True
        found = tape.backward(answer.values, self.target_chunk)
        read = {layer: Gating.read(slots) for layer, slots in found.recorded.items()}
        gates = {layer: gates for layer, (_, gates, _) in read.items()}
        blocks = {layer: row[..., prefix:].contiguous() for layer, row in sorted(found.rows.items())}
        if self.method == "input_x_gradient":
            blocks = {layer: gated_map(row, gates, layer) for layer, row in blocks.items()}
        relevance = blocks[self.start_layer]
        checks.check_finite(relevance, "the relevance", self.model, images, self.saes)
        return self._result(
            images, layout, answer, relevance, {layer: scores for layer, (scores, _, _) in read.items()}, gates,
            {layer: features for layer, (_, _, features) in read.items() if features is not None},
            torch.stack(list(blocks.values()), dim=-2) if self.per_block else None,
        )  # fmt: skip

    def _tape(self, layout: ModelLayout, stages: backends.Stages) -> Tape:
        gatings = {
            layer: Gating(
                sae, self.gate, self._permutations[layer], layout.prefix_tokens, self.top_features, stages
            )
            for layer, sae in self.saes.items()
        }  # fmt: skip
        return Tape(
            layout, gatings, stages.attention,
            method=self.method, conservative=self.backward == "conservative", signed=self.signed,
            start_layer=self.start_layer, per_block=self.per_block,
        )  # fmt: skip

    def _reference(self, images: Tensor, layout: ModelLayout, targets: Targets) -> Explanation:
        from fga_fast import reference

        found = reference.explain(
            self.model, images, targets, self.saes, self.gate, layout=layout, readout=self.readout,
            method=self.method, backward=self.backward, start_layer=self.start_layer, signed=self.signed,
            per_block=self.per_block, top_features=self.top_features, pooling_checked=self._pooling_checked,
        )  # fmt: skip
        self._pooling_checked = True
        checks.check_finite(found.relevance, "the relevance", self.model, images, self.saes)
        answer = Answer(found.logits, found.targets, found.values, found.names)
        return self._result(
            images, layout, answer, found.relevance, found.scores, found.gates, found.features, found.blocks
        )

    def _empty(self, images: Tensor, layout: ModelLayout, targets: Targets) -> Explanation:
        """No images, no explanations; one blank image tells how many classes there are."""
        with torch.no_grad():
            output = self.readout.run(images.new_zeros(1, *images.shape[1:]))[:0]
            answer = self.readout.answer(targets, output)
        dtype = relevance_dtype(images.dtype)
        none = images.new_zeros(*answer.targets.shape, layout.patches, dtype=dtype)
        slots = [none, none]
        if self.top_features:
            patch = none.new_zeros(*none.shape, self.top_features)
            slots += [patch, patch, patch[..., 0, :], patch[..., 0, :]]
        features = Gating.read(tuple(slots))[2]
        maps = dict.fromkeys(self.saes, none)
        depth = len(self.layout.blocks) - self.start_layer
        return self._result(
            images, layout, answer, none, maps, dict(maps),
            {} if features is None else dict.fromkeys(self.saes, features),
            none.new_zeros(*none.shape[:-1], depth, none.shape[-1]) if self.per_block else None,
        )  # fmt: skip

    def _result(
        self, images: Tensor, layout: ModelLayout, answer: Answer, relevance: Tensor, scores: dict[int, Tensor],
        gates: dict[int, Tensor], features: dict[int, Any], blocks: Tensor | None,
    ) -> Explanation:  # fmt: skip
        return Explanation(
            relevance=relevance, logits=answer.logits, targets=answer.targets, grid=layout.grid,
            image_size=(images.shape[-2], images.shape[-1]), scores=dict(sorted(scores.items())),
            gates=dict(sorted(gates.items())), features=dict(sorted(features.items())),
            backend=str(self._choose()),
            values=answer.values.detach(), names=answer.names, blocks=blocks, start_layer=self.start_layer,
        )  # fmt: skip

    def _without_saes(self, backend: Backend) -> Explainer:
        plain = Explainer(
            self.model, method=self.method, backward=self.backward, backend=backend, layout=self.layout,
            start_layer=self.start_layer, signed=self.signed, target_chunk=self.target_chunk,
        )  # fmt: skip
        plain.readout, plain._found, plain._pooling_checked = self.readout, self._found, True
        return plain

    @property
    def backend(self) -> str:
        """Name of the backend that runs where the model is."""
        return self._choose().name

    def _choose(self) -> backends.Choice:
        """The backend for the model's device and dtype, both of which may have changed since the last call."""
        return backends.choose(self._wanted, self._parameter().device, self._parameter().dtype)

    def _layout_for(self, images: Tensor) -> ModelLayout:
        """The layout, for a tower that takes several sizes the one for images of this size."""
        size = tuple(images.shape[-2:]) if isinstance(images, Tensor) else None
        if not self._found or size is None or len(size) != 2 or self.layout.image_size in (None, size):
            return self.layout
        try:
            return find_layout(self.model, (int(size[0]), int(size[1])))
        except ValueError:  # it takes one size; the check of the images says which
            return self.layout

    def _parameter(self) -> nn.Parameter:
        """Any parameter of the explained tower; what dtype and device are asked of."""
        return next((self.layout.tower or self.model).parameters())

    def __repr__(self) -> str:
        layers = ", ".join(f"{layer}: {sae.d_sae} features" for layer, sae in self.saes.items())
        name = type(self.layout.tower or self.model).__name__
        return (
            f"Explainer({name}, {len(self.layout.blocks)} blocks, grid {self.layout.grid}, "
            f"{self.layout.pooling} pooling, saes {{{layers}}}, {self.gate}, method={self.method!r}, "
            f"backward={self.backward!r}, backend={self.backend!r})"
        )


def explain(model: nn.Module, images: Tensor, targets: Targets = None, **settings: Any) -> Explanation:
    """One call for one explanation: `Explainer(model, **settings)(images, targets)`. See `Explainer` for all of it."""
    return Explainer(model, **settings)(images, targets)
