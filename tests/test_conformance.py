"""Every run of every conformance file, on every backend: the numbers of an independent implementation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
from torch import Tensor

from fga_fast.models.find import find_layout
from fga_fast.settings import Gate, Settings

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


def explain_reference(case: conformance.Case, run: int) -> Any:
    from fga_fast.reference import explain
    from fga_fast.result.explanation import Explanation

    result = explain(case.model, case.images, None, case.saes(run), Settings(case.gate(run)))
    layout = find_layout(case.model)
    return Explanation(
        relevance=result.relevance,
        logits=result.logits,
        targets=result.targets,
        grid=layout.grid,
        image_size=layout.image_size,
        scores=result.scores,
        gates=result.gates,
        backend="reference",
    )


def explain_native(case: conformance.Case, run: int) -> Any:
    from fga_fast import Explainer

    explainer = Explainer(case.model, saes=case.saes(run), gate=case.gate(run), backend="native")
    explanation = explainer(case.images)
    assert explanation.backend == "native"
    return explanation


def explain_graph(case: conformance.Case, run: int, *targets: Tensor) -> Any:
    """The traced graph, without what nobody reads, run as it is."""
    from fga_fast import Explainer, Explanation
    from fga_fast.graph.passes.biases import fold_biases
    from fga_fast.graph.trace import flatten
    from fga_fast.result.fields import nested

    explainer = Explainer(case.model, saes=case.saes(run), gate=case.gate(run), backend="native")
    flat = flatten(explainer.plan, case.images, "given" if targets else "predicted")
    fold_biases(flat.module)  # as before it is compiled
    layout = find_layout(case.model)
    found = dict(zip(flat.outputs, flat.module(case.images, *targets), strict=True))
    return Explanation(**nested(found), grid=layout.grid, image_size=layout.image_size, backend="graph")


EXPLAIN: dict[str, Callable[[conformance.Case, int], Any]] = {
    "reference": explain_reference,
    "native": explain_native,
    "graph": explain_graph,
}


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
    explanation = EXPLAIN[backend](case, run)
    layers = case.header["runs"][run]["layers"]
    assert sorted(explanation.scores) == sorted(layers)
    assert sorted(explanation.gates) == sorted(layers)
    assert explanation.relevance.dtype == DTYPES[dtype]
    assert torch.equal(explanation.targets.cpu(), case.tensors["target"])

    got = {"logits": explanation.logits, "attribution": explanation.relevance, "heatmap": explanation.heatmap()}
    got |= {f"score.{block}": explanation.scores[block] for block in layers}
    got |= {f"gate.{block}": explanation.gates[block] for block in layers}
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
    from fga_fast.reference import explain, gate

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
    expected = EXPLAIN[backend](case, run).relevance
    if backend == "graph":
        got = explain_graph(case, run, case.tensors["target"]).relevance
    elif backend == "native":
        from fga_fast import Explainer

        explainer = Explainer(case.model, saes=case.saes(run), gate=case.gate(run), backend="native")
        got = explainer(case.images, case.tensors["target"]).relevance
    else:
        from fga_fast.reference import explain

        settings = Settings(case.gate(run))
        got = explain(case.model, case.images, case.tensors["target"], case.saes(run), settings).relevance
    assert torch.equal(got, expected)


def conservative_relevance(
    backend: str, case: conformance.Case, saes: dict[int, Any], gate: Any, method: Any
) -> tuple[Tensor, dict[int, Tensor]]:
    """Relevance [n, P] and gates under the conservative backward pass."""
    if backend == "reference":
        from fga_fast.reference import explain

        result = explain(case.model, case.images, None, saes, Settings(gate, method=method, backward="conservative"))
        return result.relevance, result.gates
    from fga_fast import Explainer

    explainer = Explainer(case.model, saes, gate=gate, method=method, backward="conservative", backend="native")
    explanation = explainer(case.images)
    assert explanation.backend == "native"
    return explanation.relevance, explanation.gates


def conservative_contributions(backend: str, case: conformance.Case) -> Tensor:
    """x_0 . g_0 of every token [n, N], the class token included, under the conservative backward pass."""
    layout, targets = find_layout(case.model), case.tensors["target"][:, None]
    if backend == "reference":
        from fga_fast.reference.explain import differentiate
        from fga_fast.reference.input_x_gradient import input_x_gradient
        from fga_fast.reference.recording import recording

        with recording(layout, case.images, conservative=True, wanted=(0,)) as record:
            values = case.model(case.images.clone().requires_grad_()).gather(1, targets)
        return input_x_gradient(record.inputs[0], differentiate(values.sum(), record, {}).inputs[0])
    from fga_fast.engine.tape import Tape

    tape = Tape(layout, {}, settings=Settings(method="input_x_gradient", backward="conservative"))
    with tape.attached(case.images):
        values = case.model(case.images).gather(1, targets)
    return tape.backward(values[:, 0]).rows[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ("reference", "native"))
@pytest.mark.parametrize("name", CONSERVATIVE)
def test_conservative_backward(name: str, backend: str, dtype: str) -> None:
    case, settings, want = conformance.load_conservative(name, DTYPES[dtype])
    assert settings["backward"] == "conservative"
    saes = case.saes_after(settings["layers"])
    gate = Gate(base=settings["base"], slope=settings["slope"])
    got = {"input_x_gradient_all_tokens": conservative_contributions(backend, case)}
    for method in ("rollout", "input_x_gradient"):
        got[method], _ = conservative_relevance(backend, case, {}, gate, method)
        got[f"{method}_gated"], gates = conservative_relevance(backend, case, saes, gate, method)
        got |= {f"gate.{block}": values for block, values in gates.items()}
    assert got.keys() == want.keys()
    for quantity, expected in want.items():
        of_norm, of_element = errors(got[quantity], expected)
        conformance.report(f"{backend} {dtype} conservative {quantity.split('.')[0]}", of_norm, of_element)
        assert max(of_norm, of_element) <= TOLERANCE[DTYPES[dtype]], quantity


@pytest.mark.parametrize("name", CONSERVATIVE)
def test_conservative_numbers_are_not_those_of_the_exact_backward_pass(name: str) -> None:
    from fga_fast.reference import explain

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


def test_every_run_is_collected() -> None:
    """A run of pytest collects each stored run once per backend and dtype."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", __file__]
    here = Path(__file__).resolve().parents[1]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=here, check=True, env=dict(os.environ)).stdout
    collected = re.findall(r"::test_run\[(.+)\]", listed)
    expected = [
        f"{path.name.removesuffix('.safetensors')}-{run}-{backend}-{dtype}"
        for path in conformance.model_files()
        for run in range(len(conformance.header(path)["runs"]))
        for backend in BACKENDS
        for dtype in ("float64", "float32")
    ]
    assert expected
    assert sorted(collected) == sorted(expected)


@pytest.mark.parametrize(("ci", "exit_code"), [("1", 1), ("", 0)])
def test_a_skip_fails_in_ci(tmp_path: Path, ci: str, exit_code: int) -> None:
    here = Path(__file__).parent
    for name in ("conftest.py", "conformance.py"):
        (tmp_path / name).write_text((here / name).read_text())
    (tmp_path / "test_conformance.py").write_text("import pytest\n\ndef test_run():\n    pytest.skip('no numbers')\n")
    environment = dict(os.environ, CI=ci)
    environment |= {conformance.REQUIRE: "", conformance.VARIABLE: str(conformance.folder())}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, env=environment)
    assert done.returncode == exit_code, done.stdout
