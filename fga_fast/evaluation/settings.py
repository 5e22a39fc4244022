"""Everything that the values of a run depend on, as JSON: a run goes on only where it is the same."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fga_fast
from fga_fast.dataset.items import Item, digest_of
from fga_fast.evaluation.group import Plan
from fga_fast.io.digest import bytes_of
from fga_fast.io.images import Preprocess
from fga_fast.io.window import Window

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # differs from process to process


def describe(
    plan: Plan, items: Sequence[Item], preprocess: Preprocess | None, batch_size: int, split: str, limit: int | None,
    window: Window | None,
) -> dict[str, Any]:  # fmt: skip
    """The settings of a run, by name."""
    model = plan.subject.model
    return {
        "model": type(model).__name__,
        "weights": weights_of(model),
        "saes": {
            str(block): f"{weights_of(sae)}, {sae.activation}, k {sae.k}"
            for block, sae in sorted(plan.subject.saes.items())
        },
        "grid": plan.grid,
        "preprocess": None if preprocess is None else asdict(preprocess),
        "window": window,
        "items": len(items),
        "images": len({item.unit for item in items}),
        "data": digest_of(items),
        "split": split,
        "limit": limit,
        "batch_size": batch_size,
        "perturbed": plan.perturbed,
        "seeds": [*plan.subjects],
        "methods": {name: source_of(method) for name, method in plan.methods.items()},
        "metrics": {name: dict(measure.higher) for name, measure in plan.measures.items()},
        "measures": {name: source_of(measure.run) for name, measure in plan.measures.items()},
        "variant": plan.variant,
        "probability": plan.probability,
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
            digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def source_of(function: Callable[..., Any]) -> str:
    """A function's place, and a digest of its module's file and of the constants that it was made with."""
    place = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', repr(type(function)))}"
    digest = hashlib.sha256("\n".join(_made_of(function, set())).encode())
    return f"{place} {digest.hexdigest()[:8]}"


def _made_of(value: Any, seen: set[int]) -> Iterator[str]:
    """What a function, or a constant that it holds, can be told apart by."""
    if isinstance(value, (tuple, list, dict)):
        for part in [*value.items()] if isinstance(value, dict) else value:
            yield from _made_of(part, seen)
        return
    if not callable(value) or isinstance(value, type):
        yield _ADDRESS.sub("", repr(value))
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        yield from _made_of((value.func, value.args, value.keywords), seen)
        return
    yield getattr(value, "__qualname__", type(value).__qualname__)
    try:
        file = inspect.getsourcefile(value)
    except TypeError:  # a built-in one
        file = None
    if file is not None and Path(file).is_file():
        yield hashlib.sha256(Path(file).read_bytes()).hexdigest()
    for cell in getattr(value, "__closure__", None) or ():
        with suppress(ValueError):  # empty
            yield from _made_of(cell.cell_contents, seen)
    yield from _made_of((getattr(value, "__defaults__", None), getattr(value, "__dict__", None)), seen)
