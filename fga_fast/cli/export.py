"""`fga-fast export`: compiles a model and its explanation into a package that runs without the model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import torch

from fga_fast.cli import arguments
from fga_fast.cli.subject import load_subject
from fga_fast.settings import TargetMode


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `export` to the parser's commands."""
    parser = commands.add_parser(
        "export",
        help="compile a model with its explanation into a package",
        description="Writes OUT.pt2, machine code with the weights in it, and OUT.json beside it. `fga-fast explain "
        "--package OUT.pt2`, fga_fast.load_package and the C++ runtime read them. Takes a minute or so and needs a C++ "
        "compiler. The package runs on processors like this one.",
    )
    parser.add_argument("model", metavar="MODEL", help=f"{arguments.MODEL}, or 'demo': the shipped fashion demo model")
    parser.add_argument("out", metavar="OUT.pt2", type=Path, help="the package to write")
    arguments.add_subject(parser)
    arguments.add_settings(parser)
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N",
        help="how many images the package computes at once; it takes any number (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--target-mode", choices=get_args(TargetMode), default="predicted",
        help="explain the predicted class, or a class that may be given with each image (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports what the arguments name; returns the exit code."""
    from fga_fast.graph.package.export import check_path

    if args.batch < 1:
        raise ValueError(f"--batch: expected at least 1, got {args.batch}")
    check_path(args.out)
    if args.model == "demo":
        args.model = None
    subject = load_subject(args)
    dtype = getattr(torch, args.dtype)
    subject.model.to(dtype)
    explainer = arguments.explainer(subject, args)
    example = torch.randn(args.batch, explainer.layout.in_chans, *subject.preprocess.image_size)
    path = explainer.export(
        args.out, example.to(args.device, dtype), target_mode=args.target_mode, preprocessing=subject.preprocess,
    )  # fmt: skip
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB) and {path.with_suffix('.json').name}")
    return 0
