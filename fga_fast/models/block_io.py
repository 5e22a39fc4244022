"""What goes into and comes out of a block, and what may happen on the way: the rules that a forward pass must keep.

Every backend follows a model's forward pass with a `ForwardPass`, so all of them refuse the same models in the same
words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves, tree_map_only

from fga_fast.models.layout import ModelLayout
from fga_fast.sae.hold import Hold


class TapeError(ValueError):
    """The model cannot be tapped; the message says what was found and what to do."""


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def replace_input(
    arguments: Arguments, tokens: Tensor | None, layout: ModelLayout, images: int, where: str
) -> tuple[Tensor, Callable[[Tensor], Arguments]]:
    """The residual stream that enters a block, and a function that puts another tensor in its place.

    Args:
        arguments: positional and keyword arguments of the block.
        tokens: output of the block before, or None. If it is among the arguments, it is the stream.
        layout: says how many tokens there are, and their width if it is known.
        images: B.
        where: names the block in errors.
    """
    args, kwargs = arguments
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    found = [name for name, value in named if value is tokens and tokens is not None]
    first = (layout.tokens, images) if layout.tokens_first else (images, layout.tokens)
    if not found:
        found = [name for name, value in named if _is_stream(value, first, layout.d_model)]
    if len(found) != 1:
        what = "no tensor" if not found else f"{len(found)} tensors ({', '.join(map(str, found))})"
        raise TapeError(
            f"model: {where} is called with {what} of shape [{first[0]}, {first[1]}, {layout.d_model or 'C'}], so the "
            "residual stream is not known; call it with that tensor alone, or use preset='published'"
        )
    name = found[0]

    def replaced(value: Tensor) -> Arguments:
        if isinstance(name, int):
            return (*args[:name], value, *args[name + 1 :]), kwargs
        return args, {**kwargs, name: value}

    return (args[name] if isinstance(name, int) else kwargs[name]), replaced


def stream_of(output: Any, where: str) -> Tensor:
    """The residual stream that leaves a block: its output, or the first entry of it."""
    x = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(x, Tensor) or x.dim() != 3:
        raise TapeError(
            f"model: {where} returned {type(output).__name__}, expected the residual stream [B, N, C] or a tuple that "
            "starts with it"
        )
    return x


def with_stream(output: Any, x: Tensor) -> Any:
    """The same output with another residual stream, in the type it came in."""
    if not isinstance(output, tuple):
        return x
    if hasattr(output, "_replace"):  # a named tuple, whose names the model uses
        return type(output)(x, *output[1:])
    return (x, *output[1:])


def _is_stream(value: object, first: tuple[int, int], width: int | None) -> bool:
    if not isinstance(value, Tensor) or value.dim() != 3 or not value.is_floating_point():
        return False
    return tuple(value.shape[:2]) == first and width in (None, value.shape[2])


class Outside(NamedTuple):
    """An attention after the blocks that is not the layout's pool."""

    edge: GradientEdge | None  # of its output; None: it has no gradient
    queries: int
    keys: int
    before_pool: bool


class WrittenMap(NamedTuple):
    """An attention map that the model computes itself, and goes on with."""

    where: str
    block: int | None  # None: the pool
    edge: GradientEdge  # of the map [B, H, Nq, N]


