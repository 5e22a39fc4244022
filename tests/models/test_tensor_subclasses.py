"""Weights of other classes than nn.Parameter: quantised, sharded, computed from others, or handed in for one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_vit import IMAGES, WIDTH, OwnViT, own_vit
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from fga_fast import Explainer, SparseAutoencoder
from fga_fast.models.block_io import TapeError

TARGETS: dict[str, Any] = {"one": [3, 1], "many": [[0, 1], [2, 3]]}
HIDDEN = 2 * WIDTH


class Quantised(Tensor):
    """Integers and a scale. It has products of its own and nothing else, as torchao's weights do."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Any:
        make = torch.Tensor._make_wrapper_subclass
        return make(cls, values.shape, dtype=scale.dtype, device=values.device)  # type: ignore[attr-defined]

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values_, self.scale = values, scale

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].values_, args[0].scale)
        if func in (aten.t.default, aten.transpose.int):
            return cls(func(args[0].values_, *args[1:]), args[0].scale)
        if func in (aten.mm.default, aten.addmm.default):
            return func(*(a.plain() if isinstance(a, cls) else a for a in args), **(kwargs or {}))
        raise NotImplementedError(f"Quantised: attempting to run unimplemented operator {func}")

    def plain(self) -> Tensor:
        return self.values_.to(self.scale.dtype) * self.scale


class Named(Tensor):
    """A class that goes through torch functions as it is, like many that only carry metadata."""


class Rounding(Named):
    """A weight whose products round the other factor, so they have no gradient: dynamic quantisation."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        x, weight, bias = args
        return func(x.detach().mul(64).round() / 64, weight.as_subclass(Tensor), bias)


class Spread(Named):
    """Traits of a DTensor of which each of two processes has a part."""

    class Mesh:
        def size(self) -> int:
            return 2

    class Shard:
        def is_replicate(self) -> bool:
            return False

        def __str__(self) -> str:
            return "S(0)"

    device_mesh, placements = Mesh(), (Shard(),)


class LearnedFactor(nn.Module):
    """An activation times learned numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, HIDDEN, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x) * self.factor


class Handed(nn.Module):
    """Runs a model with weights from elsewhere."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, images: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, self.weights, (images,))  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """A parametrization: a weight times a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.number


def factored() -> OwnViT:
    model = own_vit()
    for block in model.layers:
        block.mlp[1] = LearnedFactor()
    return model


def linear_layers(model: nn.Module) -> Iterator[nn.Linear]:
    return (module for module in model.modules() if type(module) is nn.Linear)


def explained(model: nn.Module, layout: Any, **settings: Any) -> Tensor:
    width = torch.Generator().manual_seed(1)
    draw = [torch.randn(*shape, generator=width, dtype=torch.float64) for shape in ((16, 40), (40,), (40, 16), (16,))]
    images = torch.randn(IMAGES, generator=width, dtype=torch.float64)
    targets = settings.pop("targets", [3, 1])
    return Explainer(model, {1: SparseAutoencoder(*draw)}, layout=layout, **settings, preset="published")(
        images, targets
    ).relevance


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("backward", ["exact", "conservative"])
@pytest.mark.parametrize("backend", ["native", "composite", "reference"])
def test_quantised_weights_give_the_map_of_their_values(backend: Any, backward: Any, targets: str) -> None:
    model = own_vit()
    plain = copy.deepcopy(model)
    for quantised, same in zip(linear_layers(model), linear_layers(plain), strict=True):
        scale = quantised.weight.detach().abs().max() / 127
        weight = Quantised((quantised.weight.detach() / scale).round().to(torch.int8), scale)
        quantised.weight, same.weight = nn.Parameter(weight), nn.Parameter(weight.plain())
    settings = {"backend": backend, "backward": backward, "targets": TARGETS[targets]}
    got = explained(model, model.layout(), **settings)
    torch.testing.assert_close(got, explained(plain, plain.layout(), **settings))
    assert all(layer.weight.grad is None and layer.weight.requires_grad for layer in linear_layers(model))


@contextmanager
def with_names(model: OwnViT) -> Iterator[nn.Module]:
    for module in list(model.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight.detach().as_subclass(Named)))
    assert type(model.token) is Named
    yield model


@contextmanager
def with_weight_norm(model: OwnViT) -> Iterator[nn.Module]:
    for layer in linear_layers(model):
        weight_norm(layer)
    yield model


@contextmanager
def with_old_weight_norm(model: OwnViT) -> Iterator[nn.Module]:
    for layer in linear_layers(model):
        torch.nn.utils.weight_norm(layer)
    yield model


