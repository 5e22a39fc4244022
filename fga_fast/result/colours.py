"""Colour maps without matplotlib: short tables, interpolated linearly.

Every 15th of the 256 entries of each published map is kept, so that a colour is off by at most 6 of 255.
Sources: turbo (A. Mikhailov, 2019, Apache-2.0); viridis and magma (N. Smith, S. van der Walt, E. Firing, 2015, CC0);
diverging, from blue over white to red, is RdBu of ColorBrewer (C. Brewer, 2002, Apache-2.0), all 11 entries, reversed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TABLES = {
    "turbo": "30123b 3f3e9c 4666dd 458cfd 2fb2f4 1ad4d0 22ebaa 52fa7a 8bff4b "
    "b7f735 dbe236 f5c53a fea130 f9751d e84b0c ce2d04 a91601 7a0403",
    "viridis": "440154 481769 472a7a 433d84 3d4e8a 355e8d 2e6d8e 297b8e 23898e "
    "1f978b 21a585 2eb37c 46c06f 65cb5e 89d548 b0dd2f d8e219 fde725",
    "magma": "000004 090720 1a1042 311165 4a1079 621980 792282 912b81 aa337d "
    "c23b75 d9466b ec5860 f7725c fc8e64 feaa74 fec68a fde2a3 fcfdbf",
    "gray": "000000 ffffff",
    "diverging": "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f",
}

NAMES = tuple(_TABLES)


def apply_colormap(values: Tensor, name: str = "turbo") -> Tensor:  # [...] -> [..., 3]
    """Colours of numbers in [0,1].

    Args:
        values: [...] floating point; values outside [0,1] get the colour of the nearer end.
        name: one of `NAMES` (turbo, viridis, magma, gray, diverging).

    Returns:
        [..., 3] red, green, blue in [0,1], dtype and device of `values`.

    Raises:
        ValueError: no colour map of that name.
    """
    if name not in _TABLES:
        raise ValueError(f"colormap: expected one of {', '.join(NAMES)}, got {name!r}")
    rows = [[int(entry[i : i + 2], 16) / 255 for i in (0, 2, 4)] for entry in _TABLES[name].split()]
    table = torch.tensor(rows, dtype=values.dtype, device=values.device)  # [entries, 3]
    place = values.clamp(0, 1) * (len(rows) - 1)
    below = place.floor().clamp(max=len(rows) - 2)
    fraction = (place - below).unsqueeze(-1)
    index = below.long()
    return table[index] * (1 - fraction) + table[index + 1] * fraction
