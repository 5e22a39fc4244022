"""timm can be imported without torchvision, and nothing of the stand-ins is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")

MISSING = "raise ModuleNotFoundError(\"No module named 'torchvision'\", name='torchvision')"
BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')"

BUILD_AND_RUN = """
import sys, torch
from fga_fast.models.timm_import import import_timm
timm = import_timm()
assert import_timm() is timm
assert not [name for name in sys.modules if name.startswith("torchvision")]
model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
print(tuple(model(torch.zeros(1, 3, 32, 32)).shape), type(model).__module__)
"""


def python(code: str, folder: Path, torchvision: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter that finds this torchvision first."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(torchvision, encoding="utf-8")
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([str(folder), root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("torchvision", [MISSING, BROKEN], ids=["missing", "broken"])
def test_timm_models_work_without_torchvision(torchvision: str, tmp_path: Path) -> None:
    result = python(BUILD_AND_RUN, tmp_path, torchvision)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(1, 1000) timm.models.vision_transformer"


def test_what_needs_torchvision_says_so(tmp_path: Path) -> None:
    code = "from fga_fast.models.timm_import import import_timm; import_timm().data.create_transform(224)"
    result = python(code, tmp_path, MISSING)
    assert result.returncode == 1
    assert "ImportError: torchvision.transforms" in result.stderr
    assert "needs torchvision, which is missing or does not fit the installed torch" in result.stderr


def test_without_timm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from fga_fast.models import timm_import

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(timm_import, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"timm is not installed.*fga_fast\[models\]"):
        timm_import.import_timm()
