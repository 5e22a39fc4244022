"""START HERE. `Explainer` runs Feature-Gradient Attribution on an unmodified vision transformer.

The stages of a call, in order:

1. forward    the model runs once while a `Tape` taps its attention and residual streams     (engine/tape.py)
2. target     the value to explain is read from the model's output                           (question/readout.py)
3. backward   one call of autograd; on the way down, block by block from the last,           (engine/backward.py)
     score    at blocks with an SAE, features that are present and influential score a patch (ops/score.py)
     gate     scores become factors within [1/base, base]                                    (ops/gate.py)
     relevance: x . g at the tokens that enter a block, times the gates w from there on      (engine/records.py)
              or a rollout of attention, one step a block:  v <- v + w * (v Cbar)            (ops/attention.py)
4. result     relevance of the patches, with logits, scores and gates                        (result/explanation.py)

The preset "faithful" takes x . g with the conservative backward pass, "published" the rollout with the exact one.
engine/run.py calls stages 1 to 3; docs/design.md says how relevance rides the backward pass. reference/explain.py does
the same in plain PyTorch, with score, gate and attention in files of these names; `backend="reference"` runs it.

Sources: Chefer, Gur and Wolf, "Generic Attention-model Explainability", ICCV 2021 (TransMM); Šula, TU Wien 2026, doi
10.34726/hss.2026.132361 (gate); Ali et al., "XAI for Transformers", ICML 2022 (conservative backward pass).
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fga_fast.engine import run
from fga_fast.engine.callers import check_caller, outside_graphs
from fga_fast.engine.plan import ExplainerSettings, Plan, make_plan
from fga_fast.models import checks
from fga_fast.models.layout import ModelLayout
from fga_fast.question.readout import Targets, Tensors
from fga_fast.result.explanation import Explanation
from fga_fast.result.notices import value_notices
from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.hold import Hold, hold
from fga_fast.settings import Backend, Backward, Gate, Method, Preset, TargetMode, settings_of, start_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fga_fast.graph.compiled import CompiledExplainer
    from fga_fast.graph.module import ExplanationModule
    from fga_fast.io.images import Preprocess

logger = logging.getLogger(__name__)


class Explainer:
    """Explains the decisions of one model.

    Args:
        model: any module from images [B, channels, H, W] to logits [B, classes] with one supported vision transformer
            in it (see `find_layout`), or a dual encoder such as CLIP; in eval mode. Not changed; threads may share it.
        saes: block (from 0) -> SAE of the residual stream after it. Empty: no gates.
        preset: what method, backward and the base of the gates are unless they are given. "published": TransMM, and
            with SAEs FGA, as published: "rollout", "exact" and 10. "faithful": "block_x_gradient", "conservative" and
            2, which were more faithful where it was measured (docs/faithfulness.md).
        gate: how SAE scores become gates.
        method: "rollout", the pooled row of TransMM's R, never negative; "input_x_gradient", x . g at the tokens that
            enter the first block, signed, multiplied by the gates of all blocks with an SAE; or "block_x_gradient", the
            mean of that over all blocks up to the last that is read, each multiplied by the gates from there on.
        backward: "exact", the model's own gradient; or "conservative", for which norms, activations' gates and
            attention maps are constants, so that contributions add up to the logit (see docs/conservative.md).
        backend: "native": C++ kernels on CPUs; on CUDA, CUDA kernels for attention and gate, and Triton for the score.
            "triton": Triton for score and gate, on CUDA. "composite": PyTorch's operators in chunks. "reference":
            textbook PyTorch. "auto": native on CPUs, else composite; the result says which ran, and why.
        top_features: report the k strongest features of each patch and each image at every gated block.
        ungated: also explain without gates, for the result's `ungated` and for `plot`; costs a second explanation with
            the rollout, and next to nothing with the other methods.
        layout: where the model's blocks and patches are, for models that `find_layout` does not know.
        class_names: names of the classes, so that targets may be given by name.
        tokenizer: for dual encoders, so that targets may be text prompts: open_clip's or Hugging Face's.
        start_block: explain the blocks from this one on only; relevance is that of the tokens that enter it.
        signed: let the rollout keep what speaks against the target. The other methods always do.
        per_block: also report the relevance of the tokens that enter each block, as the result's `blocks`; that of
            "block_x_gradient" is the mean from this block on.
        target_chunk: how many targets of an image are differentiated together; bounds the memory.
        start_layer: the old name of start_block.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, and what to do.
        RuntimeError: an explicit backend cannot run here.
    """

    @outside_graphs
    def __init__(
        self, model: nn.Module, saes: Mapping[int, SparseAutoencoder] | None = None, *, preset: Preset = "faithful",
        gate: Gate | None = None, method: Method | None = None, backward: Backward | None = None,
        backend: Backend = "auto", top_features: int = 0, ungated: bool = False, layout: ModelLayout | None = None,
        class_names: Sequence[str] | Mapping[int, str] | None = None, tokenizer: Callable[..., Any] | None = None,
        start_block: int = 0, signed: bool = False, per_block: bool = False, target_chunk: int = 8,
        start_layer: int | None = None,
    ) -> None:  # fmt: skip
        settings = settings_of(
            preset, gate, method, backward, backend=backend, top_features=top_features,
            start_block=start_of(start_block, start_layer), signed=signed, per_block=per_block,
            target_chunk=target_chunk, ungated=ungated,
        )  # fmt: skip
        self.plan = make_plan(model, saes, settings, layout, class_names, tokenizer)
        self.model, self.layout, self.saes, self.settings = model, self.plan.layout, self.plan.saes, settings
        self._said: set[str] = set()
        self._checked = 0  # images that the model's structure was checked with: 0, 1 or 2

    @property
    def backend(self) -> str:
        """Name of the backend that runs where the model is."""
        return self.plan.choice().name

    @outside_graphs
    def __call__(self, images: Tensor, targets: Targets = None) -> Explanation:
        """Explains one class for each image, or several.

        Args:
            images: [B, channels, H, W] as the model takes them (normalised), its dtype and device. B may be 0.
            targets: what to explain. None: the predicted class. An int or a class name: the same for all images.
                Ints or names [B]: one an image; [B, K]: K an image, in one forward pass; a None among them: the
                predicted class. `Difference(a, b)`: why a rather than b. For dual encoders, text prompts. For features,
                an `Embedding`. Or any function from logits [B, classes] to scalars [B] or [B, K].

        Returns:
            An `Explanation`; relevance, scores and gates are float64 for float64 models, else float32.

        Raises:
            TypeError, ValueError: images, targets or model do not fit, or hold NaN or Inf; the message says which.
            RuntimeError: called inside a transform of torch.func, or while a graph is traced.
        """
        check_caller(images)
        layout = self.plan.check(images)
        with torch.inference_mode(False):
            images = checks.plain(images.clone() if images.is_inference() else images.detach())
            first = self._checked < min(len(images), 2)  # some checks need two images
            found = _tensors(self.plan, layout, images, targets, first)
            self._checked = max(self._checked, min(len(images), 2))
            if self.settings.ungated and self.saes and found.ungated is None:
                other = _tensors(self.plan.without_saes(), layout, images, targets)
                found = found._replace(ungated=other.relevance, ungated_signal=other.signal)
        backend = self.plan.choice()
        seen = checks.image_notices(images, layout)
        found = found._replace(notices=(*seen, *found.notices, *value_notices(found._asdict())))
        for notice in found.notices:
            if notice not in self._said:
                logger.warning("%s", notice)
        self._said.update(found.notices)
        return Explanation(
            **found._asdict(), grid=layout.grid, image_size=(images.shape[-2], images.shape[-1]),
            signed=self.settings.has_signs, backend=backend.name, backend_reason=backend.reason,
        )  # fmt: skip

    def ablate(self, features: Mapping[int, Sequence[int] | Mapping[int, float]]) -> Explainer:
        """An explainer of the same model with SAE features switched off, or held at values: what changes without them?

        Right after each named block, x' = x + decode(f', x) - decode(f, x) at every patch; f' are the codes f of x with
        the features replaced. What the SAE does not reconstruct stays, and so do prefix tokens. What is added is a
        constant of the backward pass. So logits, relevance, scores and gates are those of the edited model. Its scores
        encode x' anew, where a feature that is held at 0 may come back a little if others point its way.

        The model and this explainer do not change. Features that this explainer holds already stay held; a
        feature named again takes the new value.

        Args:
            features: block -> feature numbers to hold at 0, or feature number -> value, in the SAE's own scale.

        Raises:
            TypeError, ValueError: no features, a block without an SAE, no such feature, or a value that is not finite.
        """
        held: dict[int, Hold] = {**self.plan.held, **hold(features, self.saes, self.plan.held)}
        other = copy.copy(self)
        other.plan = replace(self.plan, held=held)
        other._said = self._said | {one.notice(block) for block, one in held.items()}  # the caller knows
        return other

    @outside_graphs
    def compile(
        self, example: Tensor, *, target_mode: TargetMode = "predicted", mode: str | None = None,
        batches: Sequence[int] | None = None,
    ) -> CompiledExplainer:  # fmt: skip
        """This explainer as one compiled graph, called like it, with the same result; takes up to half a minute.

        TorchInductor keeps the machine code in its cache folder (TORCHINDUCTOR_CACHE_DIR), so that the next process
        compiles the same model, with any weights, in some seconds.

        Args:
            example: [B, channels, H, W], images of the size, dtype and device that will be explained.
            target_mode: "predicted": the predicted class; "given": a call may give one class an image, and where it
                gives None the predicted one is explained.
            mode: a mode of `torch.compile`, such as "max-autotune".
            batches: batch sizes to compile, by default the example's; others are filled up to the next, or cut.

        Raises:
            TypeError, ValueError: what cannot be one fixed graph (float16, `ungated` with the rollout, the reference
                backend, a model whose forward pass looks at values); the message says why and what to do.
        """
        from fga_fast.graph.compiled import CompiledExplainer

        return CompiledExplainer(self.plan, example, target_mode, mode, batches)

    def module(self, example: Tensor, *, target_mode: TargetMode = "predicted") -> ExplanationModule:
        """This explainer as a plain module of operators, which `torch.export` and other compilers take as it is.

        Arguments and errors are those of `compile`. A call returns a dict of tensors: "relevance" [B, P], "logits",
        "targets", "values", "scores.9", "gates.9" and so on. It shares the model's weights, and checks nothing.
        """
        from fga_fast.graph.module import ExplanationModule

        return ExplanationModule(self.plan, example, target_mode)

    @outside_graphs
    def export(
        self, path: str | os.PathLike[str], example: Tensor | None = None, *, target_mode: TargetMode = "predicted",
        preprocessing: Preprocess | None = None, class_names: Sequence[str] | Mapping[int, str] | None = None,
    ) -> Path:  # fmt: skip
        """This explainer as a package NAME.pt2 with NAME.json, which Python and C++ run without the model.

        `fga_fast.load_package(path)` loads it. `graph.package.export` says what the arguments are and what is raised.
        """
        from fga_fast.graph.package.export import export

        return export(self.plan, path, example, target_mode, preprocessing, class_names)

    def __repr__(self) -> str:
        saes = ", ".join(f"{block}: {sae.d_sae} features" for block, sae in self.saes.items())
        name, blocks, grid = type(self.layout.tower or self.model).__name__, len(self.layout.blocks), self.layout.grid
        held = "".join(f"; {one.notice(block)}" for block, one in sorted(self.plan.held.items()))
        settings = f"{self.settings}, on {self.backend}{held}"
        return f"Explainer({name}, {blocks} blocks, grid {grid}, saes {{{saes}}}, {settings})"


def _tensors(plan: Plan, layout: ModelLayout, images: Tensor, targets: Targets, first: bool = False) -> Tensors:
    readout = plan.readout
    if plan.choice().stages is not None or len(images) == 0:
        return run.explain(plan, layout, images, lambda output: readout.answer(targets, output), first=first)
    from fga_fast import reference

    return reference.explain(
        plan.model, images, targets, plan.saes, plan.settings,
        layout=layout, readout=readout, held=plan.held, first=first,
    )  # fmt: skip


def explain(
    model: nn.Module, images: Tensor, targets: Targets = None,
    saes: Mapping[int, SparseAutoencoder] | None = None, **settings: Unpack[ExplainerSettings],
) -> Explanation:  # fmt: skip
    """One call for one explanation: `Explainer(model, saes, **settings)(images, targets)`. See there for all of it."""
    return Explainer(model, saes, **settings)(images, targets)
