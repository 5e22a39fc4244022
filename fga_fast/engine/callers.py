"""Where an explanation is called from: what it must not run inside of, and compilers that must step over it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_graphs(function: _Function) -> _Function:
    """Decorates a function that `torch.compile` steps over where a compiled function calls it: one graph break.

    It asks for torch's compiler only where one is at work, because that takes a second to import.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            disable: Any = torch.compiler.disable
            # With fullgraph=True the compiler's error shows this line, so it says what to do.
            return disable(function, reason="for a full graph, call Explainer.module")(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(_Function, call)


def check_caller(images: object) -> None:
    """Refuses a call from inside a transform or a trace, where an explanation cannot run.

    Raises:
        RuntimeError: naming the transform or the tracer, and what to do.
    """
    transform: Any = torch._C._functorch.peek_interpreter_stack()
    if transform is not None:
        raise RuntimeError(
            f"explain: called inside torch.func's {transform.key().name.lower()}, but an explanation is a backward "
            "pass of its own, which torch.func cannot transform, and relevance has no gradient; call the explainer "
            "outside of it, with all images in one batch [B, channels, H, W]"
        )
    modes, active = torch._C._TorchDispatchModeKey, cast(Any, torch._C._get_dispatch_mode)
    traced = torch._C._get_tracing_state() is not None or active(modes.PROXY) is not None
    if traced or active(modes.FAKE) is not None or isinstance(images, FakeTensor):
        raise RuntimeError(
            "explain: called while a graph is traced (torch.export, make_fx, torch.jit.trace) or with fake tensors, "
            "which have no values; Explainer.module(example) is the same explanation as a plain module of operators, "
            "which can be traced"
        )
    if isinstance(images, Tensor) and images.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "explain: called while a CUDA graph is captured, but an explanation looks at values; Explainer.compile "
            "captures its own graph"
        )
