"""What `fga-fast explain` leaves behind: lines on the terminal, JSON, figures, raw relevance, a contact sheet."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from fga_fast.cli.drawing import Drawing, strip
from fga_fast.cli.ways import Way
from fga_fast.io.atomic import atomic_write
from fga_fast.io.window import READ
from fga_fast.result.explanation import Explanation
from fga_fast.result.features import FeatureContribution, card_url

SHEET_IMAGES = 24
_SHEET, _MARGIN = "contact_sheet.png", 10  # pixels


class Writer:
    """Takes explanations one image at a time and writes them, the same files for every way to explain.

    One image goes into the folder itself. Of several each goes into a folder of its own, named like the file; a name
    that another file has as well gets a number. For the demo only the first is written out in full. The contact sheet
    shows the first 24.

    Args:
        drawing: draws the figures.
        many: whether each image gets a folder.
        cards: the page of feature cards to link to.
    """

    def __init__(self, out: Path, way: Way, drawing: Drawing, many: bool, cards: str | None = None) -> None:
        self.out, self.way, self.many, self.cards = out, way, many, cards
        self._drawing = drawing
        self._sheet: list[Image.Image] = []
        self._count = 0
        self._taken = {_SHEET}  # in small letters, since some file systems do not tell them from large ones

    def add(self, path: Path, view: Image.Image, explanation: Explanation, milliseconds: dict[str, Any]) -> None:
        """Reports one image and its targets, relevance [1, P] or [1, K, P].

        `view` is what the model saw, `milliseconds` what the JSON says about the time for one image and one target.
        """
        self._count += 1
        facts = self._facts(path, view, explanation, milliseconds)
        captions = [*map(_caption, facts["explained"])]
        if len(self._sheet) < SHEET_IMAGES:
            self._sheet.append(strip(view, explanation, captions))
        if self._count > 1 and not self.many:
            return
        folder = self.out / self._name(path) if self.many else self.out
        folder.mkdir(exist_ok=True)
        atomic_write(folder / "explanation.json", (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode())
        explanation.save(folder / "relevance.safetensors")
        self._drawing.add(folder, view, captions, self.way.notes)
        if not self.many:
            _print_head(facts)
            _print_image(facts)

    def _name(self, path: Path) -> str:
        name, number = path.name, 1
        while name.casefold() in self._taken:
            number += 1
            name = f"{path.stem}-{number}{path.suffix}"
        self._taken.add(name.casefold())
        return name

    def finish(self, left_out: int) -> None:
        """Writes what needs all images, and says where everything is; call it when all figures are drawn."""
        written = ["figure.png", "explanation.json", "relevance.safetensors"]
        if len(self._sheet) > 1:
            buffer = io.BytesIO()
            self._contact_sheet().save(buffer, format="PNG")
            atomic_write(self.out / _SHEET, buffer.getvalue())
            written.append(_SHEET)
        if self._drawing.plain:
            note = "matplotlib is missing, so figure.png shows overlays alone; pip install 'fga_fast[plot]'"
            print(f"fga-fast: {note}", file=sys.stderr)
        if self.many:
            print(f"explained {self._count} image(s), left out {left_out}; one folder each in {self.out}")
        else:
            print(f"\nwrote {', '.join(written)} into {self.out}")

    def _facts(
        self, path: Path, view: Image.Image, explanation: Explanation, milliseconds: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "image": str(path),
            "read_as": view.info[READ],
            "model": self.way.name,
            "weights": self.way.weights,
            "notices": list(explanation.notices),
            "backend": explanation.backend,
            "backend_reason": explanation.backend_reason,
            "image_size": explanation.image_size,
            "grid": explanation.grid,
            "method": self.way.method,
            "backward": self.way.backward,
            "gated_blocks": sorted(explanation.gates),
            "gate_base": self.way.gate_base if explanation.gates else None,
            "probability_is": {None: None, True: "sigmoid", False: "softmax"}[self.way.multi_label],
            **milliseconds,
            "explained": [self._row(explanation, k) for k in range(explanation.targets.numel())],
        }

    def _row(self, explanation: Explanation, k: int) -> dict[str, Any]:
        """What explanation.json says about the k-th target of the image."""
        target, logits = int(explanation.targets.flatten()[k]), explanation.logits[0].double()  # [classes]
        chances = {None: None, True: logits.sigmoid(), False: logits.softmax(-1)}[self.way.multi_label]
        listed = {block: explanation.top_features(block)[0] for block in explanation.features}
        if explanation.targets.dim() == 2:
            listed = {block: features[k] for block, features in listed.items()}
        return {
            "target": target,
            "name": f"class {target}" if explanation.names is None else explanation.names[target],
            "logit": float(logits[target]),
            "probability": None if chances is None else float(chances[target]),
            "strongest_patch": divmod(int(explanation.shown.flatten(0, -2)[k].argmax()), explanation.grid[1]),
            "top_features": {
                str(block): [self._feature(block, pair) for pair in listed.get(block, [])]
                for block in sorted(explanation.gates)
            },
        }

    def _feature(self, block: int, pair: FeatureContribution) -> dict[str, Any]:
        """A listed feature, with what a person said about it and its card, where there is one."""
        entry: dict[str, Any] = pair._asdict()
        if (block, pair.feature) in self.way.notes:
            entry |= self.way.notes[block, pair.feature]._asdict()
        return entry if self.cards is None else entry | {"card": card_url(self.cards, block, pair.feature)}

    def _contact_sheet(self) -> Image.Image:
        columns = 2 if len(self._sheet) > 3 else 1
        rows = math.ceil(len(self._sheet) / columns)
        width, height = self._sheet[0].width + 2 * _MARGIN, self._sheet[0].height + _MARGIN
        sheet = Image.new("RGB", (columns * width, rows * height + _MARGIN), "white")
        for number, row in enumerate(self._sheet):
            sheet.paste(row, (number % columns * width + _MARGIN, number // columns * height + _MARGIN))
        return sheet


def _print_head(facts: dict[str, Any]) -> None:
    (height, width), (rows, columns) = facts["image_size"], facts["grid"]
    blocks = ", ".join(map(str, facts["gated_blocks"]))
    taken, forward = facts["milliseconds"], facts["milliseconds_forward_pass"]
    ratio = "" if forward is None else f"{_short(taken / max(forward, 1e-9), 2)} times the plain forward pass, "
    why = f" ({facts['backend_reason']})" if facts["backend_reason"] else ""
    print(f"model    {facts['model']}, {height} x {width} px, grid {rows} x {columns} patches")
    base = "" if facts["gate_base"] is None else f" of base {facts['gate_base']:g}"
    gates = f"gates{base} after block {blocks}" if blocks else "no autoencoder given"
    print(f"method   {facts['method']}, {facts['backward']} backward pass, {gates}")
    print(f"time     {_short(taken)} milliseconds a target, {ratio}backend {facts['backend']}{why}")


def _print_image(facts: dict[str, Any]) -> None:
    print(f"\n{Path(facts['image']).name}")
    if facts["read_as"]["values"] is not None:
        low, high = facts["read_as"]["window"]
        print(f"  black {low:g}, white {high:g} ({facts['read_as']['window_from']})")
    for row in facts["explained"]:
        number = f"class {row['target']}"
        named = number if row["name"] == number else f"{row['name']} ({number})"
        chance = "" if row["probability"] is None else f"probability {_short(row['probability'])}, "
        patch = "row {}, column {}".format(*row["strongest_patch"])
        print(f"  {named}: logit {_short(row['logit'])}, {chance}strongest patch {patch}")
        for block, features in row["top_features"].items():
            if features:
                listed = "  ".join(f"{_called(one)} ({one['contribution']:+.3g})" for one in features)
                print(f"    block {block} top features: {listed}")


def _called(feature: dict[str, Any]) -> str:
    return f"{feature['feature']} {feature['name']}" if "name" in feature else str(feature["feature"])


def _caption(row: dict[str, Any]) -> str:
    """A target's first name, and its probability where that is known."""
    name: str = row["name"].split(",")[0]
    return name if row["probability"] is None else f"{name[:15]}  {_short(row['probability'], 2)}"


def _short(value: float, digits: int = 4) -> str:
    """A number to read: its first digits however small it is, and no power of ten where it is large."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text
