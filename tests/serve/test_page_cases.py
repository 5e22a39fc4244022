"""The page of `fga-fast serve`: its arithmetic, models other than the demo, errors, and who can use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tokenize
from page_visits import Visit, demo_explainer, preprocess, served, upload
from PIL import Image

from fga_fast import Explainer, load_package
from fga_fast.assets import fashion_model, fashion_scenes
from fga_fast.io.images import Preprocess, load_image
from fga_fast.reference.gate import gate
from fga_fast.result import colours
from fga_fast.result.heatmap import to_picture
from fga_fast.serve.engine import Engine

expect = pytest.importorskip("playwright.sync_api").expect
serving = pytest.importorskip("serving")

TOKEN = "only-for-tests"


# arithmetic of the page, against the library's


def run_module(page: Any, module: str, call: str, given: Any = None) -> Any:
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
        for name in colours.NAMES:
            found = run_module(page, "colours.js", f"[...m.colourTable('{name}')]")
            wanted = 255 * colours.apply_colormap(steps, name)
            assert (torch.tensor(found).reshape(256, 3) - wanted).abs().max() <= 1
        logits = (4 * scores[0]).tolist()
        found = run_module(page, "numbers.js", "['softmax', 'sigmoid'].map(k => m.probabilities(given, k))", logits)
        wanted = torch.stack([(4 * scores[0]).softmax(0), (4 * scores[0]).sigmoid()])
        torch.testing.assert_close(torch.tensor(found).double(), wanted)


# other models, and what goes wrong


def test_relevance_as_published_has_its_names(visit: Visit) -> None:
    engine = Engine(demo_explainer(preset="published"), preprocess(), name="published")
    with served(engine) as url, visit(url) as page:
        upload(page, fashion_scenes()[0])
        expect(page.locator("#map-title")).to_have_text("FGA")
        expect(page.locator("#ungated figcaption")).to_have_text("TransMM: without gates")
        expect(page.locator("#colours")).to_have_value("turbo")


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


def test_a_package_that_explains_any_class(given_package: Path, visit: Visit) -> None:
    package = load_package(given_package)
    names = package.metadata.class_names or [f"Class {number}" for number in range(5)]
    with served(Engine(package, name="package")) as url, visit(url) as page:
        upload(page, fashion_scenes()[0])
        seen = package.preprocess(load_image(fashion_scenes()[0]))  # type: ignore[misc]
        likeliest = int(package(seen.unsqueeze(0)).targets)
        expect(page.locator("#why")).to_have_text(f"Why {names[likeliest]}?")
        page.locator("#classes .explain").nth(2).click()
        expect(page.locator("#classes .explain").nth(2)).to_have_attribute("aria-pressed", "true")
        page.locator("#webcam").click()
        expect(page.locator("#pace")).to_contain_text("frames/s")
        expect(page.locator("#likeliest")).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#problem")).to_be_empty()


def test_the_interface_is_shown_and_can_be_tried(visit: Visit) -> None:
    engine = Engine(Explainer(fashion_model()), preprocess(), name="guarded")
    with served(engine, token=TOKEN) as url, visit(url, refusals=True) as page:
        page.goto(url + "docs")
        page.get_by_role("button", name="Authorize").click()
        page.locator(".auth-container input").fill(TOKEN)
        page.locator(".auth-container").get_by_role("button", name="Apply credentials").click()
        page.get_by_role("button", name="Close").click()
        page.get_by_role("button", name="GET /v1/model Model").click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        expect(page.locator(".live-responses-table")).to_contain_text('"model": "guarded"')


def test_a_server_with_a_token(visit: Visit) -> None:
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
    large = serving.encoded(Image.new("RGB", (600, 500)))
    with visit(demo, refusals=True) as page:
        problem = page.get_by_role("alert")
        page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
        expect(problem).to_contain_text("no picture that the browser can read")
        page.locator("#file").set_input_files({"name": "large.png", "mimeType": "image/png", "buffer": large})
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
        wanted = {"skip", "file", "webcam", "map", "opacity", "colours", "likeliest", "search", "explain", "compare"}
        assert wanted | {"base", "slope", "served", "save-png", "save-json"} <= reached
