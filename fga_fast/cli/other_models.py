"""`--model` beside timm's names: an image classifier of transformers, or what a function of the user returns."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fga_fast.dataset.extras import need
from fga_fast.io.images import Preprocess

# A model in eval mode, its preprocessing, names of its classes, and whether they do not exclude each other.
Loaded = tuple[nn.Module, Preprocess, "list[str] | None", bool]

_HUGGING_FACE = "hf:"
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers


def is_other(name: str) -> bool:
    """Whether `--model` names no model of timm."""
    return ":" in name


def load(args: argparse.Namespace) -> Loaded:
    """The model that `--model` names.

    Raises:
        ValueError, ImportError: it cannot be loaded, or other options do not go with it.
    """
    name: str = args.model
    options = ["checkpoint", "checkpoint_key", "random_weights"]
    options += [] if name.startswith(_HUGGING_FACE) else ["pretrained"]
    for option in options:
        if getattr(args, option):
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"{flag}: expected none with --model {name}, which brings its weights; leave it out")
    if name.startswith(_HUGGING_FACE):
        return _hugging_face(name.removeprefix(_HUGGING_FACE), args.pretrained)
    return _own(name)


def own_function(text: str, option: str, example: str) -> tuple[str, Callable[..., Any]]:
    """Name and function that MODULE:FUNCTION names; modules are also found in the working folder.

    Args:
        option: what errors call it.
        example: of such a text, for errors.
    """
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"{option}: expected MODULE:FUNCTION, such as {example}, got {text!r}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever a user's file does
        raise ValueError(f"{option}: cannot import {module}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{option}: expected a function {name} in {module}, got {type(function).__name__}")
    return name, function


def _own(text: str) -> Loaded:
    name, function = own_function(text, "--model", "mine:my_model")
    found = function()
    parts = found if isinstance(found, tuple) else (found,)
    if len(parts) not in (2, 3) or not isinstance(parts[0], nn.Module) or not isinstance(parts[1], Preprocess):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(
            f"--model: expected {name}() to return a model and its Preprocess, and if you like names, got ({kinds})"
        )
    names = None if len(parts) == 2 or parts[2] is None else [str(one) for one in parts[2]]
    return parts[0], parts[1], names, False


def _hugging_face(name: str, download: bool) -> Loaded:
    """An image classifier, from a folder or the cache; from the network only where that is asked for.

    No code of the model's repository runs, and weights are read from safetensors alone.
    """
    transformers = need("transformers")
    settings = {"local_files_only": not download, "trust_remote_code": False}
    try:
        described, _ = transformers.PretrainedConfig.get_config_dict(name, **settings)
        # These would load what transformers itself does not check: any model of timm, or other weights beside these.
        if described.get("model_type") == "timm_wrapper" or (Path(name) / "adapter_config.json").exists():
            raise ValueError("a model of timm or an adapter; name the model of timm itself, or write a function")
        model = transformers.AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, attn_implementation="sdpa", **settings
        )  # which also keeps the folder from naming a kernel of the Hub
        processor = transformers.AutoImageProcessor.from_pretrained(name, **settings)
    except Exception as error:  # the library raises many kinds
        hint = "" if download else "; --pretrained lets transformers download it"
        raise ValueError(f"--model: transformers cannot load an image classifier {name!r} ({error}){hint}") from error
    config = model.config
    labels = {int(number): str(label) for number, label in (config.id2label or {}).items()}
    known = labels.get(0) != "LABEL_0" and [*sorted(labels)] == [*range(config.num_labels)]
    names = [labels[number] for number in range(config.num_labels)] if known else None
    several = config.problem_type == "multi_label_classification"
    return model, preprocess_of(processor.to_dict()), names, several


def preprocess_of(settings: dict[str, Any]) -> Preprocess:
    """The `Preprocess` of a transformers' image processor.

    Where a crop cannot be in the middle, it is half a pixel to the other side.

    Raises:
        ValueError: it does what `Preprocess` cannot.
    """
    size, crop = dict(settings.get("size") or {}), dict(settings.get("crop_size") or {})
    scale, filtered = float(settings.get("rescale_factor") or 0), _FILTERS.get(settings.get("resample", 2))
    mean, std = (tuple(settings.get(name) or ()) for name in ("image_mean", "image_std"))
    if not settings.get("do_normalize", True):
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    # What other processors do besides; LeViT's resizes to another size than it says.
    more = any(settings.get(name) for name in ("do_pad", "do_flip_channel_order", "rescale_offset"))
    more = more or "Levit" in str(settings.get("image_processor_type"))
    usual = settings.get("do_resize", True) and settings.get("do_rescale", True) and abs(255 * scale - 1) < 1e-3
    usual = usual and bool(mean) and bool(std) and not more
    if usual and filtered and not settings.get("do_center_crop") and size.keys() >= {"height", "width"}:
        return Preprocess((size["height"], size["width"]), mean, std, interpolation=filtered, squash=True)
    if usual and filtered and settings.get("do_center_crop") and size.get("shortest_edge"):
        # A trifle less, so that rounding does not cost a pixel of the resized picture.
        side = crop.get("height", 0)
        share = side / (size["shortest_edge"] + 1e-6)
        if side == crop.get("width") and 0 < share <= 1:
            return Preprocess((side, side), mean, std, crop_pct=share, interpolation=filtered)
    raise ValueError(
        f"--model: the image processor's settings are not known here: {settings}; write a function that returns the "
        "model and a Preprocess, and give --model MODULE:FUNCTION"
    )
