"""`fga-fast train-sae`: trains sparse autoencoders on a harvest, or straight from a model."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from fga_fast.cli import arguments
from fga_fast.cli.items import add_items, items_of
from fga_fast.cli.subject import load_subject
from fga_fast.dataset.items import Item, choose, digest_of, stable_number
from fga_fast.harvest.activations import Activations, HarvestTokens
from fga_fast.harvest.live import ImageBatches, LiveTokens
from fga_fast.harvest.tokens import Tokens
from fga_fast.models.find import find_layout
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder
from fga_fast.training.recipe import Kind, Recipe
from fga_fast.training.train import train

_SHARE, _MOST = 10, 512  # one image in so many is held back, at most so many images
_CODES = 2**26  # numbers in the codes of the tokens that SAEs are measured on
_WIDER = 8  # features for each dimension of the stream, unless the user says otherwise


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `train-sae` to the parser's commands."""
    parser = commands.add_parser(
        "train-sae",
        help="train sparse autoencoders",
        description="Writes OUT/<recipe>/block_<l>, an autoencoder for each recipe and block. Several values of --k, "
        "--l1 or --features make several recipes, trained in one pass. A run that was stopped goes on when the same "
        "command is given again. One image in ten, at most 512, is held back for the numbers at the end.",
    )
    add_items(parser)
    parser.add_argument("--harvest", type=Path, metavar="DIR", help="what `fga-fast harvest` wrote, instead of images")
    parser.add_argument("--model", metavar="MODEL", help=f"{arguments.MODEL}; it runs on the images in every step")
    arguments.add_weights(parser)
    arguments.add_window(parser)
    parser.add_argument(
        "--split", choices=("report", "tune", "both"),
        help="the half of the images, as `fga-fast evaluate` divides them (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--blocks", action="extend", nargs="+", type=int, default=[], metavar="L",
        help="blocks, counted from 0 (default with --harvest: all that it holds)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--kind", choices=get_args(Kind), default="topk", help="default: %(default)s")
    for name, kind, what in (
        ("--k", int, "features a token, for all kinds but relu (default: 32)"),
        ("--l1", float, "weight of the L1 penalty, for relu (default: 0.1)"),
        ("--features", int, f"features of the autoencoder (default: {_WIDER} times the width)"),
    ):
        parser.add_argument(name, action="extend", nargs="+", type=kind, default=[], metavar="N", help=what)
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help="batches (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=4096, metavar="T",
        help="tokens in a batch; from images whole images, about so many tokens (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--lr", type=float, help="learning rate (default: one that suits the number of features)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument(
        "--checkpoint-every", type=int, default=1000, metavar="N",
        help="steps after which the state is written, 0: at the end (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--autocast", action="store_true", help="compute pre-activations in bfloat16")
    parser.add_argument(
        "--compile", action="store_true", help="compile the losses with torch.compile (tested for topk only)"
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Source:
    """Where tokens come from."""

    tokens: Tokens
    patches: int  # P of an image
    held: int  # images that are not trained on; 0: there are too few
    read: Callable[[int], dict[int, Tensor]]  # n -> block -> patches [T, C] of up to n of them, each once
    words: list[str]  # by which a later command finds images and model
    name: str


def run(args: argparse.Namespace) -> int:
    """Trains what the arguments ask for; returns the exit code."""
    features = args.features or [None]
    source = _harvested(args) if args.harvest is not None else _live(args)
    recipes = _recipes(args, [_WIDER * source.tokens.d_model if one is None else one for one in features])
    saes = train(
        source.tokens, recipes, out=args.out, steps=args.steps, batch_size=args.batch_size, lr=args.lr, seed=args.seed,
        checkpoint_every=args.checkpoint_every, device=args.device, compile=args.compile, autocast=args.autocast,
    )  # fmt: skip
    _print(args, source, saes)
    return 0


def _recipes(args: argparse.Namespace, widths: list[int]) -> dict[str, Recipe]:
    if args.kind == "relu":
        if args.k:
            raise ValueError("--k: relu takes --l1 instead; leave --k out, or take another --kind")
        return {f"relu-{F}-l1-{l1!r}": Recipe("relu", F, l1=l1) for F in widths for l1 in args.l1 or [0.1]}
    if args.l1:
        raise ValueError(f"--l1: only relu takes it; give --k for {args.kind}")
    return {f"{args.kind}-{F}-k{k}": Recipe(args.kind, F, k) for F in widths for k in args.k or [32]}


def _harvested(args: argparse.Namespace) -> _Source:
    own = ("manifest", "dataset", "model", "checkpoint", "checkpoint_key", "window", "split")  # None unless given
    given = [f"--{name.replace('_', '-')}" for name in own if getattr(args, name) is not None]
    given += [
        f"--{name.replace('_', '-')}" for name in ("blocks", "pretrained", "random_weights") if getattr(args, name)
    ]
    if args.images or given:
        got = ", ".join([*(["IMAGES"] if args.images else []), *given])
        raise ValueError(
            f"--harvest: expected nothing with it that says which images, model or blocks, got {got}; leave it out: "
            "the harvest says so, and all blocks it holds are trained"
        )
    activations = Activations(args.harvest)
    about = activations.about
    held = _held(about.images)
    rest = about.images - held

    def read(images: int) -> dict[int, Tensor]:
        return {block: activations.read(block, rest, rest + images).flatten(0, 1) for block in about.blocks}

    words = ["IMAGES", "--model", about.model, "--checkpoint", "FILE"]  # which a harvest does not know
    return _Source(
        HarvestTokens(activations, args.seed, images=rest), about.patches, held, read,
        [] if about.model == "the fashion demo model" else words, about.model,
    )  # fmt: skip


def _live(args: argparse.Namespace) -> _Source:
    if not args.blocks:
        raise ValueError("--blocks: expected the numbers of some blocks, counted from 0, got none")
    subject = load_subject(args)
    # Several items may ask about one image.
    once = {item.unit: item for item in choose(items_of(args, subject.class_names), args.split or "both")}
    items = [once[unit] for unit in sorted(once, key=lambda unit: (stable_number(unit, "held"), unit))]
    held = _held(len(items))
    rest = len(items) - held
    layout = find_layout(subject.model)
    window, most = arguments.window(args), max(1, args.batch_size // layout.patches)

    def tokens(items: list[Item], size: int) -> LiveTokens:
        preprocess = subject.preprocess
        batches = ImageBatches(items, preprocess, batch_size=size, seed=args.seed, window=window)
        about = {
            "model": subject.name, "items": len(items), "data": digest_of(items), "preprocess": asdict(preprocess),
            "window": window, "images_a_step": size, "seed": args.seed,
        }  # fmt: skip
        return LiveTokens(subject.model, layout, args.blocks, batches, about)

    def read(images: int) -> dict[int, Tensor]:
        """One epoch, in batches of a size that leaves out few images."""
        size = images // -(-images // most)
        parts = [*islice(tokens(items[rest : rest + images], size).batches(0), images // size)]
        return {block: torch.cat([part[block].cpu() for part in parts]) for block in args.blocks}

    return _Source(tokens(items[:rest], most), layout.patches, held, read, _words(args), subject.name)


def _words(args: argparse.Namespace) -> list[str]:
    """What names images and model in a command, as it was given."""
    words = [*args.images]
    for name in ("manifest", "dataset", "model", "checkpoint", "checkpoint_key"):
        value = getattr(args, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    words += [flag for flag, given in (("--pretrained", args.pretrained), ("--random-weights", args.random_weights))
              if given]  # fmt: skip
    words += ["--window", *args.window] if args.window else []
    return words + (["--split", "tune"] if args.split == "report" else [])  # the half that was not trained on


def _held(images: int) -> int:
    """How many of so many images are held back."""
    return min(images // _SHARE, _MOST)


def _print(args: argparse.Namespace, source: _Source, saes: Mapping[tuple[str, int], SparseAutoencoder]) -> None:
    most = max(1, _CODES // max(sae.d_sae for sae in saes.values()))  # tokens
    if source.held:
        sample, where = source.read(min(source.held, max(1, most // source.patches))), "held back"
    else:
        sample = {block: x.cpu() for block, x in source.tokens.sample(min(4096, max(64, most))).items()}
        where = "that were trained on, as the images are too few to hold some back"
    print(f"model    {source.name}")
    print(f"\n{'autoencoder':<28} block  explained      L0   dead")
    for (name, block), sae in saes.items():
        found = sae.self_check(sample[block])
        measured = f"{found.explained_variance:9.4f} {found.l0:7.1f} {found.dead:6.1%}"
        print(f"{name:<28} {block:>5}  {measured}")
    print(f"\nmeasured on {found.tokens} tokens {where}; dead: features that none of them activates")
    first = next(iter(saes))[0]
    paths = [f"{block}={args.out / name / f'block_{block}'}" for name, block in saes if name == first]
    print(f"wrote {len(saes)} autoencoder(s) into {args.out}")
    for when, command in (("next", "sae-report"), ("then", "evaluate")):
        print(f"{when}: " + shlex.join(["fga-fast", command, *source.words, "--sae", *paths]))
