"""Packages: an explanation compiled ahead of time with its weights, as NAME.pt2 and NAME.json, for Python and C++.

A .pt2 file contains machine code, and loading it runs that code: load only packages you trust. NAME.json is data
(metadata.py). Its sha256 detects a damaged file, not a malicious one.

Unlike `Explainer.compile`, a package does not freeze weights into other memory layouts. The forward and the backward
pass would each keep a copy (652 instead of 331 MiB for ViT-B/16) and would not be faster.
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
    """Compiles a plan with its model and SAEs into a package. Takes about a minute and needs a C++ compiler.

    Args:
        plan: what to export; it does not change.
        path: NAME.pt2; NAME.json goes beside it. Existing files are replaced only once the new ones are complete.
        example: [B, channels, H, W] of the size, dtype and device of the images to explain. The package takes any
            number of images and computes B at a time. None: one image of the model's size.
        target_mode: "predicted": the package explains the predicted class; "given": a call may give one class for each
            image.
        preprocessing: from pictures to images, for users who run the package on image files.
        class_names: as for `Explainer`; None: the explainer's own.

    Returns:
        `path` as a Path.

    Raises:
        TypeError, ValueError: an argument does not fit, or this cannot become a fixed graph; the message says why and
            what to do.
        RuntimeError: the compiler failed.
        OSError: the folder is not writable.
    """
    path = check_path(path)
    example = _blank(plan) if example is None else example
    _check_preprocessing(preprocessing, example)
    check_writable_folder(path.parent)
    flat = flatten(plan, example, target_mode)
    fold_biases(flat.module)
    names = flat.class_names if class_names is None else Readout(plan.model, class_names).names(flat.classes)
    # In the same folder, because a move is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        staged = Path(folder) / path.name
        outputs = _compile(flat, staged)
        metadata = _metadata(plan, flat, example, target_mode, outputs, sha256_of(staged))
        metadata |= {"preprocess": preprocessing, "class_names": names}
        atomic_write(staged.with_suffix(".json"), Metadata(**metadata).to_json())
        _move(staged, path)
    logger.info("exported %s, %.1f MiB", path, path.stat().st_size / 2**20)
    return path


def check_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path, after checking that a package can have this name."""
    path = Path(path)
    if path.suffix != ".pt2" or not path.stem:
        raise ValueError(f"path: expected the name of a file ending in .pt2, got {path}")
    for file in (path, path.with_suffix(".json")):
        if file.is_dir():
            raise IsADirectoryError(f"path: {file} is a folder; choose another name")
    return path


def _blank(plan: Plan) -> Tensor:
    if plan.layout.image_size is None:
        raise ValueError("example: the model does not say what size of images it takes; pass images of that size")
    return plan.parameter.new_zeros(1, plan.layout.in_chans, *plan.layout.image_size)


def _check_preprocessing(preprocessing: Preprocess | None, example: Tensor) -> None:
    if preprocessing is None or not isinstance(example, Tensor) or example.dim() != 4:
        return  # flatten() reports a wrong example
    if not isinstance(preprocessing, Preprocess):
        raise TypeError(f"preprocessing: expected a Preprocess, got {type(preprocessing).__name__}")
    made = [len(preprocessing.mean), *preprocessing.image_size]
    if made != list(example.shape[1:]):
        raise ValueError(
            f"preprocessing: expected one that makes images {list(example.shape[1:])} (channels, height, width) like "
            f"the example, this one makes images {made}; change its image_size or mean and std"
        )


def _compile(flat: Flat, path: Path) -> tuple[Output, ...]:
    """Writes the package to `path` and returns what its calls will return."""
    from torch._inductor import config

    built = path.parent / "built"
    built.mkdir()
    with one_at_a_time, torch.inference_mode(False), torch.no_grad():
        inputs = tuple(t.clone(memory_format=torch.contiguous_format) for t in flat.inputs)
        # Not in the compiler's cache, which would keep a copy of everything for good, including the weights.
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
        "grid": plan.layout_for(example).grid, "classes": flat.classes, "predicts": flat.predicts,
        "target_mode": target_mode,
        "gated_blocks": tuple(plan.saes), "outputs": outputs, "backend": plan.choice().name,
        "method": settings.method, "backward": settings.backward, "start_block": flat.start_block,
        "notices": list(flat.notices),
        "signed": settings.signed, "gate": {"mode": gate.mode, "base": gate.bound, "slope": gate.slope},
        "versions": {"fga_fast": version("fga_fast"), "torch": torch.__version__},
        "machine": this_machine(), "sha256": sha256,
    }  # fmt: skip


def _move(staged: Path, path: Path) -> None:
    """Moves both files to their names, the metadata last. On an error, restores the files that were there before."""
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
