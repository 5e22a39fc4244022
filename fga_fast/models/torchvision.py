"""torchvision's VisionTransformer (vit_b_16, vit_l_32, vit_h_14, ...). Read against torchvision 0.26."""

from __future__ import annotations

from torch import nn

from fga_fast.models.common import attribute, cannot, cut, is_a, only_size, pair
from fga_fast.models.layout import ModelLayout

_PACKAGE = "torchvision.models.vision_transformer"


def is_tower(module: nn.Module) -> bool:
    """Whether `module` is torchvision's VisionTransformer or a subclass of it."""
    return is_a(module, ("VisionTransformer",), _PACKAGE)


def read_layout(tower: nn.Module, image_size: tuple[int, int] | None = None) -> ModelLayout:
    """Layout of a torchvision VisionTransformer: one class token, which its head reads.

    Raises:
        ValueError: a subclass replaces the forward pass, or another image size than the tower's own is asked for.
    """
    owner = next(cls for cls in type(tower).__mro__ if "forward" in vars(cls))
    if owner.__module__ != _PACKAGE:
        raise cannot(tower, f"{owner.__name__} replaces VisionTransformer.forward, so what is pooled is not known")
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
