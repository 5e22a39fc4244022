"""Peak memory of a call: how far the process's resident memory rises above where it was (Linux)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_PROCESS = Path("/proc/self")


def peak_bytes(work: Callable[[], object]) -> int | None:
    """Highest resident memory while `work` runs, above that before; None where the system cannot tell.

    Free memory that the allocator kept is given back first, so that nothing hides in it; the kernel's high-water mark
    is reset by writing 5 to clear_refs. Counts everything: tensors, kernels' own buffers, Python objects.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        gc.collect()
        libc.malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def resident_bytes() -> int:
    """Memory that the process takes now."""
    return _status("VmRSS")


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _status(name: str) -> int:
    for line in (_PROCESS / "status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
