"""Pixels of more than 8 bits: over the range that their format defines and they use, over a window, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from picture_files import write_png16, write_tiff
from PIL import Image

from fga_fast import Preprocess, load_image
from fga_fast.io.images import as_rgb
from fga_fast.io.window import READ, ImageFileError

Array = npt.NDArray[Any]


def ramp(low: float, high: float, dtype: str, shape: tuple[int, int] = (4, 50)) -> Array:
    return np.linspace(low, high, shape[0] * shape[1]).reshape(shape).astype(dtype)


def grey_of(picture: Image.Image) -> Array:
    pixels = np.asarray(picture)
    assert picture.mode == "RGB"
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def linear(values: Array, low: float, high: float) -> Array:
    share = (values.astype(np.float64) - low) / (high - low)
    return np.floor(share.clip(0, 1) * 255 + 0.5).astype(np.uint8)


CT, TWELVE, FULL = ramp(-1024, 3071, "int16"), ramp(0, 4095, "uint16"), ramp(0, 65535, "uint16")


def write(path: Path, values: Array) -> Path:
    if path.suffix == ".png":
        Image.fromarray(values).save(path)
        return path
    return write_tiff(path, values)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("ct.tif", CT, r"int32 values from -1024 to 3071, and their range is not known"),
        ("ct32.tif", CT.astype("int32"), "-1024 to 3071"),
        ("ct.png", ramp(31744, 35839, "uint16"), "31744 to 35839, a small part of 0 to 65535"),
        ("xray.png", TWELVE, "uint16 values from 0 to 4095, a small part of 0 to 65535"),
        ("xray.tif", TWELVE, "0 to 4095, a small part"),
        ("fourteen.png", ramp(0, 16383, "uint16"), "0 to 16383"),
        ("dark.png", ramp(0, 32767, "uint16"), "0 to 32767"),
        ("long.tif", ramp(0, 4095, "uint32"), "uint32 values from 0 to 4095, a small part of 0 to 4294967295"),
        (
            "float.tif",
            ramp(0, 1, "float32"),
            "float32 values from 0 to 1, and floating-point pixels have no agreed range",
        ),
        ("bytes.tif", ramp(-100, 100, "int8"), "int8 values from -100 to 100"),
    ],
)
def test_values_without_a_range_need_a_window(tmp_path: Path, name: str, values: Array, message: str) -> None:
    path = write(tmp_path / name, values)
    with pytest.raises(ImageFileError, match=f"^image: .*{name} holds .*{message}.*--window LOW HIGH"):
        load_image(path)
    low, high = (float(np.quantile(values, share)) for share in (0.2, 0.7))
    windowed = load_image(path, (low, high))
    assert np.array_equal(grey_of(windowed), linear(values, low, high))
    facts = windowed.info[READ]
    assert facts["window"] == [low, high] and facts["window_from"] == "given"
    assert facts["values"] == [pytest.approx(float(values.min())), pytest.approx(float(values.max()))]
    auto = load_image(path, "auto")
    low, high = np.percentile(values, (0.5, 99.5))
    assert auto.info[READ]["window"] == [pytest.approx(low), pytest.approx(high)]
    assert "percentiles 0.5 and 99.5" in auto.info[READ]["window_from"]
    assert np.array_equal(grey_of(auto), linear(values, *auto.info[READ]["window"]))


@pytest.mark.parametrize("name", ["full.png", "full.tif"])
def test_sixteen_bits_that_use_their_range_have_it(tmp_path: Path, name: str) -> None:
    for values in (FULL, ramp(9000, 60000, "uint16")):
        picture = load_image(write(tmp_path / name, values))
        assert np.array_equal(grey_of(picture), linear(values, 0, 65535))
        assert picture.info[READ]["window"] == [0, 65535]


def test_outliers_do_not_set_an_automatic_window() -> None:
    values = ramp(0, 4000, "uint16", (100, 100))
    values[0, :3] = 65535
    low, high = load_image(values, "auto").info[READ]["window"]
    assert 0 < low < high < 4000
    values[:], values[0, 0] = 7, 9
    assert load_image(values, "auto").info[READ]["window"] == [7, 9]
    values[:] = 7
    with pytest.raises(ImageFileError, match='all values of the array are 7, so window="auto"'):
        load_image(values, "auto")


def test_a_window_beside_the_values_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "xray.png", TWELVE)
    with pytest.raises(ImageFileError, match=r"from -2000 to -1000 shows .*xray\.png as one flat grey.*0 to 4095"):
        load_image(path, (-2000, -1000))


@pytest.mark.parametrize(
    "window",
    [
        "automatic",
        (1,),
        (1, 2, 3),
        (2, 1),
        (1, 1),
        (0, float("nan")),
        (0, float("inf")),
        (-1e308, 1e308),
        5,
        ("a", 1),
        "12",
    ],
)
def test_windows_that_are_none(window: Any) -> None:
    with pytest.raises(ValueError, match=r'^window: expected "auto" or \(low, high\)'):
        load_image(TWELVE, window)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("window", [None, "auto", (0, 1)])
def test_nan_is_refused(tmp_path: Path, wrong: float, window: Any) -> None:
    values = ramp(0, 1, "float32")
    values[1, 2] = wrong
    for source in (values, write_tiff(tmp_path / "nan.tif", values)):
        with pytest.raises(ImageFileError, match="NaN or Inf at 1 of 200 values"):
            load_image(source, window)


def test_white_is_zero_in_deep_tiff(tmp_path: Path) -> None:
    for values, window in ((FULL, None), (ramp(0, 1, "float32"), (0, 1)), (ramp(0, 255, "uint8"), None)):
        black = load_image(write_tiff(tmp_path / "black.tif", values), window)
        white = load_image(write_tiff(tmp_path / "white.tif", values, photometric=0), window)
        assert np.array_equal(grey_of(white), 255 - grey_of(black))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bits_a_channel(tmp_path: Path, channels: int) -> None:
    """PIL keeps the upper half of the bits only, so what is not the whole range has lost its values."""

    def colours(values: Array) -> Array:
        planes = np.stack([values] * channels, axis=-1)
        if channels in (2, 4):
            planes[..., -1], planes[0, 0] = 65535, 65535
            planes[0, 0, -1] = 0  # a white that nobody sees
        return planes

    path = write_png16(tmp_path / "full.png", colours(FULL))
    picture = load_image(path)
    assert picture.info[READ]["window_from"] == "the upper 8 of 16 bits"
    difference = grey_of(picture).astype(int) - linear(FULL, 0, 65535)
    assert abs(difference)[1:].max() <= 1
    path = write_png16(tmp_path / "dark.png", colours(TWELVE))
    for window in (None, "auto", (0, 4095)):
        with pytest.raises(ImageFileError, match=r"16 bits a channel, of which PIL reads the upper 8 only.*0 to 3855"):
            load_image(path, window)  # type: ignore[arg-type]
    assert grey_of(load_image(path, (0, 65535))).max() == (255 if channels in (2, 4) else 15)


def test_sixteen_bit_colour_tiff(tmp_path: Path) -> None:
    planes = np.stack([TWELVE] * 3, axis=-1)
    path = write_tiff(tmp_path / "dark.tif", planes)
    with pytest.raises(ImageFileError, match="PIL reads the upper 8 only"):
        load_image(path)
    assert np.array_equal(grey_of(load_image(planes, (0, 4095))), linear(TWELVE, 0, 4095))  # read by another library


def test_transparent_value_of_deep_grey(tmp_path: Path) -> None:
    image = Image.fromarray(FULL)
    image.save(tmp_path / "clear.png", transparency=int(FULL[0, 0]))
    assert grey_of(load_image(tmp_path / "clear.png"))[0, 0] == 255


def test_several_pages(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "stack.tif", *[ramp(0, 255, "uint8")] * 3)
    with pytest.raises(ImageFileError, match=r"stack\.tif has 3 pages, expected one picture"):
        load_image(path)
    thumbnail = write_tiff(tmp_path / "photo.tif", ramp(0, 255, "uint8"), ramp(0, 255, "uint8", (2, 25)), subfile=1)
    assert load_image(thumbnail).size == (50, 4)
    frames = [Image.new("L", (4, 4), shade) for shade in (0, 100)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "film.gif").info[READ]["frames"] == 2


def test_files_that_declare_their_depth(tmp_path: Path) -> None:
    """PIL stretches the values of PGM by the maximum in its header, so they have a range, but no units for a window."""
    path = tmp_path / "xray.pgm"
    path.write_bytes(b"P5 50 4 4095\n" + TWELVE.astype(">u2").tobytes())
    assert abs(grey_of(load_image(path)).astype(int) - linear(TWELVE, 0, 4095)).max() <= 1
    assert load_image(path, "auto").info[READ]["format"] == "PPM"
    with pytest.raises(ImageFileError, match=r"PIL stretches the values of PPM files.*--window auto"):
        load_image(path, (0, 4095))


def test_colour_models_that_pil_does_not_convert(tmp_path: Path) -> None:
    Image.new("LAB", (3, 3)).save(tmp_path / "lab.tif")
    with pytest.raises(ImageFileError, match=r"lab\.tif is LAB, which PIL does not turn into RGB"):
        load_image(tmp_path / "lab.tif")


def test_arrays() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(load_image(rgb)), rgb)
    assert np.array_equal(np.asarray(load_image(np.flip(rgb, 0))), rgb[::-1])
    assert grey_of(load_image(np.eye(3, dtype=bool))).tolist() == (255 * np.eye(3)).tolist()
    assert np.array_equal(grey_of(load_image(CT.astype(">i2"), (-600, 1500))), linear(CT, -600, 1500))
    with pytest.raises(ImageFileError, match=r"the array holds int16 values from -1024 to 3071"):
        load_image(CT)
    with pytest.raises(ImageFileError, match=r"grey \[H,W\] or colour \[H,W,3\], got uint8 \(3, 4, 5\)"):
        load_image(rgb.transpose(2, 0, 1))
    with pytest.raises(TypeError, match=r"expected a path, a PIL image or a NumPy array, got Tensor"):
        load_image(torch.zeros(3, 3))  # type: ignore[arg-type]


def test_file_preprocessing_and_overlay_agree(tmp_path: Path) -> None:
    """A PIL image that a user opens is read, or refused, like its file; and so is one that an overlay gets."""
    preprocess = Preprocess((4, 50), mean=(0.5,), std=(0.5,), squash=True)
    for name, values in (("full.png", FULL), ("xray.png", TWELVE), ("float.tif", ramp(0, 5, "float32"))):
        path = write(tmp_path / name, values)
        if name == "full.png":
            read = load_image(path)
            assert np.array_equal(np.asarray(preprocess.view(Image.open(path))), grey_of(read))
            assert torch.equal(as_rgb(Image.open(path), 1), as_rgb(read, 1))
            continue
        for use in (load_image, preprocess, preprocess.view, lambda image: as_rgb(image, 1)):
            with pytest.raises(ImageFileError, match=r"holds .* values from 0 to"):
                use(Image.open(path))  # type: ignore[operator]
        view = preprocess.view(load_image(path, "auto"))
        assert view.info[READ]["window_from"].startswith("auto")
        assert np.asarray(view).max() == 255
    clear = Image.new("RGBA", (50, 4), (0, 0, 0, 0))
    assert np.asarray(preprocess.view(clear)).min() == 255
    assert float(as_rgb(clear, 1).min()) == 1


def test_rotation_is_applied_or_asked_about(tmp_path: Path) -> None:
    picture = Image.fromarray(ramp(0, 255, "uint8"))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").size == (4, 50)
    upright = Preprocess((50, 4), squash=True).view(Image.open(tmp_path / "turned.png"))
    assert np.array_equal(np.asarray(upright), np.asarray(load_image(tmp_path / "turned.png")))
    with pytest.raises(ValueError, match="EXIF orientation is not applied"):
        as_rgb(Image.open(tmp_path / "turned.png"), 1)
    assert as_rgb(upright, 1).shape == (1, 50, 4, 3)
    assert as_rgb(Image.open(tmp_path / "turned.png").resize((10, 4)), 1).shape == (
        1,
        4,
        10,
        3,
    )  # a view, as it was seen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (CT, r"int16 values from -1024 to 3071; pass load_image\(array, window\)"),
        (TWELVE, "uint16 values from 0 to 4095"),
        (torch.full((3, 4, 4), 1000, dtype=torch.int32), "int32 values from 1000 to 1000"),
        (np.full((4, 4), np.nan), "got NaN or Inf"),
        (CT.astype("float32"), r"expected values in \[0,1\], got \[-1.02e\+03.*load_image\(array, window\)"),
    ],
)
def test_overlays_refuse_arrays_without_a_range(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_rgb(given, 1)


def test_overlays_take_every_layout_of_an_array() -> None:
    grey = ramp(0, 255, "uint8")
    want = as_rgb(load_image(grey), 1)
    share = grey / np.float64(255)
    for given in (grey, np.flip(np.flip(grey, 1).copy(), 1), share, share.astype(">f4"), np.asarray(load_image(grey))):
        torch.testing.assert_close(as_rgb(given, 1), want)
    with pytest.raises(TypeError, match="expected an array of numbers, got object"):
        as_rgb(np.array([[None]]), 1)
