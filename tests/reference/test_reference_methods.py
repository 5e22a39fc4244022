"""The reference's choices: several targets, methods, backward passes, depth, sign and precision."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from own_vit import IMAGES, own_vit
from torch import Tensor

from fga_fast.models.find import find_layout
from fga_fast.question.readout import Difference, Readout, Tensors
from fga_fast.reference import explain
from fga_fast.settings import Gate, Settings

Build = Callable[..., Any]
METHODS = ("rollout", "input_x_gradient", "block_x_gradient")
BACKWARDS = ("exact", "conservative")


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.fixture
def saes(random_sae: Build) -> dict[int, Any]:
    return {1: random_sae("relu"), 2: random_sae("topk")}


@pytest.fixture
def averaging(tiny_vit: Build) -> Any:
    """Reads all patches after the last block, so that every block counts."""
    return tiny_vit(global_pool="avg").double()


def tensors(result: Tensors) -> dict[str, Tensor]:
    """Everything that has a target dimension."""
    found = {name: getattr(result, name) for name in ("targets", "values", "relevance", "blocks")}
    for name in ("scores", "gates"):
        found |= {f"{name}.{block}": value for block, value in getattr(result, name).items()}
    for block, top in result.features.items():
        found |= {f"features.{block}.{name}": value for name, value in top._asdict().items()}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("method", METHODS)
def test_many_targets_are_one_after_the_other(averaging: Any, saes: Any, method: Any, backward: Any) -> None:
    settings = Settings(method=method, backward=backward, per_block=True, top_features=3, start_block=1)
    targets = torch.tensor([[0, 3, 3], [4, 1, 2]])
    together = explain(averaging, images(), targets, saes, settings)
    assert together.relevance.shape == (2, 3, 6)
    assert together.blocks is not None
    assert together.blocks.shape == (2, 3, 2, 6)
    assert together.features[1].patch_index.shape == (2, 3, 6, 3)
    for k in range(3):
        alone = tensors(explain(averaging, images(), targets[:, k], saes, settings))
        assert alone.keys() == tensors(together).keys()
        for name, value in tensors(together).items():
            torch.testing.assert_close(value[:, k], alone[name], rtol=1e-10, atol=1e-12, msg=name)
    torch.testing.assert_close(together.values, together.logits.gather(1, targets))


def test_targets_of_other_kinds(averaging: Any) -> None:
    def relevance(targets: Any, readout: Readout | None = None) -> Tensor:
        return explain(averaging, images(), targets, {}, Settings(method="input_x_gradient"), readout=readout).relevance

    first, last = relevance(0), relevance(4)
    torch.testing.assert_close(relevance(Difference(0, 4)), first - last)
    torch.testing.assert_close(relevance(lambda logits: logits[:, 0] + 2 * logits[:, 4]), first + 2 * last)
    torch.testing.assert_close(relevance("e", Readout(averaging, list("abcde"))), last)
    named = explain(averaging, images(), "e", {}, Settings(), readout=Readout(averaging, list("abcde")))
    assert named.names == ("a", "b", "c", "d", "e")
    result = explain(averaging, images(), lambda logits: logits.square(), {}, Settings())
    assert result.relevance.shape == (2, 5, 6)
    assert (result.targets == -1).all()


def test_a_value_without_gradient_is_refused(averaging: Any) -> None:
    with pytest.raises(ValueError, match="gradient"):
        explain(averaging, images(), lambda logits: logits.detach()[:, 0], {}, Settings())


def test_given_gates_may_be_one_for_each_target(averaging: Any, random_sae: Build) -> None:
    sae = {1: random_sae("relu")}
    own = explain(averaging, images(), [[0, 1]], sae, Settings())
    again = explain(averaging, images(), [[0, 1]], sae, Settings(Gate(base=2.0)), given_gates=own.gates)
    assert torch.equal(again.relevance, own.relevance)
    shared = explain(averaging, images(), [[0, 1]], sae, Settings(Gate(base=2.0)), given_gates={1: own.gates[1][:, 0]})
    assert torch.equal(shared.relevance[:, 0], own.relevance[:, 0])
    assert not torch.allclose(shared.relevance[:, 1], own.relevance[:, 1])


# -- depth -----------------------------------------------------------------------------------------------------------


def tail(model: Any, first: int) -> Any:
    """A model of the blocks from `first` on, whose images are what enters that block."""
    blocks = model.blocks[first:]

    class Tail(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.norm, self.fc_norm, self.head = blocks, model.norm, model.fc_norm, model.head

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(self.fc_norm(self.norm(x)[:, 1:].mean(1)))  # type: ignore[no-any-return]

    return Tail().eval()


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [1, 2])
def test_start_block_explains_the_last_blocks_alone(
    averaging: Any, saes: Any, method: Any, backward: Any, start: int
) -> None:
    settings: dict[str, Any] = {"method": method, "backward": backward}
    gated = {block: sae for block, sae in saes.items() if block >= start}
    got = explain(averaging, images(), 1, gated, Settings(start_block=start, **settings))
    entering: list[Tensor] = []
    handle = averaging.blocks[start].register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
    averaging(images())
    handle.remove()
    model = tail(averaging, start)
    layout = replace(find_layout(averaging), blocks=tuple(model.blocks), tower=None)
    shifted = {block - start: sae for block, sae in gated.items()}
    want = explain(model, entering[0].detach(), 1, shifted, Settings(**settings), layout=layout)
    torch.testing.assert_close(got.relevance, want.relevance, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(got.relevance, explain(averaging, images(), 1, gated, Settings(**settings)).relevance)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_per_block_is_every_start_block(averaging: Any, saes: Any, method: Any, signed: bool) -> None:
    settings = {"method": method, "signed": signed}
    result = explain(averaging, images(), 1, saes, Settings(per_block=True, **settings))
    assert result.blocks is not None
    assert result.blocks.shape == (2, 3, 6)
    assert torch.equal(result.blocks[:, 0], result.relevance)
    for start in range(3):
        left = {block: sae for block, sae in saes.items() if block >= start}
        alone = explain(averaging, images(), 1, left, Settings(start_block=start, **settings))
        assert alone.blocks is None
        torch.testing.assert_close(result.blocks[:, start], alone.relevance, rtol=1e-12, atol=1e-14)


def test_signed_keeps_negative_evidence(averaging: Any) -> None:
    plain = explain(averaging, images(), 1, {}, Settings(start_block=2)).relevance
    signed = explain(averaging, images(), 1, {}, Settings(start_block=2, signed=True)).relevance
    own = 1 / 6  # every patch's relevance for itself, from the identity in I + Cbar and the average of the six
    assert plain.min() >= own
    assert signed.min() < own - 1e-4
    # One block and no relu: linear in the explained value.
    other = explain(averaging, images(), lambda x: -x[:, 1], {}, Settings(start_block=2, signed=True)).relevance
    torch.testing.assert_close(signed - own, own - other)


# -- input x gradient ------------------------------------------------------------------------------------------------


def test_input_x_gradient_is_the_gradient_at_the_tokens(averaging: Any, saes: Any) -> None:
    model = tail(averaging, 0)
    entering: list[Tensor] = []
    handle = averaging.blocks[0].register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
    averaging(images())
    handle.remove()
    x = entering[0].detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x)[:, 3].sum(), x)
    want = (x * g).sum(-1)[:, 1:].detach()
    assert want.min() < 0 < want.max()
    ungated = explain(averaging, images(), 3, {}, Settings(method="input_x_gradient")).relevance
    torch.testing.assert_close(ungated, want, rtol=1e-10, atol=1e-12)
    gated = explain(averaging, images(), 3, saes, Settings(method="input_x_gradient"))
    torch.testing.assert_close(gated.relevance, want * gated.gates[1] * gated.gates[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backward", BACKWARDS)
def test_block_x_gradient_is_the_mean_over_the_blocks(averaging: Any, saes: Any, backward: Any) -> None:
    settings = {"backward": backward, "per_block": True}
    each = explain(averaging, images(), 3, saes, Settings(method="input_x_gradient", **settings)).blocks
    mean = explain(averaging, images(), 3, saes, Settings(method="block_x_gradient", **settings))
    assert each is not None and mean.blocks is not None
    torch.testing.assert_close(mean.relevance, each.mean(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean.blocks[:, 1], each[:, 1:].mean(1), rtol=1e-10, atol=1e-12)


def test_backward_passes_differ_and_share_their_forward_pass(averaging: Any) -> None:
    exact = explain(averaging, images(), None, {}, Settings())
    conservative = explain(averaging, images(), None, {}, Settings(backward="conservative"))
    torch.testing.assert_close(exact.logits, conservative.logits, rtol=1e-13, atol=1e-13)
    assert (exact.relevance - conservative.relevance).norm() > 0.05 * (exact.relevance - 1 / 6).norm()


# -- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("method", METHODS)
def test_relevance_is_float32_under_autocast(tiny_vit: Build, saes: Any, method: Any, backward: Any) -> None:
    model = tiny_vit(global_pool="avg")
    narrow = {block: deepcopy(sae).float() for block, sae in saes.items()}
    settings: dict[str, Any] = {"method": method, "backward": backward, "per_block": True}
    exact = explain(model.double(), images(), 1, saes, Settings(**settings))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = explain(model.float(), images(torch.float32), 1, narrow, Settings(**settings))
        assert torch.is_autocast_enabled("cpu")
    assert got.blocks is not None
    assert {got.relevance.dtype, got.blocks.dtype, got.scores[1].dtype, got.gates[2].dtype} == {torch.float32}
    error = (got.relevance.double() - exact.relevance).norm() / exact.relevance.norm()
    assert error < 0.2
    # Scores of 16-bit products, but not rounded to 16 bit themselves.
    assert not torch.equal(got.relevance, got.relevance.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_other_dtypes_follow_float64(tiny_vit: Build, backward: Any, dtype: torch.dtype) -> None:
    model = tiny_vit(global_pool="map", norm_layer=torch.nn.RMSNorm, act_layer=torch.nn.SiLU).double()
    settings = {"method": "input_x_gradient", "backward": backward}
    exact = explain(model, images(), 1, {}, Settings(**settings)).relevance
    got = explain(model.to(dtype), images(dtype), 1, {}, Settings(**settings))
    assert got.relevance.dtype == torch.float32
    assert got.values.dtype == dtype
    error = (got.relevance.double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_block": 3}, r"start_block: expected 0 to 2 \(blocks\), got 3"),
        ({"start_block": 2}, r"saes\[1\]: would gate nothing, since start_block=2 skips block 1"),
        ({"top_features": 41}, r"top_features: expected 0 to 40 \(features of the smallest SAE\), got 41"),
    ],
)
def test_refusals(averaging: Any, saes: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(averaging, images(), None, saes, Settings(**settings))


@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_model_of_the_users_own(backward: Any) -> None:
    model = own_vit("F.softmax", returns="tokens first")
    pictures = torch.randn(IMAGES).double()
    result = explain(model, pictures, [[0, 1]], {}, Settings(backward=backward), layout=model.layout())
    assert result.relevance.shape == (2, 2, 6)
    with pytest.raises(ValueError, match="no supported vision transformer"):
        explain(model, pictures, 0, {}, Settings())
