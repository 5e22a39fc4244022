"""fga_fast's own SAE format: a folder with ``sae.safetensors`` (the parameters) and ``config.json`` (the settings).

config.json::

    {"format": "fga_fast.sae", "format_version": 1, "activation": "topk", "k": 32, "normalize": null,
     "d_model": 768, "d_sae": 49152, "dtype": "float32", "metadata": {"layer": "9"}}

Tensors: W_enc [C, F], W_dec [F, C], b_dec [C], and where the SAE has them b_enc, b_gate, r_mag, b_mag [F] and
threshold [] or [F]. The safetensors header repeats the settings, so that two files of different saves are noticed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fga_fast.sae.checks import check_metadata
from fga_fast.sae.formats.json_config import MAX_JSON_BYTES, parse_json, read_json
from fga_fast.sae.formats.paths import inside
from fga_fast.sae.formats.safetensors_file import FLOATS, read_header
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

FORMAT = "fga_fast.sae"
FORMAT_VERSION = 1
WEIGHTS = "sae.safetensors"
CONFIG = "config.json"
NAME = FORMAT
TAKES: tuple[str, ...] = ()

_REQUIRED = ("W_enc", "W_dec", "b_dec")
_OPTIONAL = ("b_enc", "b_gate", "r_mag", "b_mag", "threshold")
_SETTINGS = ("format", "format_version", "activation", "k", "normalize", "d_model", "d_sae", "dtype")


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder of this format, or the weights file in one.

    Folders of EleutherAI's sparsify name their weights alike, and their settings ``cfg.json``.
    """
    weights = path if path.is_file() else path / WEIGHTS
    return weights.name == WEIGHTS and weights.exists() and not weights.with_name("cfg.json").exists()


def save(sae: SparseAutoencoder, path: str | os.PathLike[str]) -> Path:
    """Write ``sae`` to the folder ``path``; see `SparseAutoencoder.save`."""
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder to save the SAE in, got a file")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder.parent}: no such folder; make it before saving the SAE in {folder.name}")
    config = _config_of(sae)
    text = json.dumps(config, indent=2) + "\n"
    if len(text.encode()) > MAX_JSON_BYTES:
        raise ValueError(f"metadata: expected at most {MAX_JSON_BYTES} bytes of settings, got {len(text.encode())}")
    tensors = {name: getattr(sae, name) for name in (*_REQUIRED, *_OPTIONAL)}
    stored = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    fresh = not folder.exists()
    name = f".{folder.name}.{secrets.token_hex(8)}.tmp"
    staging = (folder.parent if fresh else folder) / name  # same file system, so that renaming is atomic
    try:
        staging.mkdir()
        save_file(stored, staging / WEIGHTS, metadata={"fga_fast": json.dumps(_essentials(config))})
        (staging / CONFIG).write_text(text, encoding="utf-8")
        if fresh:
            staging.replace(folder)
        else:
            for file in (WEIGHTS, CONFIG):
                (staging / file).replace(folder / file)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Path(path)


def load(path: Path) -> SparseAutoencoder:
    """Read an SAE from a folder of this format (or the weights file in one).

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: either file is damaged, oversized or does not fit the other.
    """
    folder = path.parent if path.is_file() else path
    weights = inside(folder / WEIGHTS, folder)
    config = read_json(inside(folder / CONFIG, folder))
    _check_config(config, folder / CONFIG)
    header, data_bytes = read_header(weights)
    metadata = header.pop("__metadata__", {})
    _check_header(header, data_bytes, config, weights)
    copy = metadata.get("fga_fast") if isinstance(metadata, dict) else None
    if not isinstance(copy, str) or parse_json(copy.encode(), f"{weights}: header") != _essentials(config):
        raise ValueError(
            f"{folder}: {CONFIG} and {WEIGHTS} do not belong together (an edited {CONFIG}, or a save that was "
            "interrupted); save the SAE again"
        )
    try:
        tensors: dict[str, Tensor] = load_file(weights)
    except Exception as error:  # safetensors raises its own type, which is not part of its stable interface
        raise ValueError(f"{weights}: not a readable safetensors file ({error})") from error
    parameters: dict[str, Any] = {name: tensors.get(name) for name in (*_REQUIRED, *_OPTIONAL)}
    settings = {name: config[name] for name in ("activation", "k", "normalize", "metadata")}
    try:
        return SparseAutoencoder(**parameters, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error


def _config_of(sae: SparseAutoencoder) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "activation": sae.activation,
        "k": sae.k,
        "normalize": sae.normalize,
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "metadata": sae.metadata,
    }


def _essentials(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in _SETTINGS}


def _check_config(config: dict[str, Any], where: Path) -> None:
    if config.get("format") != FORMAT:
        raise ValueError(f"{where}: format: expected {FORMAT!r}, got {config.get('format')!r}")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version: expected {FORMAT_VERSION}, got {config.get('format_version')!r}; a newer "
            "fga_fast may be needed"
        )
    missing = [name for name in (*_SETTINGS, "metadata") if name not in config]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    for name in ("d_model", "d_sae"):
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{where}: {name}: expected a positive integer, got {config[name]!r}")
    if config["dtype"] not in [str(dtype).removeprefix("torch.") for dtype in FLOATS.values()]:
        raise ValueError(f"{where}: dtype: expected float64, float32, float16 or bfloat16, got {config['dtype']!r}")
    try:
        check_metadata(config["metadata"])
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_header(header: dict[str, Any], data_bytes: int, config: dict[str, Any], weights: Path) -> None:
    """Check names, dtypes, shapes and sizes in the header against the settings and the file's size."""
    d_model, d_sae = config["d_model"], config["d_sae"]
    shapes = {
        "W_enc": [[d_model, d_sae]],
        "W_dec": [[d_sae, d_model]],
        "b_dec": [[d_model]],
        "threshold": [[], [d_sae]],
    }
    missing = [name for name in _REQUIRED if name not in header]
    unknown = sorted(set(header) - {*_REQUIRED, *_OPTIONAL})
    if missing or unknown:
        raise ValueError(f"{weights}: tensors missing: {missing or 'none'}; tensors not known: {unknown or 'none'}")
    expected_bytes = 0
    for name, entry in header.items():
        dtype = FLOATS.get(str(entry.get("dtype"))) if isinstance(entry, dict) else None
        if dtype is None or str(dtype) != f"torch.{config['dtype']}":
            got = entry.get("dtype") if isinstance(entry, dict) else entry
            raise ValueError(f"{weights}: {name}: expected dtype {config['dtype']} (from {CONFIG}), got {got!r}")
        allowed = shapes.get(name, [[d_sae]])
        if entry.get("shape") not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ValueError(f"{weights}: {name}: expected shape {wanted} (from {CONFIG}), got {entry.get('shape')!r}")
        count = 1
        for extent in entry["shape"]:
            count *= extent
        expected_bytes += count * dtype.itemsize
    if data_bytes != expected_bytes:
        kind = "truncated" if data_bytes < expected_bytes else "trailing bytes"
        raise ValueError(f"{weights}: {kind}: expected {expected_bytes} bytes of tensors, got {data_bytes}")
