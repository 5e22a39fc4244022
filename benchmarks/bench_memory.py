"""Peak memory at high resolution, each case in its own process: two blocks of ViT-B/16, one SAE."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from conftest import Scale
from peak import available_bytes
from rows import Row

SIDES = (512, 1024)  # 1,025 and 4,097 tokens
WAYS = ("forward_backward", "TransMM", "FGA", "reference TransMM", "reference FGA")
HEADS, DEPTH = 12, 2
LIMIT = 10 * 2**30


def tokens_of(side: int) -> int:
    return (side // 16) ** 2 + 1


def expected_bytes(way: str, side: int, features: int) -> int:
    """An estimate of the reference's memory from its use at 1,025 tokens; decides whether a case can run."""
    if not way.startswith("reference"):
        return 0
    maps = round(3.2 * DEPTH * HEADS * tokens_of(side) ** 2 * 4)
    return maps + (3 * tokens_of(side) * features * 4 if way.endswith("FGA") else 0)


def measure(way: str, side: int, features: int) -> int:
    # With a fixed threshold glibc gives freed tensors back, so the peak counts only memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, str(Path(__file__).with_name("memory_case.py")), way, str(side), str(features)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{way} at {side} px: {done.stderr.strip()}")
    return int(done.stdout)


def test_memory(scale: Scale, record: Callable[[Row], None]) -> None:
    sides = (128, 256) if scale.quick else SIDES
    at_small: dict[str, int] = {}
    for side in sides:
        for way in WAYS:
            row = Row("memory", way, 1, tokens_of(side), threads=torch.get_num_threads())
            need = expected_bytes(way, side, scale.features)
            if need > min(LIMIT, available_bytes() * 0.8):
                record(replace(row, note=f"not run: needs about {need / 2**30:.0f} GiB"))
                continue
            peak = measure(way, side, scale.features)
            note = ""
            if way in at_small:
                note = f"x {peak / at_small[way]:.1f} for x {tokens_of(side) / tokens_of(sides[0]):.1f} tokens"
            at_small.setdefault(way, peak)
            record(replace(row, peak_bytes=peak, note=note))
