"""Sensitivity and randomisation through `evaluate`: against loops, whatever the batch, and at no cost to others."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated import Model, exact, items, patches, seeded, subject
from torch import Tensor, nn

from fga_fast.dataset.items import Item, stable_number
from fga_fast.evaluation import store
from fga_fast.evaluation.measures import Batch, Measure
from fga_fast.evaluation.methods import METHODS
from fga_fast.evaluation.run import evaluate
from fga_fast.evaluation.subject import Method, Subject

pytest.importorskip("pyarrow")
scipy = pytest.importorskip("scipy.stats")
BOTH = ("sensitivity", "randomisation")
Row = dict[str, Any]


def run(out: Path, of: Subject, given: list[Item], methods: dict[str, Method], **settings: Any) -> list[Row]:
    usual: dict[str, Any] = {"metrics": BOTH, "batch_size": 4, "split": "both", "progress": False}
    rows: list[Row] = store.read(evaluate(of, given, methods, out=out, **{**usual, **settings})).to_pylist()
    return rows


def values(rows: list[Row]) -> dict[tuple[str, str, str, int], float]:
    return {(r["key"], r["method"], r["metric"], r["seed"]): r["value"] for r in rows if r["error"] is None}


def bits(model: nn.Module) -> list[bytes]:
    return [value.numpy().tobytes() for value in model.state_dict().values()]


def curved(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    return (patches(images).sin() * subject.model.weight[targets].exp()).detach()


def plain(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    return patches(images)


def sensitivity_by_loops(method: Method, of: Subject, item: Item, seed: int) -> float:
    assert isinstance(item.image, Tensor)
    generator = torch.Generator().manual_seed(stable_number(item.key, "sensitivity", seed))
    target = torch.tensor([item.target])
    clean, largest = method(of, item.image[None], target).double(), 0.0
    for _ in range(10):
        noise = (torch.rand(item.image.shape, generator=generator) * 2 - 1) * 0.02
        changed = method(of, (item.image + noise.to(item.image))[None], target).double()
        largest = max(largest, math.sqrt(float(((changed - clean) ** 2).sum())))
    return largest / math.sqrt(float((clean**2).sum()))


def shuffled(model: nn.Module, seed: int) -> nn.Module:
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight))
    return other


def randomisation_by_hand(method: Method, of: Subject, other: Subject, item: Item) -> float:
    assert isinstance(item.image, Tensor)
    target = torch.tensor([item.target])
    maps = [method(one, item.image[None], target)[0].double().numpy() for one in (of, other)]
    return abs(float(scipy.spearmanr(*maps).statistic))


def test_values_are_those_of_loops(tmp_path: Path) -> None:
    of, given, methods = subject(), items(5), {"exact": exact, "curved": curved}
    before = bits(of.model)
    rows = run(tmp_path, of, given, methods, seed=(0, 3))
    assert bits(of.model) == before and len(rows) == 5 * 2 * 2 * 2
    found = values(rows)
    for seed in (0, 3):
        other = Subject(shuffled(of.model, seed))
        for item in given:
            for name, method in methods.items():
                want = sensitivity_by_loops(method, of, item, seed)
                assert found[item.key, name, "sensitivity", seed] == pytest.approx(want, rel=1e-6)
                want = randomisation_by_hand(method, of, other, item)
                assert found[item.key, name, "randomisation_whole", seed] == pytest.approx(want, abs=1e-9)
    assert store.settings(tmp_path)["metrics"] == {
        "sensitivity": {"sensitivity": False}, "randomisation": {"randomisation_whole": False}
    }  # fmt: skip


def test_values_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    given, methods = items(7), {"exact": exact, "curved": curved}
    whole = values(run(tmp_path / "whole", subject(), given, methods))
    for size in (1, 3):
        assert values(run(tmp_path / str(size), subject(), given, methods, batch_size=size)) == pytest.approx(
            whole, rel=1e-6
        )
    turned = values(run(tmp_path / "turned", subject(), given[::-1], {"curved": curved}))
    assert turned == pytest.approx({key: whole[key] for key in turned}, rel=1e-6)


def test_kept_explainers_see_the_shuffled_weights(make_subject: Callable[..., Subject], tmp_path: Path) -> None:
    """Values are those of a copy of the model with explainers of its own; a map by chance is as it must be."""
    of, methods = make_subject(), {name: METHODS[name] for name in ("transmm", "fga", "random")}
    given = [Item(f"{n}", torch.randn(3, 32, 48, dtype=torch.float64), n) for n in range(2)]
    before = bits(of.model)
    found = values(run(tmp_path, of, given, methods))
    assert bits(of.model) == before
    other = Subject(shuffled(of.model, 0), of.saes)
    for item in given:
        for name in ("transmm", "fga"):
            want = randomisation_by_hand(methods[name], of, other, item)
            assert found[item.key, name, "randomisation_whole", 0] == pytest.approx(want, abs=1e-9) and want < 0.99
        # Drawn from the pixels: the same whatever the weights, and another map for each noisy image.
        assert found[item.key, "random", "randomisation_whole", 0] == pytest.approx(1)
        assert found[item.key, "random", "sensitivity", 0] > 1
    want = sensitivity_by_loops(methods["fga"], of, given[0], 0)
    assert found[given[0].key, "fga", "sensitivity", 0] == pytest.approx(want, rel=1e-6)


def test_controls_and_undefined_values(tmp_path: Path) -> None:
    def ones(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        return torch.ones(len(images), 16)

    def zeros(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros(len(images), 16)

    methods = {"ones": ones, "zeros": zeros, "plain": plain, "seeded": seeded}
    rows = run(tmp_path, subject(), items(1), methods)
    assert not any(row["error"] for row in rows)
    found = {(method, metric): value for (_, method, metric, _), value in values(rows).items()}
    assert found["ones", "sensitivity"] == 0 and math.isnan(found["zeros", "sensitivity"])
    assert math.isnan(found["ones", "randomisation_whole"]) and found["seeded", "sensitivity"] == 0
    for name in ("plain", "seeded"):
        assert found[name, "randomisation_whole"] == pytest.approx(1)


def test_a_method_that_fails_again_costs_its_own_value_only(tmp_path: Path) -> None:
    asked: list[int] = []
    calm = Model().weight

    def picky(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        asked.append(len(images))
        sizes = images.abs().amax((1, 2, 3))
        if bool(((sizes > 0) & (sizes < 0.5)).any()):
            raise KeyError("noise")
        return curved(subject, images, targets)

    def hole(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        found = curved(subject, images, targets)
        if not torch.equal(subject.model.weight, calm):
            found[images[:, 0, 0, 0] == 0] = torch.nan
        return found

    def never(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
        raise OSError("gone")

    given = [*items(2), Item("zero", torch.zeros(3, 8, 8), 0)]
    methods = {"never": never, "curved": curved, "picky": picky, "hole": hole}
    rows = run(tmp_path, subject(), given, methods)
    errors = [(row["key"], row["method"], row["metric"]) for row in rows if row["error"]]
    assert sorted(errors, key=str) == sorted(
        [
            *((one.key, "never", None) for one in given), ("zero", "picky", "sensitivity"),
            ("zero", "hole", "randomisation"),
        ],
        key=str,
    )  # fmt: skip
    assert [row["error"] for row in rows if row["method"] == "picky" and row["error"]] == ["KeyError: 'noise'"]
    # Clean maps; the first noise together and each alone; nine times without the image that failed; shuffled weights.
    assert asked == [3, 3, 1, 1, 1, *[2] * 9, 3]
    found = values(rows)
    for item in given:
        for metric in ("sensitivity", "randomisation_whole"):
            for name in ("picky", "hole"):
                if (item.key, name, metric, 0) in found:
                    assert found[item.key, name, metric, 0] == pytest.approx(
                        found[item.key, "curved", metric, 0], rel=1e-6, nan_ok=True
                    )
    assert len(found) == 3 * 3 * 2 - 2


STOPS: list[int] = []  # the call with shuffled weights that is interrupted, if any; no setting of the method


def stopping(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    if STOPS and not torch.equal(subject.model.weight, Model().weight):
        STOPS[0] -= 1
        if not STOPS[0]:
            STOPS.clear()
            raise KeyboardInterrupt
    return exact(subject, images, targets)


def test_an_interrupt_leaves_the_weights_and_a_run_that_goes_on(tmp_path: Path) -> None:
    STOPS[:] = [2]
    of, given, whole = subject(), items(9), tmp_path / "whole"
    before = bits(of.model)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", of, given, {"stopping": stopping})
    assert bits(of.model) == before and not STOPS
    assert len([*(tmp_path / "stopped" / "parts").iterdir()]) == 1
    run(tmp_path / "stopped", of, given, {"stopping": stopping})
    run(whole, of, given, {"stopping": stopping})
    assert (tmp_path / "stopped" / store.VALUES).read_bytes() == (whole / store.VALUES).read_bytes()


def test_measures_of_users_may_explain(tmp_path: Path) -> None:
    def mirrored(batch: Batch) -> dict[str, Tensor]:
        found = batch.explain(batch.images.flip(3))
        assert found.dtype == torch.float64 and found.shape == batch.maps.shape
        return {"mirrored": (found.unflatten(2, (4, 4)).flip(3).flatten(2) - batch.maps).abs().amax(2)}

    measure = {"mirrored": Measure(mirrored, {"mirrored": False}, explains=True)}
    found = values(run(tmp_path, subject(), items(3), {"exact": exact, "plain": plain}, metrics=measure))
    assert all((value < 1e-6) == (method == "plain") for (_, method, _, _), value in found.items())
