"""`fga-fast serve`: explains pictures that others send."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fga_fast.cli import arguments
from fga_fast.cli.subject import load_subject
from fga_fast.settings import PRESETS

if TYPE_CHECKING:
    from fga_fast.serve.engine import Engine
    from fga_fast.serve.limits import Limits

_TOKEN = "FGA_FAST_TOKEN"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `serve` to the parser's commands."""
    parser = commands.add_parser(
        "serve",
        help="explain pictures over HTTP, with a page to try it",
        description="Serves an explainer over HTTP and WebSocket until it is interrupted; docs/serve.md says how to "
        "ask it. `fga-fast serve demo` serves the shipped fashion demo.",
    )
    parser.add_argument("demo", nargs="?", choices=("demo",), help="the shipped fashion demo model")
    parser.add_argument("--model", metavar="MODEL", help=arguments.MODEL)
    arguments.add_package(parser)
    arguments.add_subject(parser)
    arguments.add_settings(parser)
    parser.add_argument(
        "--top-features", type=int, default=5, metavar="K",
        help="the most features that can be asked for at each patch (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ungated", action="store_true", help="also explain without gates; with the rollout that costs as much again"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the explanation of one class; takes minutes to start"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N",
        help="processors that an explanation takes on a CPU (default: all of them; demo: 1, since more do not make so "
        "small a model faster, and a browser needs them)",
    )  # fmt: skip
    parser.add_argument("--cards", metavar="PAGE", help="address of the page of `fga-fast features`")
    _add_service(parser)
    parser.set_defaults(run=run)


def _add_service(parser: argparse.ArgumentParser) -> None:
    def number(flag: str, kind: type, default: float, metavar: str, help: str) -> None:
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{help} (default: %(default)s)")

    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    number("--port", int, 8000, "N", "port; 0 takes a free one")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE",
        help=f"what clients have to show, as the one line of a file (or in the variable {_TOKEN}; default: nothing)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a name by which clients without a token may call the server, besides localhost and addresses",
    )  # fmt: skip
    number("--max-batch", int, 8, "B", "images explained at once")
    number("--max-wait-ms", float, 5, "MS", "how long the first image waits for others")
    number("--queue", int, 64, "N", "requests inside at once; more are told to come again")
    number("--deadline-ms", float, 10_000, "MS", "for an answer")
    number("--max-body-mb", float, 16, "MB", "of a request")
    number("--max-pixels", int, 40_000_000, "N", "of a picture")
    number("--max-targets", int, 16, "K", "classes of a request")


def run(args: argparse.Namespace) -> int:
    """Serves what the arguments name; returns the exit code."""
    if sum((args.demo is not None, args.model is not None, args.package is not None)) != 1:
        raise ValueError("demo, --model, --package: expected exactly one of them, such as `fga-fast serve demo`")
    try:
        from fga_fast.serve.server import serve
        from fga_fast.serve.service import Service
        from fga_fast.serve.threads import apart
    except ImportError as error:
        raise ImportError(f"serve needs {error.name}: pip install 'fga_fast[serve]'") from error
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {args.threads}")
    limits, token = _limits(args), _token(args)
    samples = {}
    if args.demo:
        from fga_fast.assets import fashion_scenes

        samples = {path.name: path for path in fashion_scenes()}
    if args.threads or args.demo:
        torch.set_num_threads(args.threads or 1)
    load = _model_engine if args.package is None else _package_engine
    engine = apart(lambda: load(args, limits))
    service = Service(engine, limits, token=token, hosts=args.allow_host, samples=samples, cards=args.cards)
    print(f"fga-fast: {engine.facts.model} is warming up", flush=True)
    serve(service, args.host, args.port, lambda url: print(f"fga-fast: serving at {url}", flush=True))
    return 0


def _limits(args: argparse.Namespace) -> Limits:
    from fga_fast.serve.limits import Limits

    return Limits(
        max_batch=args.max_batch, max_wait=args.max_wait_ms / 1000, queue=args.queue,
        deadline=args.deadline_ms / 1000, body_bytes=int(args.max_body_mb * 2**20), pixels=args.max_pixels,
        targets=args.max_targets,
    )  # fmt: skip


def _token(args: argparse.Namespace) -> str | None:
    """The token; not an argument of the command line, which other users of the machine can read."""
    if args.token_file is None:
        return os.environ.get(_TOKEN)
    token: str = args.token_file.read_text(encoding="utf-8").strip()
    return token


def _model_engine(args: argparse.Namespace, limits: Limits) -> Engine:
    from fga_fast.serve.engine import Engine

    subject = load_subject(args)
    # One graph cannot hold two rollouts, and nobody asked for the second.
    shown = args.demo is not None and not (args.compile and (args.method or PRESETS[args.preset].method) == "rollout")
    ungated = bool(subject.saes) and (args.ungated or shown)
    explainer = arguments.explainer(subject, args, ungated=ungated)
    listed = args.top_features if subject.saes else 0
    listing = arguments.explainer(subject, args, top_features=listed, ungated=ungated) if listed else None
    compiled: Any = None
    if args.compile:
        sizes = sorted({*(2**power for power in range(limits.max_batch.bit_length())), limits.max_batch})
        example = torch.zeros(1, explainer.layout.in_chans, *subject.preprocess.image_size, device=args.device)
        compiled = (listing or explainer).compile(example, target_mode="given", batches=sizes)
    return Engine(
        explainer, subject.preprocess, listing=listing, compiled=compiled, name=subject.name,
        probability_is="sigmoid" if subject.multi_label else "softmax", max_pixels=limits.pixels,
    )  # fmt: skip


def _package_engine(args: argparse.Namespace, limits: Limits) -> Engine:
    from fga_fast.graph.package.load import load_package  # which imports torch's compiler
    from fga_fast.serve.engine import Engine

    return Engine(load_package(args.package), max_pixels=limits.pixels)
