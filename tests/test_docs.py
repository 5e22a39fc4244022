"""The examples of docs/your_model.md and of docs/guide.md, run exactly as printed: in a fresh namespace, offline."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import pytest
import torch
from explaining import where_installed
from picture_files import write_dicom
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fga_fast import Explainer, Explanation

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "your_model.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^## (.+?)$.*?^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TIMM, HUGGING_FACE, OPEN_CLIP, TORCHVISION, OWN, VIT_PYTORCH, MONAI, EARLIER, PIXEL = range(9)
NOT_IN_CI = {"vit_pytorch", "monai"}
Run: TypeAlias = Callable[[int], dict[str, Any]]


def _no_network(*_: Any) -> NoReturn:
    raise AssertionError("an example opened a connection")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example, compares what it prints with its comments, and returns its variables."""

    def run_one(number: int) -> dict[str, Any]:
        title, code = EXAMPLES[number]
        for library in set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)):
            (where_installed if library in NOT_IN_CI else pytest.importorskip)(library)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(socket.socket, "connect", _no_network)
        names: dict[str, Any] = {"__name__": "example"}
        exec(compile(code, title, "exec"), names)
        printed = capsys.readouterr().out
        assert printed
        assert "nan" not in printed
        for shown in re.findall(r"print\(.*\)  # ((?:torch\.Size|\[).*?)(?:, within.*)?$", code, re.MULTILINE):
            assert shown in printed
        return names

    return run_one


def test_there_are_nine_short_ones() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") == 9
    for title, code in EXAMPLES:
        assert len(code.splitlines()) <= 50, f"{title}: too long to read"
        assert max(map(len, code.splitlines())) <= 120, title


def test_timm(run: Run, tmp_path: Path) -> None:
    names = run(TIMM)
    both, rather, sure = (names[name] for name in ("both", "rather", "sure"))
    torch.testing.assert_close(rather.values, rather.logits[:, 0] - rather.logits[:, 1])
    torch.testing.assert_close(sure.values, sure.logits.softmax(1)[:, 0])
    assert rather.relevance.shape == (2, 196)
    assert not torch.equal(both.relevance[:, 0], both.relevance[:, 1])
    with Image.open(tmp_path / "boot_not_sneaker.png") as picture:
        assert picture.size == (224, 224)
        assert len(picture.getcolors(224 * 224) or ()) > 1000


def test_hugging_face(run: Run) -> None:
    names = run(HUGGING_FACE)
    assert names["e"].names == ("cat", "dog", "remote control")
    assert torch.equal(names["predicted"].targets, names["predicted"].logits.argmax(1))


def test_open_clip(run: Run, tmp_path: Path) -> None:
    names = run(OPEN_CLIP)
    e, model = names["e"], names["model"]
    tokens = names["open_clip"].get_tokenizer("ViT-B-32")(list(e.names))
    with torch.no_grad():
        image, text = model.encode_image(names["images"], normalize=True), model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(e.logits, model.logit_scale.exp() * image @ text.T)
    read = Explanation.load(tmp_path / "cat_or_remote.safetensors")
    assert torch.equal(read.relevance, e.relevance)
    assert read.names == e.names


def test_torchvision(run: Run) -> None:
    names = run(TORCHVISION)
    e, sae, own = (names[name] for name in ("e", "sae", "own"))
    torch.testing.assert_close(sae.W_dec, names["rows"])
    assert (sae.activation, sae.k) == ("topk", 16)
    torch.testing.assert_close(own.encode(torch.randn(3, 64)).count_nonzero(1), torch.full((3,), 16))
    for gate in (e.gates[1], e.gates[2]):
        assert 0.1 <= float(gate.min()) < float(gate.max()) <= 10
    assert len(e.top_features(2)[0]) == 3


def test_own(run: Run) -> None:
    names = run(OWN)
    model, layout, images, e, signed = (names[name] for name in ("model", "layout", "images", "e", "signed"))
    assert bool((signed.relevance < 0).any())
    for found, settings in ((e, {}), (signed, {"method": "input_x_gradient", "backward": "conservative"})):
        assert found.backend == "native"
        reference = Explainer(model, layout=layout, backend="reference", **settings)(images, found.targets)
        torch.testing.assert_close(found.relevance, reference.relevance, rtol=1e-4, atol=1e-6)
    # What the patches do not explain is the biases' share, as the last line of the example says.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    unbiased = Explainer(model, layout=layout, method="input_x_gradient", backward="conservative")(images)
    torch.testing.assert_close(unbiased.relevance.sum(1), unbiased.values)


@pytest.mark.parametrize("number", (VIT_PYTORCH, MONAI))
def test_libraries_with_a_layout(run: Run, number: int) -> None:
    names = run(number)
    assert names["layout"].grid == (4, 4)


def transmm(model: nn.Module, images: Tensor, blocks: Any, seed: Tensor) -> Tensor:
    """Textbook TransMM of class 3, from the maps that timm's blocks write out: the row of `seed` [N]."""
    maps: list[Tensor] = []
    for block in blocks:
        block.attn.fused_attn = False
    hooks = [block.attn.attn_drop.register_forward_hook(lambda _m, _i, out: maps.append(out)) for block in blocks]
    value = model(images)[:, 3].sum()
    for hook in hooks:
        hook.remove()
    row = seed.expand(len(images), 1, -1)
    for a in reversed(maps):
        (g,) = torch.autograd.grad(value, a, retain_graph=True)
        row = row + row @ (a * g).clamp(min=0).mean(1)
    return row[:, 0, 1:].detach()


def test_earlier_blocks(run: Run) -> None:
    model, images = run(EARLIER)["model"], torch.randn(2, 3, 64, 64)
    token, mean = torch.eye(17)[0], torch.cat([torch.zeros(1), torch.full((16,), 1 / 16)])
    want = transmm(model, images, model.tower.blocks[:2], token)
    want = want + transmm(model, images, model.tower.blocks[:3], token + mean)
    torch.testing.assert_close(Explainer(model, preset="published")(images, 3).relevance, want, rtol=1e-3, atol=1e-6)


def test_a_pixel(run: Run) -> None:
    model, images = run(PIXEL)["model"], torch.randn(2, 3, 64, 64)
    want = transmm(model, images, model.model.tower.blocks, torch.eye(17)[1 + 2 * 4 + 1])
    torch.testing.assert_close(Explainer(model, preset="published")(images, 3).relevance, want, rtol=1e-3, atol=1e-6)


def test_chest_xray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of docs/guide.md, with a file and weights by the names in it."""
    timm, _, _ = (pytest.importorskip(library) for library in ("timm", "pydicom", "matplotlib"))
    page = (Path(__file__).resolve().parent.parent / "docs" / "guide.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"^## Medical and scientific images\n.*?^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    stored = torch.arange(64 * 64).reshape(64, 64).numpy().astype("uint16")
    write_dicom(tmp_path / "cxr.dcm", stored, bits=12, WindowCenter=2000, WindowWidth=3000)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=14).state_dict(), tmp_path / "cxr.safetensors")
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "chest X-ray", "exec"), names)
    assert "centre 2000, width 3000" in capsys.readouterr().out
    assert names["e"].relevance.shape == (1, 196)
    assert Image.open(tmp_path / "cxr.png").width > 300
