"""The examples of docs/your_model.md, run exactly as printed: in an empty folder, in a fresh namespace, offline."""

from __future__ import annotations

import importlib
import inspect
import re
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image

from fga_fast import Explainer, Explanation

PAGE = Path(__file__).resolve().parent.parent / "docs" / "your_model.md"
SECTION = re.compile(r"^## (.+?)$.*?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = SECTION.findall(PAGE.read_text(encoding="utf-8"))
TIMM, HUGGING_FACE, OPEN_CLIP, TORCHVISION, OWN = range(5)


def _no_network(*_: Any) -> NoReturn:
    raise AssertionError("an example opened a connection")


class Ran:
    """An example after its run: its variables, what it printed, and the folder it ran in."""

    def __init__(self, code: str, names: dict[str, Any], printed: str, folder: Path) -> None:
        self.code, self.names, self.printed, self.folder = code, names, printed, folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run_one(number: int) -> Ran:
        title, code = EXAMPLES[number]
        for library in set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)):
            pytest.importorskip(library)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(socket.socket, "connect", _no_network)
        names: dict[str, Any] = {"__name__": "example"}
        exec(compile(code, title, "exec"), names)
        return Ran(code, names, capsys.readouterr().out, tmp_path)

    return run_one


def test_there_are_five_and_each_says_what_it_prints() -> None:
    assert len(EXAMPLES) == PAGE.read_text(encoding="utf-8").count("```python") == 5
    for title, code in EXAMPLES:
        assert "print(" in code, title
        assert len(code.splitlines()) <= 50, f"{title}: too long to read"
        assert max(map(len, code.splitlines())) <= 120, title


@pytest.mark.parametrize("number", range(5), ids=[title for title, _ in EXAMPLES])
def test_it_prints_what_its_comments_say(run: Any, number: int) -> None:
    ran = run(number)
    for shown in re.findall(r"print\(.*\)  # ((?:torch\.Size|\[).*?)(?:, within.*)?$", ran.code, re.MULTILINE):
        assert shown in ran.printed
    assert "nan" not in ran.printed


def test_timm(run: Any) -> None:
    ran = run(TIMM)
    both, rather, sure = (ran.names[name] for name in ("both", "rather", "sure"))
    torch.testing.assert_close(rather.values, rather.logits[:, 0] - rather.logits[:, 1])
    torch.testing.assert_close(sure.values, sure.logits.softmax(1)[:, 0])
    assert rather.relevance.shape == (2, 196)
    assert not torch.equal(both.relevance[:, 0], both.relevance[:, 1])
    with Image.open(ran.folder / "boot_not_sneaker.png") as picture:
        assert picture.size == (224, 224)
        assert len(picture.getcolors(224 * 224) or ()) > 1000


def test_hugging_face(run: Any) -> None:
    ran = run(HUGGING_FACE)
    e, predicted = ran.names["e"], ran.names["predicted"]
    assert e.names == ("cat", "dog", "remote control")
    assert torch.equal(predicted.targets, predicted.logits.argmax(1))


def test_open_clip(run: Any) -> None:
    ran = run(OPEN_CLIP)
    e, model = ran.names["e"], ran.names["model"]
    tokens = ran.names["open_clip"].get_tokenizer("ViT-B-32")(list(e.names))
    with torch.no_grad():
        image, text = model.encode_image(ran.names["images"], normalize=True), model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(e.logits, model.logit_scale.exp() * image @ text.T)
    read = Explanation.load(ran.folder / "cat_or_remote.safetensors")
    assert torch.equal(read.relevance, e.relevance)
    assert read.names == e.names


def test_torchvision(run: Any) -> None:
    ran = run(TORCHVISION)
    e, sae, own = (ran.names[name] for name in ("e", "sae", "own"))
    torch.testing.assert_close(sae.W_dec, ran.names["rows"])
    assert (sae.activation, sae.k) == ("topk", 16)
    x = torch.randn(3, 64)
    torch.testing.assert_close(own.encode(x).count_nonzero(1), torch.full((3,), 16))
    for gate in (e.gates[1], e.gates[2]):
        assert 0.1 <= float(gate.min()) < float(gate.max()) <= 10
    assert len(e.top_features(2)[0]) == 3


def test_own(run: Any) -> None:
    ran = run(OWN)
    model, layout, images, e, signed = (ran.names[name] for name in ("model", "layout", "images", "e", "signed"))
    assert bool((signed.relevance < 0).any())
    for found, settings in ((e, {}), (signed, {"method": "input_x_gradient", "backward": "conservative"})):
        assert found.backend == "native"
        reference = Explainer(model, layout=layout, backend="reference", **settings)(images, found.targets)
        torch.testing.assert_close(found.relevance, reference.relevance, rtol=1e-4, atol=1e-6)


def test_what_the_patches_do_not_explain_the_biases_do(run: Any) -> None:
    """The last line of the example: without any bias the patches add up to the logit."""
    ran = run(OWN)
    model = ran.names["model"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    explainer = Explainer(model, layout=ran.names["layout"], method="input_x_gradient", backward="conservative")
    e = explainer(ran.names["images"])
    torch.testing.assert_close(e.relevance.sum(1), e.values)


def test_names_and_settings_of_the_readme_exist() -> None:
    text = (PAGE.parent.parent / "README.md").read_text(encoding="utf-8")
    adapters = set(re.findall(r"fga_fast\.integrations\.(\w+)\.(\w+)", text))
    assert len(adapters) == 3
    for module, name in adapters:
        if module == "captum":
            pytest.importorskip("captum")
        assert callable(getattr(importlib.import_module(f"fga_fast.integrations.{module}"), name))
    section = text[text.index("## Targets") : text.index("## Sparse autoencoders")]
    settings = set(re.findall(r"`(?:Explainer\(model, )?(\w+)=", section)) - {"targets"}
    assert settings >= {"method", "backward", "start_layer", "signed", "per_block", "class_names", "tokenizer"}
    assert settings <= set(inspect.signature(Explainer).parameters)
