"""An explainer whose whole graph was compiled ahead: one call of machine code an explanation, no Python in between.

On the CPU, TorchInductor with frozen weights: they are laid out once as its matrix products want them, beside the
model's own. On CUDA the compiled graph is captured in a CUDA graph for each batch size and stream, and replayed from
buffers that stay where they are.

STATUS: the CUDA half has never run on a device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fga_fast.engine.plan import Plan
from fga_fast.graph.outputs import given_classes, in_batches, packed, unpacked
from fga_fast.graph.passes.biases import fold_biases
from fga_fast.graph.trace import Flat, check_example, flatten, one_at_a_time
from fga_fast.models import checks
from fga_fast.result.explanation import Explanation
from fga_fast.result.fields import nested
from fga_fast.settings import TargetMode

Run = Callable[..., Sequence[Tensor]]

_capturing = threading.Lock()


class CompiledExplainer:
    """What `Explainer.compile` returns; see there. Called as the explainer is, with the same result.

    Attributes:
        plan: what was compiled. A change of its model's weights or SAEs does not reach the compiled graph; nor does
            autocast around a call, since the graph holds the casts of the autocast that it was compiled under.
        batches: batch sizes that were compiled, rising.
        target_mode: "predicted" or "given".
    """

    def __init__(
        self, plan: Plan, example: Tensor, target_mode: TargetMode, mode: str | None, batches: Sequence[int] | None
    ) -> None:
        check_example(example)
        self.plan, self.target_mode = plan, target_mode
        self.batches = _checked_batches(batches, example)
        options = _options(mode, example)
        self._runs: dict[int, Run] = {}
        self._example = example[:1].detach().clone()
        frozen: dict[Any, tuple[Tensor, Tensor]] = {}
        for size in self.batches:
            images = example[:1].detach().expand(size, *example.shape[1:]).contiguous()
            flat = flatten(plan, images, target_mode)
            self._outputs, self._classes, self._class_names = flat.outputs, flat.classes, flat.class_names
            fold_biases(flat.module)
            _freeze(flat.module, frozen)
            self._runs[size] = _compiled(flat, images, target_mode, options)

    def __call__(self, images: Tensor, targets: Any = None) -> Explanation:
        """Explains any number of images of the size that was compiled, from 1.

        Args:
            images: [B, channels, H, W], as `Explainer` takes them.
            targets: nothing for "predicted"; for "given" an int or a class name, or one for each image [B].

        Raises:
            TypeError, ValueError: as `Explainer`; on CUDA, NaN and Inf are not looked for, nor class numbers out of
                range in a tensor there, which give NaN: the host would have to wait for the device.
        """
        plan, layout = self.plan, self.plan.layout_for(images)
        checks.check_images(images, layout.in_chans, layout.image_size, self._example)
        if images.shape[1:] != self._example.shape[1:] or len(images) == 0:
            raise ValueError(
                f"images: expected [B, {', '.join(map(str, self._example.shape[1:]))}] with B at least 1, as compiled, "
                f"got {list(images.shape)}; compile another example for other sizes"
            )
        # Dense, which is what was compiled: machine code walks through memory as it was told.
        inputs = (images.detach().contiguous(), *self._given(images, targets))
        with _plain(images):
            outputs = in_batches(lambda size, given: self._runs[size](*given), self.batches, inputs)
        found = dict(zip(self._outputs, outputs, strict=True))
        if images.device.type == "cpu":
            for name, what in (("logits", "the logits"), ("relevance", "the relevance")):
                checks.check_finite(found[name], what, plan.model, images, plan.saes)
        return Explanation(
            **nested(found), grid=layout.grid, image_size=(images.shape[-2], images.shape[-1]),
            backend=plan.choice().name, backend_reason="compiled", names=self._class_names,
            start_layer=plan.settings.start_layer,
        )  # fmt: skip

    def _given(self, images: Tensor, targets: Any) -> tuple[Tensor, ...]:
        names, ranged = self._class_names, not images.is_cuda
        return given_classes("graph", self.target_mode, targets, images, self._classes, names, ranged=ranged)


def _checked_batches(batches: Sequence[int] | None, example: Tensor) -> tuple[int, ...]:
    sizes = (len(example),) if batches is None else tuple(batches)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"batches: expected batch sizes of at least 1, or an example with images, got {list(sizes)}")
    return tuple(sorted(set(sizes)))


def _options(mode: str | None, example: Tensor) -> dict[str, Any]:
    """Options of TorchInductor. CUDA graphs are captured here, with buffers and streams that are known."""
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"mode: expected None or one of {', '.join(map(repr, modes))}, got {mode!r}")
    chosen = {} if mode is None else dict(modes[mode])
    chosen.pop("triton.cudagraphs", None)
    # oneDNN, which frozen weights are laid out for, has no float64.
    freezing = example.dtype != torch.float64
    return {"freezing": freezing, "freezing_discard_parameters": freezing, **chosen}


def _freeze(module: fx.GraphModule, frozen: dict[Any, tuple[Tensor, Tensor]]) -> None:
    """Gives a graph weights of its own, the same for all batch sizes: of the model's, a later change would reach the
    graph where they are used as they are, and not where they were laid out anew. What was laid out is discarded.

    Args:
        frozen: where a weight lies -> the weight, which keeps that place taken, and its copy.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not name.startswith("_folded_"):
            key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if key not in frozen:
                frozen[key] = tensor, tensor.detach().clone()
            copy = frozen[key][1]
            setattr(module, name, nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy)


@contextmanager
def _plain(images: Tensor) -> Iterator[None]:
    """Nothing of the caller's modes: a graph holds its casts, and has no gradients."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        yield


def _compiled(flat: Flat, images: Tensor, target_mode: TargetMode, options: dict[str, Any]) -> Run:
    given = [torch.zeros(len(images), dtype=torch.int64, device=images.device)] if target_mode == "given" else []
    inputs = [images, *given]
    with one_at_a_time, _plain(images):
        run: Run = torch._inductor.compile(flat.module, [*inputs], options=options)
        run(*inputs)
    return _Replay(run, inputs) if images.is_cuda else run


class _Captured(NamedTuple):
    """A CUDA graph and the memory that it works in."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Tensor  # [bytes], see outputs.packed
    like: list[Tensor]  # shapes and dtypes of the outputs


class _Replay:
    """A compiled graph as one launch: captured once a stream, replayed from buffers of its own.

    Outputs lie together, so that one more copy makes them outlive the next replay; the memory for it comes from
    PyTorch's cache, and is held as long as any of them.
    """

    def __init__(self, run: Run, inputs: Sequence[Tensor]) -> None:
        self._run, self._inputs, self._lock = run, inputs, threading.Lock()
        self._captured: dict[int, _Captured] = {}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        device = inputs[0].device
        with self._lock, torch.cuda.device(device):  # threads may share a stream, and with it the buffers
            stream = torch.cuda.current_stream(device).cuda_stream
            if stream not in self._captured:
                self._captured[stream] = self._capture()
            captured = self._captured[stream]
            for buffer, given in zip(captured.inputs, inputs, strict=True):
                buffer.copy_(given, non_blocking=True)
            captured.graph.replay()
            return unpacked(captured.outputs.clone(), captured.like)

    def _capture(self) -> _Captured:
        buffers = [t.clone() for t in self._inputs]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # what a library allocates at first use must not be part of the graph
                outputs = self._run(*buffers)
                packed(outputs)
        torch.cuda.current_stream().wait_stream(side)
        like = [torch.empty_like(t, device="meta") for t in outputs]
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            flat = packed(self._run(*buffers))
        return _Captured(graph, buffers, flat, like)
