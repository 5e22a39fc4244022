"""`fga-fast harvest`: keeps the residual streams of a model on disk, to train autoencoders on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fga_fast.assets import fashion_scenes
from fga_fast.cli import arguments
from fga_fast.cli.items import add_items, are_scenes, items_of
from fga_fast.cli.subject import load_subject
from fga_fast.dataset.items import Item, choose
from fga_fast.harvest.activations import Activations
from fga_fast.harvest.folder import DTYPES
from fga_fast.harvest.run import harvest

_SHOWN = 5  # errors


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `harvest` to the parser's commands."""
    parser = commands.add_parser(
        "harvest",
        help="keep residual streams on disk, to train autoencoders on",
        description="Runs a model over images once and writes what leaves some of its blocks. A run that was stopped "
        "goes on when the same command is given again. Without images: the scenes of the shipped fashion demo.",
    )
    add_items(parser)
    parser.add_argument("--model", metavar="MODEL", help=f"{arguments.MODEL} (default: the shipped fashion demo model)")
    arguments.add_weights(parser)
    arguments.add_window(parser)
    parser.add_argument(
        "--blocks", action="extend", nargs="+", type=int, required=True, metavar="L", help="blocks, counted from 0"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--dtype", choices=[*DTYPES], default="float32", help="bfloat16 takes half the space (default: %(default)s)"
    )
    parser.add_argument("--class-token", action="store_true", help="also keep the tokens in front of the patches")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="images at once (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that read (default: %(default)s)")
    parser.add_argument(
        "--split", choices=("report", "tune", "both"), default="both",
        help="the half of the images, as `fga-fast evaluate` divides them (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many images, drawn by their names")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Harvests what the arguments name; returns the exit code (1: some images could not be read)."""
    subject = load_subject(args)
    if are_scenes(args) and args.model is None:
        items = [Item(path.name, path) for path in fashion_scenes()]  # a scene once, not once for each garment
    else:
        items = items_of(args, subject.class_names)
    folder = harvest(
        subject.model, choose(items, args.split, args.limit), args.blocks, out=args.out,
        preprocess=subject.preprocess, model_name=subject.name, dtype=args.dtype, class_token=args.class_token,
        batch_size=args.batch_size, workers=args.workers, window=arguments.window(args),
    )  # fmt: skip
    found = Activations(folder)
    about, size = found.about, sum(shard.bytes for shard in found.shards)
    print(f"model    {about.model}, checksum {about.model_checksum[:12]}")
    blocks = f"block{'s' if len(about.blocks) > 1 else ''} {', '.join(map(str, about.blocks))}"
    tokens = f"{about.patches} patches" + (f" and {about.prefix_tokens} in front" if about.prefix_tokens else "")
    print(f"streams  {about.images} images, {blocks}, {tokens}, width {about.d_model}, {about.dtype}")
    print(f"wrote {size / 1e6:.1f} MB in {len(found.shards)} shard(s) into {folder}")
    for key, reason in about.errors[:_SHOWN]:
        print(f"fga-fast: {key}: {reason}", file=sys.stderr)
    if len(about.errors) > _SHOWN:
        print(f"fga-fast: {len(about.errors)} images in all could not be read, see manifest.json", file=sys.stderr)
    return 1 if about.errors else 0
