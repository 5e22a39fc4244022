"""The page of `fga-fast serve`, in a browser, against the real service.

Needs playwright and a Chromium: /usr/bin/chromium, or what FGA_FAST_CHROMIUM names.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from families import tokenize
from PIL import Image, ImageDraw

from fga_fast import Explainer, Gate, load_package
from fga_fast.assets import fashion_config, fashion_model, fashion_saes, fashion_scenes
from fga_fast.io.images import Preprocess, load_image
from fga_fast.reference.gate import gate
from fga_fast.result import colours
from fga_fast.result.heatmap import to_picture

for library in ("playwright.sync_api", "fastapi", "uvicorn", "prometheus_client", "timm"):
    pytest.importorskip(library)

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from fga_fast.serve.engine import Engine
from fga_fast.serve.limits import Limits
from fga_fast.serve.server import Server
from fga_fast.serve.service import Service

CHROMIUM = Path(os.environ.get("FGA_FAST_CHROMIUM", "/usr/bin/chromium"))
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
LIMITS = Limits(max_batch=1, pixels=250_000, deadline=60)
TOKEN = "only-for-tests"
Visit: TypeAlias = Callable[..., AbstractContextManager[Page]]

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}; FGA_FAST_CHROMIUM names one")
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield found
        found.close()


@contextmanager
def served(engine: Engine, **settings: Any) -> Iterator[str]:
    """The address of a running service."""
    ready = threading.Event()
    server = Server(Service(engine, LIMITS, **settings), port=0, on_ready=lambda _: ready.set())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(60)
    yield f"{server.url}/"
    server.stop()
    thread.join(60)
    assert not thread.is_alive()


def preprocess(**settings: Any) -> Preprocess:
    config = fashion_config()
    return Preprocess((56, 56), config.mean, config.std, **settings)


def demo_explainer(**settings: Any) -> Explainer:
    config = fashion_config()
    return Explainer(
        fashion_model(), fashion_saes(), class_names=config.class_names, gate=Gate(base=config.gate_base), ungated=True,
        **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    listing = demo_explainer(top_features=3)
    engine = Engine(
        demo_explainer(), preprocess(), listing=listing, name="demo", probability_is="sigmoid", max_pixels=LIMITS.pixels
    )
    with served(engine, samples={path.name: path for path in fashion_scenes()[:3]}, cards="/cards.html") as url:
        yield url


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    """Signed relevance of a model without SAEs, names and probabilities, which sees the middle of a picture only."""
    with served(Engine(Explainer(fashion_model(), signed=True), preprocess(crop_pct=0.5), name="plain")) as url:
        yield url


@pytest.fixture
def visit(browser: Browser) -> Visit:
    """Opens a page, and checks at the end that nothing was said on its console and nobody else was asked."""

    @contextmanager
    def opened(url: str, refusals: bool = False, **settings: Any) -> Iterator[Page]:
        context = browser.new_context(**settings)
        page = context.new_page()
        faults: list[str] = []
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        ours = (url, "blob:", "data:", url.replace("http", "ws", 1))
        page.on("request", lambda request: None if request.url.startswith(ours) else faults.append(request.url))
        page.on("websocket", lambda socket: None if socket.url.startswith(ours) else faults.append(socket.url))
        response = page.goto(url)
        assert response is not None
        assert response.headers["content-security-policy"] == "default-src 'self'; img-src 'self' blob: data:"
        yield page
        context.close()
        assert faults == []
        # Chromium itself writes of each answer with an error.
        assert [text for text in said if not (refusals and "Failed to load resource" in text)] == []

    return opened


def upload(page: Page, file: Any) -> None:
    page.locator("#file").set_input_files(file)
    expect(page.locator("#shown")).to_be_visible()


def png(picture: Image.Image, exif: Image.Exif | None = None) -> dict[str, Any]:
    data = io.BytesIO()
    picture.save(data, format="PNG", exif=exif or Image.Exif())
    return {"name": "picture.png", "mimeType": "image/png", "buffer": data.getvalue()}


def pixels(canvas: Locator) -> Any:  # -> [H, W, 4] uint8
    data = canvas.evaluate("c => c.toDataURL().split(',')[1]")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


def explained(scene: Path, targets: Any = None) -> Any:
    return demo_explainer()(preprocess()(load_image(scene)).unsqueeze(0), targets)


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
        expect(page.locator("#map-title")).to_have_text("FGA")
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
    data = io.BytesIO()
    Image.open(fashion_scenes()[1]).convert("RGB").save(data, format="BMP")
    answer = explained(fashion_scenes()[1])
    with visit(demo) as page:
        upload(page, {"name": "x.bmp", "mimeType": "image/bmp", "buffer": data.getvalue()})
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
        heat = to_picture(explained(scene).relevance, (8, 8), canvas_size(canvas))[0]
        wanted = 255 * colours.apply_colormap(heat, "magma")
        assert np.abs(pixels(canvas)[..., :3] - wanted.numpy()).max() <= 4
        page.locator("#opacity").fill("0")
        seen = preprocess().view(load_image(scene)).resize(canvas_size(canvas)[::-1], Image.Resampling.BILINEAR)
        assert np.abs(pixels(canvas)[..., :3].astype(int) - np.asarray(seen)).mean() < 6
        assert asked == []


def canvas_size(canvas: Locator) -> tuple[int, int]:
    width, height = canvas.evaluate("c => [c.width, c.height]")
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
        upload(page, png(picture, exif))
        page.locator("#opacity").fill("0")
        found = pixels(page.locator("#map canvas"))[..., :3].astype(int)
        inside = found[10:-10, 10:-10]
        half = inside.shape[1] // 2
        assert np.abs(inside[:, : half - 10] - [255, 0, 0]).max() < 3
        assert np.abs(inside[:, half + 10 :] - [0, 0, 255]).max() < 3


def test_signed_relevance_of_a_model_without_names(plain: str, visit: Visit) -> None:
    scene = fashion_scenes()[0]
    explainer = Explainer(fashion_model(), signed=True)
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


# arithmetic of the page, against the library's


def run_module(page: Page, module: str, call: str, given: Any = None) -> Any:
    return page.evaluate(f"async given => {{ const m = await import('/static/{module}'); return {call}; }}", given)


def test_arithmetic_is_the_librarys(demo: str, visit: Visit) -> None:
    scores, steps = torch.randn(3, 20).double(), torch.linspace(0, 1, 256).double()
    maps = torch.stack([scores[0], torch.full((20,), 0.1).double(), 1e-30 * scores[1]])
    with visit(demo) as page:
        for row in (*scores, torch.zeros(20).double()):
            found = run_module(page, "numbers.js", "m.gatesOf(given, 7, 0.8)", row.tolist())
            torch.testing.assert_close(torch.tensor(found).double(), gate(row[None], 7.0, 0.8)[0])
        for centred in (False, True):
            call = f"given.map(one => [...m.heatmap(one, [4, 5], [33, 21], {str(centred).lower()})])"
            heat = torch.tensor(run_module(page, "numbers.js", call, maps.tolist()))
            wanted = to_picture(maps, (4, 5), (33, 21), centred).float().flatten(1)
            torch.testing.assert_close(heat, wanted, rtol=0, atol=1e-5)
        for name in (*colours.NAMES, "diverging"):
            found = run_module(page, "colours.js", f"[...m.colourTable('{name}')]")
            wanted = 255 * (diverging(steps) if name == "diverging" else colours.apply_colormap(steps, name))
            assert (torch.tensor(found).reshape(256, 3) - wanted).abs().max() <= 1
        logits = (4 * scores[0]).tolist()
        found = run_module(page, "numbers.js", "['softmax', 'sigmoid'].map(k => m.probabilities(given, k))", logits)
        wanted = torch.stack([(4 * scores[0]).softmax(0), (4 * scores[0]).sigmoid()])
        torch.testing.assert_close(torch.tensor(found).double(), wanted)


def diverging(steps: Any) -> Any:  # [n] -> [n, 3]
    matplotlib = pytest.importorskip("matplotlib")
    return torch.from_numpy(matplotlib.colormaps["RdBu_r"](steps.numpy())[:, :3])


# other models, and what goes wrong


def test_prompts_are_the_classes_of_a_dual_encoder(visit: Visit) -> None:
    models = pytest.importorskip("open_clip.model")
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 60, "width": 16, "heads": 2, "layers": 2}
    explainer = Explainer(models.CLIP(12, vision, text).eval(), tokenizer=tokenize)
    engine = Engine(explainer, Preprocess((32, 32)), name="pairs", probability_is="softmax")
    with served(engine) as url, visit(url) as page:
        expect(page.locator("#prompts")).to_be_visible()
        page.locator("#file").set_input_files(fashion_scenes()[0])
        expect(page.locator("#problem")).to_contain_text("Write prompts, one a line")
        page.locator("#prompt-lines").fill("a shoe\n\n two cats ")
        page.locator("#prompts button").click()
        expect(page.locator("#classes li")).to_have_count(2)
        names = {name.removeprefix("▸ ") for name in page.locator("#classes .name").all_inner_texts()}
        assert names == {"a shoe", "two cats"}
        expect(page.locator("#problem")).to_be_empty()
        page.locator("#classes .explain", has_text="two cats").click()
        expect(page.locator("#why")).to_have_text("Why two cats?")
        expect(page.get_by_role("button", name="Not this?")).to_have_count(0)
        page.locator("#webcam").click()
        expect(page.locator("#pace")).to_contain_text("frames/s")
        expect(page.locator("#why")).to_have_text(re.compile("Why (a shoe|two cats)?"))


def test_a_package_that_explains_given_classes(given_package: Path, visit: Visit) -> None:
    package = load_package(given_package)
    names = package.metadata.class_names or [f"Class {number}" for number in range(5)]
    with served(Engine(package, name="package")) as url, visit(url, refusals=True) as page:
        upload(page, fashion_scenes()[0])
        seen = package.preprocess(load_image(fashion_scenes()[0]))  # type: ignore[misc]
        likeliest = int(package(seen.unsqueeze(0), 0).logits.argmax())
        expect(page.locator("#why")).to_have_text(f"Why {names[likeliest]}?")
        page.locator("#classes .explain").nth(2).click()
        expect(page.locator("#classes .explain").nth(2)).to_have_attribute("aria-pressed", "true")
        page.locator("#webcam").click()
        expect(page.locator("#pace")).to_contain_text("frames/s")
        expect(page.locator("#why")).to_have_text(f"Why {names[0]}?")


def test_a_server_with_a_token(browser: Browser, visit: Visit) -> None:
    engine = Engine(Explainer(fashion_model()), preprocess(), name="guarded")
    scene = fashion_scenes()[0]
    with served(engine, token=TOKEN, samples={scene.name: scene}) as url, visit(url, refusals=True) as page:
        expect(page.locator("#problem")).to_contain_text("asks for a token")
        page.locator("#token").fill(TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("#key")).to_be_hidden()
        page.locator("#samples button").click()
        expect(page.locator("#shown")).to_be_visible()
        page.locator("#webcam").click()
        expect(page.locator("#pace")).to_contain_text("frames/s")


def test_errors_are_said_in_words(demo: str, visit: Visit) -> None:
    large = png(Image.new("RGB", (600, 500)))
    with visit(demo, refusals=True) as page:
        problem = page.get_by_role("alert")
        page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
        expect(problem).to_contain_text("no picture that the browser can read")
        page.locator("#file").set_input_files(large)
        expect(problem).to_contain_text("too large for this server")
        page.route("**/v1/explain*", lambda route: route.abort())
        page.locator("#file").set_input_files(fashion_scenes()[0])
        expect(problem).to_contain_text("does not answer")
        page.unroute("**/v1/explain*")
        upload(page, fashion_scenes()[0])
        expect(problem).to_be_empty()


# for everybody


@pytest.mark.parametrize(("scheme", "width"), [("light", 360), ("dark", 1280)])
def test_accessibility(scheme: str, width: int, demo: str, visit: Visit) -> None:
    checker = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with visit(demo, color_scheme=scheme, viewport={"width": width, "height": 800}) as page:
        expect(page.locator("#samples img").last).to_have_js_property("complete", True)
        for change in (None, lambda: upload(page, fashion_scenes()[0])):
            if change is not None:
                change()
                page.locator("#map").focus()
                page.get_by_role("button", name="Not this?").first.click()
                expect(page.locator("#plain")).to_be_visible()
            found = checker.run(page)
            assert found.violations_count == 0, found.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_everything_is_reached_by_tab(demo: str, visit: Visit) -> None:
    with visit(demo) as page:
        upload(page, fashion_scenes()[0])
        page.evaluate("document.activeElement.blur()")
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        wanted = {"skip", "file", "webcam", "map", "opacity", "colours", "search", "explain", "compare", "base", "slope"}
        assert wanted | {"served", "likeliest", "save-png", "save-json"} <= reached
