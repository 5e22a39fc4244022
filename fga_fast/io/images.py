"""Turns image files and arrays into a model's input, and pictures into the RGB that an overlay is painted on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fga_fast.io import dicom
from fga_fast.io.rgb import check_pages, from_array, picture_of, to_rgb
from fga_fast.io.window import HOW, ImageFileError, Window, check_window, limits

if TYPE_CHECKING:
    import numpy.typing as npt

    ImageInput: TypeAlias = (
        Image.Image | Sequence[Image.Image] | Tensor | npt.NDArray[np.floating[Any]] | npt.NDArray[np.uint8]
    )

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", *dicom.EXTENSIONS)


def load_image(
    source: str | os.PathLike[str] | Image.Image | npt.NDArray[Any], window: Window | None = None
) -> Image.Image:
    """Reads an image file or an array as upright RGB, 8 bits a channel.

    EXIF rotation is applied and transparency is composited on white. Grey, palette and CMYK files become RGB. Colour
    profiles are not applied, as in the usual training pipelines. Of an animation the first frame is read.

    Values of more than 8 bits need a range. 16-bit values that use three quarters of 0 to 65535 have it, and so have
    DICOM files that say a window. For all others give `window`; nothing is guessed. The picture's `info["fga_fast"]`
    says how the values were read.

    Args:
        source: a file; DICOM needs `fga_fast[dicom]`. Or a PIL image, or an array of grey [H, W] or colour [H, W, 3]
            values of any type.
        window: (low, high): these values become black and white, and what is outside is clipped. "auto": percentiles
            0.5 and 99.5 of the picture's values. In units of the file; of a DICOM file after its rescale slope and
            intercept (CT: Hounsfield units), and instead of its own window.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: `source` is none of these.
        ValueError: `window` is none of these.
        ImageFileError: not an image, truncated or damaged, several pages or frames, too large for PIL's
            `Image.MAX_IMAGE_PIXELS` guard, or values without a known range.
    """
    check_window(window)
    if isinstance(source, Image.Image):
        return to_rgb(source, window)
    if isinstance(source, np.ndarray):
        return from_array(source, window)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"image: expected a path, a PIL image or a NumPy array, got {type(source).__name__}")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"image: no file {path}")
    if path.is_dir():
        raise ImageFileError(f"image: {path} is a folder, expected a file; list_images() lists a folder's images")
    try:
        if dicom.is_dicom(path):
            return picture_of(*dicom.read(path, window))
        with Image.open(path) as file:
            check_pages(file, path)
            return to_rgb(file, window, str(path))
    except ImageFileError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageFileError(f"image: {path} is too large: {error}. Scale it down first.") from error
    except UnidentifiedImageError as error:
        raise ImageFileError(
            f"image: {path} is not an image that PIL can read, or its pixels are of a type that PIL does not know "
            "(such as 64-bit floats); what another library reads, load_image takes as an array"
        ) from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        raise ImageFileError(f"image: {path} is truncated or damaged ({type(error).__name__}: {error})") from error


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Image files directly inside `folder`, sorted by name; hidden files are left out.

    Files count by their extension. DICOM files also count without one, since many are named by a number.

    Raises:
        NotADirectoryError: `folder` is no folder.
        ValueError: there is no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"folder: expected a folder of images, got {folder}")
    found = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and _is_image(path))
    if not found:
        raise ValueError(f"folder: no image in {folder}; looked for files ending in {', '.join(EXTENSIONS)}, and DICOM")
    return found


def _is_image(path: Path) -> bool:
    if not path.is_file() or path.name == "DICOMDIR":  # an index of DICOM files
        return False
    try:
        return path.suffix.lower() in EXTENSIONS or dicom.is_dicom(path)
    except OSError:  # a file of another kind that this user may not read
        return False


@dataclass(frozen=True)
class Preprocess:
    """From a picture of any size to a model's input: resize to cover, centre crop, normalise.

    Attributes:
        image_size: (height, width) of the model's input in pixels.
        mean, std: per channel, of values in [0,1]; three numbers for a colour model, one for a grey model.
        crop_pct: the crop's share of the resized picture, in (0,1]; 0.9 resizes the shorter side to 224/0.9 = 248.
        interpolation: "bicubic", "bilinear" or "nearest".
        squash: resize both sides to `image_size`, changing the aspect ratio, and crop nothing.

    Raises:
        ValueError: a field out of its range.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    squash: bool = False

    def __post_init__(self) -> None:
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size: expected (height, width) of at least 1 pixel, got {self.image_size}")
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(
                f"mean, std: expected 1 or 3 numbers each, std above 0, got mean={self.mean}, std={self.std}"
            )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct: expected a number in (0,1], got {self.crop_pct}")
        if self.interpolation not in ("bicubic", "bilinear", "nearest"):
            raise ValueError(f"interpolation: expected bicubic, bilinear or nearest, got {self.interpolation!r}")

    def view(self, image: Image.Image) -> Image.Image:
        """The part of the picture that the model sees: RGB, or grey for a one-channel model, of size `image_size`.

        `image` may be in any mode; it is read as `load_image` reads it, which also takes a window for deep values.

        Raises:
            ImageFileError: values without a known range.
        """
        image = to_rgb(image).convert("RGB" if len(self.mean) == 3 else "L")
        size = self.image_size[1], self.image_size[0]
        # Resize and crop in one step: only the crop's pixels are ever made, so a panorama costs no more than a square.
        return image.resize(size, Image.Resampling[self.interpolation.upper()], box=self.box(image.width, image.height))

    def box(self, across: int, down: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what `view` shows of an upright picture `across` x `down` pixels large."""
        height, width = self.image_size
        if self.squash:
            return 0, 0, across, down
        cover_height, cover_width = floor(height / self.crop_pct), floor(width / self.crop_pct)
        if cover_height * across >= cover_width * down:
            new_height, new_width = cover_height, cover_height * across // down
        else:
            new_height, new_width = cover_width * down // across, cover_width
        top, left = round((new_height - height) / 2), round((new_width - width) / 2)
        step_x, step_y = across / new_width, down / new_height
        right, bottom = min((left + width) * step_x, across), min((top + height) * step_y, down)
        return left * step_x, top * step_y, right, bottom

    def normalise(self, view: Image.Image) -> Tensor:  # -> [channels, H, W]
        """`(value / 255 - mean) / std` of a view's pixels: [channels, H, W] float32."""
        pixels = _pixels(view).permute(2, 0, 1).float() / 255
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def __call__(self, image: Image.Image) -> Tensor:  # -> [channels, H, W]
        """The model's input for one picture: [channels, H, W] float32."""
        return self.normalise(self.view(image))


def as_rgb(image: ImageInput, count: int) -> Tensor:  # -> [count, H, W, 3]
    """`count` pictures in any usual form as [count, H, W, 3] float32 in [0,1].

    Args:
        image: a PIL image or a sequence of them (one size), read as `load_image` reads them; a tensor or array of
            floats in [0,1], [count, 3 or 1, H, W] or [3 or 1, H, W]; or of uint8 in the same layout, for arrays also
            with the channels last, or [H, W].
        count: how many pictures are expected.

    Raises:
        TypeError: none of these forms.
        ValueError: another count, pictures of several sizes, wrong shape, values outside [0,1], not finite or without a
            known range, a file's picture that nobody turned upright.
    """
    if isinstance(image, Image.Image):
        pictures = _pixels(_as_seen(image)).unsqueeze(0)
    elif isinstance(image, Sequence) and all(isinstance(one, Image.Image) for one in image):
        sizes = sorted({one.size for one in image})
        if len(sizes) > 1:
            raise ValueError(f"image: expected pictures of one size, got (width, height) {sizes}; pass their views")
        pixels = [_pixels(_as_seen(one)) for one in image]
        pictures = torch.stack(pixels) if pixels else torch.zeros(0, 1, 1, 3, dtype=torch.uint8, device="cpu")
    elif isinstance(image, Tensor):
        pictures = _channels_last(image.detach(), allow_last=False)
    elif hasattr(image, "__array__"):
        pictures = _channels_last(_tensor(np.asarray(image)), allow_last=True)
    else:
        raise TypeError(
            f"image: expected PIL image(s), a [B,3,H,W] tensor or an [H,W,3] array, got {type(image).__name__}"
        )
    if pictures.shape[0] != count:
        raise ValueError(f"image: expected {count} picture(s), one for each explained image, got {pictures.shape[0]}")
    return pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()


def _as_seen(image: Image.Image) -> Image.Image:
    """RGB of a picture that a model saw; whether it saw a file's rotation applied only the caller knows."""
    if image.format is not None and image.getexif().get(0x0112, 1) != 1:
        raise ValueError(
            "image: its EXIF orientation is not applied, so the map could lie on a turned picture. If the model saw it "
            "upright, as with load_image and Preprocess, pass PIL.ImageOps.exif_transpose(image); if it saw the pixels "
            "as they are stored, as with torchvision, pass numpy.asarray(image)"
        )
    return to_rgb(image, upright=False)


def _pixels(image: Image.Image) -> Tensor:  # -> [H, W, channels]
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, -1)


