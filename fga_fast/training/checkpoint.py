"""The folder of a training run: its settings, the state to go on from, and in the end the autoencoders.

settings.json               what the run was asked for
checkpoint.safetensors      everything to go on from, while the run is not complete
training.json               the course of the training; it is there when the run is complete
<recipe>/block_<l>/         an autoencoder each, when the run is complete
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fga_fast.io.atomic import atomic_file, atomic_write, sync
from fga_fast.io.json_file import parse_json, read_json
from fga_fast.io.resume import check_same, remove_leftovers
from fga_fast.io.safetensors_file import SafetensorsFile
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

SETTINGS, CHECKPOINT, COURSE = "settings.json", "checkpoint.safetensors", "training.json"
FILES = (SETTINGS, CHECKPOINT, COURSE)
_ADVICE = "the last checkpoint, if any, is unharmed: make room and give the same command again"
_MOST_SETTINGS = 16 * 2**20  # bytes


class Folder:
    """The folder of one run. Make it under `io.resume.only_writer`: it deletes what a killed run left.

    Args:
        folder: it is there and can be written.
        settings: everything that the result depends on, as JSON can hold it.

    Raises:
        ValueError: the folder holds a run with other settings, and a checkpoint or results of it; the message names
            them.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder
        if not (self.path / CHECKPOINT).exists() and not self.complete:  # nothing that other settings would spoil
            _write_json(self.path / SETTINGS, settings)
        elif (self.path / SETTINGS).exists():
            check_same(read_json(self.path / SETTINGS, _MOST_SETTINGS), settings, self.path)
        else:
            raise ValueError(f"out: {self.path} holds a run without {SETTINGS}; name another folder")
        for name in FILES:
            remove_leftovers(self.path, name)
        if self.complete:
            (self.path / CHECKPOINT).unlink(missing_ok=True)

    @property
    def complete(self) -> bool:
        """Whether all autoencoders are there."""
        return (self.path / COURSE).exists()

    def sae(self, recipe: str, block: int) -> Path:
        """The folder of one autoencoder."""
        return self.path / recipe / f"block_{block}"

    def keep(self, recipe: str, block: int, sae: SparseAutoencoder) -> None:
        """Writes an autoencoder.

        Raises:
            OSError: the disk does not take it; the checkpoint is still there.
        """
        path = self.sae(recipe, block)
        try:
            path.parent.mkdir(exist_ok=True)
            for place in (path.parent, path):  # what a killed save left
                for left in place.glob(f".{path.name}.*.tmp"):
                    shutil.rmtree(left)
            sae.save(path)
            sync(self.path)  # the recipe's folder in it
        except (OSError, SafetensorError) as error:
            raise OSError(f"out: cannot write {path}: {error}; {_ADVICE}") from error

    def write(self, step: int, tensors: Mapping[str, Tensor], course: Mapping[str, Any]) -> None:
        """Replaces the checkpoint.

        Raises:
            OSError: the disk does not take it; the checkpoint before is still there.
        """
        header = {"step": str(step), "course": json.dumps(course)}
        try:
            with atomic_file(self.path / CHECKPOINT) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, header)
        except (OSError, SafetensorError) as error:  # safetensors has its own kind for a full disk
            what = f"the checkpoint of step {step} into {self.path}"
            raise OSError(f"out: cannot write {what}: {error}; {_ADVICE}") from error

    def read(
        self, steps: int, like: Mapping[str, Tensor], course: Mapping[str, Any]
    ) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Step, tensors and course of the checkpoint; None if there is none.

        Args:
            steps: of the whole run.
            like: the tensors that it must have, of these shapes and dtypes.
            course: what the course must have.

        Raises:
            ValueError: it is damaged, or of another run.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            file = SafetensorsFile(path, max_header=_MOST_SETTINGS)
            if file.shapes != {name: tuple(tensor.shape) for name, tensor in like.items()}:
                raise ValueError(f"{path}: expected the {len(like)} tensors of this run, got others")
            tensors = file.tensors()
            if any(tensor.dtype != like[name].dtype for name, tensor in tensors.items()):
                raise ValueError(f"{path}: expected float32")
            step = int(file.metadata.get("step", ""))
            found = parse_json(file.metadata.get("course", ""), str(path))
            if not 1 <= step <= steps or found.keys() != course.keys():
                raise ValueError(f"{path}: expected a step from 1 to {steps} and its course, got step {step}")
        except ValueError as error:
            raise ValueError(f"out: the checkpoint cannot be read: {error}; delete it to start anew") from error
        return step, tensors, found

    def finish(self, course: Mapping[str, Any]) -> None:
        """Marks the run as complete and deletes its checkpoint."""
        _write_json(self.path / COURSE, course)
        sync(self.path)  # so that no crash leaves neither of them
        (self.path / CHECKPOINT).unlink(missing_ok=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    atomic_write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
