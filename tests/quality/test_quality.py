"""Numbers of `Quality` against a brute-force oracle in float64, and what becomes of images that do not fit."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import quality_case as case
import torch
from own_vit import WIDTH, own_vit
from pair_vit import PairViT, plainly
from PIL import Image
from quality_case import constant_sae, draw, exact_sae, items, oracle, random_sae
from torch import Tensor, nn

from fga_fast.dataset.items import Item, Loaded, load
from fga_fast.io.images import Preprocess
from fga_fast.models.find import find_layout
from fga_fast.quality import measure, sums
from fga_fast.quality.behaviour import Effect
from fga_fast.quality.histogram import Histogram, percentiles, whole_histogram
from fga_fast.quality.run import Quality, compare, quality
from fga_fast.sae import SparseAutoencoder

SAES = {
    "relu": random_sae(),
    "topk_signed": random_sae("topk_signed", k=5),
    "jumprelu": random_sae("jumprelu", threshold=1.5, normalize="layer_norm"),
}


def measured(images: Any, saes: Any, *, model: Any = None, **settings: Any) -> dict[int, Quality]:
    model = own_vit() if model is None else model
    return quality(model, saes, images, layout=model.layout(), progress=False, **settings)


def flat(value: Any) -> list[float]:
    """All numbers in it, in order."""
    if isinstance(value, dict):
        return [number for one in value.values() for number in flat(one)]
    if isinstance(value, (list, tuple)):
        return [number for one in value for number in flat(one)]
    return [float(value)] if isinstance(value, (int, float)) else []


def check(found: Quality, want: dict[str, Any]) -> None:
    for name in ("images", "tokens", "explained_variance", "l0", "dead"):
        assert getattr(found, name) == pytest.approx(want[name], rel=1e-10, abs=1e-12), name
    np.testing.assert_allclose(found.unexplained, want["unexplained"], rtol=1e-10)
    assert list(found.l0_percentiles) == want["l0_percentiles"]
    pairs = ((found.l0_histogram, "lengths"), (found.density, "density"), (found.cosines, "cosines"))
    for histogram, name in pairs:
        counts = np.histogram(want[name], histogram.edges)[0]
        assert list(histogram.counts) == counts.tolist() and counts.sum() == len(want[name]), name
    assert found.copies == np.mean(np.array(want["cosines"]) > 0.9)
    for name in ("loss", "accuracy", "agreement", "divergence"):
        effect: Effect | None = getattr(found.behaviour, name)
        if want[name] is None:
            assert effect is None
        else:
            assert effect is not None
            np.testing.assert_allclose(flat(asdict(effect)), want[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(SAES))
@pytest.mark.parametrize("output", ("softmax", "sigmoid", "features"))
def test_every_number(name: str, output: Any) -> None:
    given = items(7, classes=(2, None, 0))
    found = measured(given, {1: SAES[name]}, output=output, batch_size=3)[1]
    want = oracle(given, SAES[name], 1, output)
    check(found, want)
    kind = "divergence" if output == "features" else "loss"
    plain, spliced, mean = want[kind]
    recovered = (mean - spliced) / (mean - plain) if mean - plain > 1e-6 else None
    assert found.behaviour.recovered == (None if recovered is None else pytest.approx(recovered, rel=1e-9))
    assert found.behaviour.known == (0 if output == "features" else 5) and found.errors == ()


def test_the_oracle_sees_what_it_is_for() -> None:
    """Dead and rare features, several L0, classes that change: else the tests above could not fail."""
    want = oracle(items(7, classes=(2, None, 0)), SAES["relu"], 1)
    assert 0 < want["dead"] < 1 and len({*want["lengths"]}) > 3 and max(want["density"]) - min(want["density"]) > 1
    assert len({round(value, 6) for value in want["loss"]}) == 3 and want["agreement"][2] < 1


def test_several_blocks_and_saes_at_once() -> None:
    given = items(4, classes=(1,))
    saes = {"a": (0, SAES["relu"]), "b": (2, SAES["jumprelu"]), "c": (0, SAES["topk_signed"])}
    model = own_vit()
    found = compare(model, saes, given, layout=model.layout(), progress=False)
    assert list(found) == ["a", "b", "c"]
    for name, (block, sae) in saes.items():
        assert found[name].block == block
        check(found[name], oracle(given, sae, block))


@pytest.mark.parametrize("kind", ("tokens first", "tuple", "lists"))
def test_models_of_other_kinds(kind: str) -> None:
    given = items(3)
    own = own_vit(returns="tensor" if kind == "lists" else kind)
    model = PairViT(own, plainly).eval() if kind == "lists" else own
    check(measured(given, {1: SAES["relu"]}, model=model)[1], oracle(given, SAES["relu"], 1))


def test_batch_sizes_and_tensors_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = items(7)
    want = flat(asdict(measured(given, {1: SAES["relu"]}, batch_size=1)[1]))
    assert len(want) > 60
    for size in (2, 7, 100):
        np.testing.assert_allclose(
            flat(asdict(measured(given, {1: SAES["relu"]}, batch_size=size)[1])), want, rtol=1e-12, atol=1e-12
        )
    monkeypatch.setattr(sums, "_CODES", 60)  # two tokens at a time
    stacked = torch.stack([one.image for one in given])  # type: ignore[misc]
    np.testing.assert_allclose(flat(asdict(measured(stacked, {1: SAES["relu"]})[1])), want, rtol=1e-12, atol=1e-12)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    x = draw(50, 3, 4) + 1e6
    spread = sums.Spread.of(x[:20])
    for start in (20, 21, 35):
        spread = spread.merged(sums.Spread.of(x[start : {20: 21, 21: 35, 35: 50}[start]]))
    want = ((x - x.reshape(-1, 4).mean(0)) ** 2).sum((0, 2))
    torch.testing.assert_close(spread.total(), want, rtol=1e-9, atol=0)
    assert spread.images == 50
    # A sum of squares would have lost them.
    naive = (x**2).sum() - 150 * (x.reshape(-1, 4).mean(0) ** 2).sum()
    assert abs(float(naive - want.sum())) > 1e-4 * float(want.sum())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_same_as_self_check(tiny_vit: Any, dtype: torch.dtype) -> None:
    """With a model of a library; of 16 bits with an SAE in float32."""
    model = tiny_vit().to(dtype)
    images = torch.randn(5, 3, 32, 48)
    sae = SparseAutoencoder(torch.randn(16, 40), None, 0.1 * torch.randn(40, 16), torch.randn(16))
    kept: list[Tensor] = []
    hook = model.blocks[1].register_forward_hook(lambda _m, _i, out: kept.append(out[:, 1:].detach()))
    model(images.to(dtype))
    hook.remove()
    want = sae.self_check(kept[0].float())
    found = quality(model, {1: sae}, images, batch_size=5, progress=False)[1]
    assert (found.explained_variance, found.l0, found.dead) == pytest.approx(want[:3], rel=1e-5)
    assert found.tokens == want.tokens == 30 and found.behaviour.output == "softmax"


@pytest.mark.parametrize("kind", ("no head", "dual encoder"))
def test_models_without_classes(tiny_vit: Any, kind: str) -> None:
    """Their features are compared."""
    if kind == "no head":
        model, images = tiny_vit(num_classes=0), torch.randn(3, 3, 32, 48)
    else:
        pytest.importorskip("transformers")
        dual = next(family for family in families.registry() if family.name == "CLIP with text")
        model, images = dual.build(), dual.images(3)
    layout = find_layout(model)
    width = int(layout.d_model or 0)
    sae = SparseAutoencoder(torch.randn(width, 40), None, 0.1 * torch.randn(40, width), torch.randn(width))
    found = quality(model, {0: sae}, images, progress=False)[0].behaviour
    assert (found.output, found.loss, found.agreement) == ("features", None, None)

    def emptied(_module: Any, _inputs: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        patches = x[:, layout.prefix_tokens :]
        new = torch.cat([x[:, : layout.prefix_tokens], patches.mean((0, 1)).expand_as(patches)], 1)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    with torch.no_grad():
        plain = families.logits_of(model, images)
        hook = layout.blocks[0].register_forward_hook(emptied)
        other = families.logits_of(model, images)
        hook.remove()
    want = 1 - torch.nn.functional.cosine_similarity(plain.double(), other.double()).mean()
    assert found.divergence.mean == pytest.approx(float(want), rel=1e-3) and float(want) > 1e-3


@pytest.mark.parametrize("output", ("softmax", "sigmoid"))
def test_classes_of_a_model_without_any_are_refused(output: Any) -> None:
    model = own_vit()
    model.head, model.num_classes = nn.Identity(), 0  # type: ignore[assignment]
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    message = f"^output: expected features for a model without classes, got {output}$"
    with pytest.raises(ValueError, match=message):
        measured(items(3), {1: SAES["relu"]}, model=model, output=output, batch_size=3)
    assert len(calls) == 1


def test_an_exact_sae_keeps_everything() -> None:
    found = measured(items(4, classes=(1, 2)), {1: exact_sae()})[1]
    assert found.explained_variance == pytest.approx(1, abs=1e-12) and found.l0 == WIDTH
    assert found.behaviour.divergence_recovered == pytest.approx(1, abs=1e-9)
    assert found.behaviour.recovered == found.behaviour.loss_recovered
    loss = found.behaviour.loss
    assert loss is not None and loss.spliced == pytest.approx(loss.plain, abs=1e-12)
    assert flat(asdict(found.behaviour.agreement))[:2] == [1, 1]  # type: ignore[arg-type]


def test_a_constant_sae_keeps_nothing() -> None:
    given = items(4, classes=(1, 2))
    x = case.stream(own_vit(), torch.stack([one.image for one in given]), 1).detach()  # type: ignore[misc]
    found = measured(given, {1: constant_sae(x[:, 1:].reshape(-1, WIDTH).mean(0))})[1]
    assert found.explained_variance == pytest.approx(0, abs=1e-12)
    assert found.behaviour.divergence_recovered == pytest.approx(0, abs=1e-9)
    assert (found.l0, found.dead, found.density.counts) == (0, 1, (0,) * len(found.density.counts))
    assert measured(given, {1: constant_sae(torch.zeros(WIDTH).double())})[1].explained_variance < 0


def test_nothing_to_recover_after_the_last_block() -> None:
    """The head reads the class token, so patches mean nothing there."""
    found = measured(items(3, classes=(1,)), {2: SAES["relu"]})[2].behaviour
    assert found.loss is not None and found.loss.mean == found.loss.plain
    assert found.loss_recovered is found.divergence_recovered is found.recovered is None


def test_several_classes_of_one_image(tmp_path: Path) -> None:
    """Items of one file are one image; with sigmoids all their classes are true of it."""
    pixels = torch.randint(0, 255, (16, 24, 3), generator=torch.Generator().manual_seed(1)).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    preprocess = Preprocess((16, 24), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    given = [Item("a#1", tmp_path / "a.png", 1), Item("a#2", tmp_path / "a.png", 3), *items(1)]
    found = measured(given, {1: SAES["relu"]}, output="sigmoid", preprocess=preprocess)[1]
    assert (found.images, found.behaviour.known) == (2, 1)
    with torch.no_grad():
        logits = own_vit()(preprocess(Image.open(tmp_path / "a.png"))[None].double())
    truth = torch.tensor([[0.0, 1, 0, 1, 0]]).double()
    want = float(nn.functional.binary_cross_entropy(logits.sigmoid(), truth))
    assert found.behaviour.loss is not None and found.behaviour.loss.plain == pytest.approx(want, rel=1e-6)
    assert found.behaviour.accuracy is not None
    assert found.behaviour.accuracy.plain == float(((logits > 0) == (truth > 0)).double().mean())
    loss = measured(given, {1: SAES["relu"]}, preprocess=preprocess)[1].behaviour.loss
    logs = logits.log_softmax(1)[0]
    assert loss is not None and loss.plain == pytest.approx(-float(logs[1] + logs[3]) / 2, rel=1e-6)


def test_a_bad_image_costs_one_image(tmp_path: Path) -> None:
    good = items(5, classes=(1,))
    (tmp_path / "bad.png").write_bytes(b"none")
    image = good[0].image
    assert isinstance(image, Tensor)
    bad = [
        Item("file", tmp_path / "bad.png"), Item("nan", torch.full_like(image, float("nan"))),
        Item("large", image * 1e300), Item("shape", image[:, :8]), Item("class", image * 1.0, 5),
    ]  # fmt: skip
    mixed = [bad[0], good[0], bad[1], good[1], bad[2], *good[2:4], bad[3], good[4], bad[4]]
    found = measured(mixed, {1: SAES["relu"]}, batch_size=4)[1]
    reasons = dict(found.errors)
    assert [key for key, _ in found.errors] == ["file", "nan", "large", "shape", "class"]
    for key, reason in {
        "file": "bad.png is not an image", "nan": "images: contain NaN or Inf",
        "large": "the residual stream after block 1 came out NaN or Inf", "shape": "The size of tensor a (4)",
        "class": "target: expected a class from 0 to 4, got 5",
    }.items():  # fmt: skip
        assert reason in reasons[key]
    check(found, oracle(good, SAES["relu"], 1))
    with pytest.raises(ValueError, match=r"images: none of 2 could be measured; the first: file: "):
        measured(bad[:2], {1: SAES["relu"]})


def test_images_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of three batches is there at a time, whatever the number of images: one in use, two read ahead."""
    alive, most = 0, 0

    def counted(item: Item, *settings: Any) -> Loaded:
        nonlocal alive, most
        found = load(item, *settings)
        image = found.image.clone()
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(image, gone)
        return found._replace(image=image)

    def gone() -> None:
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(measure, "load", counted)
    found = measured(items(40), {1: SAES["relu"]}, batch_size=2)[1]
    assert found.images == 40 and 2 <= most <= 6 and alive <= 6


