"""The three metrics of the author's code, for every run that has them, against an independent implementation."""

from __future__ import annotations

import conformance
import pytest
import torch

from fga_fast import metrics

FOUND = conformance.folder().is_dir()
pytestmark = pytest.mark.skipif(
    not FOUND, reason=f"no conformance numbers at {conformance.folder()}; set {conformance.VARIABLE} to their folder"
)
NAMES = ("saco", "faithfulness_correlation", "pixel_flipping")
RUNS = [
    (path.name, run)
    for path in (conformance.model_files() if FOUND else [])
    for run in range(len(conformance.header(path)["runs"]))
    if f"metric.{run}.saco" in conformance.keys(path)
]


@pytest.mark.parametrize(("name", "run"), RUNS, ids=[f"{name.split('.')[0]}-{run}" for name, run in RUNS])
def test_run(name: str, run: int) -> None:
    case = conformance.load(name, torch.float64)
    settings, relevance = case.header["metrics"], case.expected(run)["attribution"]
    subsets = case.tensors[f"metric.{run}.fc_subsets"]
    assert subsets.shape[::2] == (settings["fc_runs"], settings["fc_subset"])
    asked = (case.model, case.images, case.tensors["target"], relevance)
    got = {
        "saco": metrics.saco(*asked, bins=settings["saco_bins"], variant="author"),
        "faithfulness_correlation": metrics.faithfulness_correlation(*asked, subsets=subsets, variant="author"),
        "pixel_flipping": metrics.pixel_flipping(*asked, variant="author"),
    }
    for metric, found in got.items():
        want = case.tensors[f"metric.{run}.{metric}"]
        error = (found - want).abs().max() / want.abs().max().clamp(min=1)
        conformance.report(f"metrics {metric}", float(error), float(error))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5, msg=metric)


def test_every_stored_number_is_compared() -> None:
    assert len(RUNS) >= 4
    stored = {
        (path.name, key)
        for path in conformance.model_files()
        for key in conformance.keys(path)
        if key.startswith("metric.")
    }
    assert stored == {(name, f"metric.{run}.{key}") for name, run in RUNS for key in (*NAMES, "fc_subsets")}
