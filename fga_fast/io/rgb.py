"""PIL images of every mode, and arrays, become RGB with 8 bits a channel: one rule for files, overlays and models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from fga_fast.io.window import READ, ImageFileError, Window, spans, to_eight_bits

if TYPE_CHECKING:
    import numpy.typing as npt

    Values = npt.NDArray[Any]

_CONVERTED = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")  # PIL's modes
_DEEP_FORMATS = ("PNG", "TIFF", "PPM", "JPEG2000", None)  # whose deep values PIL hands over right; None: from memory
_STRETCHED = ("PPM", "JPEG2000")  # from the depth that the file declares
_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLE = 254, 258, 262, 339  # TIFF tags


def to_rgb(
    image: Image.Image, window: Window | None = None, name: str = "the picture", *, upright: bool = True
) -> Image.Image:
    """A PIL image as RGB with 8 bits a channel, as `load_image` makes it of the image's file.

    Args:
        image: in any mode. An image that is opened but not yet loaded says more about its file.
        window: as for `load_image`.
        name: for messages.
        upright: apply EXIF rotation.

    Raises:
        ImageFileError: values without a known range, or a colour model that PIL does not convert.
    """
    if window is None and image.mode == "RGB" and READ in image.info:
        return image
    format, frames, halved = image.format, getattr(image, "n_frames", 1), _drops_bits(image)
    tags: Any = getattr(image, "tag_v2", {}) if format == "TIFF" else {}
    facts = {"format": format, "mode": image.mode, "frames": frames}
    image.load()
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")) or _is_signed(tags):
        grey, how = _grey(image, format, tags, window, name)
        return picture_of(grey, facts | how, image.info)
    if image.mode not in _CONVERTED:
        raise ImageFileError(f"image: {name} is {image.mode}, which PIL does not turn into RGB; save it as RGB")
    how = {"values": None, "window": [0, 255], "window_from": "the whole range, 0 to 255"}
    if halved:
        _check_halved(image, window, name)
        how = {"values": None, "window": [0, 65535], "window_from": "the upper 8 of 16 bits"}
    colours: npt.NDArray[np.uint8] = np.asarray(_on_white(image))
    if window is not None and not halved:
        colours, how = to_eight_bits(colours, window, None, name)
    return picture_of(colours, facts | how, image.info)


def from_array(values: Values, window: Window | None) -> Image.Image:
    """RGB of grey [H, W] or colour [H, W, 3] values of any type.

    Raises:
        ImageFileError: no such array, or values without a known range.
    """
    if values.dtype.kind not in "buif" or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
        raise ImageFileError(
            f"image: expected an array of numbers, grey [H,W] or colour [H,W,3], got {values.dtype} {values.shape}"
        )
    full = {"b": 1, "u": 2 ** (8 * values.itemsize) - 1}.get(values.dtype.kind)
    picture, how = to_eight_bits(values, window, full, "the array")
    return picture_of(picture, {"format": "array", "mode": values.dtype.name, "frames": 1, **how})


def picture_of(values: npt.NDArray[np.uint8], facts: dict[str, Any], info: Any = ()) -> Image.Image:
    """RGB of [H, W] or [H, W, 3] values, with the facts about their reading in its `info`."""
    picture = Image.fromarray(values).convert("RGB")
    picture.info.update({key: value for key, value in dict(info).items() if key != "transparency"})
    picture.info[READ] = facts
    return picture


def check_pages(file: Image.Image, path: Path) -> None:
    """Refuses a TIFF file with several pages, unless the others are thumbnails or masks of the first."""
    pages: int = getattr(file, "n_frames", 1) if file.format == "TIFF" else 1
    for page in range(1, pages):
        file.seek(page)
        tags: Any = getattr(file, "tag_v2", {})
        if not tags.get(_SUBFILE, 0) & 0b101:  # smaller versions, masks
            raise ImageFileError(
                f"image: {path} has {pages} pages, expected one picture; save the page you mean as a file of its own, "
                "or open the file with PIL, seek() to the page and give load_image that"
            )
    if pages > 1:
        file.seek(0)


def _grey(
    image: Image.Image, format: str | None, tags: Any, window: Window | None, name: str
) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
    """[H, W] of an image whose values are not plain 8 bits, and how they were read."""
    if format not in _DEEP_FORMATS:
        raise ImageFileError(
            f"image: {name}: {image.mode} pixels of {format} files are not read; read it with another library and give "
            "load_image the array"
        )
    if format in _STRETCHED and window is not None and window != "auto" and tuple(window) != (0, 65535):
        raise ImageFileError(
            f"image: {name}: PIL stretches the values of {format} files to 0..65535, so a window in the file's own "
            'units cannot be applied; give window="auto", on the command line --window auto, or save it as PNG or TIFF'
        )
    values: Values = np.asarray(image)
    full: int | None = 2**16 - 1
    if values.dtype.kind == "f" or _is_signed(tags):
        full = None
        values = values.view(np.int8) if values.dtype == np.uint8 else values  # which PIL takes for unsigned
    elif format == "TIFF":
        bits = int(tags.get(_BITS, (16,))[0])
        full = 2**bits - 1
        values = values.view(np.uint32) if bits == 32 else values  # which PIL takes for signed
    elif format is None and image.mode == "I":  # 32 bits in memory; in a file the mode holds 16
        full = None
    grey, how = to_eight_bits(values, window, full, name)
    inverted = tags.get(_PHOTOMETRIC) == 0  # white is zero; PIL inverts 8 bits only
    grey = 255 - grey if inverted else grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return grey, {**how, "inverted": inverted}


def _is_signed(tags: Any) -> bool:
    """Whether a TIFF file's integers are signed."""
    return bool(tags.get(_SAMPLE, (1,))[0] == 2)


def _on_white(image: Image.Image) -> Image.Image:
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, coloured)
    return image.convert("RGB")


def _drops_bits(image: Image.Image) -> bool:
    """Whether PIL will keep 8 of 16 bits a channel, as it does in colour and with transparency, without a word."""
    options = [tile[3] or [""] for tile in getattr(image, "tile", None) or []]  # the mode in the file, alone or first
    stored = [str(option if isinstance(option, str) else option[0]) for option in options]
    return not image.mode.startswith("I") and any(re.fullmatch(r"(?!BGR).*;16[BLN]", mode) for mode in stored)


def _check_halved(image: Image.Image, window: Window | None, name: str) -> None:
    """The upper 8 of 16 bits are a right picture only if the values use all 16 bits, or the user says so."""
    if window is not None and tuple(window) == (0, 65535):
        return
    pixels = np.asarray(image.convert("RGBA"))
    colours = pixels[pixels[..., 3] > 0][:, :3]
    smallest, largest = (257 * int(colours.min()), 257 * int(colours.max())) if colours.size else (0, 0)
    if window is not None or not spans(smallest, largest, 65535):
        raise ImageFileError(
            f"image: {name} has 16 bits a channel, of which PIL reads the upper 8 only. Its values go from about "
            f"{smallest} to {largest}. If 0 is black and 65535 is white, give window=(0, 65535), on the command line "
            "--window 0 65535; else read the file with another library (tifffile, OpenCV) and give load_image the "
            "array with a window"
        )
