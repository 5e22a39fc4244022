"""The pictures of a feature card: where an image makes a feature active, and which pixels drive it there.

Four panels side by side: the image as the model sees it, with the strongest patch framed; the same in grey, with amber
where the feature is active; the strongest patch with its neighbours, enlarged; and the image in grey with amber where
pixels drive the feature's code at that patch (the gradient's magnitude, summed over channels).
"""

from __future__ import annotations

import io

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

SIDE, GAP = 128, 3  # pixels
PANELS = ("image, strongest patch framed", "where it is active", "strongest patch and its neighbours", "what drives it")
_AMBER = (255, 176, 0)
_GREY, _MOST = 0.6, 0.75  # light of the grey picture, and of the colour over it
_SMOOTH = Image.Resampling.BICUBIC


def evidence(
    view: Image.Image | None,
    activity: Tensor,  # [P]
    grid: tuple[int, int],
    patch: int,
    drive: Tensor | None,  # [H, W]
) -> bytes:
    """The four panels as a JPEG file.

    Args:
        view: what the model sees; None: it cannot be read, so that only the map of activity is shown.
        activity: the feature's codes at the patches.
        patch: the strongest of them.
        drive: from `effects`; None: not known.
    """
    height = SIDE if view is None else max(1, round(SIDE * view.height / view.width))
    size = (SIDE, height)
    picture = Image.new("RGB", size, (128, 128, 128)) if view is None else view.convert("RGB").resize(size, _SMOOTH)
    box = _box(grid, patch, size)
    strip = Image.new("RGB", (4 * SIDE + 3 * GAP, height))
    light = activity.abs().float().view(1, 1, *grid)
    by_patch = interpolate(light / light.max().clamp_min(1e-12), (height, SIDE), mode="nearest-exact")[0, 0]
    panels = [picture, _lit(picture, by_patch), _crop(view, grid, patch, size), _driven(picture, drive)]
    for number, panel in enumerate(panels):
        if panel is not None:
            strip.paste(panel, (number * (SIDE + GAP), 0))
    ImageDraw.Draw(strip).rectangle(box, outline=_AMBER, width=2)
    buffer = io.BytesIO()
    strip.save(buffer, format="JPEG", quality=78, optimize=True)
    return buffer.getvalue()


def _box(grid: tuple[int, int], patch: int, size: tuple[int, int], around: int = 0) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (last pixels) of a patch with `around` neighbours on each side, in a picture. At an edge
    there are more on the other side.
    """
    ends = []
    for place, count, pixels in zip(divmod(patch, grid[1]), grid, size[::-1], strict=True):
        wide = min(2 * around + 1, count)
        first = min(max(place - around, 0), count - wide)
        low = first * pixels // count
        ends.append((low, max((first + wide) * pixels // count - 1, low)))
    (top, bottom), (left, right) = ends
    return left, top, right, bottom


def _crop(view: Image.Image | None, grid: tuple[int, int], patch: int, size: tuple[int, int]) -> Image.Image | None:
    if view is None:
        return None
    left, top, right, bottom = _box(grid, patch, view.size, around=1)
    part = view.convert("RGB").crop((left, top, right + 1, bottom + 1))
    scale = min(size[0] / part.width, size[1] / part.height)
    return part.resize((max(1, round(part.width * scale)), max(1, round(part.height * scale))), _SMOOTH)


def _driven(picture: Image.Image, drive: Tensor | None) -> Image.Image | None:
    if drive is None:
        return None
    smooth = avg_pool2d(drive.float()[None, None], 3, 1, 1, count_include_pad=False)
    light = interpolate(smooth, picture.size[::-1], mode="bilinear", align_corners=False)[0, 0]
    strong = torch.quantile(light.flatten()[:: max(1, light.numel() // 100_000)], 0.98)  # a few pixels outshine all
    return _lit(picture, light / strong.clamp_min(1e-20))


def _lit(picture: Image.Image, light: Tensor) -> Image.Image:  # [H, W]
    """A picture in grey, with as much colour as `light` says, from 0 to 1."""
    weight = _MOST * light.clamp(0, 1).unsqueeze(-1)
    grey = torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8).view(*light.shape, 1) * _GREY
    return Image.fromarray(((1 - weight) * grey + weight * torch.tensor(_AMBER)).round().byte().numpy())
