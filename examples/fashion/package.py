"""Copy a trained model and a few held-out scenes to explain into the package.

    python -m examples.fashion.package --model examples/fashion/runs

The scenes are made of test garments only. They are the first ones of a fixed seed whose garments the model names
exactly: explaining wrong answers is another subject.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import VisionTransformer

from examples.fashion.data import load_garments, make_scenes
from examples.fashion.train_vit import write_json

ASSETS = Path(__file__).parents[2] / "fga_fast" / "assets" / "fashion"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that train_vit and train_sae wrote")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--seed", type=int, default=4_000_003)
    parser.add_argument("--first", type=int, default=1, help="the scene to put first; the demo draws it large")
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.model / "vit.safetensors", arguments.out / "vit.safetensors")
    write_json(arguments.out / "config.json", config)
    for folder in config["saes"].values():
        shutil.copytree(arguments.model / folder, arguments.out / folder, dirs_exist_ok=True)
    write_scenes(arguments.model, config, arguments.out / "scenes", arguments)


@torch.inference_mode()
def write_scenes(folder: Path, config: dict[str, object], out: Path, arguments: argparse.Namespace) -> None:
    """Write scenes as PNG, and the names and boxes (x0, y0, x1, y1) of their garments as `scenes.json`."""
    count, seed, first = arguments.scenes, arguments.seed, arguments.first
    names = tuple(config["class_names"])
    model = VisionTransformer(**config["model_args"]).eval()
    model.load_state_dict(load_file(folder / "vit.safetensors"))
    scenes = make_scenes(load_garments("test", names), 20 * count, torch.Generator().manual_seed(seed))
    pixels = (scenes.images * 255).round().to(torch.uint8)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    probabilities = model((pixels / 255 - mean) / std).sigmoid()  # for the pixels of the PNG files
    right = ((probabilities > 0.5) == (scenes.targets > 0)).all(1).nonzero().flatten()[:count].tolist()
    right.insert(0, right.pop(first))
    out.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, row in enumerate(right):
        name = f"scene_{number}.png"
        Image.fromarray(pixels[row].permute(1, 2, 0).numpy()).save(out / name)
        present = (scenes.classes[row] >= 0).nonzero().flatten().tolist()
        garments = [
            {"class": scenes.classes[row, slot].item(), "name": names[scenes.classes[row, slot]],
             "box": scenes.boxes[row, slot].tolist()}
            for slot in present
        ]  # fmt: skip
        listed.append({"file": name, "garments": garments})
    write_json(out / "scenes.json", {"seed": seed, "scenes": listed})


if __name__ == "__main__":
    main()
