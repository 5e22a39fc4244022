"""Reads the conformance files: models, autoencoders, images, and the numbers an independent implementation gave.

The folder is $FGA_FAST_CONFORMANCE, or `shared/conformance` beside the project's root. Weights and images are stored in
float32 and cast up; the expected numbers are float64 (heatmaps float32).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

VARIABLE = "FGA_FAST_CONFORMANCE"
REQUIRE = "FGA_FAST_REQUIRE_CONFORMANCE"

MODES = {
    "combined": "combined",
    "activation_only": "activation_only",
    "gradient_only": "gradient_only",
    "no_SAE": "no_sae",
}


def folder() -> Path:
    """Folder of the files; a folder that was named explicitly has to exist."""
    named = os.environ.get(VARIABLE)
    if named is None:
        return Path(__file__).resolve().parents[2] / "shared" / "conformance"
    if not Path(named).is_dir():
        raise FileNotFoundError(f"{VARIABLE}: expected a folder of conformance files, got {named!r}")
    return Path(named)


def required() -> bool:
    """Whether a skipped conformance test is a failure: in CI, or on request, if the numbers are there."""
    return (bool(os.environ.get("CI")) or os.environ.get(REQUIRE) == "1") and folder().is_dir()


def files() -> list[Path]:
    """Every file in the folder."""
    return sorted(folder().glob("*.safetensors"))


def model_files() -> list[Path]:
    """Those with a model and runs of the exact backward pass."""
    return [path for path in files() if "runs" in header(path)]


def conservative_files() -> list[Path]:
    """Those with numbers of the conservative backward pass for the model, SAEs and images of another file."""
    return [path for path in files() if "inputs" in header(path)]


def header(path: Path) -> dict[str, Any]:
    """The file's `case` entry."""
    with safe_open(path, "pt") as file:
        case: dict[str, Any] = json.loads(file.metadata()["case"])
    return case


def keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def runs() -> list[tuple[str, int]]:
    """(file name, run) of every run of every file with a model."""
    return [(path.name, run) for path in model_files() for run in range(len(header(path)["runs"]))]


LARGEST: dict[str, tuple[float, float]] = {}


def report(quantity: str, of_norm: float, of_element: float) -> None:
    """Keep the largest errors for the summary at the end of the test run."""
    norm, element = LARGEST.get(quantity, (0.0, 0.0))
    LARGEST[quantity] = max(norm, of_norm), max(element, of_element)


def heatmap(relevance: Tensor, size: tuple[int, int]) -> Tensor:  # [n, P] on a square grid -> [n, H, W]
    """Bilinear upsampling, then min-max over the image with 1e-8 added to the range."""
    side = round(relevance.shape[1] ** 0.5)
    grid = relevance.reshape(-1, 1, side, side)
    image = nn.functional.interpolate(grid, size=size, mode="bilinear", align_corners=False).flatten(1)
    low, high = image.amin(dim=1, keepdim=True), image.amax(dim=1, keepdim=True)
    return ((image - low) / (high - low + 1e-8)).reshape(-1, *size)


class ZeroShot(nn.Module):
    """A CLIP tower with a fixed text side: images to temperature * cosine similarity with the text embeddings."""

    def __init__(self, tower: nn.Module, text: Tensor, temperature: float) -> None:  # text [classes, proj]
        super().__init__()
        self.tower = tower
        self.temperature = temperature
        self.register_buffer("text", text)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, classes]
        feature = nn.functional.normalize(self.tower(images), dim=-1)
        return self.temperature * feature @ self.text.t()


@dataclass(frozen=True)
class Case:
    """One file, its model and inputs in one dtype."""

    name: str
    header: dict[str, Any]
    model: nn.Module
    images: Tensor  # [n, 3, H, W]
    tensors: dict[str, Tensor]  # as stored

    def saes(self, run: int) -> dict[int, Any]:
        """The run's autoencoders by block."""
        return self.saes_after(self.header["runs"][run]["layers"])

    def saes_after(self, blocks: Iterable[int]) -> dict[int, Any]:
        """Autoencoders by block."""
        return {block: self._sae(block) for block in blocks}

    def gate(self, run: int) -> Any:
        """The run's `fga_fast.Gate`."""
        from fga_fast.settings import Gate

        settings = self.header["runs"][run]
        mode, permutation = MODES[settings["gate"]], None
        if settings["shuffle_decoder"]:
            if mode != "combined":
                raise ValueError(f"run {run}: shuffled decoders are defined for combined scores, got {mode!r}")
            mode, permutation = "shuffled", self.tensors[f"run.{run}.decoder_permutation"]
        return Gate(mode=mode, base=settings["clamp_max"], slope=settings["alpha"], permutation=permutation)

    def expected(self, run: int) -> dict[str, Tensor]:
        """The run's numbers: attribution, heatmap, score.<block>, gate.<block>."""
        prefix = f"run.{run}."
        return {
            name.removeprefix(prefix): value
            for name, value in self.tensors.items()
            if name.startswith(prefix) and not name.endswith("decoder_permutation")
        }

    def _sae(self, block: int) -> Any:
        from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

        settings, prefix = self.header["sae"], f"sae.{block}."
        weights = {
            name.removeprefix(prefix): value.to(self.images.dtype)
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }
        return SparseAutoencoder(
            weights["W_enc"],
            weights["b_enc"],
            weights["W_dec"],
            weights["b_dec"],
            activation=settings["kind"],
            k=settings["k"],
            normalize=None if settings["normalize"] == "none" else settings["normalize"],
            b_gate=weights.get("b_gate"),
            r_mag=weights.get("r_mag"),
            b_mag=weights.get("b_mag"),
        )


@lru_cache(maxsize=4)
def load(name: str, dtype: torch.dtype) -> Case:
    """One file with its model in `dtype`, in eval mode; shared by tests, so leave it as it is."""
    path = folder() / name
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    case = header(path)
    model = _build(case, tensors).to(dtype).eval().requires_grad_(False)
    return Case(name, case, model, tensors["images"].to(dtype), tensors)


def load_conservative(name: str, dtype: torch.dtype) -> tuple[Case, dict[str, Any], dict[str, Tensor]]:
    """The case that a file of the conservative backward pass is about, the file's settings, and its numbers."""
    path = folder() / name
    with safe_open(path, "pt") as file:
        expected = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    settings = header(path)
    return load(settings["inputs"], dtype), settings, expected


def _build(case: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    if case["act"] != "gelu":
        raise ValueError(f"act: expected 'gelu', got {case['act']!r}")
    sizes = {name: case[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    norm = partial(nn.LayerNorm, eps=case["ln_eps"])
    state = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if case["family"] == "vit":
        model = VisionTransformer(**sizes, num_classes=case["num_classes"], norm_layer=norm)
        model.load_state_dict(state)
        return model
    if case["family"] != "clip":
        raise ValueError(f"family: expected 'vit' or 'clip', got {case['family']!r}")
    tower = VisionTransformer(**sizes, num_classes=case["proj_dim"], norm_layer=norm, pre_norm=True)
    tower.head = nn.Linear(case["embed_dim"], case["proj_dim"], bias=False)
    tower.load_state_dict(state)
    return ZeroShot(tower, tensors["text_embeddings"], case["temperature"])


def run_of_key(key: str) -> int | None:
    """Run that a tensor belongs to, None for those of the whole file."""
    match = re.match(r"run\.(\d+)\.", key)
    return int(match.group(1)) if match else None
