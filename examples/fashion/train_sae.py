"""Train top-k sparse autoencoders on the residual stream of the ViT that `train_vit` made.

    python -m examples.fashion.train_sae --model examples/fashion/runs --blocks 2 3

Every step draws new scenes of training garments and runs the ViT on them. Writes `sae_<block>/` (fga_fast's own format)
beside the ViT, adds the folders to its `config.json`, and writes `sae_report.json`: the quality on scenes of test
garments. A run that was stopped goes on when it is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import Tensor

from examples.fashion.data import Garments, load_garments, make_scenes
from examples.fashion.train_vit import write_json
from fga_fast.dataset.items import Item
from fga_fast.harvest.live import LiveTokens
from fga_fast.quality.run import quality
from fga_fast.sae import SparseAutoencoder
from fga_fast.training.recipe import Recipe
from fga_fast.training.train import train

LOG = logging.getLogger("train_sae")
TEST_SEED = 2_000_003


class SceneBatches:
    """The normalised scenes of each step, as `LiveTokens` takes them."""

    def __init__(self, garments: Garments, config: dict[str, Any], count: int, seed: int) -> None:
        self.garments, self.count, self.seed = garments, count, seed
        self.mean, self.std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))

    def __call__(self, step: int) -> Tensor:  # -> [count, 3, 56, 56]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return (make_scenes(self.garments, self.count, generator).images - self.mean) / self.std


def main() -> None:
    arguments = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    config = json.loads((arguments.model / "config.json").read_text())
    model = VisionTransformer(**config["model_args"])
    model.load_state_dict(load_file(arguments.model / "vit.safetensors"))
    model.eval().requires_grad_(False)
    names = tuple(config["class_names"])
    scenes = SceneBatches(load_garments("train", names), config, arguments.batch, arguments.seed)
    about = {"images": "scenes of Fashion-MNIST", "scenes_a_step": arguments.batch, "seed": arguments.seed}
    tokens = LiveTokens(model, None, arguments.blocks, scenes, about)
    recipe = Recipe(kind="topk", features=arguments.features, k=arguments.k)
    trained = train(
        tokens, {"topk": recipe}, out=arguments.model / "saes", steps=arguments.steps, lr=arguments.lr,
        seed=arguments.seed,
    )  # fmt: skip
    saes = {block: sae for (_, block), sae in trained.items()}
    report = measure(model, saes, load_garments("test", names), config, arguments.test_scenes)
    for block, sae in saes.items():
        sae.save(arguments.model / f"sae_{block}")
    config["saes"] = {str(block): f"sae_{block}" for block in saes}
    write_json(arguments.model / "config.json", config)
    write_json(arguments.model / "sae_report.json", report)


def measure(
    model: VisionTransformer, saes: dict[int, SparseAutoencoder], garments: Garments, config: dict[str, Any], count: int
) -> dict[str, Any]:
    """The quality of each SAE on held-out scenes."""
    scenes = make_scenes(garments, count, torch.Generator().manual_seed(TEST_SEED))
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    images = [*((scenes.images - mean) / std)]
    items = [
        Item(f"scene {scene} garment {slot}", images[scene], int(scenes.classes[scene, slot]))
        for scene, slot in (scenes.classes >= 0).nonzero().tolist()
    ]
    found = quality(model, saes, items, output="sigmoid", batch_size=50)
    for block, one in found.items():
        LOG.info(
            "block %d: explained variance %.4f, L0 %.2f, dead %.3f", block, one.explained_variance, one.l0, one.dead
        )
    return {str(block): dataclasses.asdict(one) for block, one in found.items()}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with vit.safetensors and config.json")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=64, help="scenes a step")
    # Far below the recipe's: explains less, but contributions predict better (docs/sae_training.md)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--test-scenes", type=int, default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
