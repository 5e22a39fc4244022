"""Every instruction set's kernels are right, not only those that this machine would choose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = (
    "test_attention",
    "test_attention_bias",
    "test_attention_flags",
    "test_score",
    "test_score_signed",
    "test_score_bounded",
)
CHOSEN = (
    "test_head_widths or test_lengths or test_sixteen_bits or test_activations or test_dense_and_gathered or ties "
    "or test_bias_shapes or test_padding or test_signed or test_what_is_not_needed or test_scores or test_rows "
    "or test_widths or test_thresholds"
)


@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_op_tests_pass_with_lesser_instructions(isa: str) -> None:
    files = [str(HERE / f"{name}.py") for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CHOSEN, *files]
    ran = subprocess.run(
        command, env={**os.environ, "FGA_FAST_ISA": isa}, capture_output=True, text=True, check=False, cwd=HERE.parent
    )
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-3000:]


def test_the_variable_changes_the_kernels() -> None:
    """Sums are taken in another order with shorter vectors, so at least one bit differs: the switch does something."""
    code = (
        "import torch; from fga_fast import ops; torch.manual_seed(0);"
        "q = torch.randn(1, 2, 65, 64); out = ops.attention(q, q, q, torch.zeros(1, 65), scale=0.1)[0];"
        "print(out.view(torch.int32).sum().item())"
    )
    seen = set()
    for isa in ("baseline", ""):
        environment = {**os.environ, "FGA_FAST_ISA": isa}
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        seen.add(ran.stdout)
    if "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this processor has baseline instructions only")
    assert len(seen) == 2
