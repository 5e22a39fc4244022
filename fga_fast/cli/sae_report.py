"""`fga-fast sae-report`: measures how good autoencoders are on images they were not trained on."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from fga_fast.cli import arguments, items
from fga_fast.cli.subject import Subject, load_subject, read_sae
from fga_fast.dataset.items import Split, choose
from fga_fast.io.atomic import check_writable_folder
from fga_fast.quality import words
from fga_fast.quality.report import Written, write
from fga_fast.quality.run import Quality, compare
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

_OUT = Path("fga-fast-sae-report")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `sae-report` to the parser's commands."""
    parser = commands.add_parser(
        "sae-report",
        help="measure how good sparse autoencoders are",
        description="Writes sae_report.html, sae_report.json and sae_report.md. Without --model: the shipped fashion "
        "demo with its autoencoders; without images: its scenes. docs/sae_report.md explains the numbers.",
    )
    items.add_items(parser)
    parser.add_argument("--model", metavar="MODEL", help=f"{arguments.MODEL} (default: the shipped fashion demo model)")
    arguments.add_subject(parser)
    parser.add_argument(
        "--second", action="extend", nargs="+", default=[], metavar="BLOCK=PATH",
        help="another autoencoder of the same block, such as that of another seed: which features are in both?",
    )  # fmt: skip
    arguments.add_window(parser)
    parser.add_argument(
        "--output", choices=("softmax", "sigmoid", "features"),
        help="what the model's outputs are; sigmoid where classes do not exclude each other (default: softmax, or "
        "features where there is no head; of the demo model sigmoid)",
    )  # fmt: skip
    parser.add_argument(
        "--split",
        choices=("report", "tune", "both"),
        help="the half of the images, see docs/evaluate.md (default: report; for the demo's six scenes both)",
    )
    parser.add_argument("--out", type=Path, default=_OUT, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="images at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of random rows (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many images, drawn by their names")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures what the arguments name; returns the exit code (1: some images failed)."""
    # Several autoencoders of one block are read here, since no other command takes them.
    subject = load_subject(argparse.Namespace(**{**vars(args), "sae": []}))
    saes = _saes(args, subject)
    second = _second(args, subject)
    split: Split = args.split or ("both" if items.are_scenes(args) else "report")
    chosen = choose(items.items_of(args, subject.class_names), split, args.limit)
    window = arguments.window(args)
    check_writable_folder(args.out)
    found = compare(
        subject.model, saes, chosen, second=second, preprocess=subject.preprocess, window=window,
        output=args.output or ("sigmoid" if subject.multi_label else None), batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip
    facts = {"Model": subject.name, "Images": f"{_source(args)}, split {split}"}
    facts |= {"Second SAE": ", ".join(args.second)} if args.second else {}
    facts["Command"] = shlex.join(["fga-fast", *args.argv])
    _print(found, write(args.out, found, facts))
    return 1 if next(iter(found.values())).errors else 0


def _saes(args: argparse.Namespace, subject: Subject) -> dict[str, tuple[int, SparseAutoencoder]]:
    """Name -> block and SAE: those of --sae by block and path, or the demo's."""
    if not args.sae:
        if not subject.saes:
            raise ValueError("--sae: expected BLOCK=PATH, e.g. 9=sae_block_9, since --model has none of its own")
        return {f"block {block}": (block, sae) for block, sae in subject.saes.items()}
    found: dict[str, tuple[int, SparseAutoencoder]] = {}
    for spec in args.sae:
        block, sae = read_sae(spec, args)
        name = f"block {block}: {spec.partition('=')[2]}"
        if name in found:
            raise ValueError(f"--sae: expected different autoencoders, got {spec} twice; drop one")
        found[name] = block, sae.to(args.device)
    return found


def _second(args: argparse.Namespace, subject: Subject) -> dict[int, SparseAutoencoder]:
    found: dict[int, SparseAutoencoder] = {}
    for spec in args.second:
        block, sae = read_sae(spec, args, "--second")
        if block in found:
            raise ValueError(f"--second: expected one autoencoder a block, got two for block {block}; drop one")
        found[block] = sae.to(args.device)
    return found


def _source(args: argparse.Namespace) -> str:
    if items.are_scenes(args):
        return "the shipped scenes"
    return str(args.images[0] if args.images else args.manifest or args.dataset)


def _print(found: dict[str, Quality], written: Written) -> None:
    for name, one in found.items():
        print(f"{name}, {words.count(one.images, 'image')}, {words.count(one.tokens, 'patch')}")
        for what, value in words.summary(one).items():
            print(f"  {what:<20} {value}")
        for text in words.warnings(one):
            print(f"  ! {text}")
        print()
    first = next(iter(found.values()))
    for text in words.warnings_of_images(first):
        print(f"! {text}")
    print(f"wrote {', '.join(path.name for path in written)} into {written.html.parent}")
    for key, reason in first.errors[:5]:
        print(f"fga-fast: {key}: {reason}", file=sys.stderr)
