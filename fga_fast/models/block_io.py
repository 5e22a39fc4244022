"""What goes into and comes out of a block: the residual stream among its arguments and outputs, and the sizes of its
attention; what does not fit is refused by name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fga_fast.models.layout import ModelLayout


class TapeError(ValueError):
    """The model cannot be tapped; the message says what was found and what to do."""


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def replace_input(
    arguments: Arguments, tokens: Tensor | None, layout: ModelLayout, images: int, where: str
) -> tuple[Tensor, Any]:
    """The residual stream that enters a block, and a function that puts another tensor in its place.

    Args:
        arguments: positional and keyword arguments of the block.
        tokens: what the block before returned, if that is among them it is the one; else None.
        layout: says how many tokens there are, and their width if it is known.
        images: B.
        where: names the block in errors.

    Raises:
        TapeError: none of the arguments has the shape [B, N, C], or several have.
    """
    args, kwargs = arguments
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    found = [name for name, value in named if value is tokens and tokens is not None]
    if not found:
        found = [name for name, value in named if _is_stream(value, layout, images)]
    if len(found) != 1:
        what = "no tensor" if not found else f"{len(found)} tensors ({', '.join(map(str, found))})"
        raise TapeError(
            f"model: {where} is called with {what} of shape {_expected(layout, images)}, so which one is the residual "
            "stream is not known; call it with that tensor alone, or use method='rollout'"
        )
    name = found[0]

    def replaced(value: Tensor) -> Arguments:
        if isinstance(name, int):
            return (*args[:name], value, *args[name + 1 :]), kwargs
        return args, {**kwargs, name: value}

    return (args[name] if isinstance(name, int) else kwargs[name]), replaced


def stream_of(output: Any, where: str) -> Tensor:
    """The residual stream that leaves a block: its output, or the first entry of it.

    Raises:
        TapeError: it is no tensor [B, N, C].
    """
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


def check_attention(
    query: tuple[int, ...],  # [B, H, Nq, ...]
    key: tuple[int, ...],  # [B, H, N, ...]
    expected: tuple[int, int, int],  # B, Nq, N
    layout: ModelLayout,
    where: str,
) -> None:
    """Refuses attention of other sizes than the layout promises.

    Raises:
        TapeError: heads that do not match, another batch than the images', other tokens than the layout's.
    """
    images, queries, keys = expected
    if len(query) != 4 or len(key) < 3 or query[1] != key[1]:
        raise TapeError(
            f"model: attention in {where} must have queries and keys [B, H, N, D] with as many heads, got "
            f"{tuple(query)} and {tuple(key)}"
        )
    if query[0] != images:
        raise TapeError(
            f"model: attention in {where} sees a batch of {query[0]} for {images} images; a model that makes several "
            "views of an image cannot be explained as a whole, explain the views one by one"
        )
    if query[2] != queries or key[2] != keys:
        raise TapeError(
            f"model: attention in {where} has {query[2]} queries and {key[2]} keys, expected {queries} and {keys} "
            f"({layout.prefix_tokens} prefix tokens and a {layout.grid[0]} x {layout.grid[1]} grid); windowed "
            "attention and dropped patches cannot be explained"
        )


def unseen_attention(where: str, layout: ModelLayout) -> str:
    """What to say of a block without attention."""
    return (
        f"model: {where} ran without an attention that could be seen: neither "
        "torch.nn.functional.scaled_dot_product_attention, nor nn.MultiheadAttention, nor a softmax over "
        f"[B, H, {layout.tokens}, {layout.tokens}]; use an implementation that calls one of them"
    )


def _is_stream(value: object, layout: ModelLayout, images: int) -> bool:
    if not isinstance(value, Tensor) or value.dim() != 3 or not value.is_floating_point():
        return False
    first = (layout.tokens, images) if layout.tokens_first else (images, layout.tokens)
    return tuple(value.shape[:2]) == first and layout.d_model in (None, value.shape[2])


def _expected(layout: ModelLayout, images: int) -> str:
    width = "C" if layout.d_model is None else layout.d_model
    first = f"{layout.tokens}, {images}" if layout.tokens_first else f"{images}, {layout.tokens}"
    return f"[{first}, {width}]"
