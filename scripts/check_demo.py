"""Fails unless a folder holds what `make demo` promises: pictures that are not blank, JSON, and the raw relevance."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file


def numbers(value: Any) -> list[float]:
    """All numbers anywhere in a JSON value."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def main() -> None:
    """Check the folder named on the command line."""
    folder = Path(sys.argv[1])
    pictures, reports = sorted(folder.rglob("*.png")), sorted(folder.rglob("*.json"))
    tensors = sorted(folder.rglob("*.safetensors"))
    for kind, found in (("picture", pictures), ("JSON report", reports), ("relevance (safetensors)", tensors)):
        if not found:
            raise SystemExit(f"{folder}: no {kind} was written")
    for path in pictures:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        if min(pixels.shape[:2]) < 50 or pixels.std() < 5:
            raise SystemExit(f"{path}: {pixels.shape} picture is blank or tiny")
    for path in reports:
        found_numbers = numbers(json.loads(path.read_text(encoding="utf-8")))
        if not found_numbers or not all(math.isfinite(number) for number in found_numbers):
            raise SystemExit(f"{path}: no numbers, or NaN or infinity among them")
    for path in tensors:
        for name, tensor in load_file(path).items():
            if not np.isfinite(tensor).all():
                raise SystemExit(f"{path}: {name} has NaN or infinity")
            if name == "relevance" and not (tensor.size and tensor.std() > 0):
                raise SystemExit(f"{path}: relevance is empty or the same everywhere")
    print(f"{folder}: {len(pictures)} pictures, {len(reports)} reports, {len(tensors)} tensor files, all plausible")


if __name__ == "__main__":
    main()
