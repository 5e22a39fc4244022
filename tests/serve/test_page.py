"""The page of `fga-fast serve` in a browser, with the shipped demo."""

from __future__ import annotations

import io
import json
import re
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from page_visits import Visit, demo_explainer, explained, pixels, preprocess, served, upload
from PIL import Image, ImageDraw, ImageOps

from fga_fast import Explainer
from fga_fast.assets import fashion_config, fashion_model, fashion_scenes
from fga_fast.io.images import load_image
from fga_fast.result import colours
from fga_fast.result.heatmap import to_picture
from fga_fast.serve.engine import Engine, Picture

expect = pytest.importorskip("playwright.sync_api").expect
serving = pytest.importorskip("serving")


# a picture, and what is asked of it


def test_a_scene_is_uploaded_and_another_class_explained(demo: str, visit: Visit) -> None:
    scene, names = fashion_scenes()[0], fashion_config().class_names
    answer = explained(scene)
    likeliest = names[int(answer.targets)]
    with visit(demo) as page:
        expect(page.locator("#about")).to_contain_text("demo")
        upload(page, scene)
        expect(page.locator("#why")).to_have_text(f"Why {likeliest}?")
        place = int(answer.relevance.argmax())
        expect(page.locator("#said")).to_contain_text(f"row {place // 8 + 1}, column {place % 8 + 1}")
        expect(page.locator("#said")).to_contain_text("%")
        expect(page.locator("#map-title")).to_have_text("Relevance")
        assert {"decode", "queue", "explain", "pack", "total"} <= set(page.locator("#stages dt").all_inner_texts())
        listed = page.locator("#classes .name").all_inner_texts()
        order = answer.logits[0].argsort(descending=True).tolist()
        assert [re.sub("^▸ ", "", name) for name in listed] == [names[index] for index in order]
        before = pixels(page.locator("#map canvas"))

        other = names[order[3]]
        button = page.locator("#classes .explain", has_text=other)
        button.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#why")).to_have_text(f"Why {other}?")
        expect(button).to_be_focused()
        expect(button).to_have_attribute("aria-pressed", "true")
        assert (pixels(page.locator("#map canvas")) != before).mean() > 0.1
        page.locator("#likeliest").click()
        expect(page.locator("#why")).to_have_text(f"Why {likeliest}?")
        assert np.array_equal(pixels(page.locator("#map canvas")), before)


def test_why_this_class_and_not_that_one(demo: str, visit: Visit) -> None:
    names = fashion_config().class_names
    with visit(demo) as page:
        page.locator("#samples button").first.click()
        expect(page.locator("#shown")).to_be_visible()
        first, second, third = explained(fashion_scenes()[0]).logits[0].argsort(descending=True)[:3].tolist()
        page.get_by_role("button", name=f"Not this? Why {names[first]} and not {names[second]}?").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#why")).to_have_text(f"Why {names[first]} and not {names[second]}?")
        page.locator("#classes .explain", has_text=names[third]).click(modifiers=["Shift"])
        expect(page.locator("#why")).to_have_text(f"Why {names[first]} and not {names[third]}?")
        expect(page.locator("#said")).to_contain_text("The outputs differ by")
        page.locator("#plain").click()
        expect(page.locator("#why")).to_have_text(f"Why {names[first]}?")
        expect(page.locator("#plain")).to_be_hidden()


def test_classes_are_searched_by_words(demo: str, visit: Visit) -> None:
    with visit(demo) as page:
        upload(page, fashion_scenes()[1])
        page.locator("#search").fill("boot ank")
        expect(page.locator("#classes li")).to_have_count(1)
        expect(page.locator("#classes .name")).to_contain_text("Ankle boot")
        page.locator("#search").fill("zebra")
        expect(page.locator("#classes-shown")).to_have_text("None found")


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(way: str, demo: str, visit: Visit) -> None:
    event = {"paste": "ClipboardEvent", "drop": "DragEvent"}[way]
    with visit(demo) as page:
        page.evaluate(
            """async ([event, way]) => {
              const blob = await (await fetch("v1/samples/scene_1.png")).blob();
              const transfer = new DataTransfer();
              transfer.items.add(new File([blob], "x.png", { type: "image/png" }));
              const settings = { bubbles: true, clipboardData: transfer, dataTransfer: transfer };
              document.body.dispatchEvent(new window[event](way, settings));
            }""",
            [event, way],
        )
        answer = explained(fashion_scenes()[1])
        expect(page.locator("#why")).to_have_text(f"Why {fashion_config().class_names[int(answer.targets)]}?")


def test_formats_that_only_the_browser_knows_are_sent_as_png(demo: str, visit: Visit) -> None:
    data = serving.encoded(Image.open(fashion_scenes()[1]).convert("RGB"), "BMP")
    answer = explained(fashion_scenes()[1])
    with visit(demo) as page:
        upload(page, {"name": "x.bmp", "mimeType": "image/bmp", "buffer": data})
        expect(page.locator("#why")).to_have_text(f"Why {fashion_config().class_names[int(answer.targets)]}?")


