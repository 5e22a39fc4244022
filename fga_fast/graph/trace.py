"""Traces an explanation - forward pass, backward pass, gates and rollout - into one flat graph of operators.

The graph contains no autograd, hooks or modes: tensors go in, tensors come out, and weights and SAEs are attributes. So
any tool can compile, capture or export it like an ordinary inference graph.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from fga_fast.engine import run
from fga_fast.engine.plan import Plan
from fga_fast.graph.passes import rows, simplify
from fga_fast.models.layout import ModelLayout
from fga_fast.question.readout import Answer
from fga_fast.result.fields import flat
from fga_fast.settings import TargetMode, check_choice

logger = logging.getLogger(__name__)

# Tracing patches nn.Module and compiling changes settings, both for the whole process.
one_at_a_time = threading.RLock()


class Flat(NamedTuple):
    """A traced explanation."""

    module: fx.GraphModule  # images [B, channels, H, W] (for "given" also targets [B] int64) -> a tuple of tensors
    inputs: tuple[Tensor, ...]  # the example that was traced
    outputs: tuple[str, ...]  # names: "logits", "targets", "values", "relevance", "scores.6", "gates.6", ...
    classes: int  # columns of the logits
    predicts: bool  # there are classes, so that one of them is predicted
    class_names: tuple[str, ...] | None
    start_block: int  # the first block that is explained
    notices: tuple[str, ...]  # of the example's explanation


def flatten(plan: Plan, images: Tensor, target_mode: TargetMode = "predicted", prune: bool = True) -> Flat:
    """Traces an explanation of images of this shape, dtype and device.

    Args:
        plan: what to trace. It and its model do not change; the graph shares their weights.
        images: [B, channels, H, W], an example. It is explained eagerly first, so that all checks run.
        target_mode: "predicted": the graph explains the predicted class; "given": it takes class numbers [B], and -1 is
            the predicted class.
        prune: compute nothing for tokens that nobody reads; exact (passes/rows.py).
    """
    _check(plan, images, target_mode)
    layout = plan.check(images)
    images = images.detach()
    with one_at_a_time, torch.inference_mode(False):
        target = None if target_mode == "predicted" else 0
        whole = images.clone() if images.is_inference() else images
        eager = run.explain(plan, layout, whole, lambda output: plan.readout.answer(target, output), first=True)
        usual = run.starts_as_laid_out(plan, layout, whole)
        predicts = plan.readout.predicts
    inputs = (images, *([eager.targets] if target_mode == "given" else []))
    names: list[str] = []

    def explain(images: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        found = _explanation(plan, layout, usual, images, *given)
        names[:] = found
        return tuple(found.values())

    if threading.current_thread() is not threading.main_thread():
        _keep_device_guard()
    with one_at_a_time, torch.inference_mode(False), torch.no_grad():
        with _left_as_it_was(plan.model):
            module = _traced(explain, inputs, type(plan.model).__name__)
        before = len(module.graph.nodes)
        with torch.autocast(images.device.type, enabled=False):  # the graph contains its casts already
            module = simplify.functional(module, inputs)
            simplify.simplify(module)
        if prune and usual and layout.pooling == "token":
            rows.prune(module, layout.pooled[0], layout.tokens)
        module.graph.eliminate_dead_code()
        module.recompile()
    logger.info(
        "traced an explanation of %s: %d operators, %d kept", list(images.shape), before, len(module.graph.nodes)
    )
    return Flat(
        module, inputs, tuple(names), eager.logits.shape[1], predicts, eager.names, eager.start_block, eager.notices
    )  # fmt: skip


@functools.cache
def _keep_device_guard() -> None:
    """Makes PyTorch register its CUDA device guard from a thread that never ends.

    A PyTorch built for CUDA registers the guard at the first trace, also on a machine without CUDA. All threads use it,
    but it belongs to the thread that registered it. Once that thread has ended, the next backward pass of any other
    thread crashes the process (PyTorch 2.11).
    """
    if not torch.cuda._is_compiled() or torch.cuda.is_available():
        return
    done = threading.Event()

    def stay() -> None:
        torch._C._ensureCUDADeviceGuardSet()
        done.set()
        threading.Event().wait()

    threading.Thread(target=stay, name="fga_fast device guard", daemon=True).start()
    done.wait()


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restores tensors that the forward pass keeps in its modules: tracing overwrites them with fake tensors."""
    places = [place for part in model.modules() for place in (part.__dict__, part._buffers)]
    before = [dict(place) for place in places]
    try:
        yield
    finally:
        for place, kept in zip(places, before, strict=True):
            for name in [name for name, value in place.items() if isinstance(value, FakeTensor)]:
                if name in kept:
                    place[name] = kept[name]
                else:
                    del place[name]


