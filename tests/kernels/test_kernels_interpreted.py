"""Runs kernels_interpreted.py, the Triton kernels against the reference, in Triton's interpreter on the CPU.

A process of its own: Triton decides whether it interprets when a kernel is decorated, and other tests import Triton.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fga_fast.sae import SparseAutoencoder

pytest.importorskip("triton")
from fga_fast import kernels

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_agree_with_the_reference_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "tests/kernels/kernels_interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors on the CPU")
def test_compiled_kernels_refuse_the_cpu() -> None:
    sae = SparseAutoencoder(torch.ones(2, 3), None, torch.ones(3, 2), torch.zeros(2))
    with pytest.raises(RuntimeError, match="score: Triton kernels run on CUDA devices, got a tensor on cpu"):
        kernels.score(torch.ones(1, 4, 2), torch.ones(1, 4, 2), sae)
    with pytest.raises(RuntimeError, match="gate: Triton kernels run on CUDA devices, got a tensor on cpu"):
        kernels.gate(torch.ones(1, 4))
