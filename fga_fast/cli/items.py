"""The images that a command works through: a folder, a manifest, a Hugging Face dataset, or the shipped scenes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fga_fast.assets import fashion_items
from fga_fast.dataset import sources
from fga_fast.dataset.items import Item


def add_items(parser: argparse.ArgumentParser) -> None:
    """Adds what `items_of` reads."""
    parser.add_argument(
        "images", nargs="*", metavar="IMAGES", help="a folder of images; sub-folders may be named by class"
    )
    parser.add_argument(
        "--manifest", type=Path, metavar="FILE",
        help="CSV or Parquet instead, with the columns image and, if you like, target, mask, x0, y0, x1, y1",
    )  # fmt: skip
    parser.add_argument("--dataset", metavar="HF_NAME", help="a Hugging Face dataset instead, NAME or NAME:SPLIT")


def items_of(args: argparse.Namespace, names: Sequence[str] | None) -> list[Item]:
    """The items that the arguments name; without any, and without --model, those of the shipped scenes.

    Args:
        names: of the model's classes, if they are known.

    Raises:
        ValueError, OSError, ImportError: several are named, or none with --model, or they cannot be read.
    """
    given = [bool(args.images), args.manifest is not None, args.dataset is not None]
    if sum(given) > 1 or len(args.images) > 1:
        raise ValueError("IMAGES, --manifest, --dataset: expected one folder, file or dataset, got several; choose one")
    if args.manifest is not None:
        return sources.from_manifest(args.manifest, names)
    if args.dataset is not None:
        name, _, part = args.dataset.partition(":")
        return sources.from_huggingface(name, names, split=part or "test")
    if args.images:
        return sources.from_folder(args.images[0], names)
    if args.model is not None:
        raise ValueError(
            "IMAGES: expected a folder of images, --manifest FILE or --dataset NAME with --model, got none; IMAGES "
            "comes first, before options that take several words"
        )
    return fashion_items()


def are_scenes(args: argparse.Namespace) -> bool:
    """Whether no images are named, so that `items_of` takes the shipped scenes."""
    return not (args.images or args.manifest or args.dataset)
