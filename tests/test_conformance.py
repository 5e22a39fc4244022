"""Every run of every conformance file, on every backend: the numbers of an independent implementation."""

from __future__ import annotations

import dataclasses
from typing import Any

import conformance
import pytest
import torch
from torch import Tensor

from fga_fast import Explainer, Explanation, Gate, ModelLayout
from fga_fast.graph.passes.biases import fold_biases
from fga_fast.graph.trace import flatten
from fga_fast.models.find import find_layout
from fga_fast.reference import explain, gate
from fga_fast.result.fields import nested
from fga_fast.settings import Settings

FOUND = conformance.folder().is_dir()
BACKENDS = ("reference", "native", "graph")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# (file, run, block) whose score is the rounding of a sum that cancels: before the last block, patches are read only
# through a LayerNorm, which ignores the length of x, so g . x is about eps / var(x) of its summands (1e-8 here). Such a
# score is compared on the scale of its summands, and what follows from it given the implementation's own score.
CANCELLING = {("vit_cls_relu.safetensors", 4, 2)}
CANCELLING_BELOW = 1e-5
HEATMAP_STORED = 1e-6  # expected heatmaps are stored as float32

pytestmark = pytest.mark.skipif(
    not FOUND, reason=f"no conformance numbers at {conformance.folder()}; set {conformance.VARIABLE} to their folder"
)
RUNS = conformance.runs() if FOUND else [("none", 0)]
FILES = [path.name for path in conformance.model_files()] if FOUND else ["none"]
CONSERVATIVE = [path.name for path in conformance.conservative_files()] if FOUND else ["none"]


def explained(backend: str, case: conformance.Case, run: int, targets: Tensor | None = None) -> Explanation:
    choice: Any = "native" if backend == "graph" else backend
    explainer = Explainer(case.model, case.saes(run), gate=case.gate(run), backend=choice, preset="published")
    if backend != "graph":
        e = explainer(case.images, targets)
        assert e.backend == backend
        return e
    # The traced graph, without what nobody reads, run as it is.
    flat = flatten(explainer.plan, case.images, "predicted" if targets is None else "given")
    fold_biases(flat.module)  # as before it is compiled
    outputs = flat.module(case.images, *(() if targets is None else (targets,)))
    layout, found = explainer.layout, dict(zip(flat.outputs, outputs, strict=True))
    return Explanation(**nested(found), grid=layout.grid, image_size=layout.image_size, backend="graph")


def errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Largest error over the images: of the norm, relative to the norm; of an element, relative to the largest one."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert torch.isfinite(got).all()
    got, want = got.detach().cpu().double().flatten(1), want.double().flatten(1)
    difference = got - want
    return relative(difference.norm(dim=1), want.norm(dim=1)), relative(
        difference.abs().amax(dim=1), want.abs().amax(dim=1)
    )


def relative(error: Tensor, size: Tensor) -> float:
    """Largest ratio; numbers that are all zero (scores after the last block, whose patches no one reads) must be met
    exactly."""
    ratio = torch.where(size > 0, error / size.clamp(min=torch.finfo(size.dtype).tiny), error * float("inf"))
    return float(ratio.nan_to_num(nan=0.0, posinf=float("inf")).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "run"), RUNS, ids=[f"{name.removesuffix('.safetensors')}-{run}" for name, run in RUNS]
)
def test_run(name: str, run: int, backend: str, dtype: str) -> None:
    case = conformance.load(name, DTYPES[dtype])
    e = explained(backend, case, run)
    layers = case.header["runs"][run]["layers"]
    assert sorted(e.scores) == sorted(layers)
    assert sorted(e.gates) == sorted(layers)
    assert e.relevance.dtype == DTYPES[dtype]
    assert torch.equal(e.targets.cpu(), case.tensors["target"])

    got = {"logits": e.logits, "attribution": e.relevance, "heatmap": e.heatmap()}
    got |= {f"score.{block}": e.scores[block] for block in layers}
    got |= {f"gate.{block}": e.gates[block] for block in layers}
    want = {"logits": case.tensors["logits"], **case.expected(run)}
    assert got.keys() == want.keys()

    for block in layers:
        if (name, run, block) in CANCELLING:
            check_cancelling(case, run, block, got, want)
    wrong = []
    for quantity in want:
        tolerance = TOLERANCE[DTYPES[dtype]]
        if quantity == "heatmap":
            tolerance = max(tolerance, HEATMAP_STORED)
        of_norm, of_element = errors(got[quantity], want[quantity])
        conformance.report(f"{backend} {dtype} {quantity.split('.')[0]}", of_norm, of_element)
        if not (of_norm <= tolerance and of_element <= tolerance):
            wrong.append(f"{quantity}: {of_norm:.2e} norm-wise, {of_element:.2e} at most, allowed {tolerance:.0e}")
    assert not wrong, "; ".join(wrong)


def summands(name: str, run: int) -> dict[int, Tensor]:
    """Per block sum_c |g_c x_c| [n, P] of a no_sae run, in float64: the sums that its scores are the remainders of."""
    case = conformance.load(name, torch.float64)
    layout = find_layout(case.model)
    streams: dict[int, Tensor] = {}
    images = case.images.clone().requires_grad_()
    handles = [
        layout.blocks[block].register_forward_hook(lambda _module, _in, out, block=block: streams.update({block: out}))
        for block in case.header["runs"][run]["layers"]
    ]
    logits = case.model(images)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(logits.gather(1, case.tensors["target"][:, None]).sum(), list(streams.values()))
    return {
        block: (x * g)[:, layout.prefix_tokens :].abs().sum(dim=-1).detach()
        for (block, x), g in zip(streams.items(), gradients, strict=True)
    }


