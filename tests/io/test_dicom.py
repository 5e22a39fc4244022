"""DICOM files, written and read with the real pydicom: the right grey values, or a refusal by name."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from picture_files import write_dicom as write
from PIL import Image

from fga_fast import load_image
from fga_fast.io.images import list_images
from fga_fast.io.window import READ, ImageFileError

Array = npt.NDArray[Any]
RAMP = np.arange(200, dtype=np.int64).reshape(10, 20)
BASELINE, LOSSLESS, DEFLATED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.1.99"
CT = "1.2.840.10008.5.1.4.1.1.2"


def sequence(**elements: Any) -> Any:
    pydicom = pytest.importorskip("pydicom")
    item = pydicom.Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return pydicom.Sequence([item])


def grey_of(path: Path, window: Any = None) -> Array:
    pixels = np.asarray(load_image(path, window))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].astype(int)


def bytes_of(share: Array) -> Array:
    return np.floor(share.clip(0, 1) * 255 + 0.5).astype(int)


def test_chest_xray(tmp_path: Path) -> None:
    """12 bits in 16, with the window of the file by the standard's formula, PS3.3 C.11.2.1.2.1."""
    stored = (RAMP * 20).astype("uint16")
    path = write(tmp_path / "cxr.dcm", stored, bits=12, WindowCenter=[2000, 1], WindowWidth=[1000, 1])
    assert np.array_equal(grey_of(path), bytes_of((stored - 1999.5) / 999 + 0.5))
    facts = load_image(path).info[READ]
    assert facts["window"] == [1500, 2499] and facts["values"] == [0, 3980]
    assert facts["window_from"] == "the file: centre 2000, width 1000, LINEAR, the first of 2"
    assert (facts["format"], facts["photometric"], facts["modality"]) == ("DICOM", "MONOCHROME2", "DX")
    inverted = write(tmp_path / "m1.dcm", stored, bits=12, WindowCenter=2000, WindowWidth=1000,
                     PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE")  # fmt: skip
    assert np.array_equal(grey_of(inverted), 255 - grey_of(path))
    assert load_image(inverted).info[READ]["inverted"] is True
    assert np.array_equal(grey_of(inverted, (500, 3500)), 255 - bytes_of((stored - 500.0) / 3000))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_functions(tmp_path: Path, function: str) -> None:
    stored = (RAMP * 20).astype("uint16")
    path = write(tmp_path / "a.dcm", stored, WindowCenter=1000, WindowWidth=600, VOILUTFunction=function)
    exact = {
        "LINEAR": (stored - 999.5) / 599 + 0.5,
        "LINEAR_EXACT": (stored - 1000.0) / 600 + 0.5,
        "SIGMOID": 1 / (1 + np.exp(-4 * (stored - 1000.0) / 600)),
    }
    assert abs(grey_of(path) - bytes_of(exact[function])).max() == 0
    assert function in load_image(path).info[READ]["window_from"]


def test_hounsfield_units(tmp_path: Path) -> None:
    """A given window is in rescaled units, negative ones too, and replaces that of the file."""
    stored = (RAMP * 20).astype("uint16")
    scaled = {"RescaleSlope": 1, "RescaleIntercept": -1024, "sop": CT, "Modality": "CT"}
    path = write(tmp_path / "ct.dcm", stored, **scaled)
    with pytest.raises(
        ImageFileError, match=r"ct\.dcm holds int64 values from -1024 to 2956, .*not known; give window"
    ):
        load_image(path)
    assert np.array_equal(grey_of(path, (-600, 1500)), bytes_of((stored - 424.0) / 2100))
    assert load_image(path, (-600, 1500)).info[READ]["rescale"] == [1, -1024]
    own = write(tmp_path / "own.dcm", stored, WindowCenter=40, WindowWidth=400, **scaled)
    assert np.array_equal(grey_of(own), bytes_of((stored - 1063.5) / 399 + 0.5))
    assert np.array_equal(grey_of(own, (-600, 1500)), grey_of(path, (-600, 1500)))
    signed = write(tmp_path / "signed.dcm", (stored.astype("int16") - 1024), sop=CT)
    assert np.array_equal(grey_of(signed, (-600, 1500)), grey_of(path, (-600, 1500)))
    half = write(tmp_path / "half.dcm", stored, RescaleSlope=0.5, RescaleIntercept=None)
    assert load_image(half, "auto").info[READ]["values"] == [0, 1990]
    with pytest.raises(ImageFileError, match="rescale slope of 0"):
        load_image(write(tmp_path / "zero.dcm", stored, RescaleSlope=0, RescaleIntercept=5))


def test_padding_does_not_set_an_automatic_window(tmp_path: Path) -> None:
    stored = (RAMP * 4).astype("int16")
    stored[:3] = -2000
    for padding in (-2000, 63536):  # as it is often written
        path = write(tmp_path / "ct.dcm", stored, PixelPaddingValue=None)
        dataset = pytest.importorskip("pydicom").dcmread(path)
        dataset.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
        dataset.save_as(path)
        facts = load_image(path, "auto").info[READ]
        assert facts["values"] == [240, 796] and facts["window"][0] > 240


def test_no_window_in_the_file(tmp_path: Path) -> None:
    eight = write(tmp_path / "eight.dcm", RAMP.astype("uint8"))
    assert np.array_equal(grey_of(eight), RAMP)
    twelve = (RAMP * 20).astype("uint16")
    assert np.array_equal(grey_of(write(tmp_path / "full.dcm", twelve, bits=12)), bytes_of(twelve / 4095))
    with pytest.raises(ImageFileError, match="uint16 values from 0 to 3980, a small part of 0 to 65535"):
        load_image(write(tmp_path / "wide.dcm", twelve, WindowCenter="", WindowWidth=""))
    with pytest.raises(ImageFileError, match="int16 values from 0 to 3980, and their range is not known"):
        load_image(write(tmp_path / "signed.dcm", twelve.astype("int16"), bits=13))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lookup_tables(tmp_path: Path, bits: int) -> None:
    """VOI LUT, before a window that is there too; 8 bits of content for 4,096 entries."""
    stored, top = (RAMP * 20).astype("uint16"), 2**bits - 1
    content = [round(top * (entry / 3999) ** 2) for entry in range(4000)]
    table = sequence(LUTDescriptor=[4000, 0, bits], LUTData=np.array(content, "<u2").tobytes())
    path = write(tmp_path / "voi.dcm", stored, bits=12, VOILUTSequence=table, WindowCenter=5, WindowWidth=5)
    assert np.array_equal(grey_of(path), bytes_of(np.array(content)[stored] / top))
    assert load_image(path).info[READ]["window_from"] == "the file: VOI LUT"
    assert np.array_equal(grey_of(path, (0, 4000)), bytes_of(stored / 4000))
    path = write(tmp_path / "modality.dcm", stored, bits=12, ModalityLUTSequence=table)
    assert np.array_equal(grey_of(path), bytes_of(np.array(content)[stored] / top))
    assert load_image(path).info[READ]["rescale"] == "a modality LUT"


def test_tables_that_are_wrong(tmp_path: Path) -> None:
    stored = (RAMP * 20).astype("uint16")
    dim = sequence(LUTDescriptor=[4000, 0, 16], LUTData=np.arange(4000, dtype="<u2").tobytes())
    with pytest.raises(ImageFileError, match=r"VOI LUT holds 0 to 3999, a small part of 16 bits.*give window"):
        load_image(write(tmp_path / "dim.dcm", stored, bits=12, VOILUTSequence=dim))
    short = sequence(LUTDescriptor=[4000, 0, 16], LUTData=bytes(4))
    with pytest.raises(ImageFileError, match="its VOILUTSequence cannot be read"):
        load_image(write(tmp_path / "short.dcm", stored, bits=12, VOILUTSequence=short))


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"WindowCenter": 40, "WindowWidth": 0}, r"its own window is not one: centre 40.*width 0.*give window"),
        ({"WindowCenter": 40, "WindowWidth": None}, "its own window is not one"),
        ({"WindowCenter": 40, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "CUBIC"),
        (
            {"WindowCenter": -5000, "WindowWidth": 10},
            r"its own window, centre -5000 and width 10, shows .* one flat grey",
        ),
    ],
)
def test_windows_that_show_nothing(tmp_path: Path, elements: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageFileError, match=message):
        load_image(write(tmp_path / "a.dcm", (RAMP * 20).astype("uint16"), **elements))


