"""Residual streams of a model that only runs: read after chosen blocks, or replaced there.

For an explanation, which needs gradients and attention as well, see `tape.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fga_fast.engine.torch_functions import OPERATIONS, Function, Kind
from fga_fast.models.block_io import ForwardPass, TapeError, stream_of, with_stream
from fga_fast.models.follower import followed_by, is_following
from fga_fast.models.layout import ModelLayout, ends

# x [B, N, C] after a block -> what takes its place, or None: x itself
Edit: TypeAlias = Callable[[Tensor], "Tensor | None"]


@contextmanager
def edited(layout: ModelLayout, edits: Mapping[int, Edit], images: int) -> Iterator[None]:
    """Shows the residual stream after some blocks to functions, which may replace it, while the model runs in here.

    Acts in this thread only. The model is left as it came, whatever happens.

    Args:
        layout: of the model.
        edits: block (from 0) -> function of x [B, N, C], prefix tokens first.
        images: B, how many images the model is given in one call.

    Raises:
        ValueError: no such block.
        TapeError: what a block returns is no stream as the layout says, or a block that was asked for did not run.
    """
    for block in edits:
        if not 0 <= block < len(layout.blocks):
            raise ValueError(f"blocks: expected numbers from 0 to {len(layout.blocks) - 1}, got {block}")
    editor = _Editor(layout, edits, images)
    handles = []
    try:
        for block in edits:
            last = ends(layout.blocks[block])[1]
            handles.append(last.register_forward_hook(editor.leaving(block, last), prepend=True))
        with followed_by(editor), editor:
            yield
        editor.check_seen()
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def streams_of(
    run: Callable[[Tensor], object], layout: ModelLayout, images: Tensor, blocks: Sequence[int]
) -> dict[int, Tensor]:
    """The residual stream [B, N, C] after each of `blocks`, in the model's dtype and on its device.

    Args:
        run: the model, or `Readout.run` where only the image tower of a dual encoder is to run.
        layout: of the model.
        images: [B, channels, H, W].

    Raises:
        ValueError, TapeError: as `edited`.
    """
    found: dict[int, Tensor] = {}

    def keep(block: int) -> Edit:
        # A copy, since the model may go on with the same memory.
        return lambda x: found.__setitem__(block, x.clone())

    with edited(layout, {block: keep(block) for block in blocks}, len(images)):
        run(images)
    return {block: found[block] for block in blocks}


class _Editor(TorchFunctionMode):
    """Sees blocks end. A block that is a list of modules ends where the output of its last one is added."""

    def __init__(self, layout: ModelLayout, edits: Mapping[int, Edit], images: int) -> None:
        super().__init__()
        self._layout, self._edits, self._passed = layout, edits, ForwardPass(layout, images)
        self._unadded: tuple[int, Any] | None = None
        self._seen: set[int] = set()

    def leaving(self, block: int, last: nn.Module) -> Function:
        """The hook on the last module of a block."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if not is_following(self):
                return None
            if last is self._layout.blocks[block]:
                return self._left(block, output)
            self._unadded = block, output
            return None

        return hook

    def check_seen(self) -> None:
        """Refuses a block that has not ended."""
        missing = [block for block in self._edits if block not in self._seen]
        if missing:
            names = ", ".join(map(self._passed.name, missing))
            raise TapeError(f"model: {names} did not end in the forward pass; give blocks that the model runs")

    def _left(self, block: int, output: Any) -> Any:
        self._unadded = None
        self._seen.add(block)
        x = stream_of(output, self._passed.name(block))
        self._passed.check_stream(block, x)
        first = self._layout.tokens_first
        new = self._edits[block](x.transpose(0, 1) if first else x)
        if new is None:
            return output
        return with_stream(output, new.transpose(0, 1) if first else new)

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if self._unadded is None or not is_following(self):
            return found
        block, output = self._unadded
        operation = OPERATIONS.get(func)
        added = operation is not None and operation.kind is Kind.ADDITION
        if added and any(one is output for one in (*args, *kwargs.values())):
            return self._left(block, found)
        return found
