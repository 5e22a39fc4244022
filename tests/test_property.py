"""Any model, any question, any settings: textbook, reference, native, composite and graph say the same.

These are 120 cases, the same every time. More, and others every time:

    FGA_FAST_CASES=20000 .venv/bin/python -m pytest tests/test_property.py

A failing case is printed as code, as small as it gets. `--hypothesis-seed=7` repeats a run.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from drawn_cases import Ask, Case, Coder, cases, traced
from drawn_vit import DrawnViT, Read, Shape
from explaining import held
from hypothesis import HealthCheck, given, note, settings
from textbook import Page, Sum, Textbook, gate_of
from torch import Tensor

from fga_fast import Explanation
from fga_fast.precision import relevance_dtype
from fga_fast.settings import Settings

CASES = os.environ.get("FGA_FAST_CASES")
BACKENDS = ("reference", "native", "composite")
EXACT = 1e-9  # what float64 must reach, relative to what varies
# What rounding alone may do, in units of the dtype's eps and of the sum of absolute summands.
ROUNDING = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 8}
# In a narrower dtype, an error may also be so many times the reference's in that dtype. And a model may magnify its
# rounding by chance: so many times what the textbook changes by if all weights change by their rounding.
TIMES = 4


@dataclass
class Row:
    """One tensor of an explanation, for one image and value, and what the textbook says."""

    got: Tensor
    want: Sum
    is_map: bool = False  # of relevance, in which only differences count

    @property
    def error(self) -> float:
        return float((self.got.double() - self.want.value).norm())

    def bound(self, dtype: torch.dtype, plain: Row) -> float:
        """The largest error that is allowed; `plain` is the reference's row."""
        rounding = ROUNDING[dtype] * torch.finfo(dtype).eps * float(self.want.scale.norm())
        if dtype == torch.float64:
            varies = self.want.value - self.want.value.mean() if self.is_map else self.want.scale
            return EXACT * float(varies.norm()) + rounding
        return 8 * rounding if plain is self else rounding + TIMES * plain.error


KNOWN_WORDS = (
    "gates nothing",
    "cannot tell from 1",
    "the head weighs",
    "relevance starts there",
    "the mean over blocks gives it too little weight",
    "a map is zero everywhere",
    "the rollout starts from what",
)

Rows = dict[str, list[Row]]  # name of a tensor -> its rows


@contextmanager
def silent() -> Iterator[None]:
    """Nothing in here may warn of more than what a case is made of."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    listener, logger = Listener(logging.WARNING), logging.getLogger("fga_fast")
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
    assert not [words for words in told if not any(known in words for known in KNOWN_WORDS)], told


class Judge:
    """Compares explanations of one case with the textbook; `changed`: with weights that this seed changes a little."""

    def __init__(self, case: Case, model: DrawnViT, changed: int = 0) -> None:
        self.case, double = case, copy.deepcopy(model).double().requires_grad_()
        if changed:
            generator, half = torch.Generator().manual_seed(changed), torch.finfo(case.dtype).eps / 2
            with torch.no_grad():
                for p in double.parameters():
                    p *= 1 + half * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        self.books = [Textbook(double, image, case.settings) for image in case.images()]
        self.saes = {block: sae.double() for block, sae in case.autoencoders().items()}
        # Codes that jump do so elsewhere in a narrower dtype. Their kernels have tests of their own.
        self.codes = case.dtype == torch.float64 or not any(coder.jumps for coder in case.saes.values())

    def __call__(self, e: Explanation) -> Rows:
        """Every tensor of the explanation beside the textbook's."""
        self.check_form(e)
        rows: Rows = {}
        for image, book in enumerate(self.books):
            logits = book.logits[0].detach()
            rows.setdefault("logits", []).append(Row(e.logits[image], Sum(logits, logits.abs())))
            values = self.case.ask.values(book.logits, image, e.targets[image].flatten())
            assert len(values) == e.values[image].numel()
            for k, value in enumerate(values):
                at = (image, k) if e.values.dim() == 2 else (image,)
                size = torch.maximum(value.detach().abs(), logits.abs().amax())
                rows.setdefault("values", []).append(Row(e.values[at], Sum(value.detach(), size)))
                page = book.page(value, self.saes, {block: gate[at].double() for block, gate in e.gates.items()})
                for block, scores in e.scores.items():
                    self.check_gate(e.gates[block][at], scores[at], page.units[block])
                rows.setdefault("relevance", []).append(Row(e.relevance[at], page.relevance[0], True))
                for entry, want in enumerate(page.relevance if e.blocks is not None else ()):
                    rows.setdefault("blocks", []).append(Row(e.blocks[at][entry], want, True))
                if self.codes:
                    for block, score in page.scores.items():
                        rows.setdefault("scores", []).append(Row(e.scores[block][at], score))
                    self.check_features(e, at, page)
        return rows

    def check_form(self, e: Explanation) -> None:
        """Shapes and dtypes, finite numbers, gates that follow from the scores, classes that are predicted."""
        case, wide, tensors = self.case, relevance_dtype(self.case.dtype), held(e)
        shape = (*e.values.shape, case.shape.grid[0] * case.shape.grid[1])
        assert {tuple(t.shape) for t in (e.relevance, *e.scores.values(), *e.gates.values())} == {shape}
        assert list(e.scores) == list(e.gates) == list(case.saes)
        assert (e.blocks is not None) == case.settings.per_block
        assert bool(e.features) == (case.settings.top_features > 0)
        computed = [t for name, t in tensors.items() if t.is_floating_point() and name != "values"]
        assert all(t.dtype == wide and bool(t.isfinite().all()) for t in computed)
        if case.ask.kind == "predicted":
            assert torch.equal(e.targets, e.logits.argmax(-1))

    def check_gate(self, gates: Tensor, scores: Tensor, unit: float) -> None:  # [P], [P]
        """Gates follow from the scores. In a narrow dtype the unit, a power of two, may be rounded to the next one."""
        units = (unit,) if self.case.dtype == torch.float64 else (unit, min(1.0, 2 * unit), unit / 2)
        close = {"rtol": 2000 * torch.finfo(scores.dtype).eps, "atol": 0.0}
        wants = [gate_of(scores / u, self.case.settings.gate).to(scores.dtype) for u in units]
        assert any(torch.allclose(gates, want, **close) for want in wants), (gates, wants)

    def check_features(self, e: Explanation, at: tuple[int, ...], page: Page) -> None:
        """The strongest features: what they are said to contribute, and that none is stronger."""
        tolerance = {torch.float64: EXACT, torch.float32: 1e-3}.get(self.case.dtype)
        if tolerance is None:
            return
        for block, top in e.features.items():
            c = page.contributions[block]
            patch = (top.patch_index[at], top.patch_contribution[at], c.value, c.scale)
            image = (top.image_index[at], top.image_contribution[at], c.value.sum(0), c.scale.sum(0))
            for index, value, want, scale in (patch, image):
                atol = tolerance * float(scale.max())
                expected = want.gather(-1, index.clamp(min=0)).where(index >= 0, 0)
                assert float((value - expected).abs().max()) <= atol, f"features[{block}]"
                strongest = want.abs().sort(-1, descending=True).values[..., : index.shape[-1]]
                assert float((value.abs() - strongest).abs().max()) <= atol, f"features[{block}]"


