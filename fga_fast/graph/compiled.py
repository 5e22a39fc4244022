"""A compiled explainer: one call of machine code for each explanation, with no Python in between.

On the CPU, TorchInductor compiles the graph with frozen weights: it keeps a copy of them in the memory layout that its
matrix products need. On CUDA, a CUDA graph captures the compiled graph for each batch size and stream, and replays it
from fixed buffers. Compiled graphs are kept on disk for the next process (inductor.py).

STATUS: the CUDA half has never run on a device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fga_fast.engine.callers import check_caller, outside_graphs
from fga_fast.engine.plan import Plan
from fga_fast.graph import inductor
from fga_fast.graph.outputs import given_classes, in_batches, packed, unpacked
from fga_fast.graph.passes.biases import fold_biases
from fga_fast.graph.trace import Flat, check_example, flatten
from fga_fast.models import checks
from fga_fast.result.explanation import Explanation
from fga_fast.result.fields import nested
from fga_fast.result.notices import value_notices
from fga_fast.settings import TargetMode, check_count

Run = Callable[..., Sequence[Tensor]]

_capturing = threading.Lock()


class CompiledExplainer:
    """The result of `Explainer.compile`. Call it like the explainer; it returns the same.

    Attributes:
        plan: what was compiled. Later changes of the model's weights or SAEs do not reach the compiled graph. Autocast
            around a call has no effect: the graph contains the casts of the autocast that it was compiled under.
        batches: the compiled batch sizes, in ascending order.
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
        with inductor.ready(example.device):
            for size in self.batches:
                images = example[:1].detach().expand(size, *example.shape[1:]).contiguous()
                flat = flatten(plan, images, target_mode)
                self._outputs, self._classes, self._class_names = flat.outputs, flat.classes, flat.class_names
                self._predicts = flat.predicts
                self._start_block, self._notices = flat.start_block, flat.notices
                fold_biases(flat.module)
                _freeze(flat.module, frozen)
                self._runs[size] = _compiled(flat, options)

    @outside_graphs
    def __call__(self, images: Tensor, targets: Any = None) -> Explanation:
        """Explains one or more images of the compiled size.

        Args:
            images: [B, channels, H, W], as for `Explainer`.
            targets: None: the predicted class. For "given" also an int or a class name, or one for each image [B];
                None among them is the predicted class.

        Raises:
            TypeError, ValueError: as `Explainer`, but on CUDA the host would have to wait for the device to see values.
                So it does not look for NaN and Inf. In a CUDA tensor of classes, -1 is the predicted one, and other
                numbers out of range give NaN.
        """
        check_caller(images)
        plan, layout = self.plan, self.plan.layout_for(images)
        checks.check_images(images, layout.in_chans, layout.image_size, self._example)
        if images.shape[1:] != self._example.shape[1:] or len(images) == 0:
            raise ValueError(
                f"images: expected [B, {', '.join(map(str, self._example.shape[1:]))}] with B at least 1, as compiled, "
                f"got {list(images.shape)}; compile with another example for other sizes"
            )
        # Contiguous: the machine code was compiled for these strides.
        given = given_classes(
            "graph",
            self.target_mode,
            targets,
            images,
            self._classes,
            self._class_names,
            predicts=self._predicts,
            ranged=not images.is_cuda,
        )
        inputs = (images.detach().contiguous(), *given)
        with _plain(images):
            outputs = in_batches(lambda size, given: self._runs[size](*given), self.batches, inputs)
        found = dict(zip(self._outputs, outputs, strict=True))
        of_values: tuple[str, ...] = ()
        if images.device.type == "cpu":
            for name, what in (("logits", "the logits"), ("relevance", "the relevance")):
                checks.check_finite(found[name], what, plan.model, images, plan.saes)
            of_values = value_notices(found)
        return Explanation(
            **nested(found), grid=layout.grid, image_size=(images.shape[-2], images.shape[-1]),
            backend=plan.choice().name, backend_reason="compiled", names=self._class_names,
            start_block=self._start_block,
            signed=plan.settings.has_signs, notices=(*self._notices, *of_values),
        )  # fmt: skip


def _checked_batches(batches: Sequence[int] | None, example: Tensor) -> tuple[int, ...]:
    if batches is not None and (not isinstance(batches, Sequence) or not batches):
        raise ValueError(f"batches: expected a sequence of batch sizes, such as [1, 8], got {batches!r}")
    sizes = (len(example),) if batches is None else tuple(batches)
    for size in sizes:
        check_count("batches", size, 1)
    return tuple(sorted(set(sizes)))


def _options(mode: str | None, example: Tensor) -> dict[str, Any]:
    """Options of TorchInductor, without its CUDA graphs: `_Replay` captures those itself."""
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"mode: expected None or one of {', '.join(map(repr, modes))}, got {mode!r}")
    chosen = {} if mode is None else dict(modes[mode])
    chosen.pop("triton.cudagraphs", None)
    # Freezing lays weights out for oneDNN, which has no float64.
    freezing = example.dtype != torch.float64
    settings = {"freezing": freezing, "freezing_discard_parameters": freezing}
    if example.device.type == "cpu":
        # One C++ file for all kernels and their calls: the compiler reads torch's headers once, not once a kernel. To
        # compile them in advance takes longer than that.
        settings |= {"cpp_wrapper": True, "cpp_cache_precompile_headers": False}
    return {**settings, **chosen}


def _freeze(module: fx.GraphModule, frozen: dict[Any, tuple[Tensor, Tensor]]) -> None:
    """Gives the graph its own copy of each weight, shared by all batch sizes.

    Otherwise a later change of the model's weights would reach some of the graph: the weights that the compiler uses
    directly, but not those that it copied into another memory layout.

    Args:
        frozen: address, shape, strides and dtype -> the weight and its copy. Holding the weight keeps its address in
            use, so no other tensor can match.
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
    """Switches the caller's modes off: the graph contains its casts and needs no gradients."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        yield


def _compiled(flat: Flat, options: dict[str, Any]) -> Run:
    images = flat.inputs[0]
    with _plain(images):
        run: Run = inductor.compiled(flat.module, flat.inputs, options)
        run(*flat.inputs)
    return _Replay(run, flat.inputs) if images.is_cuda else run


class _Captured(NamedTuple):
    """A CUDA graph and its memory."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Tensor  # [bytes], see outputs.packed
    like: list[Tensor]  # shapes and dtypes of the outputs


class _Replay:
    """Runs a compiled graph as one launch: captures it once for each stream and replays it from its own buffers.

    The next replay overwrites the outputs, so each call copies them. They lie in one buffer, so one copy is enough; its
    memory comes from PyTorch's cache and is freed with the last output.
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
            for _ in range(3):  # libraries allocate at first use, which must not be captured
                outputs = self._run(*buffers)
                packed(outputs)
        torch.cuda.current_stream().wait_stream(side)
        like = [torch.empty_like(t, device="meta") for t in outputs]
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            flat = packed(self._run(*buffers))
        return _Captured(graph, buffers, flat, like)
