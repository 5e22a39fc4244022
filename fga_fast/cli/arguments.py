"""The arguments that commands share: which model, which autoencoders, explained how."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from fga_fast.cli.subject import Subject
from fga_fast.explainer import Explainer
from fga_fast.io.window import Window, check_window
from fga_fast.settings import PRESETS, Backend, Backward, Gate, Method, Preset

MODEL = "a timm model, hf:FOLDER for an image classifier of transformers, or MODULE:FUNCTION of your own"


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Adds what `load_subject` reads, except for the model's name."""
    add_weights(parser)
    parser.add_argument(
        "--sae", action="extend", nargs="+", default=[], metavar="BLOCK=PATH", help="a sparse autoencoder after a block"
    )
    parser.add_argument(
        "--allow-pickled-config", action="store_true",
        help="also read SAE files with a pickled configuration, as plain settings only",
    )  # fmt: skip
    parser.add_argument(
        "--sae-normalize", choices=("none", "layer_norm", "constant_norm"),
        help="how the SAE's input is normalised, for files that do not say",
    )  # fmt: skip


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds what `load_subject` reads for a model without autoencoders, except for its name."""
    parser.set_defaults(sae=[], sae_normalize=None, allow_pickled_config=False)
    parser.add_argument(
        "--checkpoint", metavar="FILE", type=Path, help="weights of --model: safetensors, or .pt (tensors only)"
    )
    parser.add_argument(
        "--checkpoint-key", metavar="NAME",
        help="where in --checkpoint the weights are, such as state_dict_ema, if it holds several models",
    )  # fmt: skip
    parser.add_argument("--pretrained", action="store_true", help="let timm use its cache or download the weights")
    parser.add_argument("--random-weights", action="store_true", help="no weights, for timing; explains nothing")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")


def add_package(parser: argparse.ArgumentParser) -> None:
    """Adds what names a package in place of a model."""
    parser.add_argument(
        "--package", type=Path, metavar="FILE.pt2",
        help="a package from `fga-fast export`, instead of a model; loading it runs its code, so load only packages "
        "you trust",
    )  # fmt: skip


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds what `explainer` reads."""
    parser.add_argument("--backend", choices=get_args(Backend), default="auto", help="what computes (docs/backends.md)")
    parser.add_argument(
        "--preset", choices=get_args(Preset), default="faithful",
        help="what --method, --backward and --base are unless they are given: published, TransMM and FGA as published, "
        "or faithful, which was more so where it was measured, see docs/faithfulness.md (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--method", choices=get_args(Method), help=_default("method"))
    parser.add_argument("--backward", choices=get_args(Backward), help=_default("backward"))
    parser.add_argument(
        "--start-block", type=int, default=0, metavar="L", help="explain from this block on (default: %(default)s)"
    )
    parser.add_argument("--signed", action="store_true", help="let a rollout keep what speaks against the class")
    parser.add_argument("--base", type=float, help=f"gates lie in [1/BASE, BASE]; {_default('base')}")


def _default(name: str) -> str:
    """What an option is by default, which depends on the preset."""
    values = {
        preset: f"{one.gate.bound:g}" if name == "base" else getattr(one, name) for preset, one in PRESETS.items()
    }
    return "default: " + ", ".join(f"{value} ({preset})" for preset, value in values.items())


def add_window(parser: argparse.ArgumentParser) -> None:
    """Adds what `window` reads."""
    parser.add_argument(
        "--window", nargs="+", metavar=("auto|LOW", "HIGH"),
        help="the values that become black and white, for images of more than 8 bits and DICOM; auto: percentiles 0.5 "
        "and 99.5 of each image (default: the range that the file defines, or an error)",
    )  # fmt: skip


def window(args: argparse.Namespace) -> Window | None:
    """The window that `--window` gives."""
    if args.window is None or args.window == ["auto"]:
        return None if args.window is None else "auto"
    try:
        low, high = map(float, args.window)
        check_window((low, high))
    except ValueError:
        given = " ".join(args.window)
        raise ValueError(f"--window: expected auto, or LOW and HIGH with LOW < HIGH, got {given!r}") from None
    return low, high


def explainer(subject: Subject, args: argparse.Namespace, *, top_features: int = 0, ungated: bool = False) -> Explainer:
    """The explainer that the arguments ask for."""
    return Explainer(
        subject.model, subject.saes, preset=args.preset, gate=Gate(base=args.base), method=args.method,
        backward=args.backward, backend=args.backend, class_names=subject.class_names, start_block=args.start_block,
        signed=args.signed, top_features=top_features, ungated=ungated,
    )  # fmt: skip
