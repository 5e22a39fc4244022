"""`fga-fast evaluate`: measures methods on a data set, and reports which are better."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from fga_fast.cli import arguments, items, recipe
from fga_fast.cli.other_models import own_function
from fga_fast.dataset.items import Item, Split, choose
from fga_fast.evaluation import report, store, wording
from fga_fast.evaluation.examples import examples
from fga_fast.evaluation.measures import MEASURES, flat
from fga_fast.evaluation.methods import METHODS, NEEDS_SAES
from fga_fast.evaluation.report import Written
from fga_fast.evaluation.run import evaluate
from fga_fast.evaluation.statistics import BASELINES
from fga_fast.evaluation.subject import Method, Subject
from fga_fast.question.names import label

# What `Explainer` does by default, without SAEs and with them, and as published; FGA without the meaning of its
# features; and chance.
_METHODS = ("transmm", "block_x_gradient", "block_x_gradient_gated", "fga", "fga_shuffled", "random")
_DEFAULTS = ("block_x_gradient_gated", "block_x_gradient")
_OUT = Path("fga-fast-evaluation")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `evaluate` to the parser's commands."""
    parser = commands.add_parser(
        "evaluate",
        help="measure which maps are better, with statistics",
        description="Writes values.parquet, report.html and report.md. A run that was stopped goes on when the same "
        "command is given again. Without images: the scenes of the shipped fashion demo.",
    )
    items.add_items(parser)
    parser.add_argument("--model", metavar="MODEL", help=f"{arguments.MODEL} (default: the shipped fashion demo model)")
    recipe.add_recipe(parser)
    arguments.add_subject(parser)
    arguments.add_window(parser)
    parser.add_argument(
        "--methods", action="extend", nargs="+", default=[], metavar="NAME",
        help=f"methods by name, or all (default: {' '.join(_METHODS)})",
    )  # fmt: skip
    parser.add_argument(
        "--method", action="append", default=[], metavar="MODULE:FUNCTION",
        help="a method of your own: (subject, images [B,C,H,W], targets [B]) -> relevance [B,P]; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", action="extend", nargs="+", default=[], metavar="NAME",
        help=f"some of {', '.join(MEASURES)} (default: all that fit the data, apart from those that explain again: "
        f"{', '.join(name for name, measure in MEASURES.items() if measure.explains)})",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", action="extend", nargs="+", default=[], metavar="NAME",
        help=f"methods that all others are compared with (default: {' '.join(BASELINES)})",
    )  # fmt: skip
    parser.add_argument(
        "--variant", choices=("paper", "author"),
        help="of the metrics: as published, or as in the author's runs (default: paper; with --recipe author)",
    )  # fmt: skip
    parser.add_argument(
        "--probability", choices=("softmax", "sigmoid"),
        help="of logits; sigmoid where classes do not exclude each other (default: what the model says, else softmax)",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=("report", "tune", "both"),
        help="the half of the images: tune to choose settings by, report for what is published, both where nothing is "
        "chosen (default: report; for the demo's six scenes both)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=_OUT, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="images at once (default: %(default)s)")
    parser.add_argument(
        "--seed", action="extend", nargs="+", type=int, default=[], metavar="S",
        help="of what is drawn by chance; with several, all is run with each (default: 0)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many images, drawn by their names")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluates what the arguments name; returns the exit code (1: some images, methods or metrics failed)."""
    loaded, found, labels = recipe.load(args)
    split: Split = args.split or ("both" if items.are_scenes(args) else "report")
    chosen = choose(found, split, args.limit)
    methods = _methods(args, bool(loaded.saes))
    subject = Subject(loaded.model, loaded.saes)
    window = arguments.window(args)
    preprocess = loaded.preprocess
    path = evaluate(
        subject, found, methods, _metrics(args, chosen), out=args.out, batch_size=args.batch_size, split=split,
        seed=args.seed or 0, limit=args.limit, variant=args.variant or "paper", preprocess=preprocess,
        window=window, probability=args.probability or ("sigmoid" if loaded.multi_label else "softmax"),
    )  # fmt: skip
    table, settings = store.read(path), store.settings(args.out)
    baselines = args.baseline or list(BASELINES)
    pair = _pair(args, methods, baselines)
    shown = [] if pair is None else examples(
        table, flat(settings["metrics"]), {name: methods[name] for name in pair}, subject, chosen,
        class_name=lambda number: label(number, loaded.class_names), preprocess=preprocess, window=window,
    )  # fmt: skip
    written = report.write(args.out, baselines=baselines, command=shlex.join(["fga-fast", *args.argv]), examples=shown)
    _print(written, loaded.name, path)
    if labels:
        predicted = zip(table.column("key").to_pylist(), table.column("target").to_pylist(), strict=True)
        print(recipe.agreement(dict(predicted), labels))
    return 1 if written.facts.errors else 0


def _methods(args: argparse.Namespace, saes: bool) -> dict[str, Method]:
    """The methods by name: those asked for, or the usual ones, and the user's own."""
    asked = args.methods or _METHODS
    asked = list(METHODS) if asked == ["all"] else asked
    found: dict[str, Method] = {}
    for name in asked:
        if name not in METHODS:
            raise ValueError(f"--methods: expected some of {', '.join(METHODS)}, got {name!r}")
        if saes or name not in NEEDS_SAES:
            found[name] = METHODS[name]
        elif args.methods not in ([], ["all"]):
            raise ValueError(f"--methods: {name} needs autoencoders; give --sae BLOCK=PATH, or leave the method out")
    for text in args.method:
        name, method = own_function(text, "--method", "mine:my_map")
        if name in found:
            raise ValueError(f"--method: expected a function with a name of its own, got {name} twice; rename it")
        found[name] = method
    return found


def _metrics(args: argparse.Namespace, chosen: list[Item]) -> list[str]:
    if args.metrics:
        return list(dict.fromkeys(args.metrics))
    placed = any(item.mask is not None or item.box is not None for item in chosen)
    return [name for name, measure in MEASURES.items() if not measure.explains and (placed or not measure.needs_mask)]


def _pair(args: argparse.Namespace, methods: Mapping[str, Method], baselines: list[str]) -> tuple[str, str] | None:
    """The two methods whose maps are shown: the user's own, or the default, beside the first baseline."""
    baseline = next((name for name in baselines if name in methods), None)
    own = [text.partition(":")[2] for text in args.method]
    others = [name for name in (*own, *_DEFAULTS, *methods) if name in methods and name != baseline]
    return None if baseline is None or not others else (others[0], baseline)


def _print(written: Written, model: str, path: Path) -> None:
    facts = written.facts
    settings = facts.settings
    print(f"model    {model}, {settings['images']} images ({settings['split']}), {settings['items']} questions")
    found, metrics = wording.cells(facts), wording.metrics_of(facts)
    higher = {one.metric: one.higher for one in facts.analysis.summaries}
    for metric in metrics:
        print(f"\n{wording.heading(metric, higher[metric])}")
        for method in wording.methods_of(facts):
            cell = found[method, metric]
            line = f"  {'*' if cell.best else ' '} {method:<36} {cell.mean:>8}  {cell.interval:<18} {cell.against}"
            print(f"{line}  {cell.images}".rstrip())
    print(f"\n{wording.means_note(facts)}")
    said = wording.sentences(facts) if facts.analysis.comparisons else {}
    for title in ("Tests", "Too few images"):
        if title in said:
            print(f"\n{title}: {said[title]}")
    print(f"\nwrote {path.name}, {written.html.name} and {written.markdown.name} into {path.parent}")
    for reason, count in facts.errors.most_common(5):
        print(f"fga-fast: {count} error(s): {reason}", file=sys.stderr)
