"""The tape leaves a model as it came, whatever happens, and refuses what it cannot explain."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explaining import Build, sae_for
from torch import Tensor, nn

from fga_fast import Explainer
from fga_fast.engine.records import Gating
from fga_fast.engine.tape import Tape
from fga_fast.models.block_io import TapeError
from fga_fast.models.find import find_layout


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an explanation might disturb."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {n: [dict(getattr(m, h)) for h in hooks] for n, m in model.named_modules()},
        "training": {n: m.training for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.requires_grad, p.grad is None, p._version) for n, p in model.named_parameters()},
        "buffers": {n: (id(b), b._version) for n, b in model.named_buffers()},
    }


@pytest.fixture(params=("requires_grad", "frozen", "mixed"))
def model(request: pytest.FixtureRequest, tiny_vit: Build) -> nn.Module:
    built = tiny_vit()
    for index, parameter in enumerate(built.parameters()):
        parameter.requires_grad_(request.param == "requires_grad" or (request.param == "mixed" and index % 2 == 0))
    return built


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 48)


def refused(model: nn.Module, match: str, batch: Tensor | None = None, **settings: Any) -> None:
    """By every backend, in the same words."""
    found = set()
    for backend in ("native", "composite", "reference"):
        before = state_of(model)
        with pytest.raises(TapeError, match=match) as error:
            Explainer(model, backend=backend, **settings, preset="published")(images() if batch is None else batch)  # type: ignore[arg-type]
        found.add(str(error.value))
        assert state_of(model) == before
    assert len(found) == 1


def test_the_model_is_left_as_it_came(model: nn.Module) -> None:
    before = state_of(model)
    Explainer(model, {1: sae_for(model)}, backend="native", preset="published")(images())
    assert state_of(model) == before


class Interrupting(nn.Module):
    """Raises in the middle of the forward pass."""

    def __init__(self, inner: nn.Module, error: BaseException) -> None:
        super().__init__()
        self.inner, self.error = inner, error

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) > 1:  # one image still works, so that the explainer can be tried again
            raise self.error
        return self.inner(x, *args, **kwargs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("error", (ValueError("broken"), KeyboardInterrupt(), RuntimeError("out of memory")))
@pytest.mark.parametrize("place", ("mlp", "attn", "norm1"))
def test_the_model_is_left_as_it_came_after_an_exception(tiny_vit: Build, error: BaseException, place: str) -> None:
    model = tiny_vit()
    block = model.blocks[1]  # type: ignore[index]
    setattr(block, place, Interrupting(getattr(block, place), error))
    before = state_of(model)
    explainer = Explainer(model, {1: sae_for(model)}, backend="native", preset="published")
    wrapped = isinstance(error, RuntimeError)
    with pytest.raises(TapeError if wrapped else type(error)) as found:
        explainer(images())
    if wrapped:
        assert found.value.__cause__ is error
        assert "the forward pass failed in block 1 (Block) with RuntimeError: out of memory" in str(found.value)
    assert state_of(model) == before
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch.is_grad_enabled()
    assert explainer(images(1)).relevance.shape == (1, 6)


def test_the_model_is_left_as_it_came_after_an_exception_in_backward(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(model)
    explainer = Explainer(model, {1: sae_for(model)}, backend="native", preset="published")
    monkeypatch.setattr(Gating, "__call__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        explainer(images())
    assert state_of(model) == before


@pytest.mark.parametrize("targets", (99, -1, [0, 99], [0], torch.zeros(3, 2, dtype=torch.int64)))
def test_the_model_is_left_as_it_came_after_a_bad_target(model: nn.Module, targets: Any) -> None:
    before = state_of(model)
    with pytest.raises(ValueError, match="targets"):
        Explainer(model, {1: sae_for(model)}, backend="native", preset="published")(images(), targets)
    assert state_of(model) == before


def test_no_gradient_of_any_weight_is_computed(tiny_vit: Build) -> None:
    """No node of the graph leads to a parameter, so autograd neither computes nor keeps anything for one."""
    model = tiny_vit()
    tape = Tape(find_layout(model), {})
    batch = images()
    with tape.attached(batch):
        values = model(batch)[:, 0]
    parameters = {id(p) for p in model.parameters()}
    leaves, seen, stack = set(), set(), [values.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
        stack += [following for following, _ in node.next_functions]
    assert len(leaves) == 1 and not leaves & parameters
    tape.backward(values)
    assert all(p.grad is None for p in model.parameters())


def test_existing_hooks_of_the_user_still_run(tiny_vit: Build) -> None:
    model, calls = tiny_vit(), []
    model.blocks[1].register_forward_hook(lambda *_: calls.append("block"))  # type: ignore[index,operator]
    Explainer(model, {1: sae_for(model)}, backend="native", preset="published")(images())
    assert calls == ["block"]


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_two_threads_explain_with_the_same_model(tiny_vit: Build, backend: Any) -> None:
    model = tiny_vit()
    batches = [images() for _ in range(8)]
    explainers = [
        Explainer(model, {1: sae_for(model)}, backend=backend, preset="published"),
        Explainer(model, backend=backend, preset="published"),
    ]
    want = [explainers[i % 2](batch).relevance for i, batch in enumerate(batches)]
    got: list[list[Tensor]] = [[] for _ in batches]
    plain: list[Tensor] = []
    start = threading.Barrier(3)

    def work(which: int) -> None:
        start.wait()
        for _ in range(12):
            for i in range(which, len(batches), 2):
                got[i].append(explainers[which](batches[i]).relevance)

    def forward_only() -> None:
        start.wait()
        for _ in range(60):
            plain.append(model(batches[0]).detach())

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)] + [threading.Thread(target=forward_only)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, results in zip(want, got, strict=True):
        assert len(results) == 12
        for result in results:
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)
    reference = model(batches[0]).detach()
    assert len(plain) == 60 and all(torch.allclose(logits, reference, atol=1e-5) for logits in plain)


class Odd(nn.Module):
    """Stands in for timm's attention: q, k, v from the original, then whatever `attend` does with them."""

    def __init__(self, original: nn.Module, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.original, self.attend = original, attend

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch, tokens, width = x.shape
        heads = int(self.original.num_heads)  # type: ignore[arg-type]
        qkv = self.original.qkv(x).reshape(batch, tokens, 3, heads, width // heads)  # type: ignore[operator]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.original.proj(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))  # type: ignore[operator]
        return out


sdpa = F.scaled_dot_product_attention


REFUSED: tuple[tuple[Callable[..., Tensor], str], ...] = (
    (lambda q, k, v: v, "without an attention that could be seen"),
    (lambda q, k, v: F.normalize((q @ k.mT).exp(), 1.0, -1) @ v, "without an attention that could be seen"),
    (lambda q, k, v: (q @ k[:, :, 1:].mT).softmax(-1) @ v[:, :, 1:], "without an attention that could be seen"),
    (lambda q, k, v: torch._scaled_dot_product_attention_math(q, k, v)[0], "maps cannot be reached"),
    (lambda q, k, v: (q @ k.mT).softmax(-1) @ v + (q @ k.mT).softmax(-1) @ v, "more than once"),
    (lambda q, k, v: sdpa(q, k, v) + (q @ k.mT).softmax(-1) @ v, "more than once"),
    (lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1) @ v, "dropout 0.1 is active in block 1"),
    (lambda q, k, v: torch.dropout((q @ k.mT).softmax(-1), 0.1, True) @ v, "dropout 0.1 is active in block 1"),
    (lambda q, k, v: sdpa(q, k, v, attn_mask=torch.ones(7, 7, dtype=torch.bool)), "masked .*bool"),
    (lambda q, k, v: sdpa(q, k, v, is_causal=True), "causal"),
    (lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), "dropout 0.5 active"),
    (lambda q, k, v: sdpa(q, k, v) + sdpa(q, k, v), "more than once"),
    (lambda q, k, v: sdpa(q, k[:, :, 1:], v[:, :, 1:]), "7 queries and 6 keys, expected 7 and 7"),
    (lambda q, k, v: sdpa(q, k[:, :1], v[:, :1]), "as many heads"),
    (lambda q, k, v: sdpa(q, k.repeat(1, 2, 1, 1), v, enable_gqa=True), "heads of the queries a multiple"),
    (lambda q, k, v: sdpa(q[0], k[0], v[0])[None].expand(2, -1, -1, -1), r"queries and keys \[B, H, N, D\]"),
)


