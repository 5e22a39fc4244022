"""What the formats that can be written share: which SAE they write, and how a folder appears whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from fga_fast.io.atomic import sync
from fga_fast.sae.formats.checkpoint import MAX_SETTINGS_BYTES


class Written(Protocol):
    """What is written of a `SparseAutoencoder`, whose attributes these are."""

    W_dec: Tensor  # [F, C]
    b_enc: Tensor | None  # [F]
    b_dec: Tensor  # [C]
    threshold: Tensor | None  # [] or [F]
    b_gate: Tensor | None  # [F]
    r_mag: Tensor | None  # [F]
    b_mag: Tensor | None  # [F]
    bias: Tensor  # [F]
    activation: str
    k: int | None
    normalize: str | None
    metadata: dict[str, str]
    expected_l0: float | None
    d_model: int
    d_sae: int

    @property
    def W_enc(self) -> Tensor: ...  # [C, F]


def plain(sae: Written, *names: str) -> dict[str, Tensor]:
    """Those of the tensors ``names`` that the SAE has, contiguous and on the CPU."""
    found = {name: getattr(sae, name) for name in names}
    return {name: value.detach().cpu().contiguous() for name, value in found.items() if value is not None}


def dtype_name(tensor: Tensor) -> str:
    """The dtype without "torch.", as settings files have it."""
    return str(tensor.dtype).removeprefix("torch.")


def write_folder(
    path: str | os.PathLike[str],
    weights: str,
    tensors: Mapping[str, Tensor],
    header: dict[str, str] | None,
    config: str,
    settings: Mapping[str, Any],
) -> Path:
    """Write a folder with the safetensors file ``weights`` and the JSON file ``config``; earlier ones are replaced.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, NotADirectoryError, OSError: the folder cannot be written.
        ValueError: settings larger than any reader here takes.
    """
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder to save the SAE in, got a file")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder.parent}: no such folder; make it before saving the SAE in {folder.name}")
    text = json.dumps(settings, indent=2) + "\n"
    if len(text.encode()) > MAX_SETTINGS_BYTES:
        raise ValueError(f"metadata: expected at most {MAX_SETTINGS_BYTES} bytes of settings, got {len(text.encode())}")
    fresh = not folder.exists()
    name = f".{folder.name}.{secrets.token_hex(8)}.tmp"
    staging = (folder.parent if fresh else folder) / name  # same file system, so that renaming is atomic
    try:
        staging.mkdir()
        save_file(dict(tensors), staging / weights, metadata=header)
        (staging / config).write_text(text, encoding="utf-8")
        for written in (staging / weights, staging / config, staging):  # before the names say that they are whole
            sync(written)
        if fresh:
            staging.replace(folder)
            sync(folder.parent)
        else:
            for file in (weights, config):
                (staging / file).replace(folder / file)
            sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Path(path)
