"""What the documentation says exists, and what it shows runs: examples, commands, options, links, paths."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fga_fast.cli.main import build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Repository paths in running text. Files that a build or a run makes are not there in a fresh clone.
MENTIONED = re.compile(r"`((?:fga_fast|csrc|tests|scripts|docs|examples|benchmarks|\.ci)/[\w./*-]*)`")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(read(page)) if name == language]


def prose(page: Path) -> str:
    """The page without its fenced code."""
    return FENCE.sub("", read(page))


def shell_commands(page: Path) -> list[list[str]]:
    """Commands of the page's sh blocks, split into words, without comments and leading VARIABLE=value."""
    lines = [line for body in blocks(page, "sh") for line in body.replace("\\\n", " ").splitlines()]
    split = [shlex.split(line, comments=True) for line in lines]
    return [strip_variables(words) for words in split if words]


def strip_variables(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_the_readme_opens_with_the_two_commands() -> None:
    text = read(ROOT / "README.md")
    assert text.index("make demo") < text.index("make test") < text.index("## ")
    assert "make demo TORCH=system" in text


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    found = blocks(ROOT / "README.md", "python")
    assert len(found) == 1
    monkeypatch.chdir(tmp_path)  # it writes a picture
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(found[0], "README.md", "exec"), names)
    e = names["e"]
    assert e.backend == "native"
    assert e.targets.tolist() == [281]
    assert e.relevance.shape == e.gates[8].shape == e.gates[10].shape == (1, 196)
    heat = e.heatmap()
    assert heat.shape == (1, 224, 224)
    assert float(heat.min()) == 0
    assert float(heat.max()) == pytest.approx(1, abs=1e-3)
    assert not torch.equal(e.gates[8], torch.ones_like(e.gates[8])), "the example's gates gate nothing"
    assert (tmp_path / "overlay.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    shapes = [str(value.shape) for value in (e.relevance, heat, e.gates[8])]
    assert " ".join(shapes) in printed
    for shape in re.findall(r"\[1, \d+(?:, \d+)?\]", re.search(r"print\(e\.rel.*", found[0])[0]):  # type: ignore[index]
        assert shape in printed, "a comment of the example gives another shape"


def test_example_is_short() -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 20


def test_sentences_about_the_example_hold(tmp_path: Path, tiny_vit: Any) -> None:
    """`save`, `load`, and `plot` with and without `ungated`, as the text under the example says."""
    pytest.importorskip("matplotlib")
    from fga_fast import Explainer, Explanation, Gate, SparseAutoencoder

    model = tiny_vit()
    rows = torch.randn(20, 16)
    sae = SparseAutoencoder(rows.t(), None, rows, torch.zeros(16), "topk", k=4)
    images = torch.rand(1, 3, 32, 48)
    e = Explainer(model, saes={1: sae}, gate=Gate())(images)
    columns = len(e.plot(images).axes)
    e = replace(e, ungated=Explainer(model)(images, e.targets).relevance)
    assert len(e.plot(images).axes) == columns + 1
    e.save(tmp_path / "e.safetensors")
    assert torch.equal(Explanation.load(tmp_path / "e.safetensors").relevance, e.relevance)


def test_an_sae_after_the_last_block_gates_nothing(tiny_vit: Any) -> None:
    from fga_fast import Explainer, SparseAutoencoder

    rows = torch.randn(20, 16)
    sae = SparseAutoencoder(rows.t(), None, rows, torch.zeros(16), "relu")
    e = Explainer(tiny_vit(), saes={2: sae, 1: sae})(torch.rand(1, 3, 32, 48))
    assert torch.equal(e.gates[2], torch.ones_like(e.gates[2]))
    assert torch.equal(e.scores[2], torch.zeros_like(e.scores[2]))
    assert not torch.equal(e.gates[1], torch.ones_like(e.gates[1]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.MULTILINE))
    named = {words[1] for words in shell_commands(page) if words[0] == "make"}
    named |= set(re.findall(r"(?:`|^ {4})make ([a-z]+)", prose(page), re.MULTILINE))
    if page.name == "README.md":
        assert {"demo", "test"} <= named
    assert named <= targets


def test_variables_of_make_exist() -> None:
    text = "".join(read(page) for page in PAGES)
    makefile = read(ROOT / "Makefile")
    for name, value in re.findall(r"make \w+ ([A-Z]+)=(\w*)", text):
        assert f"$({name})" in makefile, name
        assert name != "TORCH" or value == "system"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fga_fast_commands_are_understood(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command line is given to the real parser, which ends the program at an unknown option or command."""
    commands = [words for words in shell_commands(page) if words[0] == "fga-fast"]
    commands += [shlex.split(words) for words in re.findall(r"`(fga-fast [^`]+)`", prose(page))]
    if page.name == "README.md":
        assert len(commands) >= 3
    for words in commands:
        if "--help" in words:
            with pytest.raises(SystemExit) as end:
                build_parser().parse_args(words[1:])
            assert end.value.code == 0
        else:
            arguments = build_parser().parse_args(words[1:])
            # An option with several values would swallow an image that comes after it.
            if words[1] == "explain":
                assert arguments.model is None or arguments.image is not None, words
    capsys.readouterr()


def test_options_named_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["explain", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"`(--[a-z-]+)`", read(ROOT / "README.md")))
    assert named
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert ROOT in file.parents, f"{page.name}: {target} leaves the repository"
        if fragment:
            assert fragment in {anchor(line) for line in re.findall(r"^#+ (.+)$", read(file), re.MULTILINE)}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_the_text_exist(page: Path) -> None:
    for path in MENTIONED.findall(prose(page)):
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name} mentions {path}"


def test_extras_and_variables_of_the_installation_exist() -> None:
    text = read(ROOT / "README.md")
    project = read(ROOT / "pyproject.toml")
    for extras in re.findall(r"\.\[([a-z,]+)\]", text):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    sources = [*ROOT.glob("*.py"), *(ROOT / "fga_fast").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    code = "".join(read(file) for file in sources) + read(ROOT / "CMakeLists.txt")
    for page in PAGES:
        for name in set(re.findall(r"\bFGA_FAST_[A-Z_]+", read(page))):
            assert re.search(rf"\b{name}\b", code), f"{page.name} mentions {name}"


def test_pictures_are_small() -> None:
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", read(ROOT / "README.md")):
        assert (ROOT / target).stat().st_size < 300_000, target