@dataclass
class ForwardPass:
    """Where a model's forward pass is, what it has brought so far, and what it must not do.

    Blocks run in order. A block may also not run, hand its input on, or run where gradients are off: then it is no part
    of the explanation, and `notices` says so. Its checks raise `TapeError`.
    """

    layout: ModelLayout
    images: int  # B
    start: int = 0  # first block that is to be explained; those before it only run
    held: Mapping[int, Hold] = field(default_factory=dict)  # block -> SAE features that are held in the stream after it
    live: bool = True  # gradients are on where the pass is: in the block that runs, or after the blocks
    first: int = field(init=False)  # first block that can be explained; `find_reads` sets it
    cuts: list[int] = field(init=False)  # blocks before which gradients end; ascending
    block: int | None = None  # block that is running; None between, before and after blocks
    finished: int = 0  # number of the last block that has run, plus 1
    ran: set[int] = field(default_factory=set)
    attended: set[int | None] = field(default_factory=set)  # blocks whose attention was seen; None: the pool's was
    stream: Tensor | None = None  # [B, N, C] or [N, B, C], what the block that ended last handed on
    streams: dict[int, GradientEdge] = field(default_factory=dict)  # block -> what it handed on, in autograd's graph
    attentions: dict[int | None, GradientEdge] = field(default_factory=dict)  # likewise, explained attention's output
    carriers: set[Node] = field(default_factory=set)  # where relevance passes blocks by, in autograd's graph
    outside: list[Outside] = field(default_factory=list)
    maps: list[WrittenMap] = field(default_factory=list)  # for `check_maps`
    _differentiated: bool = False  # a block after the last cut had an attention
    _dead: bool = False  # the block that ended last ran without gradients
    _entered: list[Tensor] = field(default_factory=list)  # arguments of the running block

    def __post_init__(self) -> None:
        self.first, self.cuts = self.start, [self.start]

    @property
    def explaining(self) -> bool:
        """Whether what runs now is differentiated: from the first explained block to the model's end."""
        return self.finished > self.start or (self.block is not None and self.block >= self.start)

    @property
    def where(self) -> str:
        """What is running, for error messages."""
        if self.block is not None:
            return self.name(self.block)
        return "the pooling head" if self._is_over else f"the part before block {self.finished}"

    def enter(self, index: int, arguments: Arguments) -> Arguments:
        """A block begins. Returns what to call it with: copies in place of tensors that were made under
        torch.inference_mode(), which autograd refuses.
        """
        if index < self.finished or self.block is not None:
            where = f"after block {self.finished - 1}" if self.block is None else f"inside block {self.block}"
            raise TapeError(f"model: block {index} runs {where}; blocks must run in order, each at most once")
        on = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self.block, self.live = index, on and index >= self.start
        self._entered = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        if self.live:
            has_gradient = any(tensor.requires_grad for tensor in self._entered)
            if self._dead and has_gradient:
                raise TapeError(
                    f"model: block {self.finished - 1} ran without gradients, but what enters block {index} has them "
                    "(a reentrant torch.utils.checkpoint, or a path around the block); call blocks directly"
                )
            if self._differentiated and not has_gradient:
                self.cuts.append(index)
            if any(tensor.is_inference() for tensor in self._entered):
                copied: Arguments = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, arguments)
                return copied
        return arguments

    def leave(self, index: int, output: Any) -> Tensor | None:
        """A block ends. Returns the residual stream that leaves it; None if the block is no part of the explanation."""
        entered, self._entered = self._entered, []
        self.block, self.finished = None, index + 1
        self.ran.add(index)
        live, self.live = self.live, True
        if not live:
            self.stream = output[0] if isinstance(output, tuple) else output
            if index >= self.start:
                self.cuts.append(index + 1)
                self._dead, self._differentiated = True, False
            return None
        self._dead = False
        self.stream = stream_of(output, self.name(index))
        self.check_stream(index, self.stream)
        if index not in self.attended:
            if any(self.stream is tensor for tensor in entered):
                return None  # handed on unchanged
            raise TapeError(
                f"model: {self.name(index)} ran without an attention that could be seen: neither "
                "torch.nn.functional.scaled_dot_product_attention, nor nn.MultiheadAttention, nor a softmax over "
                f"[B, H, {self.layout.tokens}, {self.layout.tokens}]; use an implementation that calls one of them"
            )
        self._differentiated = True
        return self.stream

    def hold(self, index: int, output: Any) -> Any:
        """A block's output with its features held, if there are any; a constant is added to the patches."""
        if index not in self.held:
            return output
        x = stream_of(output, self.name(index))
        self.check_stream(index, x)
        patches = (x.transpose(0, 1) if self.layout.tokens_first else x)[:, self.layout.prefix_tokens :]
        change = pad(self.held[index].change(patches.detach()), (0, 0, self.layout.prefix_tokens, 0))  # [B, N, C]
        self.stream = x + (change.transpose(0, 1) if self.layout.tokens_first else change)
        return with_stream(output, self.stream)

    def check_held(self) -> None:
        """Refuses features of a block that did not run."""
        for index in self.held:
            if index not in self.ran:
                raise TapeError(f"model: {self.name(index)} did not run, so its features cannot be held; ablate others")

    def put_in(self, arguments: Any) -> None:
        """Notes what the running block is called with in place of what entered it."""
        self._entered += [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]

    def hand_on(self, index: int, x: Tensor) -> None:  # [B, N, C] or [N, B, C]
        """Notes the residual stream with which the model goes on after a block."""
        self.stream = x
        if x.requires_grad:
            self.streams[index] = get_gradient_edge(x)

    def check_stream(self, index: int, x: Tensor) -> None:
        """Refuses a residual stream whose images and tokens are not where the layout says."""
        layout = self.layout
        expected = (layout.tokens, self.images) if layout.tokens_first else (self.images, layout.tokens)
        if tuple(x.shape[:2]) != expected:
            swapped = tuple(x.shape[:2]) == expected[::-1]
            advice = f"set tokens_first={not layout.tokens_first}" if swapped else "check prefix_tokens and grid"
            raise TapeError(
                f"layout: {self.name(index)} returned {list(x.shape)}, expected [{expected[0]}, {expected[1]}, C] for "
                f"{self.images} images of {layout.tokens} tokens with tokens_first={layout.tokens_first}; {advice}"
            )

    def is_tapped(self, queries: int, keys: int) -> bool:
        """Whether an attention of this size is explained: in a block any, after the blocks the pool's."""
        if self.block is not None:
            return True
        if not self._is_over:
            raise TapeError(
                f"model: attention runs between block {self.finished - 1} and block {self.finished} of the layout, "
                "where relevance would pass it by; list all blocks, in forward order, and no blocks that do not run"
            )
        return None not in self.attended and self.layout.pooling == "attention" and (queries, keys) == self._sizes

    def pass_by(self, output: Tensor, queries: int, keys: int) -> None:
        """Remembers an attention after the blocks that is not explained."""
        edge = get_gradient_edge(output) if output.requires_grad else None
        self.outside.append(Outside(edge, queries, keys, before_pool=None not in self.attended))

    def attended_with(self, output: Tensor) -> None:
        """Notes the output, or the maps, of the attention that is explained now."""
        if output.requires_grad:
            self.attentions[self.block] = get_gradient_edge(output)

    def attend(self, query: tuple[int, ...], key: tuple[int, ...]) -> None:  # [B, H, Nq, ...], [B, H, N, ...]
        """An attention that is explained; one a block, over all tokens, and over the pooled ones in the pool."""
        if self.block in self.attended:
            raise TapeError(f"model: {self.where} calls attention more than once; expected one call a block")
        if len(query) != 4 or len(key) < 3 or query[1] != key[1]:
            raise TapeError(
                f"model: attention in {self.where} must have queries and keys [B, H, N, D] with as many heads, got "
                f"{tuple(query)} and {tuple(key)}"
            )
        if query[0] != self.images:
            raise TapeError(
                f"model: attention in {self.where} sees a batch of {query[0]} for {self.images} images; a model that "
                "makes several views of an image cannot be explained as a whole, explain the views one by one"
            )
        if (query[2], key[2]) != self._sizes:
            layout, (queries, keys) = self.layout, self._sizes
            raise TapeError(
                f"model: attention in {self.where} has {query[2]} queries and {key[2]} keys, expected {queries} and "
                f"{keys} ({layout.prefix_tokens} prefix tokens and a {layout.grid[0]} x {layout.grid[1]} grid); "
                "windowed attention and dropped patches cannot be explained"
            )
        self.attended.add(self.block)

    def map_of(self, maps: Tensor, dim: int | None) -> Tensor | None:  # a softmax's output -> [B, H, Nq, N]
        """The maps [B, H, Nq, N] if this is the attention of the running block or of the pool, else None."""
        if not torch.is_grad_enabled():  # a look at the maps, for a log
            return None
        images = max(self.images, 1)
        if dim not in (-1, maps.dim() - 1) or maps.dim() not in (3, 4) or len(maps) % images:
            return None
        by_head = maps if maps.dim() == 4 else maps.view(self.images, len(maps) // images, *maps.shape[1:])
        queries, keys = maps.shape[-2:]
        if self.block is None:
            tokens = (self._sizes[1], self.layout.patches, self.layout.tokens)
            one = self.layout.pooling == "attention" and self._sizes[1] == 1  # a pool over one token
            if not self._is_over or queries != 1 or (keys == 1 and not one) or keys not in tokens:
                return None
            if not self.is_tapped(queries, keys):
                self.pass_by(maps, queries, keys)
                return None
        elif (queries, keys) != self._sizes:
            return None
        self.attend(by_head.shape, by_head.shape[:2] + maps.shape[-1:])
        return by_head

    def keep_map(self, maps: Tensor) -> None:  # [B, H, Nq, N]
        """Remembers the map that the model goes on with."""
        if maps.requires_grad:
            self.maps.append(WrittenMap(self.where, self.block, get_gradient_edge(maps)))

    def check_call(self, attn_mask: Tensor | None, dropout_p: float, is_causal: bool) -> None:
        """Refuses dropout, and masks that are not added."""
        if dropout_p > 0:
            raise TapeError(f"model: attention in {self.where} has dropout {dropout_p} active; call model.eval() first")
        what = "causal" if is_causal else None
        if attn_mask is not None and not attn_mask.is_floating_point():
            what = f"masked (attn_mask {tuple(attn_mask.shape)}, {attn_mask.dtype})"
        if what is not None:
            raise TapeError(f"model: attention in {self.where} is {what}; only additive masks can be explained")

    def share_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, D] of grouped queries [B, H, Nq, D], repeated for each of their heads."""
        heads = tuple(t.shape[1] if t.dim() == 4 else 0 for t in (query, key, value))
        if 0 in heads or heads[0] % heads[1] or heads[0] % heads[2]:
            raise TapeError(
                f"model: attention in {self.where} with enable_gqa must have queries, keys and values [B, H, N, D], "
                f"the heads of the queries a multiple of the others', got {tuple(query.shape)}, {tuple(key.shape)} and "
                f"{tuple(value.shape)}"
            )
        return key.repeat_interleave(heads[0] // heads[1], 1), value.repeat_interleave(heads[0] // heads[2], 1)

    def refuse_hidden(self, name: str) -> None:
        """Refuses a kernel of attention that a block calls directly."""
        if self.block is not None:
            raise TapeError(
                f"model: {self.where} calls {name}, whose attention maps cannot be reached; call "
                "torch.nn.functional.scaled_dot_product_attention"
            )

    def refuse_cut_linear(self, weight: str) -> None:
        """Refuses a linear layer whose output has no gradient to its input."""
        raise TapeError(
            f"model: a linear layer in {self.where} has no gradient to its input (its weight is a {weight}); "
            "quantised activations are rounded, so nothing can be explained through them: explain the model before it "
            "is quantised, or quantise its weights only"
        )

    def check_whole(self, weight: Tensor) -> None:
        """Refuses a DTensor of which each process has only a part, so each would see a part of the attention heads."""
        mesh, placements = getattr(weight, "device_mesh", None), getattr(weight, "placements", ())
        if mesh is not None and mesh.size() > 1 and any(not placement.is_replicate() for placement in placements):
            raise TapeError(
                f"model: a linear layer in {self.where} has a weight that is spread over {mesh.size()} processes "
                f"({type(weight).__name__}, {', '.join(map(str, placements))}), so no process sees all of the model; "
                "tensor parallelism cannot be explained, fully_shard can, which gathers the weights of each block"
            )

    def check_dropout(self, probability: float) -> None:
        """Refuses dropout that is on, wherever it is."""
        if probability > 0:
            raise TapeError(f"model: dropout {probability} is active in {self.where}; call model.eval() first")

    def refuse_random(self, name: str) -> None:
        """Refuses a draw of random numbers."""
        raise TapeError(
            f"model: {self.where} draws random numbers ({name}), so that each call would explain another prediction; "
            "switch off what is random, or draw the numbers once and keep them"
        )

    def refuse_list(self, index: int) -> None:
        """Refuses a list of modules that does not end as a block does."""
        raise TapeError(
            f"model: {self.name(index)} is a list of modules. The output of its last one must be added to the "
            "residual stream at once, as in x = ff(x) + x, so that the block's end can be seen; put what the block "
            "does into the forward of one module"
        )

    def check_out(self, name: str) -> None:
        """Refuses a differentiated result that is written into another tensor, which autograd cannot follow."""
        raise TapeError(f"model: {self.where} calls {name} with out=, which has no gradient; use what it returns")

    @property
    def _is_over(self) -> bool:
        return self.finished == len(self.layout.blocks)

    @property
    def _sizes(self) -> tuple[int, int]:
        """Queries and keys of the attention that is expected now."""
        tokens = self.layout.tokens
        return (tokens, tokens) if self.block is not None else (1, self.layout.pooled[1] - self.layout.pooled[0])

    def name(self, index: int) -> str:
        """A block for messages."""
        return f"block {index} ({type(self.layout.blocks[index]).__name__})"
