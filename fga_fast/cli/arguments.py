"""The arguments that commands share: which model, which autoencoders, explained how."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fga_fast.cli.subject import Subject
from fga_fast.engine.backends import BACKENDS

if TYPE_CHECKING:
    from fga_fast.explainer import Explainer


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Adds what `load_subject` reads, except for the model's name."""
    parser.add_argument(
        "--checkpoint", metavar="FILE", type=Path, help="its weights: safetensors, or .pt (tensors only)"
    )
    parser.add_argument("--pretrained", action="store_true", help="let timm use its cache or download the weights")
    parser.add_argument("--random-weights", action="store_true", help="no weights, for timing; explains nothing")
    parser.add_argument(
        "--sae", action="extend", nargs="+", default=[], metavar="LAYER=PATH", help="a sparse autoencoder after a block"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument(
        "--allow-pickled-config",
        action="store_true",
        help="read old SAE files with a pickled configuration, restricted",
    )
    parser.add_argument(
        "--sae-normalize", choices=("none", "layer_norm", "constant_norm"), help="for SAE files that do not say it"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds what `explainer` reads."""
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--method", choices=("rollout", "input_x_gradient"), default="rollout")
    parser.add_argument("--backward", choices=("exact", "conservative"), default="exact")
    parser.add_argument(
        "--start-layer", type=int, default=0, metavar="L", help="explain from this block on (default: %(default)s)"
    )
    parser.add_argument("--signed", action="store_true", help="keep what speaks against the class")
    parser.add_argument("--base", type=float, help="gates lie in [1/BASE, BASE] (default: 10; the demo's own: 2)")


def explainer(subject: Subject, args: argparse.Namespace, gated: bool = True, **settings: Any) -> Explainer:
    """The explainer that the arguments ask for; `gated=False`: the same without autoencoders."""
    from fga_fast.explainer import Explainer
    from fga_fast.settings import Gate

    if gated:
        base = subject.gate_base if args.base is None else args.base
        settings |= {"saes": subject.saes, "gate": Gate(base=base)}
    return Explainer(
        subject.model, method=args.method, backward=args.backward, backend=args.backend,
        start_layer=args.start_layer, signed=args.signed, **settings,
    )  # fmt: skip
