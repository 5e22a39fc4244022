"""The engine gives what the explainer gives, whatever is asked beside it."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest
import serving
import torch
from explaining import agree
from own_vit import OwnViT, own_vit
from packages import PREPROCESS, images
from PIL import Image
from torch import Tensor

from fga_fast import Difference, Explainer, Explanation, load_image
from fga_fast.serve.engine import Answered, Engine
from fga_fast.serve.limits import Refused
from fga_fast.serve.questions import Question

# A question, and the same as targets of the explainer.
QUESTIONS: list[tuple[dict[str, Any], Any]] = [
    ({}, None),
    ({"targets": [2]}, 2),
    ({"targets": ["émeu"]}, "émeu"),
    ({"targets": [4, "ant", 1]}, [[4, 0, 1]]),
    ({"targets": ["2", "1", "0"]}, [[2, 1, 0]]),
    ({"targets": [3], "rather_than": "cat"}, Difference(3, 2)),
    ({"targets": [0], "rather_than": 1}, Difference(0, 1)),
    ({"top_features": 2}, None),
    ({"targets": [1, 3], "top_features": serving.LISTED}, [[1, 3]]),
]


def answered(found: Answered | Exception) -> Explanation:
    assert isinstance(found, Answered), found
    return found.explanation


@pytest.fixture(scope="module")
def engine() -> Engine:
    return serving.engine()


def test_all_kinds_of_questions_in_one_batch(engine: Engine) -> None:
    asked = [
        (engine.decode(serving.png(number)), engine.question(**question))
        for number, (question, _) in enumerate(QUESTIONS)
    ]
    found = engine.explain(asked)
    assert len(found) == len(QUESTIONS)
    for number, (question, targets) in enumerate(QUESTIONS):
        want = serving.direct(serving.picture(number), targets, question.get("top_features", 0))
        agree(answered(found[number]), want, 1e-9)


def test_predicted_given_and_compared_classes_take_one_forward_pass() -> None:
    engine = serving.engine()
    model, passes = engine._explainer.model, []
    model.register_forward_hook(lambda _, given, __: passes.append(len(given[0])))
    pictures = [engine.decode(serving.png(number)) for number in range(4)]
    questions = [Question(), Question((3,)), Question((1,), 2), Question()]
    found = engine.explain(list(zip(pictures, questions, strict=True)))
    assert passes == [4]  # of the ungated explanation too
    assert [one.batch for one in found if isinstance(one, Answered)] == [4] * 4


class Picky(OwnViT):
    """Gives NaN for black pictures, and fails on white ones."""

    def forward(self, given: Tensor) -> Tensor:
        brightest = given.flatten(1).amax(1, keepdim=True)
        if float(given.flatten(1).amin(1).max()) > 1.9:
            raise RuntimeError("white")
        logits = super().forward(given)
        return torch.where(brightest < -0.99, torch.nan, logits)


def test_one_bad_image_does_not_fail_the_others() -> None:
    model = Picky().double().eval()
    model.load_state_dict(own_vit().state_dict())
    asked = Explainer(model, layout=model.layout())
    engine = Engine(asked, PREPROCESS)
    bad = [serving.encoded(Image.new("RGB", (30, 20), colour)) for colour in ("black", "white")]
    files = [serving.png(0), bad[0], serving.png(1), bad[1], serving.png(2)]
    found = engine.explain([(engine.decode(file), Question()) for file in files])
    for place, seed in ((0, 0), (2, 1), (4, 2)):
        agree(answered(found[place]), asked(PREPROCESS(serving.picture(seed))[None].double()), 1e-9)
    for place in (1, 3):
        error = found[place]
        assert isinstance(error, Refused) and error.code == "internal"
        assert "white" not in error.message and "NaN" not in error.message


def test_notices_are_about_the_own_image() -> None:
    """A map of zeros is noticed for the picture that has it: the head ignores dark pictures."""

    class Blind(OwnViT):
        def forward(self, given: Tensor) -> Tensor:
            logits = super().forward(given)
            return logits * (given.flatten(1).amax(1, keepdim=True) > -0.99)

    model = Blind().double().eval()
    model.load_state_dict(own_vit().state_dict())
    asked = Explainer(model, layout=model.layout(), method="input_x_gradient")
    engine = Engine(asked, PREPROCESS)
    files = [serving.png(0), serving.encoded(Image.new("RGB", (30, 20), "black"))]
    bright, dark = map(answered, engine.explain([(engine.decode(file), Question()) for file in files]))
    assert any("zero everywhere" in notice for notice in dark.notices)
    assert not any("zero everywhere" in notice for notice in bright.notices)


@pytest.mark.slow
def test_prompts_of_a_dual_encoder() -> None:
    pytest.importorskip("open_clip")
    family = next(family for family in families.registry() if family.library == "open_clip" and family.prompts)
    asked = Explainer(family.build(), tokenizer=families.tokenize)
    preprocess = type(PREPROCESS)(family.image_size)
    engine = Engine(asked, preprocess)
    assert (engine.facts.classes, engine.facts.takes_prompts) == (0, True)
    engine.warm_up(2)
    questions = [["an owl"], ["an owl", "a cat"], ["a cat"], ["an owl"]]
    pictures = [engine.decode(serving.png(number)) for number in range(4)]
    found = engine.explain(
        [(one, engine.question(prompts=prompts)) for one, prompts in zip(pictures, questions, strict=True)]
    )
    for one, prompts, got in zip(pictures, questions, found, strict=True):
        image = one.image[None].to(next(asked.model.parameters()))
        want = asked(image, prompts[0] if len(prompts) == 1 else [prompts])
        assert answered(got).names == tuple(prompts)
        agree(answered(got), want, 1e-4)
    with pytest.raises(Refused, match="no classes of its own"):
        engine.question()
    with pytest.raises(Refused, match="got an empty one"):
        engine.question(prompts=[" "])


@pytest.mark.slow
def test_compiled() -> None:
    """Questions about one class share the compiled graph; others go to the explainer."""
    from packages import explainer

    asked, listing = explainer(), explainer(top_features=serving.LISTED)
    compiled = listing.compile(images(2), target_mode="given")
    engine = Engine(asked, PREPROCESS, listing=listing, compiled=compiled)
    questions = [Question(), Question((2,)), Question((0, 3)), Question((4,), 1), Question((1,), top_features=2)]
    found = engine.explain([(engine.decode(serving.png(n)), question) for n, question in enumerate(questions)])
    for number, question in enumerate(questions):
        got = answered(found[number])
        alone = len(question.targets) <= 1 and question.rather_than is None
        assert got.backend_reason == ("compiled" if alone else "")
        targets: Any = [list(question.targets)] if question.targets else None
        if question.rather_than is not None:
            targets = Difference(*question.targets, question.rather_than)
        want = listing(PREPROCESS(serving.picture(number))[None].double(), targets)
        torch.testing.assert_close(got.relevance.flatten(), want.relevance.flatten(), rtol=1e-9, atol=1e-9)
        assert {block: top.patch_index.shape[-1] for block, top in got.features.items()} == (
            dict.fromkeys(want.features, 2) if question.top_features else {}
        )
    together = engine.explain([(engine.decode(serving.png(0)), question) for question in questions])
    assert [isinstance(one, Answered) and one.batch for one in together] == [3, 3, 1, 1, 3]
    for plan, mode in ((asked.plan, "given"), (listing.plan, "predicted")):
        wrong: Any = SimpleNamespace(plan=plan, target_mode=mode)
        with pytest.raises(ValueError, match='compiled: expected a graph of target_mode "given" and top_features 4'):
            Engine(asked, PREPROCESS, listing=listing, compiled=wrong)


def test_pictures_are_those_of_files(engine: Engine, tmp_path: Path) -> None:
    """Also turned ones, grey ones, ones with transparency, and of each format."""
    exif = Image.Exif()
    exif[0x0112] = 6
    grey, clear = serving.picture().convert("L"), serving.picture().convert("RGBA")
    clear.putalpha(Image.fromarray(np.arange(600, dtype=np.uint32).reshape(20, 30).astype(np.uint8)))
    files = [
        serving.encoded(serving.picture(), "JPEG", exif=exif), serving.encoded(grey), serving.encoded(clear),
        serving.encoded(clear.convert("P")), serving.encoded(serving.picture(), "WEBP"),
        serving.encoded(serving.picture().convert("CMYK"), "JPEG"),
    ]  # fmt: skip
    for number, data in enumerate(files):
        path = tmp_path / f"{number}.img"
        path.write_bytes(data)
        assert torch.equal(engine.decode(data).image, PREPROCESS(load_image(path)))


def _declares(width: int, height: int) -> bytes:
    """A PNG file that says it has so many pixels, and has none."""
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x00", "bad_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "bad_image"),
        (serving.encoded(serving.picture(), "GIF"), "bad_image"),
        (serving.encoded(serving.picture(), "TIFF"), "bad_image"),
        (_declares(60, 60), "bad_image"),
        (_declares(1001, 1000), "too_large"),
        (_declares(60_000, 60_000), "too_large"),
        (_declares(0, 60), "bad_image"),
    ],
    ids=["one byte", "svg", "gif", "tiff", "no pixels", "just too large", "bomb", "no width"],
)
def test_hostile_images(data: bytes, code: str) -> None:
    engine = serving.engine(max_pixels=1_000_000)
    with pytest.raises(Refused) as refused:
        engine.decode(data)
    assert refused.value.code == code


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_images(engine: Engine, format: str) -> None:
    whole = serving.encoded(serving.picture(size=(64, 48)), format)
    engine.decode(whole)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(Refused) as refused:
            engine.decode(whole[: int(share * len(whole))])
        assert refused.value.code == "bad_image"


@pytest.mark.parametrize(
    ("asked", "code", "told"),
    [
        ({"targets": [5]}, "bad_target", "from 0 to 4, got 5"),
        ({"targets": ["-1"]}, "bad_target", "from 0 to 4, got -1"),
        ({"targets": ["owl"]}, "bad_target", "not among the names"),
        ({"targets": [""]}, "bad_target", "got an empty one"),
        ({"rather_than": 1}, "bad_target", "exactly one target with it, got 0"),
        ({"targets": [0, 1], "rather_than": 2}, "bad_target", "exactly one target with it, got 2"),
        ({"targets": ["bee"], "rather_than": 1}, "bad_target", "got 1 twice"),
        ({"prompts": ["an owl"]}, "bad_target", "takes none"),
        ({"top_features": serving.LISTED + 1}, "bad_parameter", "expected 0 to 4"),
        ({"top_features": -1}, "bad_parameter", "expected 0 to 4"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:20],
)
def test_questions_that_cannot_be_asked(engine: Engine, asked: dict[str, Any], code: str, told: str) -> None:
    with pytest.raises(Refused, match=told) as refused:
        engine.question(**asked)
    assert refused.value.code == code


def test_no_preprocessing() -> None:
    from packages import explainer

    with pytest.raises(ValueError, match="preprocess: expected one"):
        Engine(explainer())
