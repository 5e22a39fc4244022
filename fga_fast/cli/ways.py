"""The two ways to explain images: with a model, or with a package that `fga-fast export` wrote."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fga_fast.cli import arguments
from fga_fast.cli.notes import notes_of
from fga_fast.cli.subject import load_subject, target_number
from fga_fast.io.images import Preprocess
from fga_fast.result.explanation import Explanation
from fga_fast.sae.notes import Notes

if TYPE_CHECKING:
    from fga_fast.graph.package.metadata import Metadata


@dataclass(frozen=True)
class Way:
    """How images are explained."""

    name: str  # of the model or package, for the reader
    preprocess: Preprocess  # from pictures to its input
    multi_label: bool | None  # probabilities are sigmoids of single logits rather than a softmax; None: not known
    method: str
    backward: str
    gate_base: float | None  # gates lie in [1/gate_base, gate_base]; None: not known
    batch: int  # images at once
    like: Tensor  # any tensor of the images' dtype and device
    explain: Callable[[Tensor], Explanation]  # images [B, channels, H, W] -> one target an image, or K
    timed: Callable[[Tensor], object]  # explains one image and one target, without the ungated explanation beside it
    forward: Callable[[Tensor], object] | None  # the model's forward pass alone; None where there is none
    weights: dict[str, Any] | None = None  # where a checkpoint's weights were found, see `Subject`
    notes: Notes = field(default_factory=dict)  # names that people gave to features


def by_model(args: argparse.Namespace) -> Way:
    """Explains with the model and the autoencoders that the arguments name."""
    notes = notes_of(args)
    subject = load_subject(args)
    listed = args.top_features if subject.saes else 0
    explainer = arguments.explainer(subject, args, top_features=listed, ungated=True)
    timed = arguments.explainer(subject, args, top_features=listed)
    settings = explainer.settings

    @torch.no_grad()
    def forward(images: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, classes]
        return explainer.plan.readout.run(images)

    blank = torch.zeros(1, explainer.layout.in_chans, *subject.preprocess.image_size, device=args.device)
    classes = forward(blank).shape[1]
    given = [target_number(target, classes, subject.class_names) for target in args.target]
    one = given[0] if given else None

    def explain(images: Tensor) -> Explanation:  # [B, channels, H, W]
        if subject.multi_label and not given:
            # A scene of several garments has several likely classes; a photograph with one label has one.
            return explainer(images, forward(images).topk(2).indices)
        return explainer(images, [given] if len(given) > 1 else one)

    return Way(
        subject.name, subject.preprocess, subject.multi_label, settings.method, settings.backward, settings.gate.bound,
        args.batch_size, blank, explain, lambda image: timed(image, one), forward, subject.weights, notes,
    )  # fmt: skip


def by_package(args: argparse.Namespace) -> Way:
    """Explains with the package that the arguments name."""
    from fga_fast.graph.package.load import load_package  # which imports torch's compiler, of no use to others
    from fga_fast.graph.package.metadata import DTYPES

    package = load_package(args.package)
    about = package.metadata
    if package.preprocess is None:
        raise ValueError(
            f"--package: {args.package} was exported without preprocessing, so it takes no image files; export it with "
            "`preprocessing`, or call it from Python"
        )
    target = _package_target(args, about)

    def explain(images: Tensor) -> Explanation:  # [B, channels, H, W]
        return package(images, target)

    return Way(
        f"the package {args.package.name}", package.preprocess, None, about.method, about.backward,
        about.gate.get("base"), about.batch, torch.empty(0, dtype=DTYPES[about.dtype], device=about.device), explain,
        explain, None, notes=notes_of(args),
    )  # fmt: skip


def _package_target(args: argparse.Namespace, about: Metadata) -> int | None:
    if not args.target:
        return None
    got = " ".join(args.target)
    if about.target_mode != "given":
        raise ValueError(
            f"--target: expected none, since {args.package} explains the predicted class only, got {got}; leave it "
            "out, or export a package with `--target-mode given`"
        )
    if len(args.target) > 1:
        raise ValueError(
            f"--target: expected one class, since {args.package} explains one class an image, got {got}; give one with "
            "each call"
        )
    return target_number(args.target[0], about.classes, about.class_names)