def _tensor(values: npt.NDArray[Any]) -> Tensor:
    """A copy, since torch takes no array of another byte order, with negative strides or for reading only."""
    if values.dtype.kind not in "buif":
        raise TypeError(f"image: expected an array of numbers, got {values.dtype}")
    return torch.as_tensor(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))


def _channels_last(values: Tensor, allow_last: bool) -> Tensor:  # [(B,) C, H, W] or [(B,) H, W, C] -> [B, H, W, 3]
    shape = tuple(values.shape)
    if values.dtype != torch.uint8 and not values.is_floating_point():
        smallest, largest = limits(values.cpu().numpy(), "the array")
        raise ValueError(
            f"image: expected floats in [0,1] or uint8, got {str(values.dtype).removeprefix('torch.')} values from "
            f"{smallest} to {largest}; pass load_image(array, window), where array is [H,W] or [H,W,3]; {HOW}"
        )
    if values.dim() == 2 and allow_last:
        values = values.unsqueeze(0)
    if values.dim() == 3:
        values = values.unsqueeze(0)
    if values.dim() == 4 and values.shape[1] in (1, 3):
        values = values.permute(0, 2, 3, 1)
    elif not (values.dim() == 4 and allow_last and values.shape[3] in (1, 3)):
        layouts = "[B,3,H,W] or [3,H,W]" + (", channels last, or grey [H,W]" if allow_last else "")
        raise ValueError(f"image: expected {layouts}, got shape {shape}")
    if values.is_floating_point() and values.numel():
        if not bool(values.isfinite().all()):
            raise ValueError("image: expected finite values in [0,1], got NaN or Inf")
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                f"image: expected values in [0,1], got [{float(values.min()):.3g}, {float(values.max()):.3g}]; for a "
                "normalised input pass image * std + mean; for measured values load_image(array, window)"
            )
    return values.expand(*values.shape[:3], 3)
