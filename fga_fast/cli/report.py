"""What `fga-fast explain` leaves behind: lines on the terminal, JSON, figures, raw relevance, a contact sheet."""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from fga_fast.cli.subject import Subject
from fga_fast.io.atomic import atomic_write
from fga_fast.result.explanation import Explanation

SHEET_IMAGES = 24
_TILE, _CAPTION, _MARGIN = 168, 24, 10  # pixels


class Timing(NamedTuple):
    """Milliseconds for one image and one target: the explanation, and the plain forward pass beside it."""

    explanation: float
    forward: float


class Writer:
    """Takes explanations one image at a time and writes them.

    One image goes into the folder itself. Of several each goes into a folder of its own, named like the file; for the
    demo only the first is written out in full. The contact sheet shows the first 24.
    """

    def __init__(self, out: Path, subject: Subject, args: argparse.Namespace, many: bool) -> None:
        self.out, self.subject, self.args, self.many = out, subject, args, many
        self._sheet: list[tuple[Image.Image, Explanation]] = []
        self._count = 0

    def add(self, path: Path, view: Image.Image, explanation: Explanation, timing: Timing) -> None:
        """Reports one image, whose targets are the explanation's rows; `view` is what the model saw."""
        self._count += 1
        if len(self._sheet) < SHEET_IMAGES:
            self._sheet.append((view, explanation))
        if self._count > 1 and not self.many:
            return
        facts = self._facts(path, explanation, timing)
        folder = self.out / path.name if self.many else self.out
        folder.mkdir(exist_ok=True)
        atomic_write(folder / "explanation.json", (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode())
        explanation.save(folder / "relevance.safetensors")
        atomic_write(folder / "figure.png", self._figure(view, explanation, facts))
        if not self.many:
            self._print_head(facts)
            self._print_image(facts)

    def finish(self, failed: list[tuple[Path, str]]) -> None:
        """Writes what needs all images, and says where everything is."""
        written = ["figure.png", "explanation.json", "relevance.safetensors"]
        if len(self._sheet) > 1:
            atomic_write(self.out / "contact_sheet.png", png(self._contact_sheet()))
            written.append("contact_sheet.png")
        if self.many:
            print(f"explained {self._count} image(s), left out {len(failed)}; one folder each in {self.out}")
        else:
            print(f"\nwrote {', '.join(written)} into {self.out}")

    def _facts(self, path: Path, explanation: Explanation, timing: Timing) -> dict[str, Any]:
        probabilities = self.subject.probabilities(explanation.logits)
        rows = []
        for row, target in enumerate(explanation.targets.tolist()):
            strongest = int(explanation.relevance[row].argmax())
            features = {
                str(layer): [pair._asdict() for pair in explanation.top_features(layer)[row]]
                for layer in sorted(explanation.features)
            }
            rows.append(
                {
                    "target": target,
                    "name": self.subject.label(target),
                    "logit": float(explanation.logits[row, target]),
                    "probability": float(probabilities[row, target]),
                    "strongest_patch": divmod(strongest, explanation.grid[1]),
                    "top_features": features,
                }
            )
        return {
            "image": str(path),
            "model": self.subject.name,
            "backend": explanation.backend,
            "image_size": explanation.image_size,
            "grid": explanation.grid,
            "gated_layers": sorted(explanation.gates),
            "gate_base": self.args.base if explanation.gates else None,
            "probability_is": "sigmoid" if self.subject.multi_label else "softmax",
            "milliseconds": round(timing.explanation, 3),
            "milliseconds_forward_pass": round(timing.forward, 3),
            "explained": rows,
        }

    def _labels(self, explanation: Explanation) -> dict[int, str]:
        return {target: self.subject.label(target).split(",")[0] for target in explanation.targets.tolist()}

    def _figure(self, view: Image.Image, explanation: Explanation, facts: dict[str, Any]) -> bytes:
        names = {
            row["target"]: f"{self.subject.label(row['target']).split(',')[0]}  {row['probability']:.2f}"
            for row in facts["explained"]
        }
        try:
            figure = explanation.plot([view] * len(explanation), class_names=names)
        except ImportError:
            if self._count == 1:
                note = (
                    "fga-fast: matplotlib is missing, so figure.png shows overlays alone; pip install 'fga_fast[plot]'"
                )
                print(note, file=sys.stderr)
            return png(self._strip(view, explanation))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()

    def _print_head(self, facts: dict[str, Any]) -> None:
        (height, width), (rows, columns) = facts["image_size"], facts["grid"]
        layers = ", ".join(map(str, facts["gated_layers"]))
        print(f"model    {facts['model']}, {height} x {width} px, grid {rows} x {columns} patches")
        print(f"method   {f'FGA, gates after block {layers}' if layers else 'TransMM, no autoencoder given'}")
        ratio = facts["milliseconds"] / max(facts["milliseconds_forward_pass"], 1e-9)
        print(
            f"time     {facts['milliseconds']:.1f} milliseconds a target, {ratio:.1f} times the plain forward pass, "
            f"backend {facts['backend']}"
        )

    def _print_image(self, facts: dict[str, Any]) -> None:
        print(f"\n{Path(facts['image']).name}")
        for row in facts["explained"]:
            number = f" (class {row['target']})" if self.subject.class_names is not None else ""
            patch = "row {}, column {}".format(*row["strongest_patch"])
            print(f"  {row['name']}{number}: probability {row['probability']:.3f}, strongest patch {patch}")
            for layer, features in row["top_features"].items():
                listed = "  ".join(f"{one['feature']} ({one['contribution']:+.3g})" for one in features)
                print(f"    block {layer} top features: {listed}")

    def _strip(self, view: Image.Image, explanation: Explanation) -> Image.Image:
        """One row of tiles: the picture, then one overlay for each target, with captions below."""
        tile = (_TILE, _TILE * view.height // view.width)
        large = view.convert("RGB").resize(tile, Image.Resampling.BICUBIC)
        grey = large.convert("L").convert("RGB")  # so that all colour in an overlay is the heat map's
        overlays = explanation.overlay([grey] * len(explanation), alpha=0.55)
        tiles = [large, *(Image.fromarray(one.numpy()) for one in overlays)]
        probabilities = self.subject.probabilities(explanation.logits)
        names = self._labels(explanation)
        captions = ["image"] + [
            f"{names[target]} {float(probabilities[row, target]):.2f}"
            for row, target in enumerate(explanation.targets.tolist())
        ]
        strip = Image.new("RGB", (len(tiles) * (_TILE + 4) - 4, tile[1] + _CAPTION), "white")
        draw = ImageDraw.Draw(strip)
        for number, (picture, caption) in enumerate(zip(tiles, captions, strict=True)):
            strip.paste(picture, (number * (_TILE + 4), 0))
            draw.text((number * (_TILE + 4) + 2, tile[1] + 4), caption[:24], fill="black", font=_font())
        return strip

    def _contact_sheet(self) -> Image.Image:
        strips = [self._strip(view, explanation) for view, explanation in self._sheet]
        columns = 2 if len(strips) > 3 else 1
        rows = math.ceil(len(strips) / columns)
        width, height = strips[0].width + 2 * _MARGIN, strips[0].height + _MARGIN
        sheet = Image.new("RGB", (columns * width, rows * height + _MARGIN), "white")
        for number, strip in enumerate(strips):
            sheet.paste(strip, (number % columns * width + _MARGIN, number // columns * height + _MARGIN))
        return sheet


def _font() -> Any:
    try:
        return ImageFont.load_default(13)
    except TypeError:  # Pillow below 10.1 has one size only
        return ImageFont.load_default()


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file's content."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
