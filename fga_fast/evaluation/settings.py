"""Everything that the values of a run depend on, as JSON: a run goes on only where it is the same."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fga_fast
from fga_fast.evaluation.group import Plan
from fga_fast.evaluation.items import Item
from fga_fast.evaluation.measures import RUNS
from fga_fast.io.images import Preprocess
from fga_fast.io.window import Window


def describe(
    plan: Plan, items: Sequence[Item], preprocess: Preprocess | None, batch_size: int, split: str, limit: int | None,
    window: Window | None,
) -> dict[str, Any]:  # fmt: skip
    """The settings of a run, by name."""
    model = plan.subject.model
    return {
        "model": type(model).__name__,
        "weights": weights_of(model),
        "saes": {str(block): weights_of(sae) for block, sae in sorted(plan.subject.saes.items())},
        "grid": plan.grid,
        "preprocess": None if preprocess is None else asdict(preprocess),
        "window": window,
        "items": len(items),
        "images": len({item.unit for item in items}),
        "data": _data(items),
        "split": split,
        "limit": limit,
        "batch_size": batch_size,
        "perturbed": plan.perturbed,
        "seeds": [*plan.subjects],
        "methods": {name: source_of(method) for name, method in plan.methods.items()},
        "metrics": {name: dict(measure.higher) for name, measure in plan.measures.items()},
        "variant": plan.variant,
        "probability": plan.probability,
        "runs": RUNS[plan.variant],
        "device": plan.like.device.type,
        "dtype": str(plan.like.dtype).removeprefix("torch."),
        "fga_fast": fga_fast.__version__,
        "torch": torch.__version__,
    }


def weights_of(module: nn.Module) -> str:
    """A digest of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, torch.Tensor):
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def source_of(function: Callable[..., Any]) -> str:
    """A function's place, and a digest of its source where that is known, so that an edited one is another."""
    place = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', repr(type(function)))}"
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return place
    return f"{place} {hashlib.sha256(source.encode()).hexdigest()[:8]}"


def _data(items: Sequence[Item]) -> str:
    """A digest of which items there are, and what is asked about them; of files it knows the size alone."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.key, item.unit, item.target, item.box, item.mask is not None)).encode())
        if isinstance(item.image, Path) and item.image.is_file():
            digest.update(str(item.image.stat().st_size).encode())
        elif isinstance(item.image, torch.Tensor):
            digest.update(_bytes(item.image))
    return digest.hexdigest()[:16]


def _bytes(tensor: torch.Tensor) -> memoryview:
    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)