def check_nothing(case: Case, model: DrawnViT) -> None:
    """No images: all tensors of one image, without it. Only values tell whether relevance holds a constant."""
    some = held(case.explainer("native", model)(case.images(1), case.ask.targets(1)))
    some.pop("signal", None)
    for backend in BACKENDS:
        none = held(case.explainer(backend, model)(case.images(), case.ask.targets(0)))
        kinds = [{name: (t.dtype, t.shape[1:]) for name, t in found.items()} for found in (none, some)]
        assert kinds[0] == kinds[1], backend
        assert all(len(t) == 0 for t in none.values())


def explanations(case: Case, model: DrawnViT) -> dict[str, Explanation]:
    """By every backend, and by the graph if the case has one."""
    images, targets = case.images(), case.ask.targets(case.batch)
    found = {backend: case.explainer(backend, model)(images, targets) for backend in BACKENDS}
    return found | ({"graph": traced(case, case.explainer("native", model), images)} if case.graph else {})


def check_some(case: Case, model: DrawnViT) -> None:
    """All tensors of all backends are the textbook's, but for rounding."""
    judge, plain = Judge(case, model), Rows()
    for backend, e in explanations(case, model).items():
        rows = judge(e)
        plain = plain or rows  # the reference comes first
        for name in rows:
            for place, (row, by_reference) in enumerate(zip(rows[name], plain[name], strict=True)):
                bound = row.bound(case.dtype, by_reference)
                if row.error > bound:
                    changed = [Judge(case, model, seed)(e)[name][place].want.value for seed in (1, 2, 3)]
                    bound += TIMES * max(float((value - row.want.value).norm()) for value in changed)
                assert row.error <= bound, f"{backend}: {name}: off by {row.error:.1e}, {bound:.1e} allowed"


def check(case: Case) -> None:
    """Fails where a backend explains the case otherwise than the textbook, warns, or changes the model."""
    model = case.model()
    with silent():
        (check_some if case.batch else check_nothing)(case, model)
    assert all(parameter.requires_grad is not case.shape.frozen for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.slow
@settings(
    max_examples=int(CASES or 120), derandomize=CASES is None, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(cases())
def test_explanations_are_the_textbooks(case: Case) -> None:
    note(f"check({case!r})")
    check(case)


KNOWN = Case(
    Shape(depth=2, heads=2, prefix=2, grid=(2, 3), classes=3, reads=(Read(2, "patches"),)), ask=Ask("array", ((2, 0),)),
    saes={0: Coder(features=6)}, settings=Settings(per_block=True, top_features=2),
)  # fmt: skip


@pytest.mark.parametrize("name", ("logits", "values", "relevance", "blocks", "scores", "gates", "features"))
def test_a_small_error_is_seen(name: str) -> None:
    """An error of a millionth in any tensor."""
    model = KNOWN.model()
    e = KNOWN.explainer("native", model)(KNOWN.images(), KNOWN.ask.targets(1))
    judge = Judge(KNOWN, model)
    assert all(row.error <= row.bound(KNOWN.dtype, row) for rows in judge(e).values() for row in rows)

    def shifted(value: Tensor) -> Tensor:
        return value + 1e-6 * (value - value.mean()).norm() * torch.linspace(-1, 1, value.numel()).view_as(value)

    found = getattr(e, name)
    if name == "features":
        found = {0: found[0]._replace(image_contribution=shifted(found[0].image_contribution))}
    else:
        found = {0: shifted(found[0])} if isinstance(found, dict) else shifted(found)
    wrong = dataclasses.replace(e, **{name: found})
    if name in ("scores", "gates", "features"):
        with pytest.raises(AssertionError):
            judge(wrong)
    else:
        assert any(row.error > row.bound(KNOWN.dtype, row) for row in judge(wrong)[name])
