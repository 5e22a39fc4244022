"""open_clip's image towers, alone or inside CLIP, CustomTextCLIP and CoCa models. Written for open_clip 3.3.

It ignores text towers. timm.py reads the trunk inside a TimmModel tower.
"""

from __future__ import annotations

from torch import nn

from fga_fast.models.common import attribute, cannot, check_methods, class_of, cut, only_size, pair
from fga_fast.models.layout import ModelLayout
from fga_fast.settings import Pooling

_PACKAGE = "open_clip.transformer"


def is_tower(module: nn.Module) -> bool:
    """Whether `module` is open_clip's VisionTransformer or a subclass of it."""
    return class_of(module, ("VisionTransformer",), _PACKAGE) is not None


def read_layout(tower: nn.Module, image_size: tuple[int, int] | None = None) -> ModelLayout:
    """Layout of an open_clip VisionTransformer: one class token in front of the patches."""
    _check(tower)
    own = pair(attribute(tower, "image_size"), tower, "image_size")
    only_size(image_size, own, tower, "create it with open_clip.create_model(..., force_image_size=...)")
    grid = cut(own, pair(attribute(tower, "patch_size"), tower, "patch_size"), tower)
    transformer = attribute(tower, "transformer")
    pooling, pooled = _pooling(tower, 1 + grid[0] * grid[1])
    return ModelLayout(
        blocks=tuple(transformer.resblocks),
        prefix_tokens=1,
        grid=grid,
        pooling=pooling,
        pooled=pooled,
        image_size=own,
        in_chans=attribute(tower, "conv1").in_channels,
        d_model=len(attribute(tower, "class_embedding")),
        tower=tower,
        # Versions without batch_first always used [N, B, C].
        tokens_first=not getattr(transformer, "batch_first", False),
    )


def _check(tower: nn.Module) -> None:
    methods = ("forward", "_embeds", "_pool", "_global_pool")
    check_methods(tower, methods, [_PACKAGE], "which tokens are patches and which are pooled")
    dropout = getattr(tower, "patch_dropout", None)
    if tower.training and getattr(dropout, "prob", 0.0) > 0:
        raise cannot(tower, "patch dropout is active in train mode; call model.eval() first")


def _pooling(tower: nn.Module, tokens: int) -> tuple[Pooling, tuple[int, int]]:
    """The kind of pooling and the range of tokens that it reads."""
    kind = attribute(tower, "pool_type")
    pool = getattr(tower, "attn_pool", None)
    if pool is None:
        if kind == "tok":
            return "token", (0, 1)
        if kind == "avg":
            return "average", (1, tokens)
        raise cannot(tower, f"pool_type={kind!r} returns every token; create the model with pool_type 'tok' or 'avg'")
    if getattr(tower, "attn_pool_contrastive", None) is not None:
        raise cannot(tower, "it has two attention pools, for captions and for contrast; expected one")
    queries = len(attribute(pool, "query"))
    if queries != 1 or kind != "tok":
        raise cannot(
            tower,
            f"its attentional pool has {queries} queries and pool_type={kind!r}; expected 1 query, "
            "because the rollout starts from its row, and pool_type='tok'",
        )
    return "attention", (0, tokens)