def test_enhanced_files_keep_their_numbers_in_groups(tmp_path: Path) -> None:
    stored = (RAMP * 20).astype("uint16")
    shared = sequence(PixelValueTransformationSequence=sequence(RescaleSlope=1, RescaleIntercept=-1024))
    frame = sequence(FrameVOILUTSequence=sequence(WindowCenter=40, WindowWidth=400))
    path = write(
        tmp_path / "enhanced.dcm", stored, NumberOfFrames=1, SharedFunctionalGroupsSequence=shared,
        PerFrameFunctionalGroupsSequence=frame,
    )  # fmt: skip
    assert np.array_equal(grey_of(path), bytes_of((stored - 1063.5) / 399 + 0.5))


def test_colour(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(load_image(write(tmp_path / "rgb.dcm", rgb))), rgb)
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    read = np.asarray(load_image(write(tmp_path / "ybr.dcm", ybr, PhotometricInterpretation="YBR_FULL")))
    assert abs(read.astype(int) - rgb).max() <= 3
    photo = Image.new("RGB", (16, 16), (200, 80, 40))
    for name in ("YBR_FULL_422", "RGB"):
        buffer = BytesIO()
        photo.save(buffer, "JPEG", quality=95, subsampling="4:2:2" if name != "RGB" else "4:4:4")
        path = write(
            tmp_path / "photo.dcm",
            buffer.getvalue(),
            (16, 16, 3),
            syntax=BASELINE,
            PhotometricInterpretation="YBR_FULL_422",
        )
        assert abs(np.asarray(load_image(path)).astype(int) - (200, 80, 40)).max() <= 3


