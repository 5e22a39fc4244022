"""Feature cards: what stands on them, hostile names, broken images, harvests of another model."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from carding import FEATURES, sae
from harvesting import PREPROCESS, items, model, picture, small
from html_page import Page
from own_vit import GRID
from PIL import Image

from fga_fast import Explainer
from fga_fast.cards import run as module
from fga_fast.cards.card import Card, Example, agreement_of, to_json
from fga_fast.cards.census import take_census
from fga_fast.cards.evidence import GAP, SIDE, evidence
from fga_fast.cards.page import cards_page
from fga_fast.cards.run import feature_cards, features_of
from fga_fast.dataset.items import Item
from fga_fast.harvest.activations import Activations
from fga_fast.result.features import card_url
from fga_fast.sae.notes import Note

HOSTILE = '"><script>alert(1)</script>&amp;'
NAMES = ("bag", "boot", "<i>coat</i>", "dress", "sandal")


def photos(folder: Path, count: int = 7) -> list[Item]:
    made = []
    for number in range(count):
        path = folder / f"{number}{'<i>' * (number == 3)}.png"
        picture(number).save(path)
        made.append(Item(path.name, path, number % 5))
    return made


def cards(found: Activations, own: Any, out: Path, saes: Any = None, **settings: Any) -> tuple[Page, dict[str, Any]]:
    usual: dict[str, Any] = {"layout": own.layout(), "class_names": NAMES, "progress": False, "examples": 3}
    path = feature_cards(own, saes or {1: sae()}, found, out=out, **(usual | settings))
    assert path == out / "cards.html" and sorted(one.name for one in out.iterdir()) == ["cards.html", "cards.json"]
    return Page(path.read_text(encoding="utf-8")), json.loads((out / "cards.json").read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and a harvest of them."""
    folder = tmp_path_factory.mktemp("cards")
    (folder / "photos").mkdir()
    small(folder / "harvest", photos(folder / "photos"), (0, 1))
    return folder


def test_what_stands_on_a_card(folder: Path, tmp_path: Path) -> None:
    own, found = model(), Activations(folder / "harvest")
    _, told = cards(found, own, tmp_path / "out", {0: sae(1), 1: sae()}, features={1: [8, 2], 0: [4]})
    assert [(one["block"], one["feature"]) for one in told["features"]] == [(0, 4), (1, 2), (1, 8)]
    assert told["model_checksum"] == found.about.model_checksum and told["images"] == 7
    census, card = take_census(found, 1, sae(), strongest=3, progress=False), told["features"][2]
    assert card["density"] == pytest.approx(float(census.density[8])) and card["images"] == int(census.lit[8]) / 7
    assert card["mean"] == pytest.approx(float(census.total[8] / census.active[8]))
    assert card["largest"] == pytest.approx(float(census.code[0, 8]))
    assert sum(count for _, _, count in card["histogram"]) == int(census.active[8])
    assert card["company"][0]["feature"] == 9 and card["company"][0]["jaccard"] == card["company"][0]["share"] == 1
    assert 8 not in [one["feature"] for one in card["company"]]
    keys = [found.keys[image] for image in census.image[:, 8].tolist()]
    assert [one["key"] for one in card["examples"]] == keys
    assert [divmod(int(patch), GRID[1]) for patch in census.patch[:, 8]] == [
        tuple(e["patch"]) for e in card["examples"]
    ]
    explainer = Explainer(
        own, {1: sae()}, layout=own.layout(), top_features=FEATURES, class_names=NAMES, preset="published"
    )
    lost = []
    for one in card["examples"]:
        image = found_image(folder, one["key"])
        plain = explainer(image)
        lost.append((plain.logits - explainer.ablate({1: [8]})(image).logits)[0])
        contributions = {pair.feature: pair.contribution for pair in plain.top_features(1)[0]}
        assert one["target"] == NAMES[int(plain.targets)]
        assert one["predicted"] == pytest.approx(contributions[8], rel=1e-3, abs=1e-5)
        assert one["measured"] == pytest.approx(float(lost[-1][int(plain.targets)]), rel=1e-3, abs=1e-5)
    mean = torch.stack(lost).mean(0)
    assert {one["name"]: pytest.approx(one["value"], rel=1e-3, abs=1e-5) for one in card["pushes"]} == {
        name: float(value) for name, value in zip(NAMES, mean, strict=True)
    }
    assert [one["value"] for one in card["pushes"]] == sorted((one["value"] for one in card["pushes"]), reverse=True)
    predicted = [NAMES[int(one)] for one in found.predicted]
    for one in card["classes"]:
        assert one["usual"] == pytest.approx(predicted.count(one["name"]) / 7)
    assert told["agreement"]["pairs"] == 9