def _traced(explain: Callable[..., Any], inputs: tuple[Tensor, ...], model: str) -> fx.GraphModule:
    try:
        return make_fx(explain, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:
        raise ValueError(
            f"model: {model} cannot be traced into one graph. Its forward pass looks at values or leaves PyTorch; "
            f"explain it eagerly, or change this: {error}"
        ) from error


def check_example(images: Any) -> None:
    """Raises ValueError unless `images` is a tensor [B, channels, H, W] with B at least 1."""
    if not isinstance(images, Tensor) or images.dim() != 4 or len(images) == 0:
        what = f"a tensor {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"example: expected images [B, channels, H, W] with B at least 1, got {what}")


def _check(plan: Plan, images: Any, target_mode: str) -> None:
    check_choice("target_mode", target_mode, TargetMode)
    check_example(images)
    choice = plan.choice()
    if choice.stages is None:
        raise ValueError(
            f"backend: {choice.name!r} is not compiled, it only defines the correct numbers; use backend="
            '"auto", "native", "triton" or "composite"'
        )
    if plan.settings.ungated and plan.saes and plan.settings.method == "rollout":
        raise ValueError(
            "ungated: a graph holds one rollout; compile an Explainer without SAEs beside this one, or take another "
            "method"
        )
    if images.dtype == torch.float16 or (
        torch.is_autocast_enabled(images.device.type) and torch.get_autocast_dtype(images.device.type) == torch.float16
    ):
        raise ValueError(
            "dtype: float16 gradients get a loss scale chosen from their values, and a fixed graph cannot choose; "
            "use bfloat16 or float32"
        )


def _explanation(
    plan: Plan, layout: ModelLayout, usual: bool, images: Tensor, given: Tensor | None = None
) -> dict[str, Tensor]:
    """An explanation that looks at no values: of the predicted classes, or of the `given` ones [B] (-1: predicted).

    usual: the rollout starts where the layout says. Else the graph finds the start for each image, as a call does.
    """
    inside: list[Tensor] = []

    def answer(output: Tensor) -> Answer:
        logits = plan.readout.logits(output)
        targets = logits.argmax(dim=-1)
        if given is not None:
            targets = targets.where(given == -1, given)
        # Does the class exist? If the host did not check, the graph gives NaN below.
        inside.append((targets >= 0) & (targets < logits.shape[1]))
        values = logits.gather(1, targets.where(inside[0], 0).unsqueeze(1)).squeeze(1)
        return Answer(logits.detach(), targets, values, None)

    found = run.explain(plan, layout, images, answer, look_at_values=False, as_laid_out=usual)._asdict()
    outputs = flat({name: value for name, value in found.items() if name not in ("names", "start_block", "notices")})
    if given is not None:
        for name, value in outputs.items():
            if name != "logits" and value.is_floating_point():
                outputs[name] = value.where(inside[0].view(-1, *[1] * (value.dim() - 1)), math.nan)
    return {name: value.detach().contiguous() for name, value in outputs.items()}
