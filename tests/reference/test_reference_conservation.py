"""Conservation: under the conservative backward pass, tokens and bias terms share the explained logit out completely.

At every block, `sum_t x_t . g_t + sum_b b . dy/db = y`, over the tokens t that enter the block and the bias terms b of
linear layers and norms from there to the logits. Position embeddings are part of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import LIBRARIES, Family, layout_of, registry, tokenize
from torch import Tensor, nn

from fga_fast.engine.torch_functions import OPERATIONS
from fga_fast.models.find import find_layout
from fga_fast.models.layout import ModelLayout
from fga_fast.question.readout import Readout
from fga_fast.reference.conservative import activation
from fga_fast.reference.explain import differentiate
from fga_fast.reference.recording import recording

timm_layers = pytest.importorskip("timm.layers")
eva = pytest.importorskip("timm.models.eva")

Build = Callable[..., Any]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
FAR_OFF = 0.1  # the least error of the exact backward pass, relative to the logit


class NewGELU(nn.Module):
    """GELU's tanh form as transformers writes it out."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


class ErfGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class Gated(nn.Module):
    """An MLP with a gate; `multiply` is how the product of activation and value is written."""

    def __init__(self, act: nn.Module, multiply: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.gate, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.act, self.multiply = act, multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.multiply(self.act(self.gate(x)), self.value(x)))


def in_place(a: Tensor, b: Tensor) -> Tensor:
    a.mul_(b)
    return a


def in_place_of_the_other(a: Tensor, b: Tensor) -> Tensor:
    b.mul_(a)
    return b


def augmented(a: Tensor, b: Tensor) -> Tensor:
    a *= b
    return a


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a * b": lambda a, b: a * b,
    "b * a": lambda a, b: b * a,
    "torch.mul": torch.mul,
    "mul_": in_place,
    "*=": augmented,
    "b.mul_(a)": in_place_of_the_other,
    "scaled": lambda a, b: 2 * a * b,
}


class Normalised(nn.Module):
    """A zero-shot head: the feature is divided by its length, in one of the ways that models write it."""

    def __init__(self, tower: nn.Module, divide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.tower, self.divide = tower, divide
        self.register_buffer("text", torch.randn(7, 5))

    def forward(self, images: Tensor) -> Tensor:
        return 10 * self.divide(self.tower(images)) @ self.text.t()


LENGTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.normalize": lambda x: F.normalize(x, dim=-1),
    "Tensor.norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "torch.norm": lambda x: x / torch.norm(x, dim=-1, keepdim=True),
    "linalg.norm": lambda x: x / torch.linalg.norm(x, dim=-1, keepdim=True),
    "vector_norm": lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "layer norm, gelu": {},
    "composed rms norm": {"norm_layer": timm_layers.RmsNorm},
    "rms norm": {"norm_layer": partial(nn.RMSNorm, eps=1e-6)},
    "layer scale": {"init_values": 0.5},
    "pre-norm, registers": {"pre_norm": True, "reg_tokens": 2},
    "quick gelu": {"act_layer": timm_layers.get_act_layer("quick_gelu")},
    "silu": {"act_layer": nn.SiLU},
    "silu in place": {"act_layer": partial(nn.SiLU, inplace=True)},
    "mish": {"act_layer": nn.Mish},
    "hardswish": {"act_layer": nn.Hardswish},
    "tanh gelu": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "written out: tanh gelu": {"act_layer": NewGELU},
    "written out: erf gelu": {"act_layer": ErfGELU},
    "written out: quick gelu": {"act_layer": QuickGELU},
    "relu": {"act_layer": nn.ReLU},
    "swiglu": {"mlp_layer": timm_layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4, "init_values": 0.5},
    "glu": {"mlp_layer": timm_layers.GluMlp, "act_layer": nn.Sigmoid},
    "q/k norm": {"qk_norm": True},
    "sub-layer norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "average pool": {"global_pool": "avg"},
    "average pool, no class token": {"global_pool": "avg", "class_token": False},
    "attention pool": {"global_pool": "map"},
    "attention pool, no class token": {"global_pool": "map", "class_token": False, "act_layer": nn.SiLU},
}


def draw(model: nn.Module) -> nn.Module:
    """Weights that make attention uneven and bias terms count."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


class Read(nn.Module):
    """A model with what is read from it, logits or features."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        super().__init__()
        self.model, self.readout = model, Readout(model, tokenizer=tokenizer)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, classes] or [B, E]
        return self.readout.run(images)


