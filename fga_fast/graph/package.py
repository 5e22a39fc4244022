"""Packages: an explanation compiled ahead of time with its weights, as NAME.pt2 and NAME.json, for Python and for C++.

A .pt2 file holds machine code, and loading it runs that code: load packages from sources you trust only. NAME.json is
data (package_metadata.py); its sha256 tells a damaged file, not a malicious one.

Weights are not frozen into layouts of their own, as `Explainer.compile` does: in a package the forward and the backward
pass would keep a copy each (652 instead of 331 MiB for ViT-B/16), which is no faster there.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fga_fast import checks
from fga_fast.atomic import atomic_write, check_writable_folder
from fga_fast.explanation import Explanation
from fga_fast.graph.biases import fold_biases
from fga_fast.graph.outputs import explanation, given_classes, in_batches
from fga_fast.graph.package_metadata import DTYPES, Metadata, Output, sha256_of, this_machine
from fga_fast.graph.trace import Flat, Targets, flatten, one_at_a_time
from fga_fast.images import Preprocess
from fga_fast.models.layout import ModelLayout
from fga_fast.readout import Readout

if TYPE_CHECKING:
    from fga_fast.explainer import Explainer

logger = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes; what torch's own allocations have, and compiled code may count on


def export(
    explainer: Explainer,
    path: str | os.PathLike[str],
    example: Tensor,
    *,
    targets: Targets = "predicted",
    preprocessing: Preprocess | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
) -> Path:
    """Compiles `explainer` with its model and SAEs into a package; takes a minute or so and needs a C++ compiler.

    Args:
        explainer: what to export; it stays as it is.
        path: NAME.pt2; NAME.json is written beside it. Both are replaced only when the new ones are complete.
        example: [B, channels, H, W], images of the size, dtype and device that are to be explained. B becomes the
            package's batch: it takes any number of images, but computes B at a time.
        targets: "predicted": the package explains the predicted class; "given": it takes one class an image.
        preprocessing: from pictures to images, for whoever runs the package on image files.
        class_names: as for `Explainer`; None: the explainer's own.

    Returns:
        `path` as a Path.

    Raises:
        TypeError, ValueError: what cannot be one fixed graph, or does not fit; the message says why and what to do.
        RuntimeError: the compiler failed.
        OSError: the folder cannot be written.
    """
    path = check_path(path)
    _check_preprocessing(preprocessing, example)
    check_writable_folder(path.parent)
    flat = flatten(explainer, example, targets)
    fold_biases(flat.module)
    names = flat.class_names if class_names is None else Readout(explainer.model, class_names).names(flat.classes)
    # In the same folder, since files are moved atomically only within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        staged = Path(folder) / path.name
        outputs = _compile(flat, example, targets, staged)
        metadata = _metadata(explainer, flat, example, targets, outputs, sha256_of(staged))
        metadata |= {"preprocess": preprocessing, "class_names": names}
        atomic_write(staged.with_suffix(".json"), Metadata(**metadata).to_json())
        _move(staged, path)
    logger.info("exported %s, %.1f MiB", path, path.stat().st_size / 2**20)
    return path


def check_path(path: str | os.PathLike[str]) -> Path:
    """Refuses names that no package can have.

    Raises:
        ValueError, IsADirectoryError: not a .pt2 file, or the name of a folder.
    """
    path = Path(path)
    if path.suffix != ".pt2" or not path.stem:
        raise ValueError(f"path: expected the name of a file ending in .pt2, got {path}")
    for file in (path, path.with_suffix(".json")):
        if file.is_dir():
            raise IsADirectoryError(f"path: {file} is a folder; choose another name")
    return path


def _check_preprocessing(preprocessing: Preprocess | None, example: Tensor) -> None:
    if preprocessing is None or not isinstance(example, Tensor) or example.dim() != 4:  # flatten says what is wrong
        return
    if not isinstance(preprocessing, Preprocess):
        raise TypeError(f"preprocessing: expected a Preprocess, got {type(preprocessing).__name__}")
    made = [len(preprocessing.mean), *preprocessing.image_size]
    if made != list(example.shape[1:]):
        raise ValueError(
            f"preprocessing: makes images {made} (channels, height, width), the example's are {list(example.shape[1:])}"
        )


def _compile(flat: Flat, example: Tensor, targets: Targets, path: Path) -> tuple[Output, ...]:
    """Writes the package to `path`; what it returns."""
    from torch._inductor import config

    built = path.parent / "built"
    built.mkdir()
    with one_at_a_time, torch.inference_mode(False), torch.no_grad():
        images = example.detach().clone(memory_format=torch.contiguous_format)
        given = [torch.zeros(len(images), dtype=torch.int64, device=images.device)] if targets == "given" else []
        inputs = (images, *given)
        # Not into the compiler's cache, where it would leave a copy of everything for good, weights included.
        with config.patch({"aot_inductor.output_path": str(built)}):
            program = torch.export.export(flat.module, inputs)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    shown = [node.meta["val"] for node in next(iter(flat.module.graph.find_nodes(op="output"))).args[0]]
    return tuple(
        Output(name, tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in zip(flat.outputs, shown, strict=True)
    )


def _metadata(
    explainer: Explainer, flat: Flat, example: Tensor, targets: Targets, outputs: tuple[Output, ...], sha256: str
) -> dict[str, Any]:
    from fga_fast import __version__

    gate = explainer.gate
    batch, channels, height, width = example.shape
    return {
        "device": example.device.type, "dtype": str(example.dtype).removeprefix("torch."),
        "batch": batch, "channels": channels, "height": height, "width": width,
        "grid": explainer._layout_for(example).grid, "classes": flat.classes, "targets": targets,
        "layers": tuple(explainer.saes), "outputs": outputs, "backend": explainer.backend,
        "method": explainer.method, "backward": explainer.backward, "start_layer": explainer.start_layer,
        "signed": explainer.signed, "gate": {"mode": gate.mode, "base": gate.base, "slope": gate.slope},
        "versions": {"fga_fast": __version__, "torch": torch.__version__}, "machine": this_machine(), "sha256": sha256,
    }  # fmt: skip


def _move(staged: Path, path: Path) -> None:
    """Both files of a package to their names, the metadata last; on an error what was there before is there again."""
    pairs = [(staged, path), (staged.with_suffix(".json"), path.with_suffix(".json"))]
    undo: list[Callable[[], Any]] = []
    try:
        for new, file in pairs:
            if file.exists():
                old = new.with_suffix(new.suffix + ".old")
                file.replace(old)
                undo.append(lambda old=old, file=file: old.replace(file))  # type: ignore[misc]
        for new, file in pairs:
            new.replace(file)
            undo.insert(0, file.unlink)
    except BaseException:
        for step in undo:
            step()
        raise


class _Size(NamedTuple):
    """What `checks.check_images` asks a layout for."""

    in_chans: int
    image_size: tuple[int, int]


class Package:
    """An exported explanation, ready to run; see `load_package`. Called as an `Explainer` is, with the same result.

    Several threads may share one; they run in turn.

    Attributes:
        path: NAME.pt2.
        metadata: what NAME.json says: sizes, dtype, classes, settings, versions.
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
                "written for: its sha256 is another one; export it again"
            )
        _load_operators(self.metadata)
        self._device = torch.device(self.metadata.device)
        if self.metadata.device == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        # torch waits for a free runner without releasing Python's lock, which the thread that runs may need.
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
        """From a picture to an image [channels, H, W] that the package takes, if it was exported with it."""
        return self.metadata.preprocess

    def __call__(self, images: Tensor, targets: Any = None) -> Explanation:
        """Explains any number of images.

        Args:
            images: [B, channels, H, W] of the package's size, dtype and device. B may be 0.
            targets: nothing where the package explains the predicted class; where classes are given, an int or a class
                name, or one for each image [B].

        Returns:
            An `Explanation`, as the exported explainer's.

        Raises:
            TypeError, ValueError: images or targets do not fit, or hold NaN or Inf; the message says which.
        """
        m = self.metadata
        size = cast(ModelLayout, _Size(m.channels, (m.height, m.width)))
        checks.check_images(images, size, torch.empty(0, dtype=DTYPES[m.dtype], device=self._device))
        count = len(images)
        inputs: tuple[Tensor, ...] = (images.detach(), *self._given(images, targets))
        if not count:  # one blank image tells dtypes and shapes
            inputs = tuple(t.new_zeros(1, *t.shape[1:]) for t in inputs)
        with torch.inference_mode(False), torch.no_grad():
            outputs = in_batches(self._batch, [m.batch], inputs)
        found = {output.name: t[:count] for output, t in zip(m.outputs, outputs, strict=True)}
        for name, what in (("logits", "the logits"), ("relevance", "the relevance")):
            checks.check_finite(found[name], what, nn.Module(), images)  # a model without weights to look at
        return explanation(
            found, grid=m.grid, image_size=(m.height, m.width), backend=f"{m.backend}, package", names=m.class_names,
            start_layer=m.start_layer,
        )  # fmt: skip

    def _batch(self, _: int, inputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        whole = (t.contiguous() for t in inputs)
        aligned = [t if t.data_ptr() % _ALIGNMENT == 0 else t.clone() for t in whole]
        with self._lock:
            outputs: list[Tensor] = self._loader.run(aligned)
        got = [(tuple(t.shape), t.dtype) for t in outputs]
        if got != [(output.shape, DTYPES[output.dtype]) for output in self.metadata.outputs]:
            raise RuntimeError(f"package: {self.path} returns other tensors than its metadata says: {got}")
        return outputs

    def _given(self, images: Tensor, targets: Any) -> tuple[Tensor, ...]:
        m = self.metadata
        return given_classes("package", m.targets, targets, images, m.classes, m.class_names)


def load_package(path: str | os.PathLike[str]) -> Package:
    """Loads what `Explainer.export` wrote.

    A package is machine code, and loading it runs that code: load packages from sources you trust only. No model, no
    timm and no compiler are needed. Needs free space of the file's size in the folder for temporary files.

    Args:
        path: NAME.pt2; NAME.json has to lie beside it, and is checked first.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the metadata is damaged or of another version, the package is not the one that it was written for,
            or was compiled for a device or processor that is not here; the message says which.
        RuntimeError: torch does not load it.
    """
    return Package(path)


def _check_machine(metadata: Metadata, path: Path) -> None:
    if metadata.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"package: {path} was exported for cuda, but torch sees no CUDA device; export one on the CPU")
    wanted, here = metadata.machine, this_machine()
    if not wanted:
        return
    lacking = [f"{wanted['architecture']}"] if wanted["architecture"] != here["architecture"] else []
    if here["features"]:
        lacking += [feature for feature in wanted["features"] if feature not in here["features"]]
    if lacking:
        raise ValueError(
            f"package: {path} was compiled for another processor, this one lacks {', '.join(lacking)}; export it on a "
            "machine like this one"
        )


def _loader(path: Path, device: torch.device) -> Any:
    # Not torch._inductor.aoti_load_package, which has a C++ compiler try out instruction sets first, for 15 seconds.
    index = -1 if device.index is None else device.index
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)


def _load_operators(metadata: Metadata) -> None:
    """Makes the operators known that the package calls by name."""
    if metadata.backend == "native":
        from fga_fast import ops

        ops.load()
    if metadata.device == "cuda" and metadata.backend in ("native", "triton"):
        from fga_fast import triton_kernels

        triton_kernels.load()
