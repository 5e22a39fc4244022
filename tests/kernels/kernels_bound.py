"""The Triton kernels up to the launch, without a device. Run by test_kernels_compile.py in a process of its own.

Triton believes in a GPU of compute capability 9.0: each launch binds its arguments, is specialised and compiled as on
a device, and stops there, so results are arbitrary. Shows that the host's half works, and what is compiled when.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from explicit_score import make_sae
from fga_fast.kernels.gate import _run as run_gate
from fga_fast.kernels.score import _run as run_score
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fga_fast.ops.score import empty_score


class Pretended:
    """As much of a driver as binding and compiling ask for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Kernel -> what was compiled of it."""
    found: dict[str, set[str]] = defaultdict(set)
    run = JITFunction.run

    def stop_before_the_launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        assert len(grid) == 1 and grid[0] >= 1
        kernel = run(self, *arguments, grid=grid, warmup=True, **more)
        found[self.fn.__name__].add(kernel.hash)
        return kernel

    driver.set_active(Pretended())
    monkeypatch.setattr(JITFunction, "run", stop_before_the_launch)
    return found


def call(images: int, patches: int, activation: str, mode: str = "combined", top: int = 0, rows: int = 0) -> None:
    sae = make_sae(activation, 64, 96, torch.bfloat16, normalize="layer_norm")
    x = torch.randn(images, patches + 1, 64).bfloat16()[:, 1:]
    g = torch.randn(rows or images, patches + 1, 64).bfloat16()[:, 1:]
    image = torch.arange(rows) % images if rows else None
    tensors = (x, g, image, sae.W_enc.t(), sae.bias, sae.W_dec, sae.theta, sae.gate_scale, sae.mag_bias, None)
    outputs = run_score(*tensors, activation, sae.normalize, mode, None, sae.k or 0, top)
    fakes = empty_score(x, g.shape[:2], top)
    assert [(t.shape, t.dtype, t.stride()) for t in outputs] == [(t.shape, t.dtype, t.stride()) for t in fakes]


def test_every_route_binds_and_another_batch_compiles_nothing(compiled: dict[str, set[str]]) -> None:
    for images, patches in ((2, 5), (1, 1), (16, 16), (3, 7)):
        for activation in ("relu", "topk", "gated", "jumprelu"):
            call(images, patches, activation)
        call(images, patches, "relu", top=1)
        call(images, patches, "relu", "activation_only")
        call(images, patches, "relu", rows=2 * images)
        call(images, patches, "topk", rows=2 * images)
        counts = {name: len(variants) for name, variants in compiled.items()}
        assert counts == {"_normalise": 1, "_dense": 6, "_strongest": 2, "_encode": 1, "_select": 1, "_gather": 2}


def test_gates_bind(compiled: dict[str, set[str]]) -> None:
    for rows, patches in ((1, 1), (32, 196), (8, 200), (5, 255)):
        run_gate(torch.randn(rows, patches), 10.0, 1.0)
    assert len(compiled["_gate"]) == 2