class Frail(nn.Module):
    """An `OwnViT` that fails in its last block for images with a large first pixel, and keeps count of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = own_vit()
        self.inner.layers[2].register_forward_pre_hook(self._fail)

    def _fail(self, _module: nn.Module, inputs: Any) -> None:
        if bool((inputs[0] > 1e3).any()):
            raise RuntimeError("mine")

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)  # type: ignore[no-any-return]


def test_the_model_is_left_as_it_came() -> None:
    model = Frail().train()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [parameter.requires_grad for parameter in model.parameters()]
    given = [*items(3), Item("large", items(1)[0].image * 1e6)]  # type: ignore[operator]
    found = quality(model, {1: SAES["relu"]}, given, layout=model.inner.layout(), progress=False)[1]
    assert found.errors == (("large", "RuntimeError: mine"),) and found.images == 3
    assert model.training and all(module.training for module in model.modules() if module is not model)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_sae_that_overflows_is_named() -> None:
    rows = 1e200 * draw(24, WIDTH)
    sae = SparseAutoencoder(1e200 * draw(WIDTH, 24), None, rows, torch.zeros(WIDTH).double())
    with pytest.raises(ValueError, match="first: image 0: ValueError: the reconstruction of 1 came out NaN"):
        measured(items(2), {1: sae})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"output": "logits"}, ValueError, "output: expected softmax, sigmoid, features or None, got 'logits'"),
        ({"saes": {}}, ValueError, "saes: expected at least one SAE, got none"),
        ({"saes": {3: SAES["relu"]}}, ValueError, "saes: expected blocks 0 to 2 as keys, got 3"),
        ({"saes": {1: SAES["relu"].W_dec}}, TypeError, r"saes\[1\]: expected a SparseAutoencoder, got Tensor"),
        ({"second": {0: SAES["relu"]}}, ValueError, r"second: expected SAEs of the blocks \[1\], got one of block 0"),
        ({"images": draw(3, 16, 24)}, ValueError, r"images: expected \[I, channels, H, W\], got \[3, 16, 24\]"),
        ({"images": []}, ValueError, "items: expected at least one image, got none"),
        ({"images": [draw(3, 16, 24)]}, TypeError, "images: expected items of fga_fast.dataset, or a tensor"),
        ({"images": torch.zeros(1, 3, 16, 24)[:0]}, ValueError, "items: expected at least one image, got none"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"images": items(2), "saes": {1: SAES["relu"]}, **settings}
    with pytest.raises(error, match=message):
        measured(given.pop("images"), given.pop("saes"), **given)


def test_tokens_that_do_not_vary() -> None:
    model = own_vit()
    with torch.no_grad():
        model.patches.weight.zero_()
        model.position.copy_(model.position[:, :1].expand_as(model.position))
    with pytest.raises(ValueError, match="images: expected tokens that differ after block 0, got 6 without variance"):
        measured(items(1), {0: SAES["relu"]}, model=model)


@pytest.mark.parametrize(
    ("effect", "recovered"),
    [
        ((1, 1, 3), 1),
        ((1, 3, 3), 0),
        ((1, 2, 3), 0.5),
        ((1, 4, 3), -0.5),
        ((1, 0, 3), 1.5),
        ((1, 0, 1), None),
        ((1, 1, 0), None),
    ],
)
def test_recovered_by_hand(effect: tuple[float, float, float], recovered: float | None) -> None:
    assert Effect(*effect).recovered == recovered


def test_bins_of_l0() -> None:
    """At most thirty, each of equally many whole numbers, and nothing is lost."""
    lengths = torch.zeros(1000, dtype=torch.int64)
    lengths[[3, 7, 8, 640]] = torch.tensor([1, 2, 96, 1])
    found = whole_histogram(lengths)
    assert len(found.counts) <= 30 and sum(found.counts) == 100 and found.edges[0] == 3 and found.edges[-1] > 640
    assert {b - a for a, b in zip(found.edges, found.edges[1:], strict=False)} == {22.0}
    assert percentiles(lengths) == (8, 8, 8)
    lengths[7] = 5
    assert percentiles(lengths) == (7, 8, 8)
    one = torch.zeros(4, dtype=torch.int64)
    one[0] = 5
    assert whole_histogram(one) == Histogram((0.0, 1.0), (5,)) and percentiles(one) == (0, 0, 0)
