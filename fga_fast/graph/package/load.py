"""Checks, loads and runs a package, without the model. See export.py."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fga_fast.engine.callers import check_caller, outside_graphs
from fga_fast.graph.outputs import ALIGNMENT, given_classes, in_batches
from fga_fast.graph.package.metadata import DTYPES, Metadata, sha256_of, this_machine
from fga_fast.io.images import Preprocess
from fga_fast.models import checks
from fga_fast.result.explanation import Explanation
from fga_fast.result.fields import nested
from fga_fast.result.notices import value_notices


class Package:
    """An exported explanation, ready to run; see `load_package`. Call it like an `Explainer`; it returns the same.

    Several threads may share one; they run in turn.

    Attributes:
        path: NAME.pt2.
        metadata: the content of NAME.json: sizes, dtype, classes, settings, versions.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.suffix != ".pt2":
            raise ValueError(f"package: expected a file ending in .pt2, got {self.path}")
        if not self.path.is_file():
            raise FileNotFoundError(f"package: no file {self.path}")
        self.metadata = Metadata.read(self.path.with_suffix(".json"))
        _check_machine(self.metadata, self.path)
        if sha256_of(self.path) != self.metadata.sha256:
            raise ValueError(
                f"package: {self.path} is damaged, or not the file that {self.path.with_suffix('.json').name} was "
                "written for: its sha256 differs; export it again"
            )
        _load_operators(self.metadata)
        self._device = torch.device(self.metadata.device)
        if self.metadata.device == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        # torch waits for a free runner while it holds Python's lock, and the running thread may need that lock.
        self._lock = threading.Lock()
        try:
            self._loader = _loader(self.path, self._device)
        except RuntimeError as error:
            raise RuntimeError(
                f"package: {self.path} does not load in torch {torch.__version__} (made by "
                f"{self.metadata.versions.get('torch', 'another version')}): {error}"
            ) from error

    @property
    def preprocess(self) -> Preprocess | None:
        """From a picture to an image [channels, H, W] for this package; None if it was exported without."""
        return self.metadata.preprocess

    @outside_graphs
    def __call__(self, images: Tensor, targets: Any = None) -> Explanation:
        """Explains any number of images.

        Args:
            images: [B, channels, H, W] of the package's size, dtype and device. B may be 0.
            targets: None: the predicted class. For target_mode "given" also an int or a class name, or one for each
                image [B]; None among them is the predicted class.

        Returns:
            The `Explanation` that the exported explainer would return.

        Raises:
            TypeError, ValueError: images or targets do not fit, or contain NaN or Inf; the message says which.
        """
        check_caller(images)
        m = self.metadata
        like = torch.empty(0, dtype=DTYPES[m.dtype], device=self._device)
        checks.check_images(images, m.channels, (m.height, m.width), like)
        count = len(images)
        given = given_classes("package", m.target_mode, targets, images, m.classes, m.class_names, predicts=m.predicts)
        inputs: tuple[Tensor, ...] = (images.detach(), *given)
        if not count:  # run one blank image, to learn dtypes and shapes
            inputs = tuple(t.new_zeros(1, *t.shape[1:]) for t in inputs)
        with torch.inference_mode(False), torch.no_grad():
            outputs = in_batches(self._batch, [m.batch], inputs)
        found = {output.name: t[:count] for output, t in zip(m.outputs, outputs, strict=True)}
        for name, what in (("logits", "the logits"), ("relevance", "the relevance")):
            checks.check_finite(found[name], what, nn.Module(), images)  # stands for a model without weights
        return Explanation(
            **nested(found), grid=m.grid, image_size=(m.height, m.width), backend=m.backend, backend_reason="package",
            names=m.class_names, start_block=m.start_block, notices=(*m.notices, *value_notices(found)),
            signed=m.has_signs,
        )  # fmt: skip

    def _batch(self, _: int, inputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        whole = (t.contiguous() for t in inputs)
        aligned = [t if t.data_ptr() % ALIGNMENT == 0 else t.clone() for t in whole]
        with self._lock:
            outputs: list[Tensor] = self._loader.run(aligned)
        got = [(tuple(t.shape), t.dtype) for t in outputs]
        if got != [(output.shape, DTYPES[output.dtype]) for output in self.metadata.outputs]:
            raise RuntimeError(f"package: {self.path}: expected {self.metadata.outputs}, got {got}; export it again")
        return outputs


def load_package(path: str | os.PathLike[str]) -> Package:
    """Loads a package that `Explainer.export` wrote.

    Loading a package runs its machine code: load only packages you trust. This needs no model, no timm and no compiler,
    but free space of the file's size in the folder for temporary files.

    Args:
        path: NAME.pt2; NAME.json must be in the same folder, and is checked first.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the metadata is damaged or of another version, belongs to another package, or the package was
            compiled for a device or processor that is not here; the message says which.
        RuntimeError: torch cannot load it.
    """
    return Package(path)


def _check_machine(metadata: Metadata, path: Path) -> None:
    if metadata.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"package: {path} was exported for cuda, but torch sees no CUDA device; export one on the CPU")
    wanted, here = metadata.machine, this_machine()
    if not wanted:
        return
    lacking = [] if wanted["architecture"] == here["architecture"] else [wanted["architecture"]]
    if here["features"]:
        lacking += [feature for feature in wanted["features"] if feature not in here["features"]]
    if lacking:
        raise ValueError(
            f"package: {path} was compiled for another processor, this one lacks {', '.join(lacking)}; export it on a "
            "machine like this one"
        )


def _loader(path: Path, device: torch.device) -> Any:
    # torch._inductor.aoti_load_package() would first try instruction sets with a C++ compiler, for 15 seconds.
    index = -1 if device.index is None else device.index
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)


def _load_operators(metadata: Metadata) -> None:
    """Registers the operators that the package calls by name."""
    if metadata.backend == "native":
        from fga_fast import ops

        ops.load()
    if metadata.device == "cuda" and metadata.backend in ("native", "triton"):
        importlib.import_module("fga_fast.kernels")