def test_webcam_frames_arrive_and_follow_the_question(demo: str, visit: Visit) -> None:
    with visit(demo) as page:
        page.locator("#webcam").click()
        expect(page.locator("#pace")).to_have_text(re.compile(r"[1-9][\d.]* frames/s · [\d.]+ ms from camera to map"))
        expect(page.locator("#said")).to_contain_text("Webcam:")
        page.wait_for_function("() => Number(document.querySelector('#pace').textContent.match(/of (\\d+)/)[1]) > 12")
        button = page.locator("#classes .explain", has_text="Sandal")
        button.click()
        expect(page.locator("#why")).to_have_text("Why Sandal?")
        assert pixels(page.locator("#map canvas")).std() > 5
        page.locator("#webcam").click()
        expect(page.locator("#webcam")).to_have_text("Start the webcam")
        expect(page.locator("#pace")).to_be_hidden()
        before = pixels(page.locator("#map canvas"))
        page.wait_for_timeout(200)
        assert np.array_equal(pixels(page.locator("#map canvas")), before)
        page.locator("#classes .explain", has_text="Bag").click()  # of the last frame
        expect(page.locator("#why")).to_have_text("Why Bag?")
        expect(page.locator("#patch-facts")).not_to_contain_text("feature")
        page.locator("#map").focus()
        expect(page.locator("#patch-facts")).to_contain_text("feature")


class Recording(Engine):
    """Keeps the frames that it explains."""

    frames: ClassVar[list[bytes]] = []

    def decode(self, data: bytes) -> Picture:
        self.frames.append(data)
        return super().decode(data)


def test_a_frames_map_lies_on_that_frame(visit: Visit) -> None:
    explainer = demo_explainer()
    with served(Recording(explainer, preprocess())) as url, visit(url, accept_downloads=True) as page:
        page.locator("#webcam").click()
        page.wait_for_function("() => Number(document.querySelector('#pace').textContent.match(/of (\\d+)/)?.[1]) > 8")
        page.locator("#webcam").click()
        page.locator("#opacity").fill("0")
        with page.expect_download() as numbers:
            page.locator("#save-json").click()
        logits = json.loads(numbers.value.path().read_text(encoding="utf-8"))["logits"]
        shown = pixels(page.locator("#map canvas"))[..., :3].astype(int)
    frames = [Image.open(io.BytesIO(data)) for data in Recording.frames]
    assert len(frames) > 2
    away = [
        np.abs(shown - np.asarray(ImageOps.fit(frame, shown.shape[1::-1], Image.Resampling.BILINEAR))).mean()
        for frame in frames
    ]
    again = explainer(torch.stack([preprocess()(frame) for frame in frames])).logits
    apart = (again - torch.tensor(logits)).abs().amax(-1)
    assert int(np.argmin(away)) == int(apart.argmin())
    assert min(away) < 3
    assert apart.min() < 1e-3


# what is shown


def test_opacity_and_colours_need_no_server(demo: str, visit: Visit) -> None:
    scene = fashion_scenes()[2]
    with visit(demo) as page:
        upload(page, scene)
        expect(page.locator("#ungated")).to_be_visible()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        canvas = page.locator("#map canvas")
        before = pixels(canvas)
        page.locator("#colours").select_option("magma")
        assert (pixels(canvas) != before).mean() > 0.3
        page.locator("#opacity").fill("1")
        heat = to_picture(explained(scene).relevance, (8, 8), canvas_size(canvas), centred=True)[0]
        wanted = 255 * colours.apply_colormap(heat, "magma")
        assert np.abs(pixels(canvas)[..., :3] - wanted.numpy()).max() <= 4
        # Diverging colours cover the picture from half of the largest relevance on, and let it through at 0.
        page.locator("#colours").select_option("diverging")
        much, nothing = ((heat - 0.5).abs() >= 0.25).numpy(), ((heat - 0.5).abs() < 2e-3).numpy()
        wanted = 255 * colours.apply_colormap(heat, "diverging")
        assert much.any() and np.abs(pixels(canvas)[much][:, :3] - wanted.numpy()[much]).max() <= 4
        view = preprocess().view(load_image(scene)).convert("L")
        grey = np.asarray(view.resize(canvas_size(canvas)[::-1], Image.Resampling.BILINEAR))
        assert nothing.any() and np.abs(pixels(canvas)[nothing][:, 0].astype(int) - grey[nothing]).mean() < 8
        page.locator("#opacity").fill("0")
        seen = preprocess().view(load_image(scene)).resize(canvas_size(canvas)[::-1], Image.Resampling.BILINEAR)
        assert np.abs(pixels(canvas)[..., :3].astype(int) - np.asarray(seen)).mean() < 6
        assert asked == []


def canvas_size(canvas: Any) -> tuple[int, int]:
    height, width, _ = pixels(canvas).shape
    return height, width


