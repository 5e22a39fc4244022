"""TorchInductor with its cache of compiled graphs on disk, which it would not use for a graph like ours.

Torch keeps compiled graphs in TORCHINDUCTOR_CACHE_DIR, for all processes of a user. As of torch 2.11 it looks there
only if a shape environment is present, and refuses graphs with oneDNN's packed weights, since these cannot be pickled.
Neither is a real obstacle: with frozen weights, an entry of the cache holds only the names of the weights, which are
taken from the graph at hand. So `_Key` describes a packed weight by its shape and dtype, as torch does for other frozen
weights.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, fx
from torch._inductor import codecache, config, cpu_vec_isa
from torch._inductor.compile_fx import compile_fx
from torch._inductor.freezing_utils import is_frozen_param
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fga_fast.graph.trace import one_at_a_time


class _Key(codecache.FxGraphCachePickler):
    """Pickles a graph to hash it; see above."""

    def _reduce_tensor(self, t: Tensor) -> Any:
        if t.is_mkldnn and is_frozen_param(t):
            return str, (f"packed {tuple(t.shape)} {t.dtype}",)
        return super()._reduce_tensor(t)

    def dumps(self, obj: Any) -> bytes:
        # Another version's operators may return other strides, for which the machine code was not made. The number of
        # threads is written into it too.
        return super().dumps((importlib.metadata.version("fga_fast"), torch.get_num_threads(), obj))


@contextmanager
def ready(device: torch.device) -> Iterator[None]:
    """Prepares for calls of `compiled`, of one thread at a time.

    For a CPU, TorchInductor tests each instruction set by a program that imports torch, 2 seconds each. The first test,
    whether the C++ compiler can build for it at all, is left out: compiling would say so. The others run while the
    graph is traced.
    """
    with one_at_a_time, config.patch("cpp.vec_isa_ok", config.cpp.vec_isa_ok is not False):
        tests = threading.Thread(target=_test_instruction_sets, name="fga_fast instruction sets", daemon=True)
        if device.type == "cpu":
            tests.start()
        try:
            yield
        finally:
            if device.type == "cpu":
                tests.join()


def _test_instruction_sets() -> None:
    with suppress(Exception):  # whatever is wrong with the C++ compiler, compiling will say
        cpu_vec_isa.pick_vec_isa()


def compiled(module: fx.GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]) -> Callable[..., Any]:
    """The graph as machine code for inputs of these shapes, from the cache if it is there; see `ready`.

    Args:
        module: a flat graph of operators; afterwards only the machine code may use it.
        inputs: an example of its inputs.
        options: of TorchInductor's configuration.
    """
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with (
        torch._guards.tracing(torch._guards.TracingContext(fake)),
        mock.patch.object(codecache, "FxGraphCachePickler", _Key),
    ):
        # The metadata of the package that torch exported last would be part of the entry's key. All shapes are fixed,
        # so nothing is asked of the shape environment.
        patches = {**options, "aot_inductor.metadata": {}}
        run: Any = compile_fx(module, [*inputs], config_patches=patches, ignore_shape_env=True)
    return cast("Callable[..., Any]", run)
