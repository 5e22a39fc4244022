"""The layout read from a model of every family, held against what the model does, by hooks and gradients only."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from families import Family
from torch import Tensor
from torch.overrides import TorchFunctionMode

FAMILIES = [pytest.param(family, id=family.id) for family in families.registry()]


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> None:
    pytest.importorskip(families.LIBRARIES[request.getfixturevalue("family").library])


@pytest.mark.parametrize("family", FAMILIES)
def test_layout(family: Family) -> None:
    layout = families.layout_of(family, family.build())
    got = (layout.prefix_tokens, layout.pooling, layout.pooled, layout.grid, layout.image_size)
    assert got == (family.prefix, family.pooling, family.pooled, family.grid, family.image_size)
    assert layout.in_chans == 3
    assert layout.tower is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_once_in_order_over_all_tokens(family: Family) -> None:
    model = family.build()
    layout = families.layout_of(family, model)
    seen: list[tuple[int, tuple[int, ...]]] = []
    for index, block in enumerate(layout.blocks):
        block.register_forward_hook(
            lambda _module, _inputs, output, index=index: seen.append((index, tuple(stream(output).shape)))
        )
    families.logits_of(model, family.images(3))
    rows = (layout.tokens, 3) if layout.tokens_first else (3, layout.tokens)
    assert seen == [(index, (*rows, layout.d_model)) for index in range(len(layout.blocks))]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_reads_the_pooled_tokens_and_no_others(family: Family) -> None:
    model = family.build()
    layout = families.layout_of(family, model)
    last: list[Tensor] = []
    layout.blocks[-1].register_forward_hook(lambda _module, _inputs, output: last.append(stream(output)))
    output = families.logits_of(model, family.images().requires_grad_())
    (gradient,) = torch.autograd.grad((output * torch.randn_like(output)).sum(), last)
    if layout.tokens_first:
        gradient = gradient.transpose(0, 1)
    start, stop = layout.pooled
    read = (gradient != 0).any(-1).all(0).nonzero()[:, 0].tolist()
    others = [token for token in read if not start <= token < stop]
    assert set(range(start, stop)) <= set(read)
    assert bool(others) is family.reads_more


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


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_makes_one_attention_call_of_the_kind_in_the_table(family: Family) -> None:
    model = family.build()
    layout = families.layout_of(family, model)
    calls = Calls(layout.tokens)
    for block in layout.blocks:
        block.register_forward_pre_hook(lambda _module, _inputs: calls.__enter__() and None)
        block.register_forward_hook(lambda _module, _inputs, _output: calls.__exit__(None, None, None))
    families.logits_of(model, family.images().requires_grad_())
    blocks = len(layout.blocks)
    expected = {"fused": (blocks, 0, 0), "eager": (0, 0, blocks), "MultiheadAttention": (0, blocks, 0)}
    assert (calls.fused, calls.multihead, calls.eager) == expected[family.attention]


def stream(output: Any) -> Tensor:
    """The residual stream that a block returns, alone or as the first entry of a tuple."""
    return output[0] if isinstance(output, tuple) else output
