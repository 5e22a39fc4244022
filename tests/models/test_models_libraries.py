"""Which tower is found inside dual encoders, classifiers and wrappers of several libraries, and at which image size."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn

from fga_fast import Explainer
from fga_fast.models.find import find_layout

Build = Callable[..., nn.Module]


def built(library: str, name: str) -> nn.Module:
    pytest.importorskip(families.LIBRARIES[library])
    return next(f for f in families.registry() if (f.library, f.name) == (library, name)).build()


@pytest.mark.parametrize(
    ("library", "name", "path"),
    [
        ("Hugging Face", "CLIP with text", "vision_model"),
        ("Hugging Face", "SigLIP with text", "vision_model"),
        ("Hugging Face", "ViT", "vit"),
        ("Hugging Face", "DINOv2, classifier", "dinov2"),
        ("open_clip", "CLIP with text", "visual"),
        ("open_clip", "CLIP with text, patches averaged", "visual"),
        ("open_clip", "CLIP with text, timm tower", "visual.trunk"),
    ],
)
def test_the_image_tower_inside(library: str, name: str, path: str) -> None:
    model = built(library, name)
    assert find_layout(model).tower is model.get_submodule(path)
    wrapped = nn.Sequential(nn.Identity(), nn.ModuleDict({"model": model}))
    assert find_layout(wrapped).tower is model.get_submodule(path)


def test_two_towers_of_two_libraries(tiny_vit: Build) -> None:
    other = built("Hugging Face", "ViT")
    with pytest.raises(ValueError, match=r"found 2: '0' \(VisionTransformer\), '1' \(ViTForImageClassification\)"):
        find_layout(nn.Sequential(tiny_vit(), other))


def test_timm_inside_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    config = transformers.TimmWrapperConfig(architecture="test_vit", num_labels=4)
    model = transformers.TimmWrapperForImageClassification(config)
    layout = find_layout(model)
    assert (layout.prefix_tokens, layout.grid, layout.pooling) == (1, (10, 10), "token")


def test_hugging_face_towers_at_another_size() -> None:
    model = built("Hugging Face", "DINOv2")
    assert find_layout(model).grid == (3, 3)
    layout = find_layout(model, image_size=(56, 30))
    assert (layout.grid, layout.image_size, layout.pooled) == ((4, 2), (56, 30), (0, 1))
    with pytest.raises(ValueError, match=r"image_size: expected at least one patch of 14 x 14 pixels .*, got 56 x 10"):
        find_layout(model, image_size=(56, 10))


def test_timm_towers_at_another_size(tiny_vit: Build) -> None:
    model = tiny_vit(dynamic_img_size=True, global_pool="avg")
    layout = find_layout(model, image_size=(64, 48))
    assert (layout.grid, layout.image_size, layout.pooled) == ((4, 3), (64, 48), (1, 13))
    assert layout.tokens == model.forward_features(torch.randn(1, 3, 64, 48)).shape[1]  # type: ignore[operator]


def test_a_timm_tower_without_a_size_of_its_own(tiny_vit: Build) -> None:
    model: Any = tiny_vit(dynamic_img_size=True)
    model.patch_embed.img_size = None
    with pytest.raises(ValueError, match=r"has no fixed img_size .*find_layout\(model, image_size=\(224, 224\)\)"):
        find_layout(model)
    assert find_layout(model, image_size=(32, 32)).grid == (2, 2)


@pytest.fixture
def transformers_4(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], nn.Module]:
    """Makes modules whose class is defined, by name, where transformers 4 defined it."""

    def make(name: str, **parts: Any) -> nn.Module:
        where = "transformers.models.clip.modeling_clip"
        monkeypatch.setitem(sys.modules, where, ModuleType(where))
        module = type(name, (nn.Module,), {"__module__": where, "forward": lambda self, images: images})()
        for part, value in parts.items():
            setattr(module, part, value)
        return module

    return make


def test_names_of_transformers_4(transformers_4: Callable[..., nn.Module]) -> None:
    class Config:
        image_size, patch_size, num_channels, hidden_size = 48, 16, 3, 8
        _attn_implementation = "sdpa"

    encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), nn.Linear(8, 8)])})
    encoder.layers = encoder["layers"]
    tower = transformers_4("CLIPVisionTransformer", embeddings=nn.Identity(), encoder=encoder, config=Config())
    shell = transformers_4("CLIPVisionModel", vision_model=tower)
    layout = find_layout(shell)
    assert layout.tower is tower
    assert layout.blocks == tuple(encoder["layers"])
    assert (layout.prefix_tokens, layout.grid, layout.pooling) == (1, (3, 3), "token")


def test_a_users_class_may_be_called_like_a_library_s() -> None:
    own = type("ViTModel", (nn.Module,), {"embeddings": None})()
    with pytest.raises(ValueError, match="no supported vision transformer found in ViTModel"):
        find_layout(own)


class NextToLast(nn.Module):
    """Image features as LLaVA takes them: `vision_feature_layer=-2`, without the class token."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower, self.head = tower, nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        states = self.tower(images, output_hidden_states=True).hidden_states
        return self.head(states[-2][:, 1:].mean(dim=1))  # type: ignore[no-any-return]


def test_a_head_on_the_block_before_the_last() -> None:
    """The layout of docs/your_model.md, on a model that computes attention in the last block all the same."""
    transformers = pytest.importorskip("transformers")
    size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size, num_hidden_layers=3))
    tower.set_attn_implementation("eager")
    model, images, maps = NextToLast(tower).double().eval(), torch.randn(2, 3, 32, 32).double(), []
    found = find_layout(model)
    layout = dataclasses.replace(found, blocks=found.blocks[:-1], pooling="average", pooled=None)  # type: ignore[arg-type]
    hooks = [b.self_attn.register_forward_hook(lambda _m, _i, out: maps.append(out[1])) for b in layout.blocks]  # type: ignore[union-attr,operator]
    value = model(images)[:, 3].sum()
    for hook in hooks:
        hook.remove()
    row = torch.cat([torch.zeros(1), torch.full((16,), 1 / 16)]).double().expand(2, 1, -1)
    for a in reversed(maps):
        (g,) = torch.autograd.grad(value, a, retain_graph=True)
        row = row + row @ (a * g).clamp(min=0).mean(1)
    for backend in ("native", "reference"):
        got = Explainer(model, layout=layout, backend=backend, preset="published")(images, 3).relevance  # type: ignore[arg-type]
        torch.testing.assert_close(got, row[:, 0, 1:].detach())
