"""Traces an explanation - forward pass, backward pass, gates and rollout - into one flat graph of operators.

Nothing of autograd, hooks or modes is left in it: tensors in, tensors out, weights and SAEs as its attributes. So it is
an ordinary inference graph, which can be compiled, captured and exported.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from fga_fast.engine.records import Gating, gated_map
from fga_fast.graph.passes import rows, simplify
from fga_fast.models.layout import ModelLayout

if TYPE_CHECKING:
    from fga_fast.explainer import Explainer

logger = logging.getLogger(__name__)

# Tracing patches nn.Module, and compiling changes settings, for the whole process.
one_at_a_time = threading.RLock()

Targets = Literal["predicted", "given"]


class Flat(NamedTuple):
    """A traced explanation."""

    module: fx.GraphModule  # images [B, channels, H, W] (and targets [B] int64, if given) -> a tuple of tensors
    outputs: tuple[str, ...]  # their names: "logits", "targets", "values", "relevance", "scores.6", "gates.6", ...
    classes: int  # columns of the logits
    class_names: tuple[str, ...] | None


def flatten(explainer: Explainer, images: Tensor, targets: Targets = "predicted", prune: bool = True) -> Flat:
    """The graph of `explainer(images, targets)` for images of this shape, dtype and device.

    Args:
        explainer: what to trace; it and its model stay as they are, and their weights are shared, not copied.
        images: [B, channels, H, W], an example; explained once eagerly, so that everything that is checked is.
        targets: "predicted": the graph explains the predicted class; "given": it takes targets [B], class numbers.
        prune: leave out what is computed for tokens that nobody reads; exact (rows.py).

    Raises:
        TypeError, ValueError: what cannot be a fixed graph; the message says why and what to do.
    """
    _check(explainer, images, targets)
    with one_at_a_time:
        eager = explainer(images, None if targets == "predicted" else 0)
    layout = explainer._layout_for(images)
    names: list[str] = []

    def explain(images: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        found = _explanation(explainer, layout, images, *given)
        names[:] = found
        return tuple(found.values())

    inputs = (images.detach(), *([eager.targets] if targets == "given" else []))
    if threading.current_thread() is not threading.main_thread():
        _keep_device_guard()
    with one_at_a_time, torch.inference_mode(False), torch.no_grad():
        with _left_as_it_was(explainer.model):
            module = _traced(explain, inputs, type(explainer.model).__name__)
        before = len(module.graph.nodes)
        with torch.autocast(images.device.type, enabled=False):  # whose casts the graph holds
            module = simplify.functional(module, inputs)
            simplify.simplify(module)
        if prune and layout.pooling == "token":
            rows.prune(module, layout.pooled[0], layout.tokens)
        module.graph.eliminate_dead_code()
        module.recompile()
    logger.info(
        "traced an explanation of %s: %d operators, %d kept", list(images.shape), before, len(module.graph.nodes)
    )
    return Flat(module, tuple(names), eager.logits.shape[1], eager.names)


@functools.cache
def _keep_device_guard() -> None:
    """Sets what a PyTorch built for CUDA, on a machine without, sets when it first traces, from a thread that stays.

    It belongs to the thread that set it and is used by all: once that thread has ended, the next backward pass of any
    other ends the process (PyTorch 2.11).
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
    """Puts back what a forward pass that keeps tensors in its modules overwrites with some that have no values."""
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
            f"model: {model} cannot be traced into one graph, since its forward pass looks at values or leaves "
            f"PyTorch: {error}"
        ) from error


def check_example(images: Any) -> None:
    """Refuses what are no images.

    Raises:
        ValueError: it is no tensor [B, channels, H, W] with B at least 1.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or len(images) == 0:
        what = f"a tensor {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"example: expected images [B, channels, H, W] with B at least 1, got {what}")


def _check(explainer: Explainer, images: Any, targets: str) -> None:
    if targets not in get_args(Targets):
        raise ValueError(f'targets: expected "predicted" or "given", got {targets!r}')
    check_example(images)
    if explainer._choose().stages is None:
        raise ValueError(
            f"backend: {explainer.backend!r} is not compiled; it is there to say what is correct. Use backend="
            '"auto", "native", "triton" or "composite"'
        )
    if images.dtype == torch.float16 or (
        torch.is_autocast_enabled(images.device.type) and torch.get_autocast_dtype(images.device.type) == torch.float16
    ):
        raise ValueError(
            "dtype: float16 gradients get a loss scale that is chosen from their values, which a fixed graph cannot; "
            "use bfloat16 or float32"
        )
    if explainer._ungated is not None:
        raise ValueError("ungated: a graph holds one explanation; compile a second Explainer without SAEs beside it")


def _explanation(
    explainer: Explainer, layout: ModelLayout, images: Tensor, given: Tensor | None = None
) -> dict[str, Tensor]:
    """As `Explainer._explain`, without what looks at values."""
    stages = explainer._choose().stages
    assert stages is not None  # _check
    tape, prefix = explainer._tape(layout, stages), layout.prefix_tokens
    with tape.attached(images):
        output = explainer.readout.run(images)
        logits = explainer.readout.logits(output)
        targets = logits.argmax(dim=-1) if given is None else given
        # Whether there is such a class: where the host did not look, the graph says so itself, by NaN.
        inside = (targets >= 0) & (targets < logits.shape[1])
        values = logits.gather(1, targets.where(inside, 0).unsqueeze(1)).squeeze(1)
    found = tape.backward(values, explainer.target_chunk)
    read = {layer: Gating.read(slots) for layer, slots in sorted(found.recorded.items())}
    blocks = {layer: row[..., prefix:] for layer, row in sorted(found.rows.items())}
    if explainer.method == "input_x_gradient":
        gates = {layer: gate for layer, (_, gate, _) in read.items()}
        blocks = {layer: gated_map(row, gates, layer) for layer, row in blocks.items()}
    outputs = {
        "logits": logits,
        "targets": targets,
        "values": values,
        "relevance": blocks[explainer.start_layer],
    }
    if explainer.per_block:
        outputs["blocks"] = torch.stack(list(blocks.values()), dim=-2)
    for layer, (scores, gate, features) in read.items():
        outputs |= {f"scores.{layer}": scores, f"gates.{layer}": gate}
        if features is not None:
            outputs |= {f"features.{layer}.{name}": value for name, value in features._asdict().items()}
    if given is not None:
        for name, value in outputs.items():
            if name != "logits" and value.is_floating_point():
                outputs[name] = value.where(inside.view(-1, *[1] * (value.dim() - 1)), math.nan)
    return {name: value.detach().contiguous() for name, value in outputs.items()}
