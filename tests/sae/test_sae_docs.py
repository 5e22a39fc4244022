"""docs/sae_formats.md lists the formats that the code reads, and the arguments each takes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from fga_fast.sae import SparseAutoencoder, formats

PAGE = (Path(__file__).parents[2] / "docs" / "sae_formats.md").read_text(encoding="utf-8")
ROWS = {row[1]: row[0] for row in re.finditer(r"^\| `([\w.-]+)` \|.*\|$", PAGE, re.MULTILINE)}


def test_the_table_is_the_registry() -> None:
    assert sorted(ROWS) == sorted(module.NAME for module in formats.FORMATS)
    files = {path.stem for path in Path(formats.__file__).parent.glob("*.py") if "def matches(" in path.read_text()}
    assert files == {module.__name__.rpartition(".")[2] for module in formats.FORMATS}


def test_each_row_names_the_arguments_its_format_takes() -> None:
    for module in formats.FORMATS:
        named = set(re.findall(r"`(\w+)=", ROWS[module.NAME])) - {"allow_pickled_config"}
        assert named == set(module.TAKES), module.NAME


def test_every_argument_is_one_of_from_pretrained() -> None:
    accepted = set(inspect.signature(SparseAutoencoder.from_pretrained).parameters)
    assert set(re.findall(r"`(\w+)=", PAGE)) <= accepted