@pytest.mark.parametrize(("attend", "message"), REFUSED)
def test_attention_that_cannot_be_explained_is_refused(
    tiny_vit: Build, attend: Callable[..., Tensor], message: str
) -> None:
    model = tiny_vit()
    block = model.blocks[1]  # type: ignore[index]
    block.attn = Odd(block.attn, attend)  # type: ignore[union-attr]
    refused(model, message)


def test_a_block_that_is_not_explained_may_do_as_it_likes(tiny_vit: Build) -> None:
    model, batch = tiny_vit().double(), images().double()
    block = model.blocks[1]  # type: ignore[index]
    block.attn = Odd(block.attn, lambda q, k, v: sdpa(q, k, v, is_causal=True))  # type: ignore[union-attr]
    got, want = (
        Explainer(model, backend=b, start_block=2, preset="published")(batch).relevance for b in ("native", "reference")
    )  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


EQUIVALENT: dict[str, Callable[..., Tensor]] = {
    "scale": lambda q, k, v: sdpa(q, k, v, scale=q.shape[-1] ** -0.5),
    "a mask of zeros": lambda q, k, v: sdpa(q, k, v, attn_mask=torch.zeros(7, 7)),
    "softmax": lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v,
    "functional softmax": lambda q, k, v: F.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1, dtype=torch.float32) @ v,
    "batched heads": lambda q, k, v: (
        torch.softmax((q @ k.mT).flatten(0, 1) * q.shape[-1] ** -0.5, 2) @ v.flatten(0, 1)
    ).unflatten(0, q.shape[:2]),
    "dropout off": lambda q, k, v: F.dropout((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), 0.1, training=False) @ v,
}


