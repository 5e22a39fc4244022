"""Single-frame DICOM files: stored values, rescaled, through the file's own window or one that is given, to 8 bits.

pydicom does what the standard says; this module refuses what would become a wrong picture without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fga_fast.io.window import HOW, ImageFileError, Window, check_shows, limits, scale, spans, to_eight_bits

if TYPE_CHECKING:
    import numpy.typing as npt

    Values = npt.NDArray[Any]
    Picture = tuple[npt.NDArray[np.uint8], dict[str, Any]]

EXTENSIONS = (".dcm", ".dicom")
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom turns all of them into RGB
_SIXTEEN_BITS = 65535


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its content or its name; many have no extension."""
    if path.suffix.lower() in EXTENSIONS:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read(path: Path, window: Window | None) -> Picture:
    """A DICOM file as [H, W] or [H, W, 3] uint8, black as 0, and how it was read.

    Args:
        path: a file with one frame, grey or RGB/YBR of 8 bits.
        window: in units after rescaling (CT: Hounsfield units); None: the file's own.

    Raises:
        ImageFileError: pydicom is missing; damaged; no picture; several frames; a kind that is not read; compressed so
            that nothing installed decodes it; no window and no range that the values use.
    """
    name = str(path)
    dataset = _parse(path)
    _check(dataset, name)
    stored = _decode(dataset, name)
    facts = {
        "format": "DICOM",
        "mode": stored.dtype.name,
        "frames": 1,
        "modality": str(dataset.get("Modality", "")),
        "intent": str(dataset.get("PresentationIntentType", "")),  # for presentation, or detector data for processing
        "photometric": dataset.PhotometricInterpretation,
        "transfer_syntax": dataset.file_meta.TransferSyntaxUID.name,
    }
    if stored.ndim == 3:
        picture, how = to_eight_bits(stored, window, 255, name)
        return picture, {**facts, **how}
    values, full, rescale = _modality(dataset, stored, name)
    own = None if window is not None else _voi_table(dataset, values, name) or _voi_window(dataset, values, name)
    picture, how = own or to_eight_bits(values, window, full, name, _padding(dataset, stored))
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    return (255 - picture if inverted else picture), {**facts, "rescale": rescale, **how, "inverted": inverted}


def _parse(path: Path) -> Any:
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
        from pydicom.filereader import read_file_meta_info
        from pydicom.pixels import pixel_array  # noqa: F401 - pydicom before 3.0 has none
        from pydicom.uid import DeflatedExplicitVRLittleEndian
    except ImportError as error:
        raise ImageFileError(
            f"image: {path} is a DICOM file, which needs pydicom 3 or newer: pip install 'fga_fast[dicom]'"
        ) from error
    try:
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            # pydicom would inflate it whatever its size.
            raise ImageFileError(
                f"image: {path} is deflated DICOM, which is not read; write it as Explicit VR Little Endian, for "
                "example with dcmconv +te"
            )
        dataset = pydicom.dcmread(path)
    except InvalidDicomError as error:
        raise ImageFileError(f"image: {path} is not a DICOM file: there is no DICM after its preamble") from error
    if not dataset.file_meta.get("TransferSyntaxUID"):
        raise ImageFileError(f"image: {path} does not say its transfer syntax, so its pixels cannot be read for sure")
    # Enhanced objects keep these in functional groups, where pydicom's functions do not look.
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in list(dataset.get(groups) or [])[:1]:
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in list(group.get(macro) or [])[:1]:
                    dataset.update(item)
    return dataset