def found_image(folder: Path, key: str) -> torch.Tensor:
    return PREPROCESS(Image.open(folder / "photos" / key))[None]


def test_the_page(folder: Path, tmp_path: Path) -> None:
    """One file with an anchor for each card, four panels of each example, and nothing from elsewhere."""
    notes = {(1, 8): Note(HOSTILE, HOSTILE), (1, 9): Note("twin")}
    own, found = model(), Activations(folder / "harvest")
    page, told = cards(found, own, tmp_path / "out", features={1: [8, 9]}, notes=notes)
    assert [one["id"] for one in page.found["article"]] == ["block-1-feature-8", "block-1-feature-9"]
    assert card_url("p.html", 2, 8) == "p.html#block-2-feature-8"
    ids = {one["id"] for group in page.found.values() for one in group if "id" in one}
    links = [one["href"] for one in page.found["a"]]
    assert len(links) >= 4 and all(link.startswith("#") and link[1:] in ids for link in links)
    labels = {one["for"] for one in page.found["label"]}
    assert labels == {"search", "block", "order"} and labels < ids
    assert page.headings == [1, 2, 3, 3, 2]  # that cards are closed, Page asserts
    assert len(page.found["script"]) == 1 and "link" not in page.found
    text = page.text
    assert text.count(HOSTILE) == 3 and "twin" in text  # as a name, as a note, and as its twin's company
    assert HOSTILE in page.found["article"][0]["data-words"] and "<i>coat</i>" in "".join(NAMES)
    assert "i" not in page.found  # neither from the names of classes nor of files
    assert told["features"][0]["name"] == HOSTILE
    assert len(page.found["img"]) == 6 and all(one["loading"] == "lazy" and one["alt"] for one in page.found["img"])
    for one in page.found["img"]:
        head, _, data = one["src"].partition(",")
        assert head == "data:image/jpeg;base64"
        strip = Image.open(io.BytesIO(base64.b64decode(data)))
        assert strip.size == (4 * 128 + 3 * 3, 85) == (int(one["width"]), int(one["height"]))
    first = told["features"][0]["examples"][0]
    row, column = first["patch"]
    alt = f"{first['key']}: feature 8 is strongest at row {row + 1}, column {column + 1}"
    assert page.found["img"][0]["alt"] == alt
    # A browser may have kept the chosen order over a reload.
    assert re.search(r"\n  sort\(\);\n  show\(\);\n\}\)\(\);", page.text)
    assert not re.search(r"https?://", (tmp_path / "out" / "cards.html").read_text())


def test_panels_show_where_a_feature_is_active(folder: Path) -> None:
    """Amber at the strongest patch and not at one without, in a grey picture."""
    activity, drive = torch.zeros(6), torch.zeros(16, 24)
    activity[4], activity[0] = 2.0, 1.0
    drive[:8, 16:] = 1
    strip = Image.open(io.BytesIO(evidence(Image.new("RGB", (24, 16), (90, 90, 90)), activity, GRID, 4, drive)))

    def amber(panel: int, column: float, row: float) -> int:
        """How much more red than blue, at a place from 0 to 1 in a panel."""
        place = round(panel * (SIDE + GAP) + column * SIDE), round(row * strip.height)
        red, _, blue = strip.getpixel(place)  # type: ignore[misc]
        return int(red - blue)

    assert amber(1, 0.5, 0.75) > 120 and 40 < amber(1, 1 / 6, 0.25) < 120 and abs(amber(1, 5 / 6, 0.75)) < 12
    assert amber(3, 5 / 6, 0.25) > 120 and abs(amber(3, 1 / 6, 0.75)) < 12
    assert abs(amber(0, 1 / 6, 0.25)) < 12 and abs(amber(2, 0.5, 0.3)) < 12
    assert amber(0, 1 / 3 + 0.004, 0.75) > 60  # the frame