@pytest.mark.parametrize("kind", EQUIVALENT)
def test_an_equivalent_attention_of_the_users_is_explained_alike(tiny_vit: Build, kind: str) -> None:
    model, batch = tiny_vit(), images()
    settings: list[dict[str, Any]] = [
        {}, {"signed": True}, {"backward": "conservative"}, {"method": "input_x_gradient"},
        {"method": "input_x_gradient", "backward": "conservative"}, {"start_block": 1},
    ]  # fmt: skip
    saes, targets = {1: sae_for(model)}, torch.tensor([[1, 0], [4, 2]])
    want = [
        Explainer(model, saes, backend="native", **setting, preset="published")(batch, targets) for setting in settings
    ]
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn = Odd(block.attn, EQUIVALENT[kind])
    for setting, expected in zip(settings, want, strict=True):
        got = Explainer(model, saes, backend="native", **setting, preset="published")(batch, targets)
        torch.testing.assert_close(got.relevance, expected.relevance, rtol=1e-3, atol=1e-5)


def test_heads_that_share_keys_and_values(tiny_vit: Build) -> None:
    """Grouped-query attention is attention with the keys and values repeated."""
    model, batch = tiny_vit().double(), images().double()
    shared = lambda q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True)  # noqa: E731
    repeated = lambda q, k, v: sdpa(q, k[:, :1].repeat(1, 2, 1, 1), v[:, :1].repeat(1, 2, 1, 1))  # noqa: E731
    found, originals = [], [block.attn for block in model.blocks]  # type: ignore[union-attr]
    for attend, backend in ((shared, "native"), (repeated, "native"), (shared, "reference")):
        for block, original in zip(model.blocks, originals, strict=True):  # type: ignore[arg-type]
            block.attn = Odd(original, attend)
        found.append(Explainer(model, backend=backend, preset="published")(batch, 1).relevance)  # type: ignore[arg-type]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-9, atol=1e-12)


