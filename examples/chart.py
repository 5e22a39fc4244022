"""Draw the means of studies, with intervals: a row for each study, a column for each metric.

python -m examples.chart docs/studies/fashion/report docs/studies/solar/report --out docs/faithfulness.png
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fga_fast.evaluation import store
from fga_fast.evaluation.measures import flat
from fga_fast.evaluation.statistics import Summary, analyse
from fga_fast.evaluation.wording import CONTROLS

METRICS = {
    "saco": "SaCo (higher is better)",
    "faithfulness_correlation": "correlation (higher is better)",
    "pixel_flipping": "pixel flipping (lower is better)",
    "inside": "inside (higher is better)",
}
# The others are far behind, and would squeeze these.
SHOWN = (
    "transmm", "fga", "fga_no_sae_centred", "fga_shuffled", "grad_cam", "sae_score", "integrated_gradients",
    "input_x_gradient_conservative", "block_x_gradient", "block_x_gradient_gated", "block_x_gradient_gated_no_sae",
    "block_x_gradient_gated_shuffled",
)  # fmt: skip
PLAIN, CONTROL, DEFAULT = "#2b6cb0", "#9aa0a6", "#c2410c"


def draw(studies: Mapping[str, list[Summary]], out: Path) -> None:
    """Writes the figure: name of a study -> its means."""
    figure = Figure(figsize=(12.5, 3.9 * len(studies)), dpi=100, layout="constrained")
    rows = figure.subplots(len(studies), len(METRICS), squeeze=False)
    for axes, (name, summaries) in zip(rows, studies.items(), strict=True):
        for place, (metric, title) in zip(axes, METRICS.items(), strict=True):
            found = {one.method: one for one in summaries if one.metric == metric}
            if found:
                _panel(place, title, found)
            else:
                place.set_axis_off()
        axes[0].set_ylabel(name, fontsize=11)
        axes[0].set_yticks(range(len(SHOWN), 0, -1), [method.replace("_", " ") for method in SHOWN], fontsize=8.5)
    figure.savefig(out)


def _panel(axes: Any, title: str, found: Mapping[str, Summary]) -> None:
    for place, method in enumerate(reversed(SHOWN), start=1):
        control = method in CONTROLS
        colour = CONTROL if control else DEFAULT if method.startswith("block_x") else PLAIN
        axes.plot(found[method].interval, (place, place), color=colour, linewidth=2)
        fill = "none" if control else "full"
        axes.plot(found[method].mean, place, "o", color=colour, markersize=5, fillstyle=fill)
    axes.set_title(title, fontsize=10)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=8.5)
    axes.grid(axis="x", color="#e5e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of complete runs, as STUDY/report")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = {}
    for folder in arguments.folders:
        higher = flat(store.settings(folder)["metrics"])
        found[folder.parent.name] = analyse(store.read(folder), higher).summaries
    draw(found, arguments.out)


if __name__ == "__main__":
    main()