@contextmanager
def with_parametrizations(model: OwnViT) -> Iterator[nn.Module]:
    for block in model.layers:
        parametrize.register_parametrization(block.mlp[1], "factor", Scaled())
    yield model


@contextmanager
def with_cached_parametrizations(model: OwnViT) -> Iterator[nn.Module]:
    with with_parametrizations(model), parametrize.cached():
        model(torch.zeros(IMAGES, dtype=torch.float64))  # fills the cache, with gradients
        yield model


@contextmanager
def with_leaves(model: OwnViT) -> Iterator[nn.Module]:
    yield Handed(model, {n: weight.detach().clone().requires_grad_() for n, weight in model.named_parameters()})


@contextmanager
def with_computed_weights(model: OwnViT) -> Iterator[nn.Module]:
    yield Handed(model, {n: weight + 0 for n, weight in model.named_parameters()})


@contextmanager
def frozen(model: OwnViT) -> Iterator[nn.Module]:
    yield model.requires_grad_(False)


KINDS = [
    *(with_names, with_weight_norm, with_old_weight_norm, with_parametrizations, with_cached_parametrizations),
    *(with_leaves, with_computed_weights, frozen),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("backward", ["exact", "conservative"])
@pytest.mark.parametrize("backend", ["native", "composite", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_take_part_without_their_gradient(kind: Any, backend: Any, backward: Any) -> None:
    plain, model = factored(), factored()
    want = explained(plain, plain.layout(), backend=backend, backward=backward)
    with kind(model) as changed:
        got = explained(changed, model.layout(), backend=backend, backward=backward)
    torch.testing.assert_close(got.as_subclass(Tensor), want)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_lists_of_weights_are_constants_too(backend: Any) -> None:
    class Stacked(LearnedFactor):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x) * torch.cat([self.factor[:5], self.factor[5:]]) * torch.stack([self.factor])[0]

    class Same(LearnedFactor):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x) * self.factor.detach() * self.factor.detach()

    maps = []
    for factor in (Stacked, Same):
        model = own_vit()
        for block in model.layers:
            block.mlp[1] = factor()
        maps.append(explained(model, model.layout(), backend=backend, backward="conservative"))
    torch.testing.assert_close(*maps)


def in_mlp(model: OwnViT, replace: Callable[[nn.Linear], None]) -> OwnViT:
    replace(model.layers[1].mlp[2])
    return model


def rounding(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Rounding))


def spread(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Spread))


@pytest.mark.parametrize("backend", ["native", "composite", "reference"])
def test_products_that_cannot_be_explained_are_refused_by_name(backend: Any) -> None:
    """Without a word, the first would leave the MLP out of the map, and the second a part of the attention heads."""
    model = in_mlp(own_vit(), rounding)
    with pytest.raises(TapeError, match=r"block 1 \(Block\) has no gradient.* is a Rounding.*before it is quant"):
        explained(model, model.layout(), backend=backend)
    model = in_mlp(own_vit(), spread)
    with pytest.raises(TapeError, match=r"block 1 \(Block\).*spread over 2 processes \(Spread, S\(0\)\).*fully_shard"):
        explained(model, model.layout(), backend=backend)


def test_images_of_other_classes() -> None:
    """Those that carry metadata give plain results; those with operators of their own are refused by name."""
    model, images = own_vit(), torch.randn(IMAGES, dtype=torch.float64)
    e = Explainer(model, layout=model.layout(), preset="published")
    found = e(images.as_subclass(Named))
    assert type(found.relevance) is type(found.logits) is Tensor
    torch.testing.assert_close(found.relevance, e(images).relevance)
    with pytest.raises(TypeError, match=r"images: expected a plain tensor .* got a Quantised"):
        e(Quantised(torch.ones(IMAGES, dtype=torch.int8), torch.tensor(1.0, dtype=torch.float64)))


def test_the_cause_of_nan_is_found_beside_quantised_weights() -> None:
    model = own_vit()
    layer = model.layers[0].mlp[0]
    layer.weight = nn.Parameter(Quantised(torch.ones(HIDDEN, WIDTH, dtype=torch.int8), layer.weight.detach().max()))
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"model: weight 'norm\.weight' contains NaN"):
        explained(model, model.layout())


def test_a_wrapper_of_sharded_weights_that_cannot_be_explained_is_refused() -> None:
    class FullyShardedDataParallel(nn.Sequential):
        pass

    model = own_vit()
    with pytest.raises(ValueError, match=r"model: FullyShardedDataParallel cannot be explained.*fully_shard"):
        Explainer(FullyShardedDataParallel(model), layout=model.layout(), preset="published")