def test_a_model_that_runs_its_tower_twice_is_refused(tiny_vit: Build) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tiny_vit()

        def forward(self, x: Tensor) -> Tensor:
            return self.tower(x) + self.tower(x.flip(-1))  # type: ignore[no-any-return]

    refused(Twice(), "block 0 runs after block 2; blocks must run in order, each at most once")


def test_a_model_that_does_not_run_its_tower_is_refused(tiny_vit: Build) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tiny_vit()

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5]

    refused(Idle(), "0 of 3 blocks ran")


def test_a_residual_stream_changed_in_place_is_scored_as_it_was(tiny_vit: Build) -> None:
    class Adding(nn.Module):
        """A block that adds to its input, in place as some models do to save memory."""

        def __init__(self, inner: nn.Module, in_place: bool) -> None:
            super().__init__()
            self.inner, self.in_place = inner, in_place

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = x.add_(1.0) if self.in_place else x + 1.0
            return self.inner(x, *args, **kwargs)  # type: ignore[no-any-return]

    model, batch = tiny_vit(), images()
    sae, last = sae_for(model), model.blocks[2]  # type: ignore[index]
    results = []
    for in_place in (False, True):
        model.blocks[2] = Adding(last, in_place)  # type: ignore[index,operator,arg-type]
        results.append(Explainer(model, {1: sae}, backend="native", preset="published")(batch))
    assert torch.equal(results[0].scores[1], results[1].scores[1])
    assert torch.equal(results[0].relevance, results[1].relevance)


def test_a_weight_that_depends_on_the_image_keeps_its_gradient(tiny_vit: Build) -> None:
    class Dynamic(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.inner(x), torch.eye(x.shape[-1], dtype=x.dtype) * x.mean())

    model, batch = tiny_vit().double(), images().double()
    block = model.blocks[2]  # type: ignore[index]
    block.mlp = Dynamic(block.mlp)  # type: ignore[union-attr,arg-type]
    got, want = (Explainer(model, backend=backend, preset="published")(batch, 1) for backend in ("native", "reference"))  # type: ignore[arg-type]
    torch.testing.assert_close(got.relevance, want.relevance, rtol=1e-9, atol=1e-12)


def test_temporary_parameters_are_not_mixed_up(tiny_vit: Build) -> None:
    class Temporary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tiny_vit()

        def forward(self, x: Tensor) -> Tensor:
            y = self.tower(x)
            for i in range(12):
                y = F.linear(y, nn.Parameter(torch.eye(5, dtype=y.dtype) * (i + 1) / 3))
            return y  # type: ignore[no-any-return]

    model, batch = Temporary().double(), images().double()
    torch.testing.assert_close(
        Explainer(model, backend="native", preset="published")(batch).logits, model(batch).detach()
    )


@pytest.mark.parametrize("how", ("no_grad", "detach", "views"))
def test_a_wrapper_that_cuts_the_gradient_is_refused(tiny_vit: Build, how: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tiny_vit()

        def forward(self, x: Tensor) -> Tensor:
            if how == "views":
                return self.tower(torch.cat([x, x.flip(-1)])).unflatten(0, (2, -1)).mean(0)  # type: ignore[no-any-return]
            if how == "detach":
                return self.tower(x).detach()  # type: ignore[no-any-return]
            with torch.no_grad():
                return self.tower(x)  # type: ignore[no-any-return]

    message = "a batch of 4 for 2 images" if how == "views" else "carry no gradient to the tower"
    refused(Wrapper(), message)
