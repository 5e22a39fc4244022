"""Every run of every conformance file on a CUDA device, in float32: the numbers of an independent implementation."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

import conformance
import pytest
import torch

from fga_fast import Explainer

FOUND = conformance.folder().is_dir()
REQUIRED = os.environ.get("FGA_FAST_REQUIRE_CUDA") == "1"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not FOUND, reason=f"no conformance numbers at {conformance.folder()}"),
    pytest.mark.skipif(not torch.cuda.is_available() and not REQUIRED, reason="no CUDA device"),
]
RUNS = conformance.runs() if FOUND else [("none", 0)]


@pytest.mark.parametrize("backend", ("native", "triton", "composite", "reference"))
@pytest.mark.parametrize(("name", "run"), RUNS)
def test_relevance(name: str, run: int, backend: Any) -> None:
    case = conformance.load(name, torch.float32)
    saes = {block: sae.cuda() for block, sae in case.saes(run).items()}
    e = Explainer(deepcopy(case.model).cuda(), saes=saes, gate=case.gate(run), backend=backend, preset="published")(
        case.images.cuda()
    )
    assert e.backend == backend and e.relevance.is_cuda
    assert torch.equal(e.targets.cpu(), case.tensors["target"])
    want = case.expected(run)["attribution"]
    error = (e.relevance.cpu().double() - want).norm(dim=1) / want.norm(dim=1)
    assert float(error.max()) < 1e-4
