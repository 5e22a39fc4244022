"""What to explain, and how: a model with its layout, SAEs and settings, checked against each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from fga_fast.engine import backends
from fga_fast.models import checks
from fga_fast.models.find import find_layout
from fga_fast.models.layout import ModelLayout
from fga_fast.question.readout import Readout
from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.hold import Hold
from fga_fast.settings import Backend, Backward, Gate, Method, Preset, Settings

logger = logging.getLogger(__name__)


class ExplainerSettings(TypedDict, total=False):
    """The keywords of `Explainer`, without model and SAEs, for functions that pass them on."""

    preset: Preset
    gate: Gate | None
    method: Method | None
    backward: Backward | None
    backend: Backend
    top_features: int
    ungated: bool
    layout: ModelLayout | None
    class_names: Sequence[str] | Mapping[int, str] | None
    tokenizer: Callable[..., Any] | None
    start_block: int
    start_layer: int | None
    signed: bool
    per_block: bool
    target_chunk: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that an explanation needs besides images and targets."""

    model: nn.Module
    layout: ModelLayout
    found: bool  # we read the layout from the model, so we can read it again for another image size
    readout: Readout
    saes: dict[int, SparseAutoencoder]  # block -> SAE for its output, in ascending order
    settings: Settings
    permutations: dict[int, Tensor | None]  # block -> [F], for the control with shuffled decoder rows
    held: Mapping[int, Hold] = field(default_factory=dict)  # block -> features that are held; also without gates

    @property
    def parameter(self) -> nn.Parameter:
        """A weight that tells the device and the dtype of the explained tower."""
        return checks.typical_weight(self.model, self.layout)

    def choice(self) -> backends.Choice:
        """The backend for the model's device and dtype. Both may have changed since the last call."""
        return backends.choose(self.settings.backend, self.parameter.device, self.parameter.dtype)

    def layout_for(self, images: object) -> ModelLayout:
        """The layout; if the tower takes several image sizes, the layout for images of this size.

        Raises:
            ValueError: the tower does not take images of this size; the message says what to do.
        """
        if not self.found or not isinstance(images, Tensor) or images.dim() != 4:
            return self.layout
        height, width = images.shape[-2:]
        right = images.shape[1] == self.layout.in_chans and height and width
        if not right or self.layout.image_size in (None, (height, width)):
            return self.layout
        try:
            return find_layout(self.model, (height, width))
        except ValueError as error:
            hint = (
                ""
                if self.model is self.layout.tower
                else (
                    "; if the model resizes images itself, pass layout=dataclasses.replace(find_layout(model), "
                    "image_size=None)"
                )
            )
            raise ValueError(f"images: {str(error).removeprefix('image_size: ')}{hint}") from None

    def check(self, images: Tensor) -> ModelLayout:
        """The layout for these images. Checks the images, and what may have changed since the plan was made.

        Raises:
            TypeError, ValueError: the model is in train mode or does not take such images, or an SAE was moved.
        """
        checks.check_eval(self.model)
        if self.parameter.is_meta:  # offloaded since the plan was made
            checks.check_present(self.model)
        layout = self.layout_for(images)
        checks.check_images(images, layout.in_chans, layout.image_size, self.parameter)
        checks.check_saes(self.saes, self.layout, self.parameter)
        if not self.found and len(images) == layout.tokens > 1:  # a swap of the two would go unnoticed
            checks.probe_layout(layout, self.readout.run, images[:1])
        return layout

    def without_saes(self) -> Plan:
        """The same explanation without gates."""
        settings = replace(self.settings, gate=Gate(), top_features=0, per_block=False, ungated=False)
        return replace(self, saes={}, permutations={}, settings=settings)


def make_plan(
    model: nn.Module,
    saes: Mapping[int, SparseAutoencoder] | None,
    settings: Settings,
    layout: ModelLayout | None,
    class_names: Sequence[str] | Mapping[int, str] | None,
    tokenizer: Callable[..., Any] | None,
) -> Plan:
    """A plan, after checking that its parts fit each other; `Explainer` documents the arguments.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which one and what to do.
        RuntimeError: an explicit backend cannot run here.
    """
    found = layout is None
    layout = find_layout(model) if layout is None else layout
    checks.check_layout(layout, model)
    checks.check_weights(model, layout)
    saes = {} if saes is None else saes
    checks.check_saes(saes, layout, checks.typical_weight(model, layout))
    ordered = {int(block): saes[block] for block in sorted(saes)}
    checks.check_fit(settings, ordered, layout)
    _warn(settings, ordered, layout)
    cpu = torch.device("cpu")
    permutations = {block: settings.gate.decoder_permutation(sae.d_sae, cpu) for block, sae in ordered.items()}
    readout = Readout(model, class_names, tokenizer, layout)
    plan = Plan(model, layout, found, readout, ordered, settings, permutations)
    plan.choice()  # raises now if the backend cannot run
    if not found and layout.image_size is not None:
        images = plan.parameter.new_zeros(2 if layout.tokens != 2 else 3, layout.in_chans, *layout.image_size)
        checks.probe_layout(layout, plan.readout.run, images.detach())
    return plan


def _warn(settings: Settings, saes: dict[int, SparseAutoencoder], layout: ModelLayout) -> None:
    """Warns of SAEs that are probably at the wrong block."""
    for block, sae in saes.items():
        told = sae.metadata.get("layer", str(block))
        if told.isdecimal() and int(told) != block:
            logger.warning(
                "saes[%d]: its checkpoint says it was trained on block %s; its self_check() tells whether it fits",
                block, told,
            )  # fmt: skip
    if layout.pooling == "token" and len(layout.blocks) - 1 in saes:
        logger.warning("the SAE after the last block gates nothing: the model reads only the class token there")