def errors(model: Read, images: Tensor, layout: ModelLayout, conservative: bool) -> list[float]:
    """Per block, the relative error of tokens and bias terms together against the largest logit."""
    state = {name: value.detach().clone() for name, value in model.named_parameters()}
    biases = {name: value.requires_grad_() for name, value in state.items() if "bias" in name.split(".")[-1]}
    settings: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    with recording(layout, images, conservative, wanted=range(len(layout.blocks))) as record:
        # Computed in the pass and unseen by it, because it takes what has a gradient from elsewhere for constants.
        with torch._C.DisableTorchFunction():
            state |= {name: value.clone() for name, value in biases.items()}
            images = images.clone().requires_grad_().clone()
        logits = torch.func.functional_call(model, state, (images,))
    found = []
    for y in logits.gather(1, logits.abs().argmax(1, keepdim=True))[:, 0]:
        gradients = differentiate(y, record, {})
        everywhere = torch.autograd.grad(y, list(biases.values()), **settings)
        for block, x in record.inputs.items():
            g = gradients.inputs[block]
            # Bias terms before x act through x only; what they contribute is contained in x . g.
            before = torch.autograd.grad(x, list(biases.values()), g, **settings)
            after = [b * (whole - part) for b, whole, part in zip(biases.values(), everywhere, before, strict=True)]
            total = (x * g).sum() + torch.stack([contribution.sum() for contribution in after]).sum()
            found.append(float((total - y).detach().abs() / y.detach().abs()))
    return found


def check(model: nn.Module, dtype: torch.dtype) -> None:
    read, images = Read(model.to(dtype)), torch.randn(2, 3, 32, 48, dtype=dtype)
    layout = find_layout(model)
    assert max(errors(read, images, layout, conservative=True)) < TOLERANCE[dtype]
    assert max(errors(read, images, layout, conservative=False)) > FAR_OFF


@pytest.mark.parametrize("family", [pytest.param(family, id=family.id) for family in registry()])
def test_every_supported_family(family: Family) -> None:
    pytest.importorskip(LIBRARIES[family.library])
    model = family.build().double()
    read = Read(model, tokenize if family.prompts else None).eval()
    images, layout = family.images().double(), layout_of(family, model)
    assert max(errors(read, images, layout, conservative=True)) < TOLERANCE[torch.float64]
    assert max(errors(read, images, layout, conservative=False)) > FAR_OFF


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SETTINGS)
def test_vision_transformers(tiny_vit: Build, name: str, dtype: torch.dtype) -> None:
    check(tiny_vit(**SETTINGS[name]), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("settings", [{}, {"global_pool": "avg"}, {"swiglu_mlp": False}, {"global_pool": "map"}])
def test_eva02_with_rotary_embedding(settings: dict[str, Any], dtype: torch.dtype) -> None:
    sizes = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    rotary = {"use_rot_pos_emb": True, "ref_feat_shape": (2, 3), "swiglu_mlp": True, "scale_mlp": True}
    check(draw(eva.Eva(**{**sizes, **rotary, "global_pool": "token", "mlp_ratio": 2, **settings})), dtype)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU, QuickGELU, NewGELU, nn.Sigmoid])
def test_gated_mlps_however_they_are_written(tiny_vit: Build, act: type[nn.Module], product: str) -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.mlp = Gated(act(), PRODUCTS[product], 16)
    if act is nn.Sigmoid and product in ("mul_", "*="):  # overwrites what the exact backward pass needs
        read, images = Read(model.double().eval()), torch.randn(2, 3, 32, 48).double()
        assert max(errors(read, images, find_layout(model), conservative=True)) < TOLERANCE[torch.float64]
    else:
        check(model.eval(), torch.float64)


@pytest.mark.parametrize("length", LENGTHS)
def test_features_divided_by_their_length(tiny_vit: Build, length: str) -> None:
    check(Normalised(tiny_vit(), LENGTHS[length]).eval(), torch.float64)


def test_attention_computed_by_the_model_itself(tiny_vit: Build) -> None:
    model = tiny_vit(global_pool="map")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    check(model, torch.float64)


def test_activation_at_zero_has_its_limit() -> None:
    for act, limit in ((F.gelu, 0.5), (F.silu, 0.5), (F.hardswish, 0.5), (F.mish, 0.6)):
        z = torch.tensor([0.0, 1e-30, -1e-30, 2.0], requires_grad=True)
        y = activation(OPERATIONS[act], act, z)
        (g,) = torch.autograd.grad(y.sum(), z)
        torch.testing.assert_close(y, act(z))
        torch.testing.assert_close(g, torch.tensor([limit, limit, limit, float(act(torch.tensor(2.0))) / 2]))
