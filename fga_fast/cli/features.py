"""`fga-fast features`: what the features of autoencoders stand for, as a page to browse."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from fga_fast.cards.run import JSON, feature_cards, features_of
from fga_fast.cli import arguments
from fga_fast.cli.notes import add_notes, notes_of
from fga_fast.cli.subject import Subject, load_subject
from fga_fast.explainer import Explainer
from fga_fast.harvest.activations import Activations
from fga_fast.io.images import load_image
from fga_fast.sae.notes import Note, Notes, beside, read_notes, write_notes
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

_OUT = Path("fga-fast-features")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `features` to the parser's commands."""
    parser = commands.add_parser(
        "features",
        help="show what the features of an SAE stand for",
        description="Writes cards.html, a page to browse, and cards.json: for each feature its strongest images, where "
        "it is active there and which pixels drive it, how often it is active, its company, and what the model's "
        "logits lose without it.",
    )
    parser.add_argument(
        "--harvest", type=Path, required=True, metavar="DIR", help="a folder that `fga-fast harvest` wrote"
    )
    parser.add_argument("--model", metavar="MODEL", help=f"{arguments.MODEL} (default: the shipped fashion demo model)")
    arguments.add_subject(parser)
    arguments.add_window(parser)
    parser.add_argument(
        "--features", action="extend", nargs="+", default=[], metavar="N|BLOCK:N",
        help="features that get a card (default: all that are active often enough)",
    )  # fmt: skip
    parser.add_argument("--image", type=Path, metavar="FILE", help="cards of the features that matter for this image")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="how many of them (default: %(default)s)")
    parser.add_argument(
        "--min-density", type=float, default=0.001, metavar="SHARE",
        help="of the patches in which a feature is active, to get a card (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, default=100, metavar="N", help="at most so many cards of a block (default: %(default)s)"
    )
    parser.add_argument("--examples", type=int, default=6, metavar="N", help="images a card (default: %(default)s)")
    parser.add_argument(
        "--name", action="append", default=[], metavar="[BLOCK:]N=NAME",
        help="name a feature; it is kept in --notes, or beside the SAE; an empty name is forgotten; may be "
        "repeated; without --features and --image, cards that are in --out stay as they are",
    )  # fmt: skip
    add_notes(parser)
    parser.add_argument("--out", type=Path, default=_OUT, metavar="DIR", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the cards that the arguments ask for; returns the exit code."""
    if args.features and args.image is not None:
        raise ValueError("--features, --image: expected one of them, got both; choose one")
    if args.top < 1:
        raise ValueError(f"--top: expected at least 1, got {args.top}")
    activations = Activations(args.harvest)
    subject = load_subject(args)
    blocks = activations.about.blocks
    saes = subject.saes if args.sae else {block: sae for block, sae in subject.saes.items() if block in blocks}
    if not saes:
        raise ValueError(
            f"--sae: expected an autoencoder after a harvested block ({', '.join(map(str, blocks))}), got none; give "
            "--sae BLOCK=PATH"
        )
    notes = _named(args, saes) if args.name else notes_of(args)
    if args.name and not args.features and args.image is None and (args.out / JSON).exists():
        print(f"kept the names; the cards in {args.out} are as they were: run it without --name to make them anew")
        return 0
    page = feature_cards(
        subject.model, saes, activations, out=args.out, features=_features(args, subject, saes),
        min_density=args.min_density, limit=args.limit, examples=args.examples, class_names=subject.class_names,
        notes=notes, window=arguments.window(args),
    )  # fmt: skip
    print(f"model    {activations.about.model}, {len(activations)} images")
    print(f"wrote {page.name} and {JSON} into {page.parent}")
    return 0


def _features(
    args: argparse.Namespace, subject: Subject, saes: Mapping[int, SparseAutoencoder]
) -> dict[int, list[int]] | None:
    """Block -> features that are asked for; None: all that are dense enough."""
    if args.image is not None:
        # Contributions by the model's own gradient predict best what happens without a feature (docs/features.md).
        top = min(args.top, *(sae.d_sae for sae in saes.values()))
        explainer = Explainer(subject.model, saes, preset="published", top_features=top)
        picture = subject.preprocess(load_image(args.image, arguments.window(args)))
        listed = features_of(explainer(picture[None].to(args.device)))
        if not any(listed.values()):
            raise ValueError("--image: no feature of these autoencoders contributes; take another image")
        return listed
    chosen: dict[int, list[int]] = {}
    for word in args.features:
        block, feature = _feature(word, saes, "--features")
        chosen.setdefault(block, []).append(feature)
    return chosen or None


def _feature(text: str, saes: Mapping[int, SparseAutoencoder], flag: str) -> tuple[int, int]:
    """The block and feature that N or BLOCK:N means."""
    block, colon, feature = text.strip().rpartition(":")
    if not colon and len(saes) == 1:
        block = str(next(iter(saes)))
    if not (feature.isascii() and feature.isdecimal() and block.isascii() and block.isdecimal()):
        wanted = "N or BLOCK:N" if len(saes) == 1 else "BLOCK:N, since there are several autoencoders"
        raise ValueError(f"{flag}: expected {wanted}, such as {next(iter(saes))}:17, got {text!r}")
    if int(block) not in saes or int(feature) >= saes[int(block)].d_sae:
        known = ", ".join(f"{one}: 0 to {sae.d_sae - 1}" for one, sae in saes.items())
        raise ValueError(f"{flag}: expected a block and one of its features ({known}), got {text!r}")
    return int(block), int(feature)


def _named(args: argparse.Namespace, saes: Mapping[int, SparseAutoencoder]) -> Notes:
    """The notes with the names that `--name` gives, which are written where they came from."""
    paths = {int(block): path for block, _, path in (spec.partition("=") for spec in args.sae)}
    if args.notes is None and not paths:
        raise ValueError("--name: expected --notes FILE to keep names in, since the demo's own folder is not changed")
    notes = notes_of(args) if args.notes is None or args.notes.exists() else {}
    files = {block: args.notes or beside(path) for block, path in paths.items()} or dict.fromkeys(saes, args.notes)
    changed: set[int] = set()
    for word in args.name:
        feature, equals, name = word.partition("=")
        if not equals:
            raise ValueError(f'--name: expected [BLOCK:]N=NAME, such as 17="sleeve", got {word!r}')
        key = _feature(feature, saes, "--name")
        changed.add(key[0])
        if name.strip():
            notes[key] = Note(name.strip(), notes[key].note if key in notes else "")
        else:
            notes.pop(key, None)
    for file in {files[block] for block in changed}:
        here = {block for block, one in files.items() if one == file}
        kept = read_notes(file) if file.exists() else {}  # also those of blocks that this command does not look at
        kept = {key: one for key, one in kept.items() if key[0] not in here}
        write_notes(file, kept | {key: one for key, one in notes.items() if key[0] in here})
    return notes
