"""fga_fast's own SAE format: a folder with ``sae.safetensors`` (the parameters) and ``config.json`` (the settings).

config.json::

    {"format": "fga_fast.sae", "format_version": 1, "d_model": 768, "d_sae": 49152, "dtype": "float32",
     "activation": "topk", "k": 32, "normalize": null, "expected_l0": null, "metadata": {"layer": "9"}}

Tensors: W_enc [C, F], W_dec [F, C], b_dec [C], and where the SAE has them b_enc, b_gate, r_mag, b_mag [F] and
threshold [] or [F]. The safetensors header repeats the settings, so that two files of different saves are noticed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from fga_fast.io.json_file import parse_json
from fga_fast.sae.checks import check_metadata
from fga_fast.sae.formats.checkpoint import Checkpoint
from fga_fast.sae.formats.options import Options
from fga_fast.sae.formats.parameters import Loaded
from fga_fast.sae.formats.paths import inside
from fga_fast.sae.formats.writing import Written, dtype_name, plain, write_folder

FORMAT = "fga_fast.sae"
FORMAT_VERSION = 1
WEIGHTS = "sae.safetensors"
CONFIG = "config.json"
NAME = FORMAT
TAKES: tuple[str, ...] = ()

_REQUIRED = ("W_enc", "W_dec", "b_dec")
_OPTIONAL = ("b_enc", "b_gate", "r_mag", "b_mag", "threshold")
SETTINGS = ("activation", "k", "normalize", "expected_l0", "metadata")
# What the safetensors header repeats.
_REPEATED = ("format", "format_version", "activation", "k", "normalize", "d_model", "d_sae", "dtype")


def matches(found: Checkpoint) -> bool:
    """Whether the weights have this format's file name.

    Folders of EleutherAI's sparsify name their weights alike, and their settings ``cfg.json``.
    """
    return found.weights.name == WEIGHTS and not (found.folder / "cfg.json").exists()


def save(sae: Written, path: str | os.PathLike[str]) -> Path:
    """Write an SAE to a folder of this format; see `SparseAutoencoder.save`."""
    stored = plain(sae, *_REQUIRED, *_OPTIONAL)
    settings = {name: getattr(sae, name) for name in SETTINGS}
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, **_sizes(stored["W_enc"]), **settings}
    header = {"fga_fast": json.dumps(_repeated(config))}
    return write_folder(path, WEIGHTS, stored, header, CONFIG, config)


def load(found: Checkpoint, options: Options) -> Loaded:
    """Read an SAE from a folder of this format (or the weights file in one)."""
    folder = found.folder
    inside(found.weights, folder)
    config, where = found.required_config(CONFIG)
    _check_config(config, where)
    tensors = found.require(NAME, _REQUIRED, _OPTIONAL)
    W_enc = tensors["W_enc"]
    told = {name: config[name] for name in ("d_model", "d_sae", "dtype")}
    if told != _sizes(W_enc):
        raise ValueError(
            f"{found.weights}: W_enc: expected {told} (from {CONFIG}), got shape {list(W_enc.shape)}, {W_enc.dtype}"
        )
    copy = found.header.get("fga_fast", "{}")
    if parse_json(copy, f"{found.weights}: header") != _repeated(config):
        raise ValueError(
            f"{folder}: {CONFIG} and {WEIGHTS} do not belong together (an edited {CONFIG}, or a save that was "
            "interrupted); save the SAE again"
        )
    settings = {name: config[name] for name in SETTINGS if name in config}
    return Loaded({"b_enc": None, "expected_l0": _recorded_l0(config), **tensors, **settings}, str(folder))


def _recorded_l0(config: dict[str, Any]) -> float | None:
    """``metadata["l0"]``, where files of before ``expected_l0`` kept it; None where it is no number of features."""
    try:
        value = float(check_metadata(config["metadata"])["l0"])
    except (KeyError, ValueError):
        return None
    return value if 0 < value <= config["d_sae"] else None


def _sizes(
    W_enc: Tensor,  # [C, F]
) -> dict[str, Any]:
    d_model, d_sae = W_enc.shape if W_enc.ndim == 2 else (0, 0)
    return {"d_model": d_model, "d_sae": d_sae, "dtype": dtype_name(W_enc)}


def _repeated(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in _REPEATED}


def _check_config(config: dict[str, Any], where: str) -> None:
    if config.get("format") != FORMAT:
        raise ValueError(f"{where}: format: expected {FORMAT!r}, got {config.get('format')!r}")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version: expected {FORMAT_VERSION}, got {config.get('format_version')!r}; a newer "
            "fga_fast may be needed"
        )
    missing = [name for name in (*_REPEATED, "metadata") if name not in config]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    try:
        check_metadata(config["metadata"])
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
