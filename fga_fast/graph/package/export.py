"""Packages: an explanation compiled ahead of time with its weights, as NAME.pt2 and NAME.json, for Python and for C++.

A .pt2 file holds machine code, and loading it runs that code: load only packages you trust. NAME.json is
data (package_metadata.py); its sha256 tells a damaged file, not a malicious one.

Weights are not frozen into layouts of their own, as `Explainer.compile` does: in a package the forward and the backward
pass would keep a copy each (652 instead of 331 MiB for ViT-B/16), which is no faster there.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fga_fast.engine.plan import Plan
from fga_fast.graph.package.metadata import Metadata, Output, sha256_of, this_machine
from fga_fast.graph.passes.biases import fold_biases
from fga_fast.graph.trace import Flat, flatten, one_at_a_time
from fga_fast.io.atomic import atomic_write, check_writable_folder
from fga_fast.io.images import Preprocess
from fga_fast.question.readout import Readout
from fga_fast.settings import TargetMode

logger = logging.getLogger(__name__)


def export(
    plan: Plan,
    path: str | os.PathLike[str],
    example: Tensor | None,
    target_mode: TargetMode = "predicted",
    preprocessing: Preprocess | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
) -> Path:
    """Compiles a plan with its model and SAEs into a package; takes a minute or so and needs a C++ compiler.

    Args:
        plan: what to export; it stays as it is.
        path: NAME.pt2; NAME.json is written beside it. Both are replaced only when the new ones are complete.
        example: [B, channels, H, W], images of the size, dtype and device that are to be explained. B becomes the
            package's batch: it takes any number of images, but computes B at a time. None: one image of the model's
            size.
        target_mode: "predicted": the package explains the predicted class; "given": it takes one class an image.
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
    example = _blank(plan) if example is None else example
    _check_preprocessing(preprocessing, example)
    check_writable_folder(path.parent)
    flat = flatten(plan, example, target_mode)
    fold_biases(flat.module)
    names = flat.class_names if class_names is None else Readout(plan.model, class_names).names(flat.classes)
    # In the same folder, since files are moved atomically only within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        staged = Path(folder) / path.name
        outputs = _compile(flat, example, target_mode, staged)
        metadata = _metadata(plan, flat, example, target_mode, outputs, sha256_of(staged))
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


def _blank(plan: Plan) -> Tensor:
    if plan.layout.image_size is None:
        raise ValueError("example: the model does not say what size of images it takes; give some")
    return plan.parameter.new_zeros(1, plan.layout.in_chans, *plan.layout.image_size)


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


def _compile(flat: Flat, example: Tensor, target_mode: TargetMode, path: Path) -> tuple[Output, ...]:
    """Writes the package to `path`; what it returns."""
    from torch._inductor import config

    built = path.parent / "built"
    built.mkdir()
    with one_at_a_time, torch.inference_mode(False), torch.no_grad():
        images = example.detach().clone(memory_format=torch.contiguous_format)
        given = [torch.zeros(len(images), dtype=torch.int64, device=images.device)] if target_mode == "given" else []
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
    plan: Plan, flat: Flat, example: Tensor, target_mode: TargetMode, outputs: tuple[Output, ...], sha256: str
) -> dict[str, Any]:
    settings, gate = plan.settings, plan.settings.gate
    batch, channels, height, width = example.shape
    return {
        "device": example.device.type, "dtype": str(example.dtype).removeprefix("torch."),
        "batch": batch, "channels": channels, "height": height, "width": width,
        "grid": plan.layout_for(example).grid, "classes": flat.classes, "target_mode": target_mode,
        "layers": tuple(plan.saes), "outputs": outputs, "backend": plan.choice().name,
        "method": settings.method, "backward": settings.backward, "start_layer": settings.start_layer,
        "signed": settings.signed, "gate": {"mode": gate.mode, "base": gate.base, "slope": gate.slope},
        "versions": {"fga_fast": version("fga_fast"), "torch": torch.__version__},
        "machine": this_machine(), "sha256": sha256,
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
