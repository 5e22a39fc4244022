"""Only files inside a checkpoint's folder are read; links that lead out of it are not followed."""

from __future__ import annotations

from pathlib import Path, PurePosixPath


def inside(file: Path, folder: Path) -> Path:
    """Return ``file`` if it lies in ``folder`` after every symbolic link is resolved.

    The Hugging Face cache keeps a snapshot's files as links into the same repository's ``blobs``; those are followed.

    Raises:
        ValueError: a link leads out of the folder.
    """
    real, root = file.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return file
    for parent in (root, *root.parents):
        repository = parent.parent
        if parent.name == "snapshots" and repository.name.startswith("models--"):
            if real.is_relative_to(repository / "blobs"):
                return file
            break
    raise ValueError(
        f"{file}: is a link to {real}, outside the SAE's folder, and is not followed; copy the file into the folder"
    )


def check_subfolder(subfolder: str) -> str:
    """Return ``subfolder`` as a plain relative path with ``/``.

    Raises:
        TypeError: not a string.
        ValueError: absolute, with ``..``, or with a pattern's characters.
    """
    if not isinstance(subfolder, str):
        raise TypeError(f"subfolder: expected a str, got {type(subfolder).__name__}")
    path = PurePosixPath(subfolder)
    if path.is_absolute() or ".." in path.parts or not path.parts or set(subfolder) & set("*?[]\\:\0"):
        raise ValueError(f"subfolder: expected a folder inside the checkpoint, such as 'layer_9', got {subfolder!r}")
    return str(path)
