"""Peak memory of a call: how far it raises the resident memory of the process (Linux)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_PROCESS = Path("/proc/self")


def peak_bytes(work: Callable[[], object]) -> int | None:
    """Highest resident memory while `work` runs, minus that before; None if the system cannot tell.

    First the allocator gives free memory back, so that `work` cannot use it unnoticed. Then writing 5 to clear_refs
    resets the kernel's high-water mark. Counts everything: tensors, buffers of kernels, Python objects.
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


def resident_bytes(process: int | str = "self") -> int:
    """The resident memory of a process, by default this one."""
    return _status("VmRSS", process)


def available_bytes() -> int:
    """Memory available without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _status(name: str, process: int | str = "self") -> int:
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no {name}")
