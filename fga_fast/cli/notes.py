"""Names that people gave to features: which files a command reads them from."""

from __future__ import annotations

import argparse
from pathlib import Path

from fga_fast.sae.notes import FILE, Notes, beside, read_notes


def add_notes(parser: argparse.ArgumentParser) -> None:
    """Adds what `notes_of` reads."""
    parser.add_argument(
        "--notes", type=Path, metavar="FILE",
        help=f"names and notes of features (default: {FILE} in the folder of each --sae, where there is one)",
    )  # fmt: skip


def notes_of(args: argparse.Namespace) -> Notes:
    """The notes in `--notes`, or those beside the SAEs, each for its own block.

    Raises:
        FileNotFoundError: no such file as `--notes`.
        ValueError: a file that holds no notes.
    """
    if args.notes is not None:
        return read_notes(args.notes)
    notes: Notes = {}
    for spec in args.sae:
        block, _, path = spec.partition("=")
        file = beside(path)
        if file.is_file():
            notes |= {key: one for key, one in read_notes(file).items() if str(key[0]) == block.strip()}
    return notes
