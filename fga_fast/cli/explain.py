"""`fga-fast explain`: one picture or a folder of them; without arguments the shipped fashion demo."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fga_fast.atomic import check_writable_folder
from fga_fast.backends import BACKENDS
from fga_fast.cli import report
from fga_fast.cli.subject import Subject, load_subject
from fga_fast.explanation import Explanation
from fga_fast.images import ImageFileError, list_images, load_image

if TYPE_CHECKING:
    from fga_fast.explainer import Explainer

_TIMED_RUNS = 5


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `explain` to the parser's commands."""
    parser = commands.add_parser(
        "explain",
        help="show which patches of an image speak for a class",
        description="Writes a figure, explanation.json and relevance.safetensors (Explanation.load reads it). "
        "Without arguments: scenes of the shipped fashion demo.",
    )
    parser.add_argument("image", nargs="?", type=Path, help="an image file or a folder of them (default: demo scenes)")
    parser.add_argument("--model", metavar="TIMM_NAME", help="a timm model (default: the shipped fashion demo model)")
    parser.add_argument(
        "--checkpoint", metavar="FILE", type=Path, help="its weights: safetensors, or .pt (tensors only)"
    )
    parser.add_argument("--pretrained", action="store_true", help="let timm use its cache or download the weights")
    parser.add_argument("--random-weights", action="store_true", help="no weights, for timing; explains nothing")
    parser.add_argument(
        "--sae", action="extend", nargs="+", default=[], metavar="LAYER=PATH", help="a sparse autoencoder after a block"
    )
    parser.add_argument(
        "--target",
        action="extend",
        nargs="+",
        default=[],
        metavar="N|NAME",
        help="classes to explain (default: likeliest)",
    )
    parser.add_argument("--out", type=Path, default=Path("fga-fast-out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--method", choices=("rollout", "input_x_gradient"), default="rollout")
    parser.add_argument("--backward", choices=("exact", "conservative"), default="exact")
    parser.add_argument(
        "--start-layer", type=int, default=0, metavar="L", help="explain from this block on (default: %(default)s)"
    )
    parser.add_argument("--signed", action="store_true", help="keep what speaks against the class")
    parser.add_argument("--base", type=float, help="gates lie in [1/BASE, BASE] (default: 10; the demo's own: 2)")
    parser.add_argument(
        "--top-features", type=int, default=5, metavar="K", help="features listed (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="images at once (default: %(default)s)")
    parser.add_argument(
        "--allow-pickled-config",
        action="store_true",
        help="read old SAE files with a pickled configuration, restricted",
    )
    parser.add_argument(
        "--sae-normalize", choices=("none", "layer_norm", "constant_norm"), help="for SAE files that do not say it"
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Explainers:
    """The explainer asked for, and the ungated one beside it where there are gates."""

    gated: Explainer
    ungated: Explainer | None

    def __call__(self, images: Tensor, targets: Tensor) -> Explanation:  # [M, C, H, W], [M]
        explanation = self.gated(images, targets)
        if self.ungated is not None:
            explanation.ungated = self.ungated(images, targets).relevance
        return explanation


def run(args: argparse.Namespace) -> int:
    """Explains what the arguments name; returns the exit code (1: some images of a folder could not be read).

    Raises:
        ValueError, TypeError, RuntimeError, OSError, ImportError: for the user, said before anything is computed
            where it can be known.
    """
    if args.batch_size < 1 or args.top_features < 0:
        raise ValueError("--batch-size, --top-features: expected at least 1 and 0")
    paths = _paths(args)
    many = args.image is not None and args.image.is_dir()
    if many and args.out.resolve() == args.image.resolve():
        raise ValueError(f"--out: {args.out} is the folder of the images themselves; name another one for the results")
    check_writable_folder(args.out)
    subject = load_subject(args)
    if args.base is None:
        args.base = subject.gate_base
    explainers = _build(subject, args)
    writer = report.Writer(args.out, subject, args, many)
    failed: list[tuple[Path, str]] = []
    batches = _batches(_progress(paths) if many else paths, args.batch_size, many, failed)
    timing: report.Timing | None = None
    for group, pictures in batches:
        views = [subject.preprocess.view(picture) for picture in pictures]
        images = torch.stack([subject.preprocess.normalise(view) for view in views]).to(args.device)
        targets = _targets(subject, images, args)  # [b, K]
        if timing is None:
            timing = _measure(subject, explainers.gated, images[:1], targets[:1, 0])
        rows = images.repeat_interleave(targets.shape[1], 0)
        explanation = explainers(rows, targets.reshape(-1)).to("cpu")
        for number, (path, view) in enumerate(zip(group, views, strict=True)):
            first = number * targets.shape[1]
            writer.add(path, view, explanation[first : first + targets.shape[1]], timing)
    writer.finish(failed)
    for path, reason in failed:
        print(f"fga-fast: left out {path.name}: {reason}", file=sys.stderr)
    if failed:
        print(f"fga-fast: {len(failed)} of {len(paths)} image(s) could not be explained", file=sys.stderr)
    return 1 if failed else 0


def _paths(args: argparse.Namespace) -> list[Path]:
    if args.image is None:
        if args.model is not None:
            raise ValueError(
                "IMAGE: expected an image file or a folder to explain with --model, got none; IMAGE comes first, "
                "before --sae and --target, which take all words that follow them"
            )
        from fga_fast.assets import fashion_scenes

        return list(fashion_scenes())[: report.SHEET_IMAGES]
    if args.image.is_dir():
        return list_images(args.image)
    if not args.image.exists():
        raise FileNotFoundError(f"IMAGE: no file or folder {args.image}")
    return [args.image]


def _build(subject: Subject, args: argparse.Namespace) -> _Explainers:
    from fga_fast.explainer import Explainer
    from fga_fast.gate import Gate

    # Features can only be listed where there are autoencoders.
    listed = args.top_features if subject.saes else 0
    plain = partial(
        Explainer, subject.model, method=args.method, backward=args.backward, backend=args.backend,
        start_layer=args.start_layer, signed=args.signed,
    )  # fmt: skip
    gated = plain(saes=subject.saes, gate=Gate(base=args.base), top_features=listed)
    return _Explainers(gated, plain() if subject.saes else None)


def _progress(paths: list[Path]) -> Any:
    from tqdm import tqdm

    return tqdm(paths, unit="image", desc="explaining")


def _batches(
    paths: Any, size: int, many: bool, failed: list[tuple[Path, str]]
) -> Iterator[tuple[list[Path], list[Any]]]:
    """Groups of up to `size` pictures; in a folder a broken one is noted in `failed` instead of ending the run."""
    group: list[Path] = []
    pictures: list[Any] = []
    for path in paths:
        try:
            pictures.append(load_image(path))
        except (ImageFileError, OSError) as error:
            if not many:
                raise
            failed.append((path, str(error)))
            continue
        group.append(path)
        if len(group) == size:
            yield group, pictures
            group, pictures = [], []
    if group:
        yield group, pictures


def _targets(subject: Subject, images: Tensor, args: argparse.Namespace) -> Tensor:  # [b, C, H, W] -> [b, K]
    with torch.no_grad():
        logits: Tensor = subject.model(images)
    if args.target:
        chosen = [subject.resolve_target(given, logits.shape[1]) for given in args.target]
        return torch.tensor(chosen, device=images.device).expand(len(images), -1)
    # A scene of several garments has several likely classes; a photograph with one label has one.
    return logits.topk(min(2 if subject.multi_label else 1, logits.shape[1])).indices


def _measure(subject: Subject, explainer: Explainer, image: Tensor, target: Tensor) -> report.Timing:
    """Milliseconds of one explanation and of the plain forward pass, for one image: medians after a warm-up."""

    def forward() -> None:
        with torch.no_grad():
            subject.model(image)

    return report.Timing(_median(lambda: explainer(image, target), image), _median(forward, image))


def _median(action: Callable[[], object], image: Tensor) -> float:
    times = []
    for _ in range(_TIMED_RUNS + 1):
        start = time.perf_counter()
        action()
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])