def _check(dataset: Any, name: str) -> None:
    """Refuses by name what is not read, before its pixels are decoded."""

    def number(keyword: str, default: int = 0) -> int:
        return int(dataset.get(keyword) or default)

    what = getattr(dataset.file_meta.get("MediaStorageSOPClassUID"), "name", "of an unknown class")
    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ImageFileError(f"image: {name} is a DICOM file without a picture ({what})")
    size, frames, samples = (
        number("Rows") * number("Columns"),
        number("NumberOfFrames", 1),
        number("SamplesPerPixel", 1),
    )
    allocated, bits = number("BitsAllocated"), number("BitsStored")
    native = not dataset.file_meta.TransferSyntaxUID.is_encapsulated
    if frames == 1 and native and size > 0 and "PixelData" in dataset:
        frames = max(1, 8 * len(dataset.PixelData) // max(size * samples * allocated, 1))  # more than it says
    if frames != 1:
        raise ImageFileError(
            f"image: {name} has {frames} frames ({what}), expected one picture; take the frame you mean with pydicom "
            "(pydicom.pixels.pixel_array(path, index=0)) and give load_image the array with a window"
        )
    guard = Image.MAX_IMAGE_PIXELS
    if guard is not None and size > 2 * guard:
        raise ImageFileError(
            f"image: {name} is too large: {size} pixels, the limit is {2 * guard}. Scale it down first."
        )
    photometric = str(dataset.get("PhotometricInterpretation", "none"))
    if photometric not in (_GREY if samples == 1 else _COLOUR):
        raise ImageFileError(
            f"image: {name}: photometric interpretation {photometric} with {samples} value(s) a pixel is not read, "
            f"only {', '.join(_GREY)} with one and {', '.join(_COLOUR)} with three; save it as PNG"
        )
    if samples != 1 and (samples != 3 or bits != 8):
        raise ImageFileError(f"image: {name}: {samples} values a pixel of {bits} bits; colour is read with 3 of 8 bits")
    if "PixelData" in dataset and number("HighBit", bits - 1) != bits - 1:
        raise ImageFileError(f"image: {name}: its values do not start at the lowest bit (high bit, retired in DICOM)")
    shape = str(dataset.get("PresentationLUTShape") or "").strip()
    if dataset.get("PresentationLUTSequence") or (shape and (shape == "INVERSE") != (photometric == "MONOCHROME1")):
        raise ImageFileError(
            f"image: {name}: presentation LUT {shape or 'sequence'} with {photometric} leaves open what is white; read "
            "it with pydicom and give load_image the array with a window"
        )


def _decode(dataset: Any, name: str) -> Values:  # -> [H, W] or [H, W, 3]
    """The stored values."""
    from pydicom.pixels import get_decoder, pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise ImageFileError(f"image: {name} is compressed as {syntax.name}, which pydicom does not decode") from error
    if not decoder.is_available:
        raise ImageFileError(_missing(name, decoder))
    try:
        stored = pixel_array(dataset)
    except Exception as error:  # decoders raise many kinds
        if decoder.missing_dependencies:
            raise ImageFileError(f"{_missing(name, decoder)}. What is installed says: {error}") from error
        raise ImageFileError(f"image: {name} is truncated or damaged ({type(error).__name__}: {error})") from error
    if stored.ndim != (2 if int(dataset.get("SamplesPerPixel", 1)) == 1 else 3):
        raise ImageFileError(f"image: {name}: expected one picture, got pixels of shape {stored.shape}")
    if "PixelData" in dataset:
        bits, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation)
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        smallest, largest = limits(stored, name)
        if smallest < least or largest > most:
            raise ImageFileError(
                f"image: {name} holds values from {smallest} to {largest}, which its {bits} stored bits cannot; old "
                "files keep overlays there. Mask them, and give load_image the array with a window"
            )
    return np.asarray(stored)


def _missing(name: str, decoder: Any) -> str:
    return (
        f"image: {name} is compressed as {decoder.UID.name}, which needs one more library, any one of: "
        f"{'; '.join(decoder.missing_dependencies)}. Install one, or write the file without compression"
    )


def _modality(dataset: Any, stored: Values, name: str) -> tuple[Values, int | None, list[float] | str | None]:
    """Values in the modality's units [H, W], what is white by their format, and how they were rescaled."""
    from pydicom.pixels import apply_modality_lut

    if dataset.get("ModalityLUTSequence"):
        first, table, bits = _table(dataset, "ModalityLUTSequence", apply_modality_lut, name)
        return _look_up(stored, first, table), 2**bits - 1, "a modality LUT"
    slope, intercept = (_first(dataset.get(keyword)) for keyword in ("RescaleSlope", "RescaleIntercept"))
    if slope in (None, 1) and intercept in (None, 0):
        return stored, 2 ** int(dataset.BitsStored) - 1 if stored.dtype.kind == "u" else None, None
    dataset.RescaleSlope, dataset.RescaleIntercept = (1 if slope is None else slope), intercept or 0
    if dataset.RescaleSlope == 0:
        raise ImageFileError(f"image: {name}: a rescale slope of 0 makes all its values equal")
    values: Values = apply_modality_lut(stored, dataset)
    numbers = [float(dataset.RescaleSlope), float(dataset.RescaleIntercept)]
    return (values.astype(np.int64) if all(map(float.is_integer, numbers)) else values), None, numbers


