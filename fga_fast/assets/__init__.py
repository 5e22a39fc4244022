"""The demo that ships with the package: a small ViT, its SAEs and a few scenes of Fashion-MNIST garments.

`fashion/MODEL_CARD.md` says what they are, how they were trained and what their limits are. Weights are read from
safetensors files only; nothing is downloaded. Each function raises FileNotFoundError if the package was installed
without its data files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from fga_fast.dataset.items import Item
from fga_fast.models.timm_import import import_timm
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

_FOLDER = Path(__file__).parent / "fashion"


@dataclass(frozen=True)
class FashionConfig:
    """The configuration of the demo model.

    Attributes:
        model_args: keyword arguments of timm's VisionTransformer.
        mean, std: three numbers each; an image in [0, 1] is normalised as (image - mean) / std.
        class_names: the name of each logit. Several may apply to one scene (sigmoid, not softmax).
        saes: block number -> folder name of its SAE.
    """

    model_args: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    saes: dict[int, str]


def fashion_config() -> FashionConfig:
    """Read the demo model's configuration."""
    config = json.loads(_file("config.json").read_text(encoding="utf-8"))
    return FashionConfig(
        model_args=config["model_args"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        class_names=tuple(config["class_names"]),
        saes={int(block): folder for block, folder in config["saes"].items()},
    )


def fashion_model() -> nn.Module:
    """The demo ViT in eval mode, float32 on the CPU: images [B, 3, 56, 56], normalised, to logits [B, classes].

    Raises:
        ImportError: timm is not installed.
    """
    timm: Any = import_timm()
    model: nn.Module = timm.models.VisionTransformer(**fashion_config().model_args)
    model.load_state_dict(load_file(_file("vit.safetensors")))
    return model.eval()


def fashion_saes() -> dict[int, SparseAutoencoder]:
    """The demo SAEs, block number -> SAE of the residual stream after that block."""
    return {block: SparseAutoencoder.from_pretrained(_file(folder)) for block, folder in fashion_config().saes.items()}


def fashion_scenes() -> list[Path]:
    """Held-out test scenes as 56 x 56 PNG files; `scenes.json` beside them names their garments and boxes."""
    return sorted(_file("scenes").glob("*.png"))


def fashion_items() -> list[Item]:
    """The scenes as items: one for each of the sixteen garments, with its box."""
    paths = {path.name: path for path in fashion_scenes()}
    about = json.loads(_file("scenes/scenes.json").read_text(encoding="utf-8"))
    return [
        Item(
            f"{scene['file']}#{one['name']}",
            paths[scene["file"]],
            one["class"],
            box=(*one["box"],),
            group=scene["file"],
        )
        for scene in about["scenes"]
        for one in scene["garments"]
    ]


def _file(name: str) -> Path:
    path = _FOLDER / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: reinstall fga_fast from its wheel or clone, or train the demo model again "
            "(examples/fashion/README.md)"
        )
    return path