@pytest.mark.parametrize("turned", [False, True])
def test_the_map_lies_on_the_part_that_the_model_sees(turned: bool, plain: str, visit: Visit) -> None:
    picture = Image.new("RGB", (160, 80), "lime")
    ImageDraw.Draw(picture).rectangle((60, 20, 79, 59), fill="red")
    ImageDraw.Draw(picture).rectangle((80, 20, 99, 59), fill="blue")
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6  # the reader turns the pixels by 90 degrees, so they are stored turned the other way
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    with visit(plain) as page:
        data = serving.encoded(picture, exif=exif)
        upload(page, {"name": "turned.png", "mimeType": "image/png", "buffer": data})
        page.locator("#opacity").fill("0")
        found = pixels(page.locator("#map canvas"))[..., :3].astype(int)
        inside = found[10:-10, 10:-10]
        half = inside.shape[1] // 2
        assert np.abs(inside[:, : half - 10] - [255, 0, 0]).max() < 3
        assert np.abs(inside[:, half + 10 :] - [0, 0, 255]).max() < 3


def test_signed_relevance_of_a_model_without_names(plain: str, visit: Visit) -> None:
    scene = fashion_scenes()[0]
    explainer = Explainer(fashion_model(), signed=True, preset="published")
    answer = explainer(preprocess(crop_pct=0.5)(load_image(scene)).unsqueeze(0))
    with visit(plain) as page:
        upload(page, scene)
        expect(page.locator("#why")).to_have_text(f"Why Class {int(answer.targets)}?")
        expect(page.locator("#map-title")).to_have_text("Relevance")
        expect(page.locator("#colours")).to_have_value("diverging")
        assert re.fullmatch(r"against −.* 0 for .*", " ".join(page.locator("#map-scale span").all_inner_texts()))
        expect(page.locator("#gates")).to_be_hidden()
        expect(page.locator("#ungated")).to_be_hidden()
        assert not any("%" in text for text in page.locator("#classes .likely").all_inner_texts())
        page.locator("#opacity").fill("1")
        found = pixels(page.locator("#map canvas")).astype(int)
        heat = to_picture(answer.relevance, (8, 8), found.shape[:2], centred=True)[0].numpy()
        red = found[..., 0] - found[..., 2]
        assert (red[heat > 0.6] > 0).all()
        assert (red[heat < 0.4] < 0).all()


def test_patches_are_read_by_keys_and_by_pointer(demo: str, visit: Visit) -> None:
    answer = explained(fashion_scenes()[0])
    with visit(demo) as page:
        upload(page, fashion_scenes()[0])
        page.locator("#map").focus()
        place = int(answer.relevance.argmax())
        row, column = divmod(place, 8)
        expect(page.locator("#patch h3")).to_have_text(f"Row {row + 1}, column {column + 1}")
        page.keyboard.press("Home")
        for key in ("ArrowRight", "ArrowUp", "ArrowDown"):
            page.keyboard.press(key)
        row = min(max(row - 1, 0) + 1, 7)
        said = page.locator("#patch-said")
        expect(said).to_contain_text(f"Row {row + 1}, column 2. Relevance")
        expect(said).to_contain_text(f"Gate, block 2 × {float(answer.gates[2][0, 8 * row + 1]):.3g}"[:20])
        link = page.locator("#patch a").first
        expect(link).to_have_attribute("href", re.compile(r"^/cards.html#block-2-feature-\d+$"))
        box = page.locator("#ungated .panel").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] * 0.99, box["y"] + box["height"] * 0.99)
        expect(page.locator("#patch h3")).to_have_text("Row 8, column 8")
        assert page.locator(".mark:visible").count() == 4


def test_sliders_compute_the_gates_again(demo: str, visit: Visit) -> None:
    with visit(demo) as page:
        upload(page, fashion_scenes()[0])
        canvas = page.locator("#gates canvas").last
        assert canvas_size(canvas) == (8, 8)
        served, shown = pixels(canvas), pixels(page.locator("#map canvas"))
        page.locator("#slope").fill("0")
        assert (np.ptp(pixels(canvas), axis=(0, 1)) == 0).all()
        expect(page.locator("#gates .counts").last).to_have_text("0 of 64 patches raised, 0 lowered")
        page.locator("#base").fill("1")
        expect(page.locator("#base-value")).to_have_text("10")
        expect(page.locator("#gate-scale p")).to_contain_text("× 0.1")
        assert np.array_equal(pixels(page.locator("#map canvas")), shown)
        page.locator("#served").click()
        assert np.array_equal(pixels(canvas), served)


def test_downloads_are_what_is_shown(demo: str, visit: Visit) -> None:
    answer = explained(fashion_scenes()[0])
    with visit(demo, accept_downloads=True) as page:
        upload(page, fashion_scenes()[0])
        with page.expect_download() as picture:
            page.locator("#save-png").click()
        with page.expect_download() as numbers:
            page.locator("#save-json").click()
        assert picture.value.suggested_filename.startswith("scene-0-")
        assert np.array_equal(np.asarray(Image.open(picture.value.path())), pixels(page.locator("#map canvas")))
        found = json.loads(numbers.value.path().read_text(encoding="utf-8"))
        torch.testing.assert_close(torch.tensor(found["relevance"][0]), answer.relevance[0], rtol=1e-3, atol=1e-5)