def _voi_table(dataset: Any, values: Values, name: str) -> Picture | None:
    """The picture through the file's VOI LUT, if it has one."""
    from pydicom.pixels import apply_voi

    if not dataset.get("VOILUTSequence"):
        return None
    first, table, bits = _table(dataset, "VOILUTSequence", apply_voi, name)
    smallest, largest = limits(values, name)
    if not spans(int(table.min()), int(table.max()), 2**bits - 1):
        raise ImageFileError(
            f"image: {name}: its VOI LUT holds {table.min()} to {table.max()}, a small part of {bits} bits, so what is "
            f"white is not known; its values go from {smallest:g} to {largest:g}; {HOW}"
        )
    picture = scale(_look_up(values, first, table), 0, 2**bits - 1)
    check_shows(picture, smallest, largest, name, "its own VOI LUT")
    of = len(dataset.VOILUTSequence)
    return picture, {
        "values": [smallest, largest],
        "window": [first, first + len(table) - 1],
        "window_from": f"the file: VOI LUT{f', the first of {of}' if of > 1 else ''}",
    }


def _voi_window(dataset: Any, values: Values, name: str) -> Picture | None:
    """The picture through the file's window, if it has one."""
    from pydicom import Dataset
    from pydicom.pixels import apply_windowing

    center, width = (_first(dataset.get(keyword)) for keyword in ("WindowCenter", "WindowWidth"))
    if center is None and width is None:
        return None
    smallest, largest = limits(values, name)
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    known, least = function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"), 1 if function == "LINEAR" else 0
    if center is None or width is None or not known or width < least or width == 0:
        raise ImageFileError(
            f"image: {name}: its own window is not one: centre {center}, width {width}, {function}; its values go from "
            f"{smallest:g} to {largest:g}; {HOW}"
        )
    # pydicom scales to the range of the stored values; asked about 16 bits without rescaling, it is 0 to 65535.
    view = Dataset()
    view.PhotometricInterpretation, view.BitsStored, view.PixelRepresentation = "MONOCHROME2", 16, 0
    view.WindowCenter, view.WindowWidth, view.VOILUTFunction = dataset.WindowCenter, dataset.WindowWidth, function
    with np.errstate(over="ignore"):  # far below a sigmoid's centre
        picture = scale(apply_windowing(values, view), 0, _SIXTEEN_BITS)
    check_shows(picture, smallest, largest, name, f"its own window, centre {center:g} and width {width:g},")
    shift = (
        0.5 if function == "LINEAR" else 0.0
    )  # the standard's LINEAR goes from centre - width/2 to centre + width/2 - 1
    several = getattr(dataset["WindowCenter"], "VM", 1)
    return picture, {
        "values": [smallest, largest],
        "window": [center - shift - (width - 2 * shift) / 2, center - shift + (width - 2 * shift) / 2],
        "window_from": f"the file: centre {center:g}, width {width:g}, {function}"
        f"{f', the first of {several}' if several > 1 else ''}",
    }


def _table(
    dataset: Any, keyword: str, apply: Callable[[Values, Any], Values], name: str
) -> tuple[int, npt.NDArray[np.uint16], int]:
    """A lookup table of the dataset: the value of its first entry, its entries, and their bits."""
    item = dataset[keyword].value[0]
    try:
        entries, first, bits = (int(number) for number in item.LUTDescriptor)
        # pydicom counts entries in the type of their content, so that 8 bits would wrap after 256 of them.
        item.LUTDescriptor = [entries, first, 16]
        entries = entries or 2**16
        table = apply(np.arange(first, first + entries), dataset)
    except Exception as error:  # of tables that are shorter than they say, or no numbers
        raise ImageFileError(f"image: {name}: its {keyword} cannot be read ({error}); {HOW}") from error
    return first, table, bits


def _look_up(values: Values, first: int, table: Values) -> Values:
    return table[np.clip(np.rint(values), first, first + len(table) - 1).astype(np.int64) - first]


def _padding(dataset: Any, stored: Values) -> npt.NDArray[np.bool_] | None:  # [H, W]
    """Which pixels only fill the rectangle around a picture, if the file says."""
    given = (_first(dataset.get(keyword)) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    ends = [end for end in given if end is not None]
    if not ends or "PixelPaddingValue" not in dataset:
        return None
    if stored.dtype.kind == "i":  # often written as if unsigned
        wrap = 2 ** int(dataset.BitsAllocated)
        ends = [end - wrap if end >= wrap // 2 else end for end in ends]
    inside: npt.NDArray[np.bool_] = (stored >= min(ends)) & (stored <= max(ends))
    return inside


def _first(value: Any) -> float | None:
    """The first number of an element that may hold several, or none."""
    if value is None or value == "":
        return None
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        return _first(value[0]) if len(value) else None
    number = float(value)
    return number if isfinite(number) else None