@pytest.mark.parametrize(
    ("pixels", "elements", "message"),
    [
        (np.zeros((3, 10, 20), "uint8"), {"Rows": 10, "Columns": 20, "NumberOfFrames": 3, "SamplesPerPixel": 1,
         "PhotometricInterpretation": "MONOCHROME2"}, "has 3 frames .*expected one picture"),
        (np.zeros((3, 10, 20), "uint8"), {"Rows": 10, "Columns": 20, "SamplesPerPixel": 1,
         "PhotometricInterpretation": "MONOCHROME2"}, "has 3 frames"),  # it does not say so
        (RAMP.astype("uint8"), {"PhotometricInterpretation": "PALETTE COLOR"}, "interpretation PALETTE COLOR with 1"),
        (np.zeros((4, 4, 3), "uint8"), {"PhotometricInterpretation": "HSV"}, "interpretation HSV with 3"),
        (np.zeros((4, 4, 3), "uint16"), {}, "3 values a pixel of 16 bits"),
        (RAMP.astype("uint16"), {"bits": 12, "HighBit": 15}, "do not start at the lowest bit"),
        (RAMP.astype("uint8"), {"PresentationLUTShape": "INVERSE"}, "presentation LUT INVERSE with MONOCHROME2"),
        (RAMP.astype("uint8"), {"PixelData": None}, "without a picture .Digital X-Ray Image Storage"),
        (RAMP.astype("uint8"), {"PixelData": bytes(100)}, "truncated or damaged"),
        (RAMP.astype("uint8"), {"PhotometricInterpretation": None}, "interpretation none"),
    ],
)  # fmt: skip
def test_refused_by_name(tmp_path: Path, pixels: Array, elements: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.dcm", pixels, **elements)
    for window in (None, (0, 100)):
        with pytest.raises(ImageFileError, match=rf"^image: .*a\.dcm.*{message}"):
            load_image(path, window)


def test_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoders = pytest.importorskip("pydicom.pixels.decoders.base")
    path = write(tmp_path / "a.dcm", b"\xff\xd8\xff\xd9", (4, 4), syntax=LOSSLESS)
    monkeypatch.setattr(decoders.get_decoder(LOSSLESS), "_available", {})  # on a machine that has pylibjpeg
    monkeypatch.setattr(
        decoders.get_decoder(LOSSLESS), "_unavailable", {"pylibjpeg": ("pylibjpeg", "pylibjpeg-libjpeg")}
    )
    with pytest.raises(ImageFileError, match=r"compressed as JPEG Lossless.*needs one more library.*pylibjpeg-libjpeg"):
        load_image(path)
    path = write(tmp_path / "film.dcm", b"\0" * 8, (4, 4), syntax="1.2.840.10008.1.2.4.100")
    with pytest.raises(ImageFileError, match=r"compressed as MPEG2.*which pydicom does not decode"):
        load_image(path)
    path = write(tmp_path / "damaged.dcm", b"\xff\xd8\xff\xd9", (4, 4), syntax=BASELINE)
    with pytest.raises(ImageFileError, match=r"damaged\.dcm"):
        load_image(path)


def test_untrusted_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pydicom = pytest.importorskip("pydicom")
    deflated = write(tmp_path / "deflated.dcm", np.zeros((9, 9), "uint8"), syntax=DEFLATED)
    large = write(tmp_path / "large.dcm", np.zeros((40, 40), "uint8"))
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(large.read_bytes()[:400])

    def forbid(*_: object, **__: object) -> None:
        raise AssertionError("was inflated or decoded")

    monkeypatch.setattr("zlib.decompress", forbid)
    monkeypatch.setattr(pydicom.pixels, "pixel_array", forbid)
    with pytest.raises(ImageFileError, match="is deflated DICOM"):
        load_image(deflated)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageFileError, match="too large: 1600 pixels, the limit is 200"):
        load_image(large)
    monkeypatch.undo()
    (tmp_path / "text.dcm").write_text("no picture")
    for path, message in ((cut, r"cut\.dcm"), (tmp_path / "text.dcm", "is not a DICOM file")):
        with pytest.raises(ImageFileError, match=message):
            load_image(path)


def test_names_without_an_extension(tmp_path: Path) -> None:
    write(tmp_path / "1.2.840.77", RAMP.astype("uint8"))
    write(tmp_path / "DICOMDIR", RAMP.astype("uint8"))
    (tmp_path / "notes").write_text("no picture")
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    assert [path.name for path in list_images(tmp_path)] == ["1.2.840.77", "a.png"]
    assert np.array_equal(grey_of(tmp_path / "1.2.840.77"), RAMP)


def test_files_that_may_not_be_read_are_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "secret").write_text("")

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    assert [path.name for path in list_images(tmp_path)] == ["a.png"]


def test_without_pydicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs no pydicom: the file says what it is by its first bytes, or by its name."""
    monkeypatch.setitem(sys.modules, "pydicom", None)
    (tmp_path / "scan").write_bytes(bytes(128) + b"DICM" + bytes(50))
    (tmp_path / "scan.dcm").write_bytes(b"")
    for name in ("scan", "scan.dcm"):
        with pytest.raises(
            ImageFileError, match=r"is a DICOM file, which needs pydicom.*pip install 'fga_fast\[dicom\]'"
        ):
            load_image(tmp_path / name)
