"""The measured device: times calls with events, reads peaks from its allocator, and measures the two ceilings.

The kind "cpu" is a rehearsal: the same script at toy sizes on a machine without a GPU, to check that it runs.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Device:
    """The device that everything runs on.

    Attributes:
        kind: "cuda", or "cpu" for a rehearsal.
        small: toy sizes.
        until: end of the run's time, on the monotonic clock.
    """

    kind: str
    small: bool
    until: float = math.inf

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.kind == "cuda" else "rehearsal"

    @property
    def side(self) -> int:
        """Height and width of the images that ViT-B/16 explains, in pixels."""
        return 64 if self.small else 224

    @property
    def tokens(self) -> int:
        """Of such an image."""
        return (self.side // 16) ** 2 + 1

    def left(self) -> float:
        """Seconds left of the run's time; below 0 once it is over."""
        return self.until - time.monotonic()

    def synchronise(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Work, rounds: int = 30, warm_up: int = 5) -> tuple[float, float]:
        """Median and fastest time of one call."""
        for _ in range(warm_up):
            work()
        times = [self._once(work) for _ in range(1 if self.small else rounds)]
        return statistics.median(times), min(times)

    def _once(self, work: Work) -> float:
        if self.kind != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def peak_bytes(self, work: Work) -> int | None:
        """Peak of the memory in tensors during the call, minus that before it."""
        if self.kind != "cuda":
            return None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Ceilings:
    """What this device reached: bytes per second of a copy, operations per second of a matrix product."""

    copy: float
    matmul: dict[torch.dtype, float]

    def share(self, seconds: float, flops: float, moved: float, dtype: torch.dtype) -> float:
        """The time at the ceilings, divided by the time taken; 1 is the ceiling."""
        return max(flops / self.matmul[dtype], moved / self.copy) / seconds


def measure_ceilings(device: Device) -> Ceilings:
    """Times a copy of a gibibyte (read and written) and products of square matrices in each dtype."""
    elements = 2**20 if device.small else 2**29
    source = torch.randn(elements, device=device.kind).bfloat16()
    target = torch.empty_like(source)
    copied, _ = device.seconds(lambda: target.copy_(source))
    side = 256 if device.small else 8192
    rates = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device=device.kind).to(dtype) for _ in range(2))
        taken, _ = device.seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        rates[dtype] = 2 * side**3 / taken
    return Ceilings(2 * source.numel() * source.element_size() / copied, rates)
