"""`fga-fast explain`: one picture or many; without arguments the shipped fashion demo."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fga_fast.cli import arguments, files, report, ways
from fga_fast.cli.drawing import Drawing
from fga_fast.cli.notes import add_notes
from fga_fast.cli.ways import Way
from fga_fast.io.atomic import check_writable_folder
from fga_fast.io.images import load_image
from fga_fast.io.window import Window
from fga_fast.result.explanation import Explanation

_TIMED_RUNS, _TIMED_SECONDS = 5, 0.3

Picture: TypeAlias = tuple[Path, tuple[Image.Image, Tensor]]  # a file, what the model sees of it, [channels, H, W]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `explain` to the parser's commands."""
    parser = commands.add_parser(
        "explain",
        help="show which patches of an image speak for a class",
        description="Writes a figure, explanation.json and relevance.safetensors (Explanation.load reads it). "
        "Without arguments: scenes of the shipped fashion demo.",
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE",
        help="image files, folders of them, or patterns such as 'scans/**/*.png' (default: demo scenes)",
    )  # fmt: skip
    parser.add_argument("--model", metavar="MODEL", help=f"{arguments.MODEL} (default: the shipped fashion demo model)")
    arguments.add_package(parser)
    arguments.add_subject(parser)
    parser.add_argument(
        "--target", action="extend", nargs="+", default=[], metavar="N|NAME",
        help="classes to explain, by number, name or one of a name's comma-separated synonyms (default: likeliest)",
    )  # fmt: skip
    arguments.add_window(parser)
    parser.add_argument("--out", type=Path, default=Path("fga-fast-out"), metavar="DIR", help="default: %(default)s")
    arguments.add_settings(parser)
    parser.add_argument(
        "--top-features", type=int, default=5, metavar="K", help="features listed (default: %(default)s)"
    )
    add_notes(parser)
    parser.add_argument(
        "--cards", metavar="PAGE", help="the page of `fga-fast features`, which listed features then link to"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="images at once (default: %(default)s)")
    parser.set_defaults(run=run, default_of=parser.get_default)


def run(args: argparse.Namespace) -> int:
    """Explains what the arguments name; returns the exit code (1: some of several images could not be explained)."""
    _check(args)
    paths, many, failed = _paths(args)
    out = args.out.resolve()
    if many and any(folder.resolve() == out for folder in {path.parent for path in paths}):
        raise ValueError(f"--out: {args.out} is the folder of the images themselves; name another one for the results")
    check_writable_folder(args.out)
    window = arguments.window(args)
    with Drawing(len(paths) if many else 1) as drawing:
        way = ways.by_model(args) if args.package is None else ways.by_package(args)
        writer = report.Writer(args.out, way, drawing, many, args.cards)
        milliseconds: dict[str, float | None] = {}
        noted = failed if many else None
        for pictures in _batches(way, paths, window, noted):
            batch = torch.stack([image for _, (_, image) in pictures]).to(way.like)
            if not milliseconds:
                milliseconds["milliseconds"] = _median(way.timed, batch[:1])
                milliseconds["milliseconds_forward_pass"] = way.forward and _median(way.forward, batch[:1])
            for number, explanation in _explanations(way, batch, [path for path, _ in pictures], noted):
                path, (view, _) = pictures[number]
                writer.add(path, view, explanation, milliseconds)
    writer.finish(len(failed))
    for path, reason in failed:
        print(f"fga-fast: left out {path.name}: {reason}", file=sys.stderr)
    if failed:
        total = len(paths) + sum(path not in paths for path, _ in failed)
        print(f"fga-fast: {len(failed)} of {total} image(s) could not be explained", file=sys.stderr)
    return 1 if failed else 0


def _batches(
    way: Way, paths: Sequence[Path], window: Window | None, failed: files.Failed | None
) -> Iterator[list[Picture]]:
    """Groups of pictures of `way.batch`; unreadable ones are noted in `failed`, or end the run if it is None."""

    def load(path: Path) -> tuple[Image.Image, Tensor]:
        view = way.preprocess.view(load_image(path, window))
        return view, way.preprocess.normalise(view)

    with tqdm(total=len(paths), unit="image", desc="explaining", disable=failed is None) as bar:
        pictures = files.read(paths, load, 2 * way.batch, failed)
        while group := list(itertools.islice(pictures, way.batch)):
            yield group
            bar.update(len(group))


def _explanations(
    way: Way, batch: Tensor, paths: Sequence[Path], failed: files.Failed | None
) -> Iterator[tuple[int, Explanation]]:  # batch [B, channels, H, W]
    """Explanations by number; where the batch fails, of each image alone, so that one does not cost the others."""
    try:
        yield from enumerate(way.explain(batch).to("cpu"))
        return
    except ValueError:  # such as NaN in the logits of one image
        if failed is None:
            raise
    for number, path in enumerate(paths):
        try:
            explanation = way.explain(batch[number : number + 1]).to("cpu")
        except ValueError as error:
            failed.append((path, str(error)))
        else:
            yield number, explanation


def _check(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {args.batch_size}")
    if args.top_features < 0:
        raise ValueError(f"--top-features: expected at least 0, got {args.top_features}")
    if args.package is None:
        return
    takes = {"images", "package", "target", "window", "out", "notes", "cards"}
    takes |= {"run", "default_of", "traceback", "argv"}
    other = [name for name in vars(args) if name not in takes and getattr(args, name) != args.default_of(name)]
    if other:
        listed = ", ".join("--" + name.replace("_", "-") for name in other)
        raise ValueError(
            f"{listed}: the package has its own; give only IMAGE, --target, --window, --notes, --cards and --out with "
            "--package"
        )


def _paths(args: argparse.Namespace) -> files.Found:
    if args.images:
        return files.find(args.images, args.out)
    if args.model is not None or args.package is not None:
        raise ValueError(
            "IMAGE: expected an image file or a folder to explain with --model or --package, got none; IMAGE comes "
            "first, before --sae and --target, which take all words that follow them"
        )
    from fga_fast.assets import fashion_scenes

    return files.Found(list(fashion_scenes())[: report.SHEET_IMAGES], False, [])


def _median(action: Callable[[Tensor], Any], image: Tensor) -> float:  # [1, channels, H, W]
    """The median of some runs after a warm-up, in milliseconds; fewer runs of a slow action."""
    times: list[float] = []
    while len(times) < 2 or (len(times) <= _TIMED_RUNS and sum(times) < _TIMED_SECONDS):
        start = time.perf_counter()
        action(image)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        times.append(time.perf_counter() - start)
    return float(f"{1000 * statistics.median(times[1:]):.4g}")
