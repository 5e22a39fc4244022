"""Round numbers for the axes of plots."""

from __future__ import annotations

import math


def ticks(low: float, high: float) -> list[float]:
    """Some round numbers from `low` to `high`, which differ."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [place * step for place in range(first, math.floor(high / step) + 1)]
