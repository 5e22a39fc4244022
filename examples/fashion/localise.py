"""Measure whether the relevance for a class lies on that class's garment, on held-out scenes.

    python -m examples.fashion.localise --scenes 500

Explains every garment in a scene once. Prints for TransMM (no gate) and for FGA with several gate bases:
  inside    the share of the positive relevance that lies inside the garment's box
  area      the share of the canvas inside the box, which is what chance would give
  pointing  how often the most relevant patch has its centre inside the box (the pointing game)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.fashion.data import load_garments, make_scenes
from fga_fast import Explainer, Gate, SparseAutoencoder
from fga_fast.assets import fashion_config, fashion_model, fashion_saes


class Localisation(NamedTuple):
    """Values in [0, 1] for each explained garment, [M] each."""

    inside: Tensor
    area: Tensor
    pointing: Tensor


class Queries(NamedTuple):
    """M garments to explain: for each its normalised scene, its class and its box."""

    images: Tensor  # [M, 3, H, W]
    targets: Tensor  # [M]
    boxes: Tensor  # [M, 4] x0, y0, x1, y1, end excluded


def held_out_queries(scenes: int, seed: int = 3_000_003) -> Queries:
    """Every garment of `scenes` scenes made of test garments."""
    config = fashion_config()
    drawn = make_scenes(load_garments("test", config.class_names), scenes, torch.Generator().manual_seed(seed))
    images = (drawn.images - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]
    row, slot = (drawn.classes >= 0).nonzero(as_tuple=True)
    return Queries(images[row], drawn.classes[row, slot], drawn.boxes[row, slot])


def localisation(
    relevance: Tensor,  # [M, P]
    boxes: Tensor,  # [M, 4]
    grid: tuple[int, int],
    image_size: tuple[int, int],
) -> Localisation:
    """Compare patch relevance with boxes. The relevance of a patch counts evenly for all its pixels."""
    height, width = image_size
    patch = (height // grid[0], width // grid[1])
    positive = relevance.clamp(min=0).view(-1, *grid)
    x, y = torch.arange(width), torch.arange(height)
    x0, y0, x1, y1 = (edge[:, None] for edge in boxes.unbind(1))
    in_box = ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]  # [M, H, W]
    covered = torch.nn.functional.avg_pool2d(in_box[:, None].to(positive.dtype), patch)[:, 0]  # [M, gh, gw]
    total = positive.sum((1, 2)).clamp(min=torch.finfo(positive.dtype).tiny)
    centre = in_box[:, patch[0] // 2 :: patch[0], patch[1] // 2 :: patch[1]].flatten(1)
    return Localisation(
        inside=(positive * covered).sum((1, 2)) / total,
        area=in_box.flatten(1).to(positive.dtype).mean(1),
        pointing=centre.gather(1, relevance.argmax(1, keepdim=True))[:, 0].to(positive.dtype),
    )


def measure(
    model: nn.Module,
    saes: Mapping[int, SparseAutoencoder],
    gate: Gate,
    queries: Queries,
    batch: int = 256,
) -> Localisation:
    """Explain every query and measure where its relevance lies; no SAE means TransMM."""
    explainer = Explainer(model, dict(saes), preset="published", gate=gate)
    parts = []
    for start in range(0, len(queries.targets), batch):
        part = Queries(*(tensor[start : start + batch] for tensor in queries))
        explanation = explainer(part.images, part.targets)
        parts.append(localisation(explanation.relevance, part.boxes, explanation.grid, explanation.image_size))
    return Localisation(*map(torch.cat, zip(*parts, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--bases", type=float, nargs="*", default=[2.0, 5.0, 10.0])
    parser.add_argument("--out", type=Path, help="write the table as JSON here, too")
    arguments = parser.parse_args()
    model, saes, queries = fashion_model(), fashion_saes(), held_out_queries(arguments.scenes)
    rows: list[tuple[str, dict[int, SparseAutoencoder], Gate]] = [("TransMM", {}, Gate())]
    for base in arguments.bases:
        rows += [(f"FGA block {block}, base {base:g}", {block: sae}, Gate(base=base)) for block, sae in saes.items()]
        rows.append((f"FGA all blocks, base {base:g}", saes, Gate(base=base)))
    table = {}
    print(f"{len(queries.targets)} garments in {arguments.scenes} held-out scenes")
    for name, used, gate in rows:
        found = measure(model, used, gate, queries)
        table[name] = {key: round(value.mean().item(), 4) for key, value in found._asdict().items()}
        print(f"{name:28s}", "  ".join(f"{key} {value:.3f}" for key, value in table[name].items()), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