def test_a_broken_image_still_gives_a_card(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    own, given = model(), photos(tmp_path / "photos")
    found = small(tmp_path / "harvest", given, (1,))
    _, whole = cards(found, own, tmp_path / "whole", features={1: [8]})
    strongest = whole["features"][0]["examples"][0]["key"]
    (tmp_path / "photos" / strongest).write_bytes(b"<b>no picture")
    page, told = cards(found, own, tmp_path / "out", features={1: [8]})
    first, *others = told["features"][0]["examples"]
    assert (
        first["error"].startswith("cannot be read: ImageFileError: ")
        and first["code"] == whole["features"][0]["largest"]
    )
    assert first["measured"] is first["predicted"] is first["target"] is None
    assert [one["measured"] for one in others] == pytest.approx(
        [one["measured"] for one in whole["features"][0]["examples"][1:]], rel=1e-4, abs=1e-6
    )
    assert len(page.found["img"]) == 3 and "cannot be read: ImageFileError" in page.text
    for path in (tmp_path / "photos").iterdir():
        path.unlink()
    _, told = cards(found, own, tmp_path / "none", features={1: [8]})
    assert told["agreement"] is None and told["features"][0]["pushes"] == []
    assert all(one["error"].startswith("cannot be read: FileNotFoundError") for one in told["features"][0]["examples"])


def test_an_image_that_is_another_one_now(tmp_path: Path) -> None:
    """Its effect is not that of the code on the card, so that it has none."""
    (tmp_path / "photos").mkdir()
    own, given = model(), photos(tmp_path / "photos")
    found = small(tmp_path / "harvest", given, (1,))
    _, whole = cards(found, own, tmp_path / "whole", features={1: [8]})
    before = whole["features"][0]
    strongest = before["examples"][0]["key"]
    picture(99).save(tmp_path / "photos" / strongest)
    page, told = cards(found, own, tmp_path / "out", features={1: [8]})
    first, *others = told["features"][0]["examples"]
    assert first["error"].startswith("not the image of the harvest (file changed, or another --window)")
    assert "cannot be read" not in page.text and first["error"] in page.text
    assert first["target"] is first["target_number"] is first["predicted"] is first["measured"] is None
    assert first["code"] == before["examples"][0]["code"] and not any(one["error"] for one in others)
    explainer = Explainer(own, {1: sae()}, layout=own.layout(), preset="published")
    ablated, lost = explainer.ablate({1: [8]}), torch.zeros(5)
    for one in others:
        image = PREPROCESS(Image.open(tmp_path / "photos" / one["key"]))[None]
        lost += (explainer(image).logits - ablated(image).logits)[0] / len(others)
    for push in told["features"][0]["pushes"]:
        assert push["value"] == pytest.approx(float(lost[push["number"]]), rel=1e-3, abs=1e-5)
    for item in given:
        picture(90).save(item.image)  # type: ignore[arg-type]
    _, told = cards(found, own, tmp_path / "none", features={1: [8]})
    assert told["agreement"] is None and told["features"][0]["pushes"] == []


def test_a_harvest_in_bfloat16_is_near_enough(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    found = small(tmp_path / "harvest", photos(tmp_path / "photos"), (1,), dtype="bfloat16")
    _, told = cards(found, model(), tmp_path / "out", min_density=0.1)
    assert {example["error"] for one in told["features"] for example in one["examples"]} == {""}


def test_a_model_that_lets_no_gradient_through(tmp_path: Path) -> None:
    """Measured all the same."""
    (tmp_path / "photos").mkdir()
    own = model(call=torch.no_grad()(lambda block, x, _: block(x)))
    found = small(tmp_path / "harvest", photos(tmp_path / "photos"), (1,), model=own)
    page, told = cards(found, own, tmp_path / "out", features={1: [8]})
    (card,) = told["features"]
    assert all(one["predicted"] is None and one["measured"] and not one["error"] for one in card["examples"])
    assert card["pushes"] and told["agreement"] is None and "adds" in page.text


def test_classes_are_known_by_number_and_whole_name(folder: Path, tmp_path: Path) -> None:
    names = [f"{'a very long name of a class, ' * 2}number {number}" for number in range(5)]
    own, found = model(), Activations(folder / "harvest")
    page, told = cards(found, own, tmp_path / "out", features={1: [8]}, class_names=names)
    (card,) = told["features"]
    assert len(card["pushes"]) == 5 and card["classes"]
    for one in (*card["pushes"], *card["classes"]):
        assert one["name"] == names[one["number"]]
        assert f"class {one['number']} {one['name']}" in page.found["article"][0]["data-words"]
    for example in card["examples"]:
        assert example["target"] == names[example["target_number"]]
    assert names[0] not in page.text and names[0][:23] + "…" in page.text


def card_with(pairs: list[tuple[float, float]], block: int = 1) -> Card:
    strip = evidence(None, torch.ones(6), GRID, 0, None)
    examples = [Example("image", 1.0, (0, 0), "bag", 0, *pair, picture=strip) for pair in pairs]
    return Card(block, 0, "", "", 0.1, 0.5, 1.0, 2.0, (), (), (), (), tuple(examples))


def test_no_correlation_of_equal_or_infinite_numbers() -> None:
    assert agreement_of([card_with([(1.0, 2.0)] * 4)]) is None
    odd = card_with([(1.0, 2.0), (2.0, 3.0), (3.0, 5.0), (float("inf"), 1.0), (1.0, float("nan"))])
    agreement = agreement_of([odd])
    assert agreement is not None and agreement.pairs == 3 and agreement.spearman == pytest.approx(1)
    told = json.loads(to_json([odd], agreement, {}))
    assert [one["predicted"] for one in told["features"][0]["examples"]] == [1, 2, 3, None, 1]
    assert "nan" not in cards_page("t", [odd], agreement, {"images": 1, "model_checksum": "a"}).replace("nan;", "")


def test_all_blocks_are_in_the_plot() -> None:
    """Also where there are more pairs than dots."""
    made = [card_with([(block - 2.0, block + number / 1000) for number in range(1000)], block) for block in (1, 2, 3)]
    agreement = agreement_of(made)
    page = Page(cards_page("t", made, agreement, {"images": 1, "model_checksum": "a"}))
    dots = page.found["circle"]
    assert len({one["cx"] for one in dots}) == 3 and len(dots) == 1500
    assert "In 3000 pairs" in page.text and "1,500 of the pairs are drawn" in page.text
    few = cards_page("t", made[:2], agreement_of(made[:2]), {"images": 1, "model_checksum": "a"})
    assert few.count("<circle") == 2000 and "pairs are drawn" not in few


def test_a_grid_that_is_finer_than_the_picture() -> None:
    activity = torch.zeros(200 * 300)
    activity[-1] = 1
    for patch in (0, 3, 131, 300 * 3, len(activity) - 1):
        strip = Image.open(io.BytesIO(evidence(Image.new("RGB", (600, 400)), activity, (200, 300), patch, None)))
        assert strip.size == (4 * SIDE + 3 * GAP, 85)


def test_images_that_are_no_files(tmp_path: Path) -> None:
    own, given = model(), items(5)
    found = small(tmp_path / "harvest", given, (1,), preprocess=None)
    _, told = cards(found, own, tmp_path / "without", features={1: [8]})
    assert "the image was no file; give items" in told["features"][0]["examples"][0]["error"]
    _, told = cards(found, own, tmp_path / "with", features={1: [8]}, items=given)
    assert not told["features"][0]["examples"][0]["error"] and told["agreement"]["pairs"] == 3


def test_which_features_get_a_card(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, found = model(), Activations(folder / "harvest")
    census = take_census(found, 1, sae(), progress=False)
    share = sorted(census.density.tolist())[FEATURES // 2]
    wanted = [feature for feature in range(FEATURES) if float(census.density[feature]) >= share]
    for table in (2**26, 1):  # company of all features at once, or of the chosen ones in a second pass
        monkeypatch.setattr(module, "_MOST_TABLE", table)
        _, told = cards(found, own, tmp_path / str(table), min_density=share, examples=1)
        assert [one["feature"] for one in told["features"]] == wanted
        _, few = cards(found, own, tmp_path / str(table), min_density=share, limit=3, examples=1)
        largest = sorted(sorted(wanted, key=lambda feature: -float(census.total[feature]))[:3])
        assert [one["feature"] for one in few["features"]] == largest
        by_number = {one["feature"]: one for one in told["features"]}
        assert all(by_number[one["feature"]] == one for one in few["features"])
    with pytest.raises(ValueError, match=r"min_density: expected some features that are active in 1\.1"):
        cards(found, own, tmp_path / "none", min_density=1.1)
    _, dead = cards(found, own, tmp_path / "dead", features={1: [5]})
    assert dead["features"][0]["examples"] == [] and dead["features"][0]["histogram"] == []


def test_features_of_an_explanation() -> None:
    own = model()
    explanation = Explainer(own, {1: sae(1)}, layout=own.layout(), top_features=3, preset="published")(
        torch.stack([items(1)[0].image] * 2)
    )
    listed = [{one.feature for one in row} for row in explanation.top_features(1)]
    assert features_of(explanation) == {1: sorted(listed[0] | listed[1])}


def test_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    own, found, out = model(), Activations(folder / "harvest"), tmp_path / "out"
    for settings, words in (
        ({"saes": {2: sae()}}, r"saes: expected blocks of the harvest \(0, 1\), got 2"),
        ({"saes": {1: sae(dtype=torch.float64)}}, r"saes\[1\]: is torch.float64 for a model of torch.float32"),
        ({"features": {1: [FEATURES]}}, r"features\[1\]: expected 0 to 23, got 24"),
        ({"features": {0: [0]}}, r"features: expected blocks with an SAE \(1\), got 0"),
        ({"features": {}}, "features: expected at least one feature"),
        ({"limit": 0}, "limit: expected at least 1, got 0"),
        ({"examples": 0}, "examples: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            cards(found, own, out, **settings)
    with torch.no_grad():
        own.head.bias[0] += 1
    with pytest.raises(ValueError, match=r"model: expected the model of the harvest .* got one with checksum"):
        cards(found, own, out, features={1: [8]})
    found.about = replace(found.about, preprocess={"size": 3})
    with pytest.raises(ValueError, match=r"the harvest's preprocess .* is not one of this version"):
        cards(found, model(), out, features={1: [8]})
    assert not out.exists()
