"""Rows of one explanation as a package: called from Python, and by the C++ session.

The session's Python module takes images from the host and returns results to the host. For a fair comparison another
row does the same from Python; a package that stays on the device copies nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from device import Work
from rows import Row
from steadiness import PREPARATION, NotRunError, Subject
from timing import Race

from fga_fast import Explainer, Explanation, load_package

DIFFERENCE = 1e-3  # relative, norm-wise; one package on one device, twice


def rows(subject: Subject, name: str, explainer: Explainer, session: bool = True) -> Iterator[Row]:
    """Exports once and calls the package in all ways.

    Args:
        session: also run it in the C++ session, which has no Triton kernels.
    """
    with tempfile.TemporaryDirectory(prefix="fga_fast_package.") as folder:
        ways = _Ways(subject, explainer, Path(folder) / "explanation.pt2")
        row = subject.row(f"{name}, package, {explainer.backend}", ways.package, PREPARATION)
        yield row
        if session and row.median_s is not None:
            yield subject.row(f"{name}, package from and to the host, {explainer.backend}", ways.by_way_of_host)
            yield subject.row(f"{name}, package, C++ session, {explainer.backend}", ways.session)


class _Ways:
    """The ways to run one package. Each returns a call and a note about it."""

    def __init__(self, subject: Subject, explainer: Explainer, path: Path) -> None:
        self._subject, self._explainer, self._path = subject, explainer, path
        # The session converts float32 to the package's dtype.
        self._host = subject.images.float().cpu()

    def package(self) -> tuple[Work, str]:
        start = time.perf_counter()
        self._explainer.export(self._path, self._subject.images)
        exported = time.perf_counter() - start
        start = time.perf_counter()
        self._package = load_package(self._path)
        loaded = time.perf_counter() - start
        call = partial(self._package, self._subject.images)
        size = self._path.stat().st_size / 2**20
        return call, f"{size:.0f} MiB exported in {exported:.0f} s, {self._ready(loaded, call)}"

    def by_way_of_host(self) -> tuple[Work, str]:
        return self._from_host, ""

    def _from_host(self) -> Explanation:
        images = self._subject.images
        return self._package(self._host.to(images.device, images.dtype)).to("cpu")

    def session(self) -> tuple[Work, str]:
        module = _runtime()
        start = time.perf_counter()
        session = module.Session(self._path)
        loaded = time.perf_counter() - start
        call = partial(session.explain, self._host.numpy())
        ready = self._ready(loaded, call)
        want = self._from_host().relevance.double().numpy()
        off = float(np.linalg.norm(call().relevance - want) / np.linalg.norm(want))
        if not off < DIFFERENCE:
            raise RuntimeError(f"relevance differs from Python's by {off:.1e} (relative), expected {DIFFERENCE}")
        device = self._subject.device
        race = Race(self._from_host, {"session": call}, device.synchronise)
        race.warm_up()
        for _ in range(1 if device.small else 200):
            race.round()
        return call, f"{ready}; {race.result('session').ratio:.3f} x Python from and to the host"

    def _ready(self, loaded: float, call: Work) -> str:
        """Includes the first call, which loads the machine code onto the device."""
        start = time.perf_counter()
        call()
        self._subject.device.synchronise()
        return f"ready after {loaded:.3g} s, first call {time.perf_counter() - start:.3g} s"


def _runtime() -> Any:
    """The module fga_runtime from the build folder $FGA_FAST_CMAKE_BUILD."""
    built = os.environ.get("FGA_FAST_CMAKE_BUILD")
    if not built:
        raise NotRunError("FGA_FAST_CMAKE_BUILD names no build of the C++ project")
    found = next((Path(built) / "python").glob("fga_runtime*.so"), None)
    if found is None:
        raise NotRunError("the C++ project was built without -DFGA_FAST_PYBIND=ON")
    sys.path.insert(0, str(found.parent))
    return importlib.import_module("fga_runtime")
