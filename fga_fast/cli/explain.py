"""`fga-fast explain`: one picture or a folder of them; without arguments the shipped fashion demo."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from fga_fast.cli import arguments, report, ways
from fga_fast.io.atomic import check_writable_folder
from fga_fast.io.images import list_images, load_image
from fga_fast.io.window import ImageFileError, Window

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
        help="a package from `fga-fast export`, instead of a model; loading it runs its code, so load only packages "
        "you trust",
    )  # fmt: skip
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
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="images at once (default: %(default)s)")
    parser.set_defaults(run=run, default_of=parser.get_default)


def run(args: argparse.Namespace) -> int:
    """Explains what the arguments name; returns the exit code (1: some images of a folder could not be read)."""
    _check(args)
    paths = _paths(args)
    window = arguments.window(args)
    many = args.image is not None and args.image.is_dir()
    if many and args.out.resolve() == args.image.resolve():
        raise ValueError(f"--out: {args.out} is the folder of the images themselves; name another one for the results")
    check_writable_folder(args.out)
    way = ways.by_model(args) if args.package is None else ways.by_package(args)
    writer = report.Writer(args.out, way, many)
    failed: list[tuple[Path, str]] = []
    milliseconds: dict[str, float | None] = {}
    pictures = _pictures(paths, many, failed, window)
    while group := list(itertools.islice(pictures, way.batch)):
        views = [way.preprocess.view(picture) for _, picture in group]
        images = torch.stack([way.preprocess.normalise(view) for view in views]).to(way.like)
        if not milliseconds:
            milliseconds["milliseconds"] = _median(way.timed, images[:1])
            milliseconds["milliseconds_forward_pass"] = way.forward and _median(way.forward, images[:1])
        for (path, _), view, explanation in zip(group, views, way.explain(images).to("cpu"), strict=True):
            writer.add(path, view, explanation, milliseconds)
    writer.finish(failed)
    for path, reason in failed:
        print(f"fga-fast: left out {path.name}: {reason}", file=sys.stderr)
    if failed:
        print(f"fga-fast: {len(failed)} of {len(paths)} image(s) could not be explained", file=sys.stderr)
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {args.batch_size}")
    if args.top_features < 0:
        raise ValueError(f"--top-features: expected at least 0, got {args.top_features}")
    if args.package is None:
        return
    takes = {"image", "package", "target", "window", "out", "run", "default_of", "traceback"}
    other = [name for name in vars(args) if name not in takes and getattr(args, name) != args.default_of(name)]
    if other:
        listed = ", ".join("--" + name.replace("_", "-") for name in other)
        raise ValueError(
            f"{listed}: the package has its own; give only IMAGE, --target, --window and --out with --package"
        )


def _paths(args: argparse.Namespace) -> list[Path]:
    if args.image is None:
        if args.model is not None or args.package is not None:
            raise ValueError(
                "IMAGE: expected an image file or a folder to explain with --model or --package, got none; IMAGE comes "
                "first, before --sae and --target, which take all words that follow them"
            )
        from fga_fast.assets import fashion_scenes

        return list(fashion_scenes())[: report.SHEET_IMAGES]
    if args.image.is_dir():
        return list_images(args.image)
    if not args.image.exists():
        raise FileNotFoundError(f"IMAGE: no file or folder {args.image}; expected an image file or a folder of them")
    return [args.image]


def _pictures(
    paths: list[Path], many: bool, failed: list[tuple[Path, str]], window: Window | None
) -> Iterator[tuple[Path, Image.Image]]:
    """Reads the pictures; a broken file of a folder is noted in `failed` instead of ending the run."""
    for path in tqdm(paths, unit="image", desc="explaining", disable=not many):
        try:
            picture = load_image(path, window)
        except (ImageFileError, OSError) as error:
            if not many:
                raise
            failed.append((path, str(error)))
        else:
            yield path, picture


def _median(action: Callable[[torch.Tensor], Any], image: torch.Tensor) -> float:  # [1, channels, H, W]
    """The median of some runs after a warm-up, in milliseconds."""
    times = []
    for _ in range(_TIMED_RUNS + 1):
        start = time.perf_counter()
        action(image)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times[1:]), 3)
