"""Shared by all tests: a fixed seed, and the rules on what may be skipped.

Conformance is never skipped where its numbers are. Where the environment variable CI is set, no test is skipped because
a library is missing: CI installs them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
from torch import nn

os.environ.setdefault("FGA_FAST_BOUND", "1")  # also where it is not the kernel's choice; see csrc/cpu/bound.cpp

CONFORMANCE = ("test_conformance.py", "test_metrics_conformance.py")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., nn.Module]:
    """Builds a random timm VisionTransformer of 32 x 48 px images: grid (2, 3), 3 blocks, width 16, 5 classes."""
    models = pytest.importorskip("timm.models.vision_transformer")

    def build(model_class: type[nn.Module] = models.VisionTransformer, **settings: Any) -> nn.Module:
        sizes = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
        model = model_class(**{**sizes, **settings}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # timm's initial weights are so small that attention is nearly uniform, which hides mistakes.
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture
def random_sae() -> Callable[..., Any]:
    """Builds a random float64 autoencoder with 40 features."""
    from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

    def build(activation: str, normalize: str | None = None, width: int = 16) -> SparseAutoencoder:
        features = 40
        gated = {name: 0.3 * torch.randn(features).double() for name in ("b_gate", "r_mag", "b_mag")}
        return SparseAutoencoder(
            torch.randn(width, features).double(),
            0.1 * torch.randn(features).double(),
            torch.randn(features, width).double(),
            torch.randn(width).double(),
            activation=activation,
            k=5 if activation == "topk" else None,
            threshold=0.5 if activation in ("jumprelu", "batch_topk") else None,
            normalize=normalize,
            **(gated if activation == "gated" else {}),
        )

    return build


@pytest.fixture(scope="session")
def predicted_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float64, two SAEs, batches of two, with all that metadata can say."""
    from packages import NAMES, PREPROCESS, explainer, images

    def export(path: Path) -> None:
        explainer(ungated=True).export(path, images(2), preprocessing=PREPROCESS, class_names=NAMES)

    return _once(tmp_path_factory, "predicted.pt2", export)


@pytest.fixture(scope="session")
def given_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32, given classes, batches of three, with everything that an explanation can have besides."""
    from packages import EVERYTHING, PREPROCESS, explainer, images

    def export(path: Path) -> None:
        full, example = explainer(torch.float32, **EVERYTHING), images(3, torch.float32)
        full.export(path, example, target_mode="given", preprocessing=PREPROCESS)

    return _once(tmp_path_factory, "given.pt2", export)


def _once(tmp_path_factory: pytest.TempPathFactory, name: str, export: Callable[[Path], None]) -> Path:
    """A package for all processes of a run of the tests: the first that needs it compiles it, the others wait."""
    from filelock import FileLock

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / Path(name).stem / name
    with FileLock(folder / f"{name}.lock"):
        if not (path.is_file() and path.with_suffix(".json").is_file()):
            path.parent.mkdir(exist_ok=True)
            export(path)
    return path


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that at the end no process is alone with one."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def _not_skipped(report: Any, path: Any) -> None:
    """Makes a failure of a skip that must not be."""
    if not report.skipped:
        return
    if path.name in CONFORMANCE and conformance.required():
        report.outcome = "failed"
        report.longrepr = f"conformance test skipped although {conformance.folder()} exists: {report.longrepr}"
    elif os.environ.get("CI") and "could not import" in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped for a missing library, but CI must have all of them: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _not_skipped(report, item.path)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _not_skipped(report, collector.path)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if conformance.LARGEST:
        terminalreporter.section("largest errors against the conformance numbers")
        for quantity, (of_norm, of_element) in sorted(conformance.LARGEST.items()):
            terminalreporter.write_line(f"{quantity:<34} {of_norm:.1e} norm-wise   {of_element:.1e} at most")