def check_cancelling(
    case: conformance.Case, run: int, block: int, got: dict[str, Tensor], want: dict[str, Tensor]
) -> None:
    """Checks of a run with a cancelling score; takes the quantities that it checked out of `got` and `want`."""
    dtype = case.images.dtype
    size = summands(case.name, run)[block]
    score, gates = got.pop(f"score.{block}"), got.pop(f"gate.{block}")
    error = (score.double() - want.pop(f"score.{block}")).abs().amax(dim=1) / size.amax(dim=1)
    assert error.max() <= TOLERANCE[dtype], f"score.{block}: {error.max():.2e} of its summands"
    stored_run = case.header["runs"][run]
    of_own_score = gate(score.double(), stored_run["clamp_max"], stored_run["alpha"])
    assert max(errors(gates, of_own_score)) <= TOLERANCE[dtype]
    exact = conformance.load(case.name, torch.float64)
    given = {block: gates.double()}
    settings = Settings(exact.gate(run))
    relevance = explain(exact.model, exact.images, None, exact.saes(run), settings, given_gates=given).relevance
    stored = {f"gate.{block}": (gates, want.pop(f"gate.{block}")), "attribution": (relevance, want["attribution"])}
    if dtype == torch.float64:
        for quantity, pair in stored.items():
            assert max(errors(*pair)) <= 1e-6, quantity
        want["attribution"] = relevance
        return
    # In float32 the score is noise, and so are its gates; the rollout with these very gates is not.
    want["attribution"], want["heatmap"] = relevance, conformance.heatmap(relevance, case.images.shape[-2:])


def test_cancelling_scores_are_named_and_no_others() -> None:
    found = set()
    for name, run in RUNS:
        case = conformance.load(name, torch.float64)
        if case.header["runs"][run]["gate"] == "no_SAE":
            for block, size in summands(name, run).items():
                remainder = case.tensors[f"run.{run}.score.{block}"]
                if (remainder.norm(dim=1) < CANCELLING_BELOW * size.norm(dim=1)).any():
                    found.add((name, run, block))
    assert found == CANCELLING


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FILES, ids=[name.removesuffix(".safetensors") for name in FILES])
def test_targets_given_equal_targets_predicted(name: str, backend: str) -> None:
    """The stored targets are the predicted classes; naming them must not change the explanation."""
    case = conformance.load(name, torch.float64)
    run = len(case.header["runs"]) - 1
    expected = explained(backend, case, run).relevance
    assert torch.equal(explained(backend, case, run, case.tensors["target"]).relevance, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ("reference", "native"))
@pytest.mark.parametrize("name", CONSERVATIVE)
def test_conservative_backward(name: str, backend: Any, dtype: str) -> None:
    case, settings, want = conformance.load_conservative(name, DTYPES[dtype])
    assert settings["backward"] == "conservative"
    gate, found = Gate(base=settings["base"], slope=settings["slope"]), find_layout(case.model)
    # x_0 . g_0 of every token, the class token included: a layout in which all tokens are patches
    every = dataclasses.replace(found, prefix_tokens=0, grid=(1, found.tokens), pooled=(0, 1))

    def relevance(saes: dict[int, Any], method: Any, layout: ModelLayout | None = None) -> Explanation:
        e = Explainer(
            case.model,
            saes,
            gate=gate,
            method=method,
            backward="conservative",
            backend=backend,
            layout=layout,
            preset="published",
        )(case.images)
        assert e.backend == backend
        return e

    got = {"input_x_gradient_all_tokens": relevance({}, "input_x_gradient", every).relevance}
    for method in ("rollout", "input_x_gradient"):
        got[method] = relevance({}, method).relevance
        gated = relevance(case.saes_after(settings["layers"]), method)
        got[f"{method}_gated"] = gated.relevance
        got |= {f"gate.{block}": values for block, values in gated.gates.items()}
    assert got.keys() == want.keys()
    for quantity, expected in want.items():
        of_norm, of_element = errors(got[quantity], expected)
        conformance.report(f"{backend} {dtype} conservative {quantity.split('.')[0]}", of_norm, of_element)
        assert max(of_norm, of_element) <= TOLERANCE[DTYPES[dtype]], quantity


@pytest.mark.parametrize("name", CONSERVATIVE)
def test_conservative_numbers_are_not_those_of_the_exact_backward_pass(name: str) -> None:
    case, _, want = conformance.load_conservative(name, torch.float64)
    for method in ("rollout", "input_x_gradient"):
        exact = explain(case.model, case.images, None, {}, Settings(method=method)).relevance
        assert min(errors(exact, want[method])) > 0.1, method


def test_every_file_is_run() -> None:
    there = {path.name for path in conformance.files()}
    assert there == {name for name, _ in RUNS} | set(CONSERVATIVE)
    assert {"conservative_vit_cls_relu.safetensors"} == set(CONSERVATIVE)


def test_every_stored_number_belongs_to_a_run_or_a_later_metric() -> None:
    whole_file = {"images", "logits", "target", "text_embeddings"}
    for path in conformance.model_files():
        count = len(conformance.header(path)["runs"])
        for key in conformance.keys(path):
            run = conformance.run_of_key(key)
            assert (
                (run is not None and run < count) or key in whole_file or key.startswith(("model.", "sae.", "metric."))
            ), f"{path.name}: {key} is compared by no test"
