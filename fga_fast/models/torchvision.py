"""torchvision's VisionTransformer (vit_b_16, vit_l_32, vit_h_14, ...). Written for torchvision 0.26."""

from __future__ import annotations

from torch import nn

from fga_fast.models.common import attribute, check_methods, class_of, cut, only_size, pair
from fga_fast.models.layout import ModelLayout

_PACKAGE = "torchvision.models.vision_transformer"


def is_tower(module: nn.Module) -> bool:
    """Whether `module` is torchvision's VisionTransformer or a subclass of it."""
    return class_of(module, ("VisionTransformer",), _PACKAGE) is not None


def read_layout(tower: nn.Module, image_size: tuple[int, int] | None = None) -> ModelLayout:
    """Layout of a torchvision VisionTransformer: one class token, which its head reads."""
    check_methods(tower, ["forward"], [_PACKAGE], "which tokens are pooled")
    own = pair(attribute(tower, "image_size"), tower, "image_size")
    only_size(image_size, own, tower, "create the model with that image_size")
    return ModelLayout(
        blocks=tuple(attribute(attribute(tower, "encoder"), "layers")),
        prefix_tokens=1,
        grid=cut(own, pair(attribute(tower, "patch_size"), tower, "patch_size"), tower),
        pooling="token",
        image_size=own,
        d_model=attribute(tower, "hidden_dim"),
        tower=tower,
    )
