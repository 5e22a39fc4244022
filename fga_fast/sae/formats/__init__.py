"""Checkpoint formats, one file each: native (safetensors + JSON) and prisma (both layouts of ViT-Prisma).

No format runs code from a file, follows a file name found in one, or allocates from a size it has not checked.
"""

from __future__ import annotations

import os
from pathlib import Path

from fga_fast.sae.formats import native, prisma
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

__all__ = ["load"]

_READABLE = (
    "a folder with sae.safetensors and config.json (SparseAutoencoder.save), or a ViT-Prisma .pt file or a folder "
    "with one"
)


def load(
    path: str | os.PathLike[str], *, allow_pickled_config: bool = False, normalize: str | None = prisma.AS_STORED
) -> SparseAutoencoder:
    """Read an SAE of any known format; see `SparseAutoencoder.from_pretrained`.

    Raises:
        FileNotFoundError: the path, its weights or its configuration is missing.
        ValueError: unknown, damaged, oversized or refused file, or settings that cannot be used.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"SAE path {path}: no such file or folder (nothing is downloaded); expected {_READABLE}"
        )
    if path.name.endswith((".pkl", ".pkl.gz", ".pickle", ".pickle.gz")):
        raise ValueError(
            f"{path}: a raw pickle ({path.name}) can run any code when it is read, and is refused; in an environment "
            "you trust, save its state dict with torch.save as .pt and its settings as config.json"
        )
    if native.matches(path):
        if normalize != prisma.AS_STORED:
            raise ValueError(
                f"normalize: {path} stores its own normalisation; got normalize={normalize!r}, leave it out"
            )
        return native.load(path)
    if prisma.matches(path):
        return prisma.load(path, allow_pickled_config=allow_pickled_config, normalize=normalize)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) if path.is_dir() else path.name
    raise ValueError(
        f"{path}: not an SAE checkpoint that can be read; expected {_READABLE}; found {found or 'nothing'}"
    )
