"""Randomisation: does a map depend on what the model has learned?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fga_fast.metrics.checks import as_maps, check_images, check_model
from fga_fast.metrics.correlation import spearman


class Randomisation(NamedTuple):
    """Spearman's correlation of each image's map with that of the randomised model, in [-1, 1]; near 0 is better."""

    whole: Tensor  # [B] or [M, B] float64: all weights shuffled at once
    cascade: Tensor  # [S, B] or [S, M, B] float64: the first s + 1 stages shuffled, those near the output first
    stages: tuple[str, ...]  # S names, perhaps none


def randomisation(
    explain: Callable[[Tensor], Tensor],
    model: nn.Module,
    images: Tensor,  # [B, C, H, W]
    relevance: Tensor | None = None,  # [B, P] or [M, B, P]
    *,
    stages: Sequence[str] | None = None,
    absolute: bool = False,
    seed: int = 0,
) -> Randomisation:
    """Correlation of maps before and after the model's weights are shuffled.

    The numbers of each weight are permuted, so a randomised weight keeps its distribution. The weights come back bit
    for bit, also after an exception. Until then nobody else may use the model.

    Source: Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018 (arXiv:1810.03292), section 3, which draws new
    weights instead.

    Args:
        explain: images to maps [B, P] or [M, B, P], by `model`. It must read the weights at each call, so a compiled or
            exported explanation does not do. Let it explain given classes: the prediction will change.
        model: in eval mode; its parameters are shuffled, its buffers are not.
        images: normalised for the model, of its dtype and device.
        relevance: the maps of `images`, if they are known.
        stages: prefixes of parameter names, those near the output first. By default the modules that hold parameters
            directly, and of numbered modules the whole (`blocks.3`), from the last registered to the first. (): only
            `whole` is measured. It is the same whatever the stages.
        absolute: compare absolute values of relevance.
        seed: of the permutations, which are the same on all devices.

    Returns:
        NaN where a map is constant.

    Raises:
        TypeError, ValueError: an argument is wrong; its name comes first.
    """
    check_model(model)
    check_images(images)
    groups = _grouped(model, stages)
    given = explain(images) if relevance is None else relevance
    clean = as_maps(given, len(images)).to(images.device)

    def likeness(parameters: list[nn.Parameter], generator: torch.Generator) -> Tensor:  # -> [M, B]
        _shuffle(parameters, generator)
        found = as_maps(explain(images), len(images)).to(images.device)
        if found.shape != clean.shape:
            raise ValueError(f"explain: expected maps {list(clean.shape)} as before, got {list(found.shape)}")
        return spearman(clean.abs(), found.abs()) if absolute else spearman(clean, found)

    generator = torch.Generator("cpu").manual_seed(seed)
    with _lent([parameter for group in groups.values() for parameter in group]):
        cascade = [likeness(group, generator) for group in groups.values()]
    everything = list(model.parameters())
    with _lent(everything):
        whole = likeness(everything, torch.Generator("cpu").manual_seed(seed))
    steps = torch.stack(cascade) if cascade else whole.new_empty(0, *whole.shape)
    single = given.dim() == 2
    return Randomisation(whole[0] if single else whole, steps[:, 0] if single else steps, tuple(groups))


def _grouped(model: nn.Module, stages: Sequence[str] | None) -> dict[str, list[nn.Parameter]]:
    """Parameters of each stage."""
    named = list(model.named_parameters())
    if not named:
        raise ValueError(f"model: expected a model with parameters to shuffle, got {type(model).__name__} without any")
    if stages is None:
        start = _wrapping([name for name, _ in named])
        of = {name: name[:start] + _stage_of(name[start:]) for name, _ in named}
        stages = list(dict.fromkeys(of[name] for name, _ in reversed(named)))
        return {stage: [weight for name, weight in named if of[name] == stage] for stage in stages}
    groups = {
        stage: [weight for name, weight in named if name == stage or name.startswith(f"{stage}.")] for stage in stages
    }
    empty = [stage for stage, group in groups.items() if not group]
    if empty:
        raise ValueError(
            f"stages: expected prefixes of parameter names, got {empty}; the model has {named[0][0]}, ..., "
            f"{named[-1][0]}"
        )
    return groups


def _wrapping(names: list[str]) -> int:
    """How many characters all names start with that say nothing, such as "1." of a model behind a normalisation."""
    start = 0
    while all("." in name[start:] for name in names):
        first = {name[start:].split(".")[0] for name in names}
        if len(first) > 1:
            break
        start += len(first.pop()) + 1
    return start if any("." in name[start:] for name in names) else 0


def _stage_of(name: str) -> str:
    """blocks.3 of blocks.3.attn.qkv.weight; head of head.weight; a parameter of the model itself is its own stage."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: at + 1])
    return ".".join(parts[:-1]) or name


@contextmanager
def _lent(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gives the parameters their values back at the end, also after an error or an interrupt inside."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.copy_(values)


def _shuffle(parameters: list[nn.Parameter], generator: torch.Generator) -> None:
    """Permutes the numbers of each parameter in place."""
    with torch.no_grad():
        for parameter in parameters:
            order = torch.randperm(parameter.numel(), generator=generator, device="cpu").to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
