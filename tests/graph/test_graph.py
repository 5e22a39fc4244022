"""Explanations traced into one graph: the same numbers for every setting, less work, nothing changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from explaining import PIXELS, Build, agree, sae_for
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fga_fast import Explainer, Explanation, Gate
from fga_fast.graph.passes import rows
from fga_fast.graph.trace import Flat, flatten
from fga_fast.result.fields import nested

DOUBLE = torch.float64


def run(flat: Flat, *inputs: Tensor) -> Explanation:
    with torch.no_grad():
        found = dict(zip(flat.outputs, flat.module(*inputs), strict=True))
    return Explanation(
        **nested(found), grid=(2, 3), image_size=PIXELS[1:], backend="graph", start_block=flat.start_block,
        notices=flat.notices,
    )  # fmt: skip


def assert_traced(explainer: Explainer, images: Tensor) -> None:
    """Its graph gives the explainer's numbers."""
    agree(run(flatten(explainer.plan, images), images), explainer(images), 1e-10)


@pytest.fixture
def subject(tiny_vit: Build) -> tuple[nn.Module, Tensor]:
    return tiny_vit(depth=3).to(DOUBLE), torch.randn(2, *PIXELS, dtype=DOUBLE)


@pytest.mark.parametrize(
    ("blocks", "settings"),
    [
        ((0, 1), {}), ((0, 1), {"method": "input_x_gradient"}), ((0, 1), {"backward": "conservative"}),
        ((0, 1), {"signed": True}), ((1,), {"start_block": 1}), ((0, 1), {"per_block": True}),
        ((0, 1), {"top_features": 3}), ((0, 1), {"gate": Gate(mode="shuffled")}), ((0, 1), {"backend": "composite"}),
        # Before block 2, patches are read through a LayerNorm alone, and g . x there is rounding.
        ((0,), {"gate": Gate(mode="no_sae")}),
        # It reads all tokens of the last residual stream, whose gradient is that of one.
        ((2,), {}),
        ((0, 1), {"method": "input_x_gradient", "backward": "conservative", "per_block": True}),
        ((0, 1), {"method": "block_x_gradient", "backward": "conservative", "ungated": True}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_every_setting(tiny_vit: Build, blocks: tuple[int, ...], settings: dict[str, Any], pooling: str) -> None:
    model = tiny_vit(depth=3, global_pool=pooling).to(DOUBLE)
    explainer = Explainer(model, {layer: sae_for(model) for layer in blocks}, **settings, preset="published")
    assert_traced(explainer, torch.randn(2, *PIXELS, dtype=DOUBLE))


def test_given_targets_and_another_image(subject: tuple[nn.Module, Tensor], tiny_vit: Build) -> None:
    """-1 is the predicted class, which a model without a head does not have."""
    model, images = subject
    explainer = Explainer(model, {0: sae_for(model)}, preset="published")
    flat = flatten(explainer.plan, images, "given")
    other, targets = torch.randn_like(images), torch.tensor([4, 0])
    agree(run(flat, other, targets), explainer(other, targets), 1e-10)
    agree(run(flat, other, torch.tensor([-1, 0])), explainer(other, [None, 0]), 1e-10)
    headless = Explainer(tiny_vit(depth=1, num_classes=0).to(DOUBLE), preset="published")
    assert flat.predicts and not flatten(headless.plan, images, "given").predicts


def test_a_wrapped_tower_and_gradients_switched_off(subject: tuple[nn.Module, Tensor]) -> None:
    model, images = subject
    assert_traced(Explainer(nn.Sequential(model, nn.LogSoftmax(-1)).requires_grad_(False), preset="published"), images)


def flops(module: nn.Module, *inputs: Tensor) -> int:
    """Of the matrix products; tapped attention is not counted."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_last_block_works_for_the_pooled_tokens_only(tiny_vit: Build, pooling: str) -> None:
    """Forward and backward: projection and both products of the MLP; nothing is saved where all tokens are read."""
    model: Any = tiny_vit(depth=2, global_pool=pooling).to(DOUBLE)
    images = torch.randn(1, *PIXELS, dtype=DOUBLE)
    explainer = Explainer(model, preset="published")
    whole, less = (flops(flatten(explainer.plan, images, prune=p).module, images) for p in (False, True))
    width, hidden = model.embed_dim, model.blocks[0].mlp.fc1.out_features
    saved = 2 * (explainer.layout.tokens - 1) * 2 * (width * width + 2 * width * hidden)
    assert whole - less == (pytest.approx(saved, rel=1e-9) if pooling == "token" else 0)


def test_attention_does_nothing_that_is_not_read(subject: tuple[nn.Module, Tensor]) -> None:
    """The last block has one query an image, in both directions; the first computes no dq, dk, dv."""
    seen: list[tuple[int, Any]] = []

    class Watch(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            assert "convolution_backward" not in str(target)  # the images ask for no gradient
            if "fga_fast.attention" in str(target):
                backward = "backward" in str(target)
                seen.append((args[3 if backward else 0].shape[2], args[-2:] if backward else None))
            return super().call_function(target, args, kwargs)

    model, images = subject
    Watch(flatten(Explainer(model, preset="published").plan, images).module).run(images)
    assert [queries for queries, _ in seen] == [7, 7, 1, 1, 7, 7]
    assert seen[-1][1] == (False, False)


def test_casts_of_weights_are_made_once(tiny_vit: Build) -> None:
    model, images = tiny_vit(depth=2), torch.randn(1, *PIXELS)
    with torch.autocast("cpu", torch.bfloat16):
        flat = flatten(Explainer(model, preset="published").plan, images)
        want = Explainer(model, preset="published")(images)
    weights = {node for node in flat.module.graph.nodes if node.op == "get_attr"}
    casts = [n for n in flat.module.graph.nodes if n.target is torch.ops.aten._to_copy.default]
    assert casts and not any(set(node.all_input_nodes) <= weights for node in casts)
    assert families.error(run(flat, images).relevance, want.relevance) < 2e-2


class _Counting(nn.Module):
    """A model that looks at values on the way."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits * 2 if float(logits.mean()) > 0 else logits


def test_refused_with_the_reason(tiny_vit: Build) -> None:
    model, images = tiny_vit(depth=1), torch.randn(1, *PIXELS)
    reference, half = (
        Explainer(model, backend="reference", preset="published"),
        Explainer(tiny_vit(depth=1).half(), preset="published"),
    )
    cases: list[tuple[Explainer, Tensor, Any, str]] = [
        (Explainer(_Counting(model), preset="published"), images, "predicted", "cannot be traced .* looks at values"),
        (reference, images, "predicted", "backend: 'reference' is not compiled"),
        (
            Explainer(model, preset="published"),
            images,
            "all",
            "target_mode: expected one of 'predicted', 'given', got 'all'",
        ),
        (Explainer(model, preset="published"), images[:0], "given", r"example: .* got a tensor \[0, 3, 32, 48\]"),
        (half, images.half(), "given", "float16 gradients get a loss scale"),
    ]
    for explainer, example, target_mode, words in cases:
        with pytest.raises(ValueError, match=words):
            flatten(explainer.plan, example, target_mode)


def test_a_selected_row_is_computed_alone() -> None:
    """By hand: a product of all tokens of which one is read, beside a sum that reads them all."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.ops.aten.mm(x.reshape(10, 4), w).reshape(2, 5, 6)
        z = torch.ops.aten.mm(x.reshape(10, 4), w).reshape(2, 5, 6)
        return y.relu()[:, 3], z.sum()

    x, w = torch.randn(2, 5, 4, dtype=DOUBLE), torch.randn(4, 6, dtype=DOUBLE)
    module, other = (make_fx(function, tracing_mode="fake")(x, w) for _ in range(2))
    want, before = module(x, w), flops(module, x, w)
    assert rows.prune(module, row=3, tokens=5) >= 3
    got = module(x, w)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    assert flops(module, x, w) == before // 2 + before // 10
    assert rows.prune(other, row=2, tokens=5) == 0  # nothing reads that one alone


def test_another_selected_row_is_not_taken_for_it() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y[:, 1], y[:, 2]

    module: fx.GraphModule = make_fx(function, tracing_mode="fake")(torch.ones(1, 3))
    assert rows.prune(module, row=1, tokens=3) == 0


@pytest.mark.parametrize("function", [lambda t: t.softmax(-1), lambda t: t.log_softmax(-1), torch.exp])
def test_zeros_that_become_something_else_are_kept(function: Callable[..., Tensor]) -> None:
    def padded(x: Tensor) -> Tensor:
        rows: Tensor = nn.functional.pad(x.transpose(1, 2), (0, 3)).transpose(1, 2)  # zeros but for token 0
        return function(rows)

    x = torch.randn(2, 1, 5, dtype=DOUBLE)
    module: fx.GraphModule = make_fx(padded, tracing_mode="fake")(x)
    rows.prune(module, row=0, tokens=4)
    torch.testing.assert_close(module(x), padded(x))


class _After(nn.Module):
    """A module with something behind it."""

    def __init__(self, module: nn.Module, change: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.change, self.table = module, change, nn.Buffer(torch.ones(16, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, x, self.module(x))


def _copy_of_a_weight(self: _After, _x: Tensor, y: Tensor) -> Tensor:
    table = self.table.clone()
    table.mul_(2)
    return y * table


def _written_constant(_self: _After, _x: Tensor, y: Tensor) -> Tensor:
    factor = torch.tensor([1.0], dtype=y.dtype)
    factor += 1
    return y * factor


def _written_row(_self: _After, _x: Tensor, y: Tensor) -> Tensor:
    y[:, 0] = y[:, 0] * 3
    y[:, 1:] += 1
    return y


def _strides_of_another(_self: _After, x: Tensor, y: Tensor) -> Tensor:
    images, tokens, width = x.shape
    like = torch.zeros_like(x.view(images, tokens, 2, width // 2).transpose(1, 2))
    return y + like.transpose(1, 2).view(images, tokens, width)


def _cat_with_nothing(_self: _After, _x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([torch.empty(0, dtype=y.dtype), y], -1)


@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize(
    "change", [_copy_of_a_weight, _written_constant, _written_row, _strides_of_another, _cat_with_nothing]
)
def test_what_models_do_to_tensors(tiny_vit: Build, change: Callable[..., Tensor], pooling: str) -> None:
    model = tiny_vit(depth=2, global_pool=pooling).to(DOUBLE)
    model.blocks[-1].mlp = _After(model.blocks[-1].mlp, change)  # type: ignore[index,union-attr]
    explainer, images = Explainer(model, {0: sae_for(model)}, preset="published"), torch.randn(2, *PIXELS, dtype=DOUBLE)
    flat, want = flatten(explainer.plan, images), explainer(images)
    for _ in range(2):
        agree(run(flat, images), want, 1e-10)


def test_a_model_that_changes_its_own_weights_is_refused(tiny_vit: Build) -> None:
    model = tiny_vit(depth=2).to(DOUBLE)
    model.head = _After(model.head, lambda self, _, y: y + self.table.add_(1)[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="changes its weights or buffers in place"):
        flatten(Explainer(model, preset="published").plan, torch.randn(1, *PIXELS, dtype=DOUBLE))


def test_models_may_keep_what_they_compute(tiny_vit: Build) -> None:
    """What a forward pass leaves in the model while it is traced has no values."""

    def remember(self: Any, _x: Tensor, y: Tensor) -> Tensor:
        self.last, self.table = y, self.table.clone()
        return y

    model, images = tiny_vit(depth=2).to(DOUBLE), torch.randn(1, *PIXELS, dtype=DOUBLE)
    model.blocks[0].mlp = keeping = _After(model.blocks[0].mlp, remember)  # type: ignore[index,union-attr]
    assert_traced(Explainer(model, preset="published"), images)
    assert type(keeping.last) is type(keeping.table) is Tensor


@pytest.mark.parametrize("shared", ["query_is_key", "all_three"])
def test_queries_that_are_keys_too(tiny_vit: Build, shared: str) -> None:
    """Keys are needed for all tokens, also where they are the same tensor as queries."""

    def attention(self: Any, x: Tensor, **_: Any) -> Tensor:
        images, tokens, width = x.shape
        parts = self.qkv(x).reshape(images, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        q, v = parts[2 if shared == "all_three" else 0], parts[2]
        out = nn.functional.scaled_dot_product_attention(q, q, v)
        return self.proj(out.transpose(1, 2).reshape(images, tokens, width))  # type: ignore[no-any-return]

    model = tiny_vit(depth=2).to(DOUBLE)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.forward = attention.__get__(block.attn)
    assert_traced(Explainer(model, {1: sae_for(model)}, preset="published"), torch.randn(2, *PIXELS, dtype=DOUBLE))


def test_threads_trace_in_turn(subject: tuple[nn.Module, Tensor]) -> None:
    """Tracing patches `nn.Module` for the whole process, and may leave behind what ends with the thread."""
    model, images = subject
    call, found = nn.Module.__call__, list[Flat]()
    explainer = Explainer(model, preset="published")
    threads = [threading.Thread(target=lambda: found.append(flatten(explainer.plan, images))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and nn.Module.__call__ is call
    for flat in found:
        agree(run(flat, images), explainer(images), 1e-10)


def test_autocast_of_the_caller_is_no_part_of_folding(tiny_vit: Build) -> None:
    def wide(self: _After, _x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            square = torch.outer(self.table.float(), self.table.float()) + 1e-3
            return y + torch.mm(square, square).sum()

    model, images = tiny_vit(depth=2), torch.randn(1, *PIXELS)
    model.blocks[-1].mlp = _After(model.blocks[-1].mlp, wide)  # type: ignore[index,union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        flat = flatten(Explainer(model, preset="published").plan, images)
    (total,) = (float(b) for b in flat.module.buffers() if b.dim() == 0)
    assert total == pytest.approx(16**3 * 1.001**2, rel=1e-6)


def test_classes_that_are_not_there_give_nan(subject: tuple[nn.Module, Tensor]) -> None:
    """Nobody looks at the numbers of a tensor on a device before the graph runs."""
    model, images = subject
    explainer = Explainer(model, {0: sae_for(model)}, per_block=True, preset="published")
    flat = flatten(explainer.plan, images, "given")
    for beyond in (-2, flat.classes):
        got = run(flat, images, torch.tensor([1, beyond]))
        assert got.targets.tolist() == [1, beyond]
        for tensor in (got.relevance, got.values, got.scores[0], got.gates[0], got.blocks):
            assert tensor is not None and bool(tensor[0].isfinite().all()) and bool(tensor[1].isnan().all())
        assert bool(got.logits.isfinite().all())
        assert families.error(got.relevance[:1], explainer(images[:1], 1).relevance) < 1e-9
