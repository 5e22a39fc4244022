"""An explainer called from unusual places gives the numbers of a plain call, or an error that says what to do."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from explaining import agree
from packages import NAMES, explainer, images
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fga_fast import Embedding, Explainer, Explanation, explain, load_package
from fga_fast.io.images import Preprocess

BACKENDS = ["native", "composite", "reference"]
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda f, x: torch.func.vmap(lambda one: f(one[None]))(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}
TRACERS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "make_fx": lambda f, x: make_fx(f)(x),
    "torch.jit.trace": lambda f, x: torch.jit.trace(f, x),
    "torch.export": lambda f, x: torch.export.export(Calls(f), (x,), strict=False),
    "fake tensors": lambda f, x: fake(f, x),
}


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class FunctionsPass(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class OperatorsPass(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def fake(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return function(x)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "a default device": default_device,
    "a device as context": lambda: torch.device("meta"),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "deterministic algorithms": deterministic,
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "another function mode": FunctionsPass,
    "another dispatch mode": OperatorsPass,
    "functions of torch that no mode sees": torch._C.DisableTorchFunction,
    "hooks on saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
}
# anomaly detection warns that it is on
pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")


def everything(backend: Any) -> Explainer:
    """Makes every tensor that an explanation can make."""
    settings = {"top_features": 3, "per_block": True, "ungated": True, "class_names": NAMES}
    return explainer(torch.float32, backend=backend, **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_change_nothing(name: str, backend: Any) -> None:
    x, e = images(2, torch.float32), everything(backend)
    for targets in (None, ["bee", "cat"], [[0, 1], [2, 3]], lambda logits: logits.square().sum(1)):
        want = e(x, targets)
        with CONTEXTS[name]():
            got = e(x, targets)
            heat = got.heatmap()
        agree(got, want, 1e-6)
        assert heat.dtype == torch.float32
        torch.testing.assert_close(heat, want.heatmap())


@pytest.mark.parametrize("name", CONTEXTS)
def test_explainers_made_in_contexts_are_the_same(name: str) -> None:
    x, vector, want = images(2, torch.float32), torch.ones(5), everything("auto")
    with CONTEXTS[name]():
        same = Explainer(
            want.model, want.saes, layout=want.layout, top_features=3, per_block=True, ungated=True, class_names=NAMES,
        )  # fmt: skip
        likeness = same(x, Embedding(vector))
    agree(same(x), want(x), 1e-6)
    agree(likeness, want(x, Embedding(vector)), 1e-6)


@pytest.mark.parametrize("name", CONTEXTS)
def test_pictures_and_files_in_contexts(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image").new("RGB", (24, 16), (10, 200, 30))
    found = everything("auto")(images(1, torch.float32))
    overlay, ready = found.overlay(image), Preprocess((16, 24), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))(image)
    with CONTEXTS[name]():
        torch.testing.assert_close(found.overlay(image), overlay)
        torch.testing.assert_close(Preprocess((16, 24), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))(image), ready)
        found.plot(image)
        again = Explanation.load(found.save(tmp_path / "found"))
    agree(again, found, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_an_explainer_is_the_model_s(backend: Any) -> None:
    x, e = images(2, torch.float32), explainer(torch.float32, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got, logits = e(x), e.model(x)
    torch.testing.assert_close(got.logits.to(logits.dtype), logits, rtol=0.05, atol=0.05)
    assert got.relevance.dtype == torch.float32
    want = e(x, got.targets).relevance
    assert float((got.relevance - want).norm()) < 0.1 * float(want.norm())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_caller_s_graph_is_left_alone(backend: Any) -> None:
    e, x = explainer(backend=backend), images(2).requires_grad_()
    between = x * 3
    found = e(between)
    assert not any(t.requires_grad for t in (found.relevance, found.logits, found.values))
    between.square().sum().backward()
    torch.testing.assert_close(x.grad, 18 * x.detach())
    assert all(parameter.grad is None for parameter in e.model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_explainer_inside_a_backward_pass(backend: Any) -> None:
    e, found = explainer(backend=backend), []

    class Explains(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            found.append(e(images(2)))
            return grads[0]

    Explains.apply(torch.ones(1, requires_grad=True)).sum().backward()  # type: ignore[no-untyped-call]
    agree(found[0], e(images(2)), 1e-12)


@pytest.mark.parametrize("outer", BACKENDS)
@pytest.mark.parametrize("inner", BACKENDS)
def test_a_target_function_may_call_an_explainer_and_the_model(outer: Any, inner: Any) -> None:
    """Both on the model that is being explained, whose hooks must not take one pass for the other."""
    e, other, x = explainer(backend=outer), explainer(backend=inner), images(2)
    other = Explainer(e.model, other.saes, layout=e.layout, backend=inner)
    seen = []

    def margin(logits: Tensor) -> Tensor:
        with torch.no_grad():
            blank = e.model(torch.zeros_like(x))
        seen.append(other(x, 2))
        return (logits - blank)[:, 1]

    got = e(x, margin)
    agree(seen[0], other(x, 2), 1e-12)
    torch.testing.assert_close(got.relevance, e(x, 1).relevance)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in e.model.modules())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_refused(name: str, backend: Any) -> None:
    e = explainer(backend=backend)
    with pytest.raises(RuntimeError, match=rf"^explain: called inside torch.func's {name}, .*outside of it"):
        TRANSFORMS[name](lambda x: e(x).relevance, images(2))
    agree(e(images(2)), explainer(backend=backend)(images(2)), 1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.parametrize("name", TRACERS)
def test_tracers_are_refused(name: str) -> None:
    e = explainer()
    with pytest.raises(RuntimeError, match=r"^explain: called while a graph is traced .*Explainer\.module\(example\)"):
        TRACERS[name](lambda x: e(x).relevance, images(2))


def test_torch_compile_steps_over_an_explainer_once() -> None:
    pytest.importorskip("torch._dynamo.testing")
    counter = torch._dynamo.testing.CompileCounter()
    e, x = explainer(), images(2)

    def step(x: Tensor) -> Tensor:
        return e(x + 1).relevance * x.sum()

    run = torch.compile(step, backend=counter)
    for _ in range(3):
        torch.testing.assert_close(run(x), x.sum() * e(x + 1).relevance)
    assert counter.frame_count == 2  # what is before the explainer, and what is after it
    with pytest.raises(Exception, match=r"for a full graph, call Explainer\.module"):
        torch.compile(step, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("name", ["explain", "Explainer", "heatmap", "targets"])
def test_other_calls_in_a_compiled_function(name: str) -> None:
    e, x = explainer(), images(2)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "explain": lambda x: explain(e.model, x, 1, e.saes, layout=e.layout).relevance * 2,
        "Explainer": lambda x: Explainer(e.model, layout=e.layout)(x).relevance * 2,
        "heatmap": lambda x: e(x).heatmap() * 2,
        "targets": lambda x: e(x, torch.tensor([[0, 1], [1, 2]])).scores[0] * 2,
    }
    torch.testing.assert_close(torch.compile(calls[name], backend="eager")(x), calls[name](x))


def test_a_module_is_one_graph() -> None:
    e, x = explainer(), images(2)
    whole = torch.compile(e.module(x), backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x)["relevance"], e(x).relevance)


def test_importing_does_not_load_the_compiler() -> None:
    code = "import sys, fga_fast; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def compiled_forward(model: Any) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_block(model: Any) -> nn.Module:
    model.layers[1].forward = torch.compile(model.layers[1].forward, backend="eager")
    return model


def compiled_in_place(model: Any) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "change",
    [lambda model: torch.compile(model, backend="eager"), compiled_in_place, compiled_forward, compiled_block],
    ids=["torch.compile(model)", "model.compile()", "model.forward", "block.forward"],
)
def test_compiled_models_are_refused(change: Callable[[Any], nn.Module]) -> None:
    e = explainer()
    layout = e.layout
    with pytest.raises(ValueError, match=r"cannot be explained: .*compiled"):
        Explainer(change(e.model), layout=layout)


def test_a_forward_that_no_compiler_enters_is_explained() -> None:
    e, x = explainer(), images(2)
    want = e(x)
    e.model.forward = torch.compiler.disable(e.model.forward)  # type: ignore[method-assign]
    agree(Explainer(e.model, e.saes, layout=e.layout)(x), want, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_threads(backend: Any) -> None:
    e, x = explainer(backend=backend), images(2)
    want = e(x)
    for same in (copy.deepcopy(e), pickle.loads(pickle.dumps(e))):
        assert same.model is not e.model
        agree(same(x), want, 1e-12)
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(lambda _: e(x), range(6)):
            agree(got, want, 1e-12)


def _explain_there(e: Explainer, answers: Any) -> None:
    answers.put(e(images(2)).relevance.tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_processes(backend: Any, method: str) -> None:
    """After a process used it, which leaves threads and locks behind; in a process of one thread, since torch itself
    does not outlive a fork with several.
    """
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    code = f"import test_callers; test_callers.in_another_process({backend!r}, {method!r})"
    here = {"cwd": Path(__file__).parent, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, **here)  # type: ignore[call-overload]


def in_another_process(backend: Any, method: str) -> None:
    e = explainer(backend=backend)
    want, context = e(images(2)).relevance, multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=_explain_there, args=(e, answers))  # type: ignore[attr-defined]
    process.start()
    try:
        got = torch.tensor(answers.get(timeout=120), dtype=torch.float64)
    finally:
        process.kill()
        process.join()
    torch.testing.assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTEXTS)
def test_packages_in_contexts(name: str, predicted_package: Path) -> None:
    x = images(2)
    want = load_package(predicted_package)(x)
    with CONTEXTS[name]():
        agree(load_package(predicted_package)(x), want, 1e-12)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_packages_in_transforms_are_refused(name: str, predicted_package: Path) -> None:
    package = load_package(predicted_package)
    with pytest.raises(RuntimeError, match=rf"^explain: called inside torch.func's {name}"):
        TRANSFORMS[name](lambda x: package(x).relevance, images(2))


def test_packages_in_a_compiled_function(predicted_package: Path) -> None:
    package, x = load_package(predicted_package), images(2)
    got = torch.compile(lambda x: package(x).relevance * 2, backend="eager")(x)
    torch.testing.assert_close(got, 2 * package(x).relevance)
