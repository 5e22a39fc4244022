"""Errors of a model, of autograd or of a kernel say what was being done, and in which block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import CheckpointError

from fga_fast.models.block_io import ForwardPass, TapeError


@contextmanager
def running(passed: ForwardPass) -> Iterator[None]:
    """Around the forward pass; see `_named`."""
    with _named("forward pass", lambda: passed.where):
        yield


@contextmanager
def differentiating(passed: ForwardPass) -> Iterator[None]:
    """Around the backward pass; see `_named`."""
    place = ["the pooling head"]

    def note(name: str, _gradients: object) -> None:
        place[0] = name

    handles = [edge.node.register_prehook(partial(note, passed.name(block))) for block, edge in passed.streams.items()]
    try:
        with _named("backward pass", lambda: place[0]):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _named(what: str, where: Callable[[], str]) -> Iterator[None]:
    """Turns errors into a `TapeError` with a place.

    A ValueError passes, since it was written for people; so do errors of memory, which callers treat in their own way.
    """
    try:
        yield
    except (ValueError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        told = " ".join(str(error).split())
        advice = "run the model alone on these images to see whether the error is its own"
        if isinstance(error, CheckpointError):
            advice = "blocks under torch.utils.checkpoint run twice; call them directly while you explain"
        raise TapeError(
            f"model: the {what} failed in {where()} with {type(error).__name__}: {told[:500] or 'no message'}; {advice}"
        ) from error
