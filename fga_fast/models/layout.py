"""What a relevance rollout has to know about a model: its blocks, its token order and how logits are read.

`find_layout` looks at the modules only. It runs nothing, changes nothing and imports no model library: families are
recognised by the classes of the modules that the caller already built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from types import ModuleType
from typing import Literal, get_args

from torch import nn

from fga_fast.models.refused import check_inside
from fga_fast.models.refused import reason as refusal

SUPPORTED = (
    "timm's plain ViTs (ViT, DeiT, DINOv2, DINOv3, EVA-02, BEiT, CLIP, SigLIP, PE), open_clip's image towers, Hugging "
    "Face's ViT, DeiT, BEiT, CLIP, SigLIP, DINOv2 and DINOv3, and torchvision's VisionTransformer"
)
Pooling = Literal["token", "average", "attention"]


@dataclass(frozen=True)
class ModelLayout:
    """Places in a vision transformer that an explanation needs. `find_layout` reads it from the known families.

    For a model of your own, say where things are; only the first three have no default:

        layout = ModelLayout(
            blocks=model.layers,         # in forward order; each returns the residual stream and attends once
            prefix_tokens=1,             # a class token in front of the patches
            grid=(14, 14),
            pooling="token",             # the head reads the class token
        )
        explainer = Explainer(model, layout=layout)

    To correct one that was found, for example for a wrapper that averages the patches itself:
    `dataclasses.replace(find_layout(model), pooling="average", pooled=None)`.

    Attributes:
        blocks: the L transformer blocks in forward order (any sequence of modules, kept as a tuple). Block l returns
            the residual stream x_l [B, N, C], or a tuple whose first entry it is, and attends over all N tokens once.
        prefix_tokens: tokens in front of the patches (class, distillation, registers); N = prefix_tokens + gh * gw.
        grid: (gh, gw), patches along height and width; patch p sits at row p // gw, column p % gw.
        pooling: how the residual stream becomes one vector. "token": one token is read. "average": the tokens of
            `pooled` are averaged with equal weight. "attention": one learned query attends to the tokens of `pooled`,
            in one more attention call after the blocks.
        pooled: token range [start, stop) that the pooling reads. None: the first token for "token", all patches for
            "average" and "attention"; the attribute is the range itself, never None.
        image_size: (height, width) of the images the model takes; None: not known, so not checked.
        in_chans: channels of those images.
        d_model: width C of the residual stream; None: not known, so not checked.
        tower: the vision transformer inside the model (the model itself, or a submodule of it); None: not known.
        tokens_first: blocks hand over [N, B, C] (sequence first) instead of [B, N, C].

    Raises:
        TypeError, ValueError: a value that cannot be, or two that contradict each other; the message names them.
    """

    blocks: tuple[nn.Module, ...]
    prefix_tokens: int
    grid: tuple[int, int]
    pooling: Pooling = "token"
    pooled: tuple[int, int] = None  # type: ignore[assignment] # None may be given, __post_init__ resolves it
    image_size: tuple[int, int] | None = None
    in_chans: int = 3
    d_model: int | None = None
    tower: nn.Module | None = None
    tokens_first: bool = False

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the class is frozen for everyone else
        set_field(self, "blocks", _modules(self.blocks))
        set_field(self, "prefix_tokens", _whole("prefix_tokens", self.prefix_tokens, least=0))
        set_field(self, "grid", _two("grid", self.grid, least=1))
        set_field(self, "in_chans", _whole("in_chans", self.in_chans, least=1))
        if self.image_size is not None:
            set_field(self, "image_size", _two("image_size", self.image_size, least=1))
        if self.d_model is not None:
            set_field(self, "d_model", _whole("d_model", self.d_model, least=1))
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling: expected 'token', 'average' or 'attention', got {self.pooling!r}")
        set_field(self, "pooled", self._resolve_pooled())
        if not isinstance(self.tokens_first, bool):
            raise TypeError(f"tokens_first: expected True or False, got {self.tokens_first!r}")
        self._check_tower()

    def _resolve_pooled(self) -> tuple[int, int]:
        given: object = self.pooled
        if given is None:
            if self.pooling != "token":
                return self.prefix_tokens, self.tokens
            if self.prefix_tokens == 0:
                raise ValueError(
                    "pooling: 'token' reads the first token, but prefix_tokens=0 says that there is no class token; "
                    "give pooling='average' or 'attention', or the token that is read as pooled=(i, i + 1)"
                )
            return 0, 1
        start, stop = _two("pooled", given, least=0)
        if not start < stop <= self.tokens:
            raise ValueError(
                f"pooled: expected a range (start, stop) within the {self.tokens} tokens (prefix_tokens="
                f"{self.prefix_tokens} and a {self.grid[0]} x {self.grid[1]} grid), got ({start}, {stop})"
            )
        if self.pooling == "token" and stop - start != 1:
            raise ValueError(f"pooled: pooling='token' reads one token, got the range ({start}, {stop})")
        return start, stop

    def _check_tower(self) -> None:
        if self.tower is None:
            return
        if not isinstance(self.tower, nn.Module):
            raise TypeError(f"tower: expected a torch.nn.Module or None, got {type(self.tower).__name__}")
        inside = set(self.tower.modules())
        for index, block in enumerate(self.blocks):
            if block not in inside:
                raise ValueError(f"tower: {type(self.tower).__name__} does not hold blocks[{index}]; give its tower")

    @property
    def patches(self) -> int:
        """Number of patches P = gh * gw."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Number of tokens N = prefix tokens + patches."""
        return self.prefix_tokens + self.patches


