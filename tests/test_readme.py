"""What pages name exists: commands, options, keywords, links, paths. The README's example prints what is shown."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

import fga_fast
from fga_fast.cli.main import build_parser

ROOT = Path(__file__).resolve().parent.parent
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
FOLDERS = ("docs", "benchmarks", "examples", "fga_fast")
PAGES = sorted({*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))})
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Repository paths in running text. Files that a build or a run makes are not there in a fresh clone.
MENTIONED = re.compile(r"`((?:fga_fast|kernels|csrc|tests|scripts|docs|examples|benchmarks|\.ci)/[\w./*-]*)`")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(read(page)) if name == language]


def prose(page: Path) -> str:
    """The page without its fenced code."""
    return FENCE.sub("", read(page))


def commands(page: Path, program: str) -> list[list[str]]:
    """Calls of a program in the page's sh blocks and in its text, without comments and leading VARIABLE=value."""
    lines = [line for body in blocks(page, "sh") for line in body.replace("\\\n", " ").splitlines()]
    lines += re.findall(rf"(?:`|^ {{4}})({program} [^`\n]+)", prose(page), re.MULTILINE)
    split = [shlex.split(re.sub(r"^(?:[A-Z_]+=\S* )+", "", line), comments=True) for line in lines]
    return [words[1:] for words in split if words[:1] == [program]]


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_the_example_prints_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    (example,), (shown,) = blocks(README, "python"), blocks(README, "text")
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == shown
    assert len(example.splitlines()) <= 12
    assert len(read(README).splitlines()) <= 150


@each_page
def test_make_targets_and_variables_exist(page: Path) -> None:
    makefile = read(ROOT / "Makefile")
    called = commands(page, "make")
    assert {words[0] for words in called} <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert page != README or {"demo", "test"} <= {words[0] for words in called}
    for name, _, value in (word.partition("=") for words in called for word in words[1:] if "=" in word):
        assert f"$({name})" in makefile, name
        assert name != "TORCH" or value == "system"


@each_page
def test_fga_fast_commands_are_understood(page: Path) -> None:
    """Each command line is given to the real parser, which ends the program at an unknown option or command."""
    called = [words for words in commands(page, "fga-fast") if len(words) > 1]
    assert page.name != "cli.md" or len(called) >= 5
    for words in called:
        if "--help" in words:
            with pytest.raises(SystemExit, match=r"^0$"):
                build_parser().parse_args(words)
        else:
            arguments = build_parser().parse_args(words)
            # An option with several values would swallow an image that comes after it.
            assert words[0] != "explain" or arguments.model is None or arguments.images, words


def test_options_named_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    page = read(ROOT / "docs" / "cli.md")
    sections = dict(re.findall(r"^## `fga-fast ([\w-]+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert {*sections} == {"explain", "evaluate", "export", "harvest", "train-sae", "sae-report", "features", "serve"}
    for name, text in sections.items():
        with pytest.raises(SystemExit):
            build_parser().parse_args([name, "--help"])
        named = set(re.findall(r"`(--[a-z-]+)`", text))
        assert len(named) >= 3
        assert named <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out)), name


@each_page
def test_python_names_and_keywords_exist(page: Path) -> None:
    """Calls of the public API, in python blocks and in the text, use names and keyword arguments that it has."""
    known = {name: getattr(fga_fast, name) for name in fga_fast.__all__}
    known |= {name: getattr(fga_fast.Explainer, name) for name in ("compile", "module", "export")}
    for code in [*blocks(page, "python"), *re.findall(r"`([^`\n]+\([^`\n]*\))`", prose(page))]:
        try:
            nodes = list(ast.walk(ast.parse(code)))
        except SyntaxError:  # a formula, C++ or a call with a part left out
            continue
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fga_fast":
                assert all(hasattr(importlib.import_module(str(node.module)), name.name) for name in node.names), code
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if name in known:
                parameters = inspect.signature(known[name]).parameters
                open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
                assert open_ended or {keyword.arg for keyword in node.keywords} <= set(parameters), code  # type: ignore[attr-defined]


def test_settings_and_adapters_of_the_guide_exist() -> None:
    adapters = set(re.findall(r"fga_fast\.integrations\.(\w+)\.(\w+)", read(GUIDE)))
    assert len(adapters) == 3
    for module, name in adapters:
        if module == "captum":
            pytest.importorskip("captum")
        assert callable(getattr(importlib.import_module(f"fga_fast.integrations.{module}"), name))
    settings = set(re.findall(r"^\| `(\w+)=` \|", read(GUIDE), re.MULTILINE)) - {"targets"}
    assert len(settings) == 8
    assert settings <= set(inspect.signature(fga_fast.Explainer).parameters)


@each_page
def test_links_and_paths_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert ROOT in file.parents, f"{target} leaves the repository"
        assert file.suffix != ".png" or file.stat().st_size < 300_000, target
        if fragment:
            assert fragment in {anchor(line) for line in re.findall(r"^#+ (.+)$", read(file), re.MULTILINE)}, target
    for path in MENTIONED.findall(prose(page)):
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_extras_and_variables_of_the_environment_exist() -> None:
    text, project = "".join(map(read, PAGES)), read(ROOT / "pyproject.toml")
    for extra in {extra for extras in re.findall(r"\.\[([a-z,]+)\]", text) for extra in extras.split(",")}:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.h")]
    sources += [file for folder in ("fga_fast", "tests") for file in (ROOT / folder).rglob("*.py")]
    code = "".join(map(read, sources))
    text = text.replace(read(ROOT / "CHANGELOG.md"), "")  # which also names what is gone
    for name in set(re.findall(r"\bFGA_FAST_[A-Z_]+", text)):
        assert re.search(rf"\b{name}\b", code), name
