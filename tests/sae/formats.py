"""SAE files for the tests: weights, settings and both ViT-Prisma layouts, and objects that run code when unpickled."""

from __future__ import annotations

import collections
import json
import os
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from formats_case import C, F, changed, draw
from torch import Tensor

MODULE = "fake_prisma.sae.config"


def state_dict(gated: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"W_enc": (C, F), "W_dec": (F, C), "b_enc": (F,), "b_dec": (C,)}
    if gated:
        shapes |= {"b_gate": (F,), "r_mag": (F,), "b_mag": (F,)}
    return {name: draw(*shape, seed=seed, dtype=dtype) for seed, (name, shape) in enumerate(shapes.items())}


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return draw(3, C, seed=5, dtype=dtype)


def config(**changes: Any) -> dict[str, Any]:
    """Settings as ViT-Prisma writes them."""
    entries = {
        "hook_point_layer": 9,
        "layer_subtype": "hook_resid_post",
        "hook_point_head_index": None,
        "cached_activations_path": "activations/data/model/blocks.6.hook_mlp_out",
        "d_in": C,
        "d_sae": F,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "cls_token_only": False,
        "normalize_activations": "layer_norm",
        "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
        "device": {"__type__": "torch.device", "value": "cuda"},
        "architecture": "standard",
        "model_name": "open-clip:laion/some-model",
        "total_training_tokens": 10**10,
        "lr": 1e-3,
    }
    return changed(entries, changes)


def public_folder(folder: Path, state: Any = None, **changes: Any) -> Path:
    """Layout (ii): a bare state dict and config.json."""
    folder.mkdir(exist_ok=True)
    state = state_dict() if state is None else state
    torch.save(collections.OrderedDict(state) if isinstance(state, dict) else state, folder / "n_images_2600058.pt")
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    return folder


def trainer_file(path: Path, state: Any = None, **changes: Any) -> Path:
    """Layout (i): the configuration pickled as an object of ViT-Prisma's class name beside the state dict.

    The class's module exists only while the file is written, so a reader that imports it fails.
    """
    made = type("VisionModelSAERunnerConfig", (), {"__module__": MODULE})
    cfg = made()
    cfg.__dict__.update(config(**({"device": torch.device("cpu"), "dtype": torch.float32} | changes)))
    content = {"cfg": cfg, "state_dict": collections.OrderedDict(state_dict() if state is None else state)}
    modules = {name: types.ModuleType(name) for name in (MODULE, "fake_prisma", "fake_prisma.sae")}
    modules[MODULE].VisionModelSAERunnerConfig = made  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        torch.save(content, path)
    finally:
        for name in modules:
            del sys.modules[name]
    return path


def touch(path: str) -> None:
    Path(path).touch()


class RunsOnLoad:
    """Unpickling an instance calls ``function(argument)``."""

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> Any:
        return self.call


def malicious(marker: Path) -> list[RunsOnLoad]:
    """Objects whose unpickling creates ``marker``; the last would load it instead."""
    return [
        RunsOnLoad(os.system, f"touch {marker}"),
        RunsOnLoad(eval, f"open({str(marker)!r}, 'w')"),
        RunsOnLoad(touch, str(marker)),
        RunsOnLoad(torch.load, str(marker)),
    ]


def rezip(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, change(name, data))
