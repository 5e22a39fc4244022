"""Real libraries whose files are read and written; each is compared where it is installed. See docs/interop.md."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from explaining import where_installed

SCRIPT = Path(__file__).parents[2] / "scripts" / "interop.py"
LIBRARIES = ("saelens", "saev", "overcomplete", "sparsify", "visaebench", "dictionary_learning")


@pytest.fixture(scope="module")
def interop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("interop", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["interop"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_library_is_in_the_list(interop: ModuleType) -> None:
    assert tuple(interop.LIBRARIES) == LIBRARIES


@pytest.mark.parametrize("library", LIBRARIES)
def test_codes_and_reconstructions(interop: ModuleType, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    where_installed(interop.LIBRARIES[library][1])
    rows = interop.compare(library)
    assert len(rows) > 1
    most = interop.TOLERANCE  # each by itself: max(1e-8, nan) is 1e-8
    wrong = [row for row in rows if not (row.codes <= most and row.reconstruction <= most)]
    assert wrong == []


def test_a_difference_is_seen(interop: ModuleType) -> None:
    """A table of zeros would also come from comparing a thing with itself."""
    sae, x = interop.ours("topk"), interop.tokens(interop.TOKENS, seed=12_345)
    codes = sae.encode(x)
    exact = interop.row(interop.OURS, "same", sae, codes, sae.decode(codes))
    assert (exact.codes, exact.reconstruction, exact.l0) == (0.0, 0.0, interop.K)
    off = interop.row(interop.OURS, "other", sae, codes * 1.001, sae.decode(codes) * 1.01)
    assert off.codes > interop.TOLERANCE and off.reconstruction == pytest.approx(0.01 / 1.01, rel=1e-3)
