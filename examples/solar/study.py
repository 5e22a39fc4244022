"""Measure which explanation of the solar-cell model is the most faithful: all methods, with statistics.

    python -m examples.solar.study --model examples/solar/runs --split tune --k 32 --limit 60 --out runs/tune
    python -m examples.solar.study --model examples/solar/runs --split report --k 32 --out runs/report
    python -m examples.solar.study --model examples/solar/runs --split report --k 32 --others --out runs/others
    python -m examples.solar.study --model examples/solar/runs --split report --k 32 --confirm runs/report --out runs/n

Explains the predicted class of test cells, which trained neither head nor SAEs. Half of them are for choosing ("tune":
which k), the other half for what is published ("report"). There are no masks, so localisation is not measured. A run
that was stopped goes on when it is given again. `--others` measures insertion and deletion, ROAD, sensitivity and
randomisation. `--confirm` takes all cells of the half that another run did not use, and asks one question: is
`block_x_gradient` better than TransMM and than FGA as published?
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from examples.measured import measured, others
from examples.solar.data import cells, preprocess
from examples.solar.model import trained
from fga_fast.dataset.items import choose
from fga_fast.evaluation import report, store
from fga_fast.evaluation.methods import METHODS
from fga_fast.evaluation.run import evaluate
from fga_fast.evaluation.subject import Subject
from fga_fast.sae import SparseAutoencoder

BASELINES = ("transmm", "fga", "block_x_gradient", "block_x_gradient_gated")
CONFIRMED = ("transmm", "fga", "block_x_gradient")  # few, so that Holm's correction leaves small differences visible


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that train_head and train_sae wrote")
    parser.add_argument("--split", choices=("tune", "report"), required=True)
    parser.add_argument("--k", type=int, required=True, help="of the SAEs")
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 9])
    parser.add_argument("--others", action="store_true", help="measure the other metrics")
    parser.add_argument("--confirm", type=Path, metavar="RUN", help="only the three methods, on cells not in that run")
    parser.add_argument("--limit", type=int, help="at most so many cells")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, image_size = trained(arguments.model)
    folder = arguments.model / "saes" / f"topk_{arguments.k}"
    saes = {block: SparseAutoencoder.from_pretrained(folder / f"block_{block}") for block in arguments.blocks}
    used = {*store.read(arguments.confirm).column("image").to_pylist()} if arguments.confirm else set()
    if not used <= {item.key for item in choose(list(cells("test")), arguments.split)}:
        parser.error(f"--confirm: {arguments.confirm} has other images than the half {arguments.split!r}")
    items = [replace(item, target=None) for item in cells("test") if item.key not in used]
    methods = {name: METHODS[name] for name in CONFIRMED} if arguments.confirm else METHODS
    evaluate(
        Subject(model, saes), items, methods, (others if arguments.others else measured)(step=8), out=arguments.out,
        preprocess=preprocess(image_size), batch_size=8, split=arguments.split, limit=arguments.limit, perturbed=64,
    )  # fmt: skip
    command = f"python -m examples.solar.study {' '.join(sys.argv[1:])}"
    print(report.write(arguments.out, baselines=BASELINES, command=command).markdown.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
