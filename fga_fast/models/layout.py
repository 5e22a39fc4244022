"""What a rollout must know about a model: its blocks, the order of its tokens and how its logits read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import TypeGuard

from torch import nn

from fga_fast.settings import Pooling, check_choice

LISTS = (nn.ModuleList, nn.ModuleDict)


def ends(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The first and the last module that a block calls: itself, or those of a list, which is never called."""
    parts = list(block.children()) if isinstance(block, LISTS) else [block]
    return parts[0], parts[-1]


@dataclass(frozen=True)
class ModelLayout:
    """Where the parts of a vision transformer are. `find_layout` makes one for the known families.

    For your own model, write it yourself; only the first three have no default:

        layout = ModelLayout(
            blocks=model.layers,         # in forward order; each returns the residual stream and attends once
            prefix_tokens=1,             # a class token in front of the patches
            grid=(14, 14),
            pooling="token",             # the head reads the class token
        )
        explainer = Explainer(model, layout=layout)

    To correct a found layout, for example for a wrapper that averages the patches itself:
    `dataclasses.replace(find_layout(model), pooling="average", pooled=None)`.

    Attributes:
        blocks: the L transformer blocks in forward order (any sequence of modules, kept as a tuple). Block l returns
            the residual stream x_l [B, N, C], or a tuple that starts with it, and attends over all N tokens once.
            A block may be an nn.ModuleList (or ModuleDict) of modules that the model calls in this order, such as
            [attention, mlp]: the stream enters the first, and what the last returns is added to it.
        prefix_tokens: tokens in front of the patches (class, distillation, registers); N = prefix_tokens + gh * gw.
        grid: (gh, gw), patches along height and width; patch p sits at row p // gw, column p % gw.
        pooling: how the residual stream becomes one vector. "token": one token is read. "average": the tokens of
            `pooled` are averaged with equal weight. "attention": one learned query attends to the tokens of `pooled`,
            in one more attention call after the blocks.
        pooled: token range [start, stop) that the pooling reads. None: the first token for "token", all patches for
            "average" and "attention"; the attribute is the range itself, never None.
        image_size: (height, width) of the model's images; None: unknown, so not checked.
        in_chans: channels of those images.
        d_model: width C of the residual stream; None: unknown, so not checked.
        tower: the vision transformer: the model itself, or a submodule of it; None: unknown.
        tokens_first: blocks take and return [N, B, C] (sequence first) instead of [B, N, C].

    Raises:
        TypeError, ValueError: a value is impossible, or two contradict each other; the message names them.
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
        set_field(self, "grid", two("grid", self.grid, least=1))
        set_field(self, "in_chans", _whole("in_chans", self.in_chans, least=1))
        if self.image_size is not None:
            set_field(self, "image_size", two("image_size", self.image_size, least=1))
        if self.d_model is not None:
            set_field(self, "d_model", _whole("d_model", self.d_model, least=1))
        check_choice("pooling", self.pooling, Pooling)
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
        start, stop = two("pooled", given, least=0)
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
        if isinstance(block, LISTS) and not len(block):
            raise ValueError(f"blocks[{index}]: expected modules in the {type(block).__name__}, got none")
    if not found:
        raise ValueError("blocks: expected at least one block, got none")
    if len(set(found)) < len(found):
        raise ValueError("blocks: one module is there twice; give each block once, and no blocks that share weights")
    return found


def is_whole(value: object) -> TypeGuard[int]:
    """Whether `value` is an int, also one of NumPy's, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _whole(name: str, value: object, least: int) -> int:
    if not is_whole(value):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")
    return int(value)


def two(name: str, value: object, least: int) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair of ints, got {value!r}")
    return _whole(f"{name}[0]", value[0], least), _whole(f"{name}[1]", value[1], least)
