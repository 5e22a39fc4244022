"""Every family's own model definition, small and random: it does what its layout says, and is explained natively and as
one graph as by the reference."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from families import Family
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fga_fast import Explainer, Gate, ModelLayout
from fga_fast.graph.passes.biases import fold_biases
from fga_fast.graph.trace import flatten
from fga_fast.settings import PRESETS, Preset


@pytest.fixture(scope="module", params=families.registry(), ids=lambda family: family.id)
def family(request: pytest.FixtureRequest) -> Family:
    pytest.importorskip(families.LIBRARIES[request.param.library])
    found: Family = request.param
    return found


@pytest.fixture(scope="module")
def model(family: Family) -> nn.Module:
    return family.build()


@pytest.fixture(scope="module")
def layout(family: Family, model: nn.Module) -> ModelLayout:
    return families.layout_of(family, model)


def test_layout(family: Family, layout: ModelLayout) -> None:
    got = (layout.prefix_tokens, layout.pooling, layout.pooled, layout.grid, layout.image_size)
    assert got == (family.prefix, family.pooling, family.pooled, family.grid, family.image_size)
    assert layout.in_chans == 3
    assert layout.tower is not None


class Calls(TorchFunctionMode):
    """Counts the calls of fused attention, of multi-head attention and of softmax over all tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.fused = self.multihead = self.eager = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += func is F.scaled_dot_product_attention
        self.multihead += func is F.multi_head_attention_forward
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            self.eager += args[0].dim() == 4 and args[0].shape[-2:] == (self.tokens, self.tokens)
        return func(*args, **(kwargs or {}))


def test_the_model_does_what_the_layout_says(family: Family, model: nn.Module, layout: ModelLayout) -> None:
    """Blocks run once, in order, over all tokens, with one attention of the kind in the table; the output reads the
    pooled tokens and no others. Seen by hooks and gradients only."""
    calls, ran, streams = Calls(layout.tokens), list[nn.Module](), list[Tensor]()

    def enter(*_: Any) -> None:
        calls.__enter__()

    def leave(block: nn.Module, _inputs: Any, output: Any) -> None:
        calls.__exit__(None, None, None)
        ran.append(block)
        streams.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_pre_hook(enter) for block in layout.blocks]
    handles += [block.register_forward_hook(leave) for block in layout.blocks]
    output = families.logits_of(model, family.images(3).requires_grad_())
    for handle in handles:
        handle.remove()
    blocks = len(layout.blocks)
    rows = (layout.tokens, 3) if layout.tokens_first else (3, layout.tokens)
    assert ran == list(layout.blocks)
    assert [tuple(stream.shape) for stream in streams] == [(*rows, layout.d_model)] * blocks
    expected = {"fused": (blocks, 0, 0), "eager": (0, 0, blocks), "MultiheadAttention": (0, blocks, 0)}
    assert (calls.fused, calls.multihead, calls.eager) == expected[family.attention]

    (gradient,) = torch.autograd.grad((output * torch.randn_like(output)).sum(), streams[-1])
    gradient = gradient.transpose(0, 1) if layout.tokens_first else gradient
    read = set((gradient != 0).any(-1).all(0).nonzero()[:, 0].tolist())
    assert set(range(*layout.pooled)) <= read
    assert bool(read - set(range(*layout.pooled))) is family.reads_more


@pytest.mark.parametrize(
    ("gated", "method", "backward"),
    [(False, "rollout", "exact"), (True, "rollout", "exact"), (True, "rollout", "conservative"),
     (True, "input_x_gradient", "exact"), (True, "block_x_gradient", "conservative")],
)  # fmt: skip
def test_explained_as_by_the_reference(
    family: Family, model: nn.Module, layout: ModelLayout, gated: bool, method: str, backward: str
) -> None:
    saes = families.autoencoders(layout) if gated else {}
    got, want = (
        families.explain(family, model, backend, saes=saes, method=method, backward=backward)
        for backend in ("native", "reference")
    )
    # What rollouts start from is left out, or it would hide errors in the rest.
    start = families.seed(layout) if method == "rollout" else 0
    rest = want.relevance - start
    assert families.error(got.relevance - start, rest) < 1e-4
    for layer in saes:
        assert families.error(got.gates[layer], want.gates[layer]) < 1e-4
        assert want.gates[layer].unique().numel() > 2  # the gates do something
    if not gated:
        assert float(rest.max()) > 1.5 * float(rest.mean())  # attention is not uniform


@pytest.mark.parametrize("preset", PRESETS)
def test_explained_as_one_graph(family: Family, model: nn.Module, layout: ModelLayout, preset: Preset) -> None:
    names: dict[str, Any] = {}
    if family.prompts:
        names = {"class_names": [*family.prompts, "a chair"], "tokenizer": families.tokenize}
    saes, images = families.autoencoders(layout), family.images()
    explainer = Explainer(model, saes, gate=Gate(base=4.0), layout=layout, preset=preset, **names)
    want = explainer(images, 1)
    flat = flatten(explainer.plan, images, "given")
    fold_biases(flat.module)  # as before it is compiled
    with torch.no_grad():
        got = dict(zip(flat.outputs, flat.module(images, want.targets), strict=True))
    start = families.seed(layout) if preset == "published" else 0
    assert families.error(got["relevance"] - start, want.relevance - start) < 1e-4
    torch.testing.assert_close(got["logits"], want.logits, rtol=1e-4, atol=1e-4)
    assert all(families.error(got[f"gates.{layer}"], gates) < 1e-4 for layer, gates in want.gates.items())


def test_the_model_answers_as_before_and_keeps_nothing(family: Family) -> None:
    model, images = family.build().requires_grad_(False), family.images()  # frozen: attention looks for shortcuts
    with torch.no_grad():
        before = families.logits_of(model, images)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    e = families.explain(family, model, "native")
    if not family.prompts:
        torch.testing.assert_close(e.logits, before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(families.logits_of(model, images), before)
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
