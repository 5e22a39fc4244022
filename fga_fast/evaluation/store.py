"""The values of a run on disk: parts that a killed run leaves whole, and one file in the end.

A folder holds settings.json, while the run goes on parts/000000.parquet and so on, and when it is complete
values.parquet. Every file is written whole or not at all. A part belongs to a fixed group of items, so a run that goes
on computes the missing parts only, and values.parquet is the same, byte for byte, as that of a run without a break.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fga_fast.dataset.extras import need
from fga_fast.io.atomic import atomic_write, check_writable_folder
from fga_fast.io.json_file import read_json
from fga_fast.io.resume import check_same, remove_leftovers

SETTINGS, VALUES, _PARTS = "settings.json", "values.parquet", "parts"
_MOST_SETTINGS = 16 * 2**20  # bytes


class Row(NamedTuple):
    """One value, or one error: of an item, of a method on an item, or of a metric."""

    key: str
    image: str  # what counts as one image in tests
    half: str
    seed: int
    target: int | None  # explained class; None: not known, since the image could not be read
    method: str | None  # None: an error that all methods share
    metric: str | None  # None: an error that all metrics share
    value: float  # NaN where the metric is not defined, and beside an error
    error: str | None


class Store:
    """The folder of one run.

    Args:
        folder: made if it is missing.
        settings: everything that the values depend on, as JSON can hold it.

    Raises:
        ValueError: the folder holds a run with other settings; the message names them.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = check_writable_folder(folder)
        self._parts = self.folder / _PARTS
        given = json.loads(json.dumps(settings))  # as they come back from the file
        if (self.folder / SETTINGS).exists():
            check_same(read_json(self.folder / SETTINGS, _MOST_SETTINGS), given, self.folder)
        elif (self.folder / VALUES).exists() or self._parts.exists():
            raise ValueError(f"out: {self.folder} holds values without {SETTINGS}; name another folder")
        else:
            text = json.dumps(given, indent=2, allow_nan=False) + "\n"
            atomic_write(self.folder / SETTINGS, text.encode())
        self._tidy()

    @property
    def complete(self) -> bool:
        """Whether all values are there."""
        return (self.folder / VALUES).exists()

    def has(self, number: int) -> bool:
        """Whether a part is there."""
        return self.complete or self._path(number).exists()

    def write(self, number: int, rows: Sequence[Row]) -> None:
        """Writes a part."""
        self._parts.mkdir(exist_ok=True)
        atomic_write(self._path(number), _parquet(rows))

    def finish(self, parts: int) -> Path:
        """Makes one file of all parts, and deletes them. Returns its path."""
        if not self.complete:
            arrow, parquet = need("pyarrow"), need("pyarrow.parquet")
            tables = [parquet.read_table(self._path(number), schema=_schema()) for number in range(parts)]
            atomic_write(self.folder / VALUES, _bytes(arrow.concat_tables(tables).combine_chunks()))
        self._tidy()
        return self.folder / VALUES

    def _path(self, number: int) -> Path:
        return self._parts / f"{number:06}.parquet"

    def _tidy(self) -> None:
        """Deletes what a killed run left half-written, and parts that the one file holds."""
        for folder, name in ((self.folder, SETTINGS), (self.folder, VALUES), (self._parts, "*.parquet")):
            remove_leftovers(folder, name)
        if self.complete and self._parts.exists():
            for part in self._parts.glob("*.parquet"):
                part.unlink(missing_ok=True)
            with suppress(OSError):  # something of others is in it
                self._parts.rmdir()


def read(path: str | Path) -> Any:
    """values.parquet, or that of a folder, as a pyarrow Table with the columns of `Row`.

    Raises:
        FileNotFoundError: there is none; the run is not complete.
    """
    path = Path(path)
    path = path / VALUES if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"values: no file {path}; run the evaluation to its end first")
    return need("pyarrow.parquet").read_table(path, schema=_schema())


def settings(folder: str | Path) -> dict[str, Any]:
    """The settings of the run in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    return read_json(Path(folder) / SETTINGS, _MOST_SETTINGS)


def _schema() -> Any:
    arrow: Any = need("pyarrow")
    kinds = {"seed": arrow.int64(), "target": arrow.int64(), "value": arrow.float64()}
    return arrow.schema([(name, kinds.get(name, arrow.string())) for name in Row._fields])


def _parquet(rows: Sequence[Row]) -> bytes:
    arrow: Any = need("pyarrow")
    columns = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    return _bytes(arrow.table(columns, schema=_schema()))


def _bytes(table: Any) -> bytes:
    buffer = io.BytesIO()
    need("pyarrow.parquet").write_table(table, buffer)
    return buffer.getvalue()
