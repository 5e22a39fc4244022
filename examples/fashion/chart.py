"""Draw the means of a study, with intervals, one panel for each metric.

python -m examples.fashion.chart docs/studies/fashion/report docs/faithfulness.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from fga_fast.evaluation import store
from fga_fast.evaluation.measures import flat
from fga_fast.evaluation.statistics import Analysis, analyse
from fga_fast.evaluation.wording import CONTROLS

METRICS = {
    "saco": "SaCo (higher is better)",
    "faithfulness_correlation": "faithfulness correlation (higher is better)",
    "pixel_flipping": "pixel flipping (lower is better)",
    "inside": "relevance on the object (higher is better)",
}
PLAIN, CONTROL, BEST = "#2b6cb0", "#9aa0a6", "#c2410c"


def draw(analysis: Analysis, out: Path) -> None:
    """Writes the figure; the control "random" is left out, since it would squeeze all others."""
    shown = [one for one in analysis.summaries if one.metric in METRICS and one.method != "random"]
    names = list(dict.fromkeys(one.method for one in shown))
    figure = Figure(figsize=(11, 0.26 * len(names) * 2 + 1.6), dpi=130, layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(2, 2, sharey=True).flat, METRICS.items(), strict=True):
        for one in (one for one in shown if one.metric == metric):
            place = len(names) - names.index(one.method)
            control = one.method in CONTROLS
            colour = CONTROL if control else BEST if one.method.startswith("block_x") else PLAIN
            axes.plot(one.interval, (place, place), color=colour, linewidth=2)
            axes.plot(one.mean, place, "o", color=colour, markersize=5, fillstyle="none" if control else "full")
        axes.set_title(title, fontsize=10)
        axes.set_yticks(range(len(names), 0, -1), [name.replace("_", " ") for name in names], fontsize=8.5)
        axes.tick_params(axis="x", labelsize=8.5)
        axes.grid(axis="x", color="#e5e7eb")
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a complete run")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    higher = flat(store.settings(arguments.folder)["metrics"])
    draw(analyse(store.read(arguments.folder), higher), arguments.out)


if __name__ == "__main__":
    main()
