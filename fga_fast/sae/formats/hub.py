"""Fetching a checkpoint from the Hugging Face hub, only when the caller asks for it in that call."""

from __future__ import annotations

import re
from pathlib import Path

from fga_fast.sae.formats.paths import check_subfolder

# Weights and settings of the formats that are read. No pickles of whole objects, and no scripts.
_PATTERNS = ("*.safetensors", "*.pt", "cfg.json", "config.json", "config.yaml", "config.yml")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_repository(name: str) -> bool:
    """Whether ``name`` has the form of a hub id, "organisation/name"."""
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name and "--" not in name


def fetch(repository: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """Download the weights and settings of one folder of a hub repository into Hugging Face's own cache.

    Args:
        repository, revision: see `SparseAutoencoder.from_pretrained`.
        subfolder: the folder to fetch; None: the files beside the repository's readme, none of its folders.

    Raises:
        ImportError: huggingface_hub is not installed.
        FileNotFoundError: the repository has no such folder, or none of these files in it.
        ValueError: a subfolder that leads out of the repository.
        Any error of huggingface_hub: no such repository or revision, no network.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            "download=True needs huggingface_hub: pip install huggingface_hub, or download the files yourself and "
            "pass their folder"
        ) from error
    folder = "" if subfolder is None else f"{check_subfolder(subfolder)}/"
    snapshot = snapshot_download(
        repo_id=repository,
        revision=revision,
        allow_patterns=[folder + pattern for pattern in _PATTERNS],
        # A pattern's star also stands for slashes, so folders below are left out by name.
        ignore_patterns=[f"{folder}*/*", f"{folder}*sparsity*"],
    )
    found = Path(snapshot) / folder
    if not found.is_dir() or not any(found.iterdir()):
        raise FileNotFoundError(
            f"{repository}: no weights or settings of an SAE ({', '.join(_PATTERNS)}) in "
            f"{'its top folder' if subfolder is None else repr(subfolder)}; pass subfolder= the folder that has them"
        )
    return found
