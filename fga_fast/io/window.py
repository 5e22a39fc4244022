"""Pixel values of any depth become 8 bits: over the range that their format defines, or over a window that is given.

No range is guessed. 12-bit values in a 16-bit file, Hounsfield units or floats would become an almost black or a
clipped picture, and the explanation of such a picture looks like any other.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Values: TypeAlias = npt.NDArray[Any]  # [H, W] or [H, W, 3]
    EightBits: TypeAlias = npt.NDArray[np.uint8]  # of the same shape

Window: TypeAlias = tuple[float, float] | Literal["auto"]
"""The values that become black and white; "auto": percentiles 0.5 and 99.5 of the picture's own values."""

READ = "fga_fast"
"""The key of a picture's `info` under which `load_image` says how the values were read."""

_PERCENTILES = (0.5, 99.5)
_ROWS = 256  # scaled at once, so that a large picture is never a large picture of float64
HOW = 'give window=(low, high) or window="auto"; on the command line --window LOW HIGH or --window auto'


class ImageFileError(ValueError):
    """A picture that is damaged, too large or of a kind that is not read, or whose values have no known range."""


def check_window(window: Window | None) -> None:
    """Raises ValueError if `window` is none of None, "auto" and (low, high) with finite low < high."""
    if window is None or (isinstance(window, str) and window == "auto"):
        return
    try:
        low, high = map(float, window)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if isinstance(window, str) or not (isfinite(high - low) and low < high):
        raise ValueError(f'window: expected "auto" or (low, high), two finite numbers with low < high, got {window!r}')


def to_eight_bits(
    values: Values,
    window: Window | None,
    full: int | None,
    name: str,
    left_out: npt.NDArray[np.bool_] | None = None,  # [H, W]
) -> tuple[EightBits, dict[str, Any]]:
    """Scales values to 0..255 and says how.

    Args:
        values: integers or floats.
        window: what becomes black and white; None: 0 and `full`, if the values use them.
        full: the value that is white by the values' format, with 0 for black; None: it says nothing.
        name: what the values belong to, for messages.
        left_out: pixels outside the picture proper, which no range is taken from.

    Returns:
        The picture, and "values", "window" and "window_from" for a report.

    Raises:
        ImageFileError: NaN or Inf; no window where one is needed; a window that shows nothing.
    """
    known = values if left_out is None or left_out.all() else values[~left_out]
    smallest, largest = limits(known, name)
    low: float
    high: float
    if window is None:
        low, high = 0, _white(values, full, smallest, largest, name)
        source = f"the whole range, 0 to {high}"
    elif isinstance(window, str):
        low, high = np.percentile(known, _PERCENTILES).tolist()
        source = f"auto: percentiles {_PERCENTILES[0]} and {_PERCENTILES[1]}"
        if low == high:
            low, high, source = smallest, largest, "auto: smallest and largest value, since nearly all are equal"
        if low == high:
            raise ImageFileError(f'image: all values of {name} are {low:g}, so window="auto" finds no range in them')
    else:
        low, high, source = float(window[0]), float(window[1]), "given"
    picture = scale(values, low, high)
    check_shows(picture, smallest, largest, name, f"the window from {low:g} to {high:g}")
    return picture, {"values": [smallest, largest], "window": [low, high], "window_from": source}


def limits(values: Values, name: str) -> tuple[float, float]:
    """The smallest and the largest value; ImageFileError if there is none or one is not finite."""
    if values.size == 0:
        raise ImageFileError(f"image: {name} has no pixels")
    if values.dtype.kind == "f" and (wrong := values.size - int(np.isfinite(values).sum())):
        raise ImageFileError(
            f"image: {name} holds NaN or Inf at {wrong} of {values.size} values; replace them first, for example with "
            "numpy.nan_to_num"
        )
    smallest, largest = values.min().item(), values.max().item()
    return (int(smallest), int(largest)) if values.dtype.kind in "bui" else (smallest, largest)


def scale(values: Values, low: float, high: float) -> EightBits:
    """Values at or below `low` become 0, at or above `high` 255, and linear between them, rounded half up."""
    picture = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), _ROWS):
        part = np.clip(values[top : top + _ROWS].astype(np.float64), low, high)
        picture[top : top + _ROWS] = (part - low) * (255 / (high - low)) + 0.5
    return picture


def spans(low: float, high: float, full: float) -> bool:
    """Whether values from `low` to `high` use the range from 0 to `full`: three quarters of it, or if it is 8 bits.

    A photograph of 16 bits does. 12 or 14 bits in a 16-bit file do not, nor does a CT that was shifted by 32768.
    """
    return full <= 255 or high - low >= 0.75 * full


def check_shows(picture: EightBits, smallest: float, largest: float, name: str, window: str) -> None:
    """Raises ImageFileError if different values became one flat grey."""
    if smallest < largest and picture.min() == picture.max():
        raise ImageFileError(
            f"image: {window} shows {name} as one flat grey, since its values go from {smallest:g} to {largest:g}; "
            f"{HOW}"
        )


def _white(values: Values, full: int | None, smallest: float, largest: float, name: str) -> int:
    """`full`, if there is one and the values use it."""
    found = f"{name} holds {values.dtype.newbyteorder('=').name} values from {smallest:g} to {largest:g}"
    if full is None:
        kind = "floating-point pixels have no agreed range" if values.dtype.kind == "f" else "their range is not known"
        raise ImageFileError(f"image: {found}, and {kind}; {HOW}")
    if not spans(smallest, largest, full):
        raise ImageFileError(
            f"image: {found}, a small part of 0 to {full}, so what is black and what is white is not known; {HOW} "
            f"(low 0 and high {full} if it is only a dark or pale picture)"
        )
    return full
