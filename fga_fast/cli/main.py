"""Entry point of `fga-fast`: finds the command, runs it, and turns user errors into one line and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fga_fast import __version__
from fga_fast.cli import evaluate, explain, export, features, harvest, sae_report, serve, train_sae

USER_ERROR, INTERRUPTED = 2, 130
_COMMANDS = (explain, harvest, train_sae, sae_report, features, evaluate, export, serve)  # in the order of use


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; each sets `run`, a function from parsed arguments to an exit code."""
    about = "Explain Vision Transformers by feature-gradient attribution."
    parser = argparse.ArgumentParser(prog="fga-fast", description=about)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; images may stand after options, which argparse alone does not take before Python 3.13."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "images") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.images = [*args.images, *rest]
    args.argv = [*(sys.argv[1:] if argv is None else argv)]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0 done; 1 done, but some images failed; 2 wrong arguments or input, said on stderr; 130 interrupted.
    """
    args = _parsed(argv)
    try:
        code: int = args.run(args)
    except KeyboardInterrupt:
        print("fga-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError) as error:
        if args.traceback:
            raise
        print(f"fga-fast: error: {error or type(error).__name__}", file=sys.stderr)
        return USER_ERROR
    return code
