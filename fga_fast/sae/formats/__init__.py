"""Checkpoint formats, one file each. A checkpoint's file names, tensors and settings tell which one it has.

No format runs code from a file, follows a file name found in one, or allocates from a size it has not checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fga_fast.sae.formats import (
    dictionary_learning,
    hub,
    native,
    overcomplete,
    prisma,
    saelens,
    saev,
    sparsify,
    visaebench,
)
from fga_fast.sae.formats.checkpoint import open_checkpoint
from fga_fast.sae.formats.options import Options
from fga_fast.sae.formats.parameters import Loaded
from fga_fast.sae.formats.paths import check_subfolder, inside
from fga_fast.sae.formats.writing import Written

__all__ = ["FORMATS", "WRITERS", "load", "locate"]

# In the order they are asked: dictionary_learning, which asks for all of its names, before those that ask for some;
# visaebench before overcomplete, whose names it may use.
FORMATS = (native, saev, dictionary_learning, sparsify, visaebench, overcomplete, saelens, prisma)
WRITERS: dict[str, Callable[[Written, str | os.PathLike[str]], Path]] = {
    "fga_fast": native.save,
    "saelens": saelens.save,
    "saev": saev.save,
}

_READABLE = (
    "a folder with sae.safetensors and config.json (SparseAutoencoder.save), or a file or folder of ViT-Prisma, "
    "SAELens, saev, overcomplete, sparsify, visaebench or dictionary_learning"
)


def locate(
    path: str | os.PathLike[str], *, download: bool = False, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """The local file or folder of a checkpoint; a hub repository is fetched only with ``download``.

    Raises:
        FileNotFoundError: nothing there, or a hub id without ``download``.
        ImportError: huggingface_hub is needed and not installed.
        ValueError: a subfolder that leads out, or ``revision`` for something local.
    """
    local = Path(path)
    if local.exists():
        if revision is not None:
            raise ValueError(f"revision: belongs to a hub repository, but {local} is on this machine; leave it out")
        local = local if subfolder is None else inside(local / check_subfolder(subfolder), local)
    elif isinstance(path, str) and hub.is_repository(path):
        if not download:
            raise FileNotFoundError(
                f"SAE path {path}: no such file or folder (nothing is downloaded); if it is a repository on the "
                "Hugging Face hub, pass download=True, and subfolder= where it holds several SAEs"
            )
        return hub.fetch(path, revision, subfolder)
    if not local.exists():
        raise FileNotFoundError(f"SAE {local}: no such file or folder (nothing is downloaded); expected {_READABLE}")
    return local


def load(path: Path, options: Options) -> Loaded:
    """Read a local file or folder of any known format.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `SparseAutoencoder.from_pretrained`.
    """
    if path.name.endswith((".pkl", ".pkl.gz", ".pickle", ".pickle.gz")):
        raise ValueError(
            f"{path}: a raw pickle ({path.name}) can run any code when it is read, and is refused; in an environment "
            "you trust, save its state dict with torch.save as .pt and its settings as config.json"
        )
    found = open_checkpoint(path, options)
    for known in FORMATS:
        if found is not None and known.matches(found):
            options.check(known.NAME, known.TAKES, path)
            loaded: Loaded = known.load(found, options)
            return loaded
    if found is not None:
        holds = f"{found.weights.name} holds {', '.join(sorted(found.names)[:8]) or 'no tensors'}"
    elif path.is_dir():
        holds = "found " + (", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing")
    else:
        holds = f"found {path.name}"
    raise ValueError(f"{path}: not an SAE checkpoint that can be read; expected {_READABLE}; {holds}")