def _modules(blocks: object) -> tuple[nn.Module, ...]:
    if not isinstance(blocks, Iterable):
        raise TypeError(f"blocks: expected a sequence of modules such as model.layers, got {type(blocks).__name__}")
    found = tuple(blocks)
    for index, block in enumerate(found):
        if not isinstance(block, nn.Module):
            raise TypeError(f"blocks[{index}]: expected a torch.nn.Module, got {type(block).__name__}")
    if not found:
        raise ValueError("blocks: expected at least one block, got none")
    if len(set(found)) < len(found):
        raise ValueError("blocks: one module is there twice; blocks that share weights run more than once a pass")
    return found


def _whole(name: str, value: object, least: int) -> int:
    # Integral takes NumPy's integers too; a bool is one by accident of Python's.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")
    return int(value)


def _two(name: str, value: object, least: int) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair of ints, got {value!r}")
    return _whole(f"{name}[0]", value[0], least), _whole(f"{name}[1]", value[1], least)


def find_layout(model: nn.Module, image_size: tuple[int, int] | None = None) -> ModelLayout:
    """Layout of the one supported vision transformer inside `model`.

    Supported: timm's plain ViTs (ViT, DeiT, DeiT III, DINOv2, DINOv3, EVA-02, BEiT, CLIP and SigLIP towers,
    Perception Encoder), the image towers of open_clip, Hugging Face's ViT, DeiT, BEiT, CLIP, SigLIP, DINOv2 and
    DINOv3, and torchvision's VisionTransformer. The tower may be the model itself or sit anywhere inside it; text
    towers of dual encoders do not count. What a wrapper of your own does with the tower's output is not looked at: the
    pooling is the library's own.

    Args:
        model: any module from images [B, channels, height, width] to logits [B, classes].
        image_size: (height, width) of the images to be explained, for towers that take several sizes; None: the size
            that the tower was built for.

    Returns:
        The tower's `ModelLayout`.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: no supported tower, more than one, or one that the method cannot explain; the message names the
            class, the reason and what to do. An `image_size` that the tower does not take.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module from images to logits, got {type(model).__name__}")
    if image_size is not None:
        image_size = _two("image_size", image_size, least=1)
    towers: dict[str, tuple[ModuleType, nn.Module]] = {}
    for name, module in _outermost(model):
        reason = refusal(module)
        if reason is not None:
            where = f" (at '{name}')" if name else ""
            raise ValueError(f"model: {type(module).__name__}{where} cannot be explained: {reason}")
        family = _family(module)
        if family is not None:
            towers[name] = family, module
    if not towers:
        raise ValueError(
            f"model: no supported vision transformer found in {type(model).__name__}; supported are {SUPPORTED}, alone "
            "or anywhere inside a wrapper that registers the tower as a submodule. For a vision transformer of your "
            "own say where its blocks are: ModelLayout(blocks=..., prefix_tokens=..., grid=..., pooling=...)"
        )
    if len(towers) > 1:
        found = ", ".join(f"'{name}' ({type(tower).__name__})" for name, (_, tower) in towers.items())
        raise ValueError(
            f"model: expected exactly one vision transformer, found {len(towers)}: {found}; pass a model that holds "
            "only the tower to be explained, e.g. a wrapper with the other one's output precomputed"
        )
    ((family, tower),) = towers.values()
    check_inside(tower)
    layout: ModelLayout = family.read_layout(tower, image_size)
    return layout


def active_randomness(model: nn.Module) -> list[str]:
    """Names of submodules that would draw random numbers in a forward pass: dropout of any kind in train mode.

    An explanation of such a model would not be of the logits that a user sees, so callers refuse it. A module counts
    if it is in train mode and has a drop probability above 0 (torch's Dropout modules, DropPath and PatchDropout, the
    attention modules of torch and Hugging Face) or shifts its rotary embeddings at random (DINOv3).
    """
    return [name or type(module).__name__ for name, module in model.named_modules() if _draws(module)]


def _draws(module: nn.Module) -> bool:
    if not module.training:
        return False
    name = type(module).__name__
    rates: tuple[str, ...] = ()
    if "Drop" in name:
        rates = ("p", "prob", "drop_prob")
    elif "Attention" in name:
        rates = ("dropout", "attention_dropout", "dropout_prob")
    elif "Rotary" in name or "Rope" in name:
        if getattr(module, "aug_active", False) is True:
            return True
        module = getattr(module, "config", module)
        rates = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
    values = (getattr(module, rate, 0.0) for rate in rates)
    return any(isinstance(value, (int, float)) and value > 0 for value in values)


def _family(module: nn.Module) -> ModuleType | None:
    """The file of this package that can read `module`, if it is a tower."""
    # Imported here because the family files need ModelLayout from this one.
    from fga_fast.models import huggingface, open_clip, timm, torchvision

    return next((family for family in (timm, huggingface, open_clip, torchvision) if family.is_tower(module)), None)


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules in forward-registration order, once each, without looking inside a tower that was recognised."""
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if _family(module) is not None:
            continue
        children = [(f"{name}.{child}" if name else child, part) for child, part in module.named_children()]
        stack.extend(reversed(children))
