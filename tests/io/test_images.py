"""Image files of every kind become what the model sees, and broken ones an error that says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fga_fast.io.images import ImageFileError, Preprocess, as_rgb, list_images, load_image

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), RED)
    picture.paste(GREEN, (0, 0, 40, 10))  # green above red as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated by 90 degrees clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((19, 20)) == GREEN  # the stored top is now on the right
    assert upright.getpixel((0, 20)) == RED


def test_transparency_becomes_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    picture.putpixel((0, 0), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 128))
    picture.save(tmp_path / "rgba.png")
    loaded = load_image(tmp_path / "rgba.png")
    assert loaded.mode == "RGB"
    assert [loaded.getpixel((x, 0)) for x in (0, 2)] == [WHITE, RED]
    assert loaded.getpixel((1, 0)) == (127, 127, 127)

    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "palette.png", transparency=0)
    loaded = load_image(tmp_path / "palette.png")
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, RED]
    Image.new("LA", (3, 3), (10, 0)).save(tmp_path / "la.png")
    assert load_image(tmp_path / "la.png").getpixel((1, 1)) == WHITE


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "YCbCr") else "picture.png")
    gradient().convert("L").convert("RGB").convert(mode).save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    assert loaded.size == (40, 30)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    loaded = load_image(tmp_path / "deep.png")
    assert [loaded.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageFileError, match="floating-point"):
        load_image(tmp_path / "float.tif")


@pytest.mark.parametrize("extension", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_file(tmp_path: Path, extension: str, share: float) -> None:
    path = tmp_path / f"cut.{extension}"
    gradient(200, 200).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageFileError, match=r"cut\.\w+ is truncated or damaged"):
        load_image(path)


@pytest.mark.parametrize("content", [b"no picture", b""])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.png").write_bytes(content)
    with pytest.raises(ImageFileError, match="not an image"):
        load_image(tmp_path / "notes.png")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ImageFileError, match="is a folder"):
        load_image(tmp_path)


def test_decompression_bomb_guard_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient(40, 30).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageFileError, match="too large"):
        load_image(tmp_path / "large.png")


def test_folder_listing(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.JPG"]


def test_folder_listing_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no image in .*\.jpeg"):
        list_images(tmp_path)
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        list_images(tmp_path / "none")


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64), (50, 400), (31, 33)])
@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
def test_preprocessing_is_that_of_timm(size: tuple[int, int], crop_pct: float) -> None:
    data = pytest.importorskip("timm.data")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    theirs = data.create_transform((3, 64, 64), mean=mean, std=std, crop_pct=crop_pct, interpolation="bicubic")
    ours = Preprocess((64, 64), mean, std, crop_pct)
    # Away from black and white, where PIL clips between its two passes, whose order depends on the sizes.
    picture = gradient(*size).point(lambda value: 64 + value // 2)
    # One or two of 255 levels: intermediate results are rounded to bytes.
    torch.testing.assert_close(ours(picture), theirs(picture), rtol=0, atol=2.01 / 255 / 0.2)
    assert (ours(picture) - theirs(picture)).abs().mean() < 0.3 / 255 / 0.2


def test_preprocessing_values_and_shapes() -> None:
    one_channel = Preprocess((4, 6), mean=(0.5,), std=(0.25,))
    assert one_channel(Image.new("RGB", (60, 40), WHITE)).tolist() == torch.full((1, 4, 6), 2.0).tolist()
    assert Preprocess((8, 8), squash=True).view(gradient(80, 20)).size == (8, 8)
    halves = Image.new("RGB", (40, 10), RED)
    halves.paste(GREEN, (15, 0, 25, 10))
    assert np.asarray(Preprocess((10, 10)).view(halves)).tolist() == np.full((10, 10, 3), GREEN).tolist()


def test_extreme_panorama_costs_no_more_than_its_crop() -> None:
    assert Preprocess((224, 224))(Image.new("RGB", (60000, 2))).shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"image_size": (0, 4)}, "image_size"),
        ({"mean": (0.1, 0.2)}, "mean, std"),
        ({"std": (0.0, 1.0, 1.0)}, "mean, std"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"interpolation": "lanczos"}, "interpolation"),
    ],
)
def test_preprocess_refuses(settings: dict[str, object], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        Preprocess(**({"image_size": (4, 4)} | settings))  # type: ignore[arg-type]


def test_as_rgb_takes_every_usual_form() -> None:
    picture = gradient(5, 4)
    expected = torch.from_numpy(np.array(picture)).float()[None] / 255
    last = np.array(picture)
    first = torch.from_numpy(last).permute(2, 0, 1)
    forms = (picture, [picture], (picture,), last, last[None], first, first[None], first.float() / 255, last / 255.0)
    for given in forms:
        torch.testing.assert_close(as_rgb(given, 1), expected)
    assert as_rgb(torch.full((2, 1, 3, 3), 0.5), 2).shape == (2, 3, 3, 3)
    assert as_rgb([], 0).shape[0] == 0


@pytest.mark.parametrize(
    ("given", "count", "message"),
    [
        ("picture.png", 1, "expected PIL image.* got str"),
        (torch.zeros(3, 4, 4), 2, r"expected 2 picture\(s\).*got 1"),
        (torch.zeros(2, 4, 4), 1, r"expected \[B,3,H,W\].*\(2, 4, 4\)"),
        (torch.zeros(4, 4, 3), 1, r"expected \[B,3,H,W\]"),
        (torch.full((3, 4, 4), 1.5), 1, r"image \* std \+ mean"),
        (torch.full((3, 4, 4), torch.nan), 1, r"values in \[0,1\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), 1, "uint8"),
        ([Image.new("RGB", (2, 2)), Image.new("RGB", (2, 3))], 2, "of one size"),
    ],
)
def test_as_rgb_refuses(given: object, count: int, message: str) -> None:
    with pytest.raises(TypeError if isinstance(given, str) else ValueError, match=message):
        as_rgb(given, count)  # type: ignore[arg-type]
