"""`fga-fast explain`: one picture or a folder of them; without arguments the shipped fashion demo."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from fga_fast.cli import arguments, report
from fga_fast.cli.subject import Subject, load_subject, resolve_target
from fga_fast.io.atomic import atomic_write, check_writable_folder
from fga_fast.io.images import ImageFileError, list_images, load_image
from fga_fast.result.explanation import Explanation

if TYPE_CHECKING:
    from fga_fast.explainer import Explainer

_TIMED_RUNS = 5


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `explain` to the parser's commands."""
    parser = commands.add_parser(
        "explain",
        help="show which patches of an image speak for a class",
        description="Writes a figure, explanation.json and relevance.safetensors (Explanation.load reads it). "
        "Without arguments: scenes of the shipped fashion demo.",
    )
    parser.add_argument("image", nargs="?", type=Path, help="an image file or a folder of them (default: demo scenes)")
    parser.add_argument("--model", metavar="TIMM_NAME", help="a timm model (default: the shipped fashion demo model)")
    parser.add_argument(
        "--package", type=Path, metavar="FILE.pt2",
        help="what `fga-fast export` wrote, instead of a model; it is code that runs, so take one that you trust",
    )  # fmt: skip
    arguments.add_subject(parser)
    parser.add_argument(
        "--target",
        action="extend",
        nargs="+",
        default=[],
        metavar="N|NAME",
        help="classes to explain (default: likeliest)",
    )
    parser.add_argument("--out", type=Path, default=Path("fga-fast-out"), metavar="DIR", help="default: %(default)s")
    arguments.add_settings(parser)
    parser.add_argument(
        "--top-features", type=int, default=5, metavar="K", help="features listed (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="images at once (default: %(default)s)")
    parser.set_defaults(run=run, default_of=parser.get_default)


@dataclass(frozen=True)
class _Explainers:
    """The explainer asked for, and the ungated one beside it where there are gates."""

    gated: Explainer
    ungated: Explainer | None

    def __call__(self, images: Tensor, targets: Tensor) -> Explanation:  # [M, C, H, W], [M]
        explanation = self.gated(images, targets)
        if self.ungated is not None:
            explanation = replace(explanation, ungated=self.ungated(images, targets).relevance)
        return explanation


def run(args: argparse.Namespace) -> int:
    """Explains what the arguments name; returns the exit code (1: some images of a folder could not be read).

    Raises:
        ValueError, TypeError, RuntimeError, OSError, ImportError: for the user, said before anything is computed
            where it can be known.
    """
    if args.package is not None:
        return _run_package(args)
    if args.batch_size < 1 or args.top_features < 0:
        raise ValueError("--batch-size, --top-features: expected at least 1 and 0")
    paths = _paths(args)
    many = args.image is not None and args.image.is_dir()
    if many and args.out.resolve() == args.image.resolve():
        raise ValueError(f"--out: {args.out} is the folder of the images themselves; name another one for the results")
    check_writable_folder(args.out)
    subject = load_subject(args)
    explainers = _build(subject, args)
    args.base = explainers.gated.gate.base
    writer = report.Writer(args.out, subject, args, many)
    failed: list[tuple[Path, str]] = []
    batches = _batches(_progress(paths) if many else paths, args.batch_size, many, failed)
    timing: report.Timing | None = None
    for group, pictures in batches:
        views = [subject.preprocess.view(picture) for picture in pictures]
        images = torch.stack([subject.preprocess.normalise(view) for view in views]).to(args.device)
        targets = _targets(subject, images, args)  # [b, K]
        if timing is None:
            timing = _measure(subject, explainers.gated, images[:1], targets[:1, 0])
        rows = images.repeat_interleave(targets.shape[1], 0)
        explanation = explainers(rows, targets.reshape(-1)).to("cpu")
        for number, (path, view) in enumerate(zip(group, views, strict=True)):
            first = number * targets.shape[1]
            writer.add(path, view, explanation[first : first + targets.shape[1]], timing)
    writer.finish(failed)
    return _left_out(failed, len(paths))


def _left_out(failed: list[tuple[Path, str]], count: int) -> int:
    """Says which images could not be read; the exit code."""
    for path, reason in failed:
        print(f"fga-fast: left out {path.name}: {reason}", file=sys.stderr)
    if failed:
        print(f"fga-fast: {len(failed)} of {count} image(s) could not be explained", file=sys.stderr)
    return 1 if failed else 0


def _run_package(args: argparse.Namespace) -> int:
    """Explains with a package: overlay.png and relevance.safetensors for each image."""
    from fga_fast.graph.package.load import load_package
    from fga_fast.graph.package.metadata import DTYPES

    takes = {"image", "package", "target", "out", "run", "default_of", "traceback"}
    other = [name for name in vars(args) if name not in takes and getattr(args, name) != args.default_of(name)]
    if other:
        listed = ", ".join("--" + name.replace("_", "-") for name in other)
        raise ValueError(f"{listed}: the package has its own; expected IMAGE, --target and --out with --package")
    if args.image is None:
        raise ValueError("IMAGE: expected an image file or a folder to explain with --package, got none")
    if len(args.target) > 1:
        raise ValueError(f"--target: expected one class with --package, got {len(args.target)}")
    paths, many = _paths(args), args.image.is_dir()
    check_writable_folder(args.out)
    package = load_package(args.package)
    about, preprocess = package.metadata, package.preprocess
    if preprocess is None:
        raise ValueError(f"--package: {args.package} was exported without preprocessing, so it takes no image files")
    target = next(
        (resolve_target(given, about.classes, about.class_names, "the package") for given in args.target), None
    )
    failed: list[tuple[Path, str]] = []
    for group, pictures in _batches(paths, about.batch, many, failed):
        views = [preprocess.view(picture) for picture in pictures]
        images = torch.stack([preprocess.normalise(view) for view in views]).to(about.device, DTYPES[about.dtype])
        explanation = package(images, target).to("cpu")
        for path, view, one in zip(group, views, explanation, strict=True):
            folder = args.out / path.name if many else args.out
            folder.mkdir(exist_ok=True)
            atomic_write(folder / "overlay.png", report.png(Image.fromarray(one.overlay(view)[0].numpy())))
            one.save(folder / "relevance.safetensors")
            number = int(one.targets)
            named = f"class {number}" if one.names is None else f"{one.names[number]} (class {number})"
            row, column = divmod(int(one.relevance.argmax()), one.grid[1])
            print(f"{path.name}: {named}: logit {float(one.logits[0, number]):.3f}, strongest patch row {row}, "
                  f"column {column}")  # fmt: skip
    print(f"wrote overlay.png and relevance.safetensors into {args.out}{' for each image' if many else ''}")
    return _left_out(failed, len(paths))


def _paths(args: argparse.Namespace) -> list[Path]:
    if args.image is None:
        if args.model is not None:
            raise ValueError(
                "IMAGE: expected an image file or a folder to explain with --model, got none; IMAGE comes first, "
                "before --sae and --target, which take all words that follow them"
            )
        from fga_fast.assets import fashion_scenes

        return list(fashion_scenes())[: report.SHEET_IMAGES]
    if args.image.is_dir():
        return list_images(args.image)
    if not args.image.exists():
        raise FileNotFoundError(f"IMAGE: no file or folder {args.image}")
    return [args.image]


def _build(subject: Subject, args: argparse.Namespace) -> _Explainers:
    # Features can only be listed where there are autoencoders.
    listed = args.top_features if subject.saes else 0
    gated = arguments.explainer(subject, args, top_features=listed)
    return _Explainers(gated, arguments.explainer(subject, args, gated=False) if subject.saes else None)


def _progress(paths: list[Path]) -> Any:
    from tqdm import tqdm

    return tqdm(paths, unit="image", desc="explaining")


def _batches(
    paths: Any, size: int, many: bool, failed: list[tuple[Path, str]]
) -> Iterator[tuple[list[Path], list[Any]]]:
    """Groups of up to `size` pictures; in a folder a broken one is noted in `failed` instead of ending the run."""
    group: list[Path] = []
    pictures: list[Any] = []
    for path in paths:
        try:
            pictures.append(load_image(path))
        except (ImageFileError, OSError) as error:
            if not many:
                raise
            failed.append((path, str(error)))
            continue
        group.append(path)
        if len(group) == size:
            yield group, pictures
            group, pictures = [], []
    if group:
        yield group, pictures


def _targets(subject: Subject, images: Tensor, args: argparse.Namespace) -> Tensor:  # [b, C, H, W] -> [b, K]
    with torch.no_grad():
        logits: Tensor = subject.model(images)
    if args.target:
        chosen = [subject.resolve_target(given, logits.shape[1]) for given in args.target]
        return torch.tensor(chosen, device=images.device).expand(len(images), -1)
    # A scene of several garments has several likely classes; a photograph with one label has one.
    return logits.topk(min(2 if subject.multi_label else 1, logits.shape[1])).indices


def _measure(subject: Subject, explainer: Explainer, image: Tensor, target: Tensor) -> report.Timing:
    """Milliseconds of one explanation and of the plain forward pass, for one image: medians after a warm-up."""

    def forward() -> None:
        with torch.no_grad():
            subject.model(image)

    return report.Timing(_median(lambda: explainer(image, target), image), _median(forward, image))


def _median(action: Callable[[], object], image: Tensor) -> float:
    times = []
    for _ in range(_TIMED_RUNS + 1):
        start = time.perf_counter()
        action()
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])
