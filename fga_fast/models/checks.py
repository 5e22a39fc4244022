"""Checks of a user's model, layout, SAEs and images: errors name the argument, the expected, the found, the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fga_fast.models import refused
from fga_fast.models.find import active_randomness
from fga_fast.models.layout import ModelLayout, is_whole
from fga_fast.precision import relevance_dtype
from fga_fast.sae import SparseAutoencoder
from fga_fast.settings import Settings, check_count


def check_eval(model: nn.Module) -> None:
    """Refuses a model whose forward pass draws random numbers or changes statistics."""
    if not any(module.training for module in model.modules()):  # the usual case, asked at every explanation
        return
    for name, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"model: '{name}' ({type(module).__name__}) is in train mode, so images would change each other's "
                "logits and the module's statistics; call model.eval() first"
            )
    names = active_randomness(model)
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"model: dropout is active in train mode ({shown}), so the explained prediction would be random; "
            "call model.eval() first"
        )


def check_layout(layout: ModelLayout, model: nn.Module) -> None:
    """Refuses a layout that does not belong to this model."""
    if not isinstance(layout, ModelLayout):
        raise TypeError(f"layout: expected a ModelLayout, got {type(layout).__name__}")
    inside = set(model.modules())
    for module in model.modules():
        hidden = refused.opaque(module)
        if hidden is not None and module not in layout.blocks and not set(module.modules()).isdisjoint(layout.blocks):
            raise ValueError(f"model: {type(module).__name__} cannot be explained: {hidden}")
    for index, block in enumerate(layout.blocks):
        hidden = refused.opaque(block)
        if hidden is not None:
            raise ValueError(f"layout: blocks[{index}] ({type(block).__name__}) cannot be explained: {hidden}")
        if block not in inside:
            raise ValueError(
                f"layout: blocks[{index}] ({type(block).__name__}) is no module inside the model; take the blocks from "
                "the same model that you explain"
            )


def check_saes(saes: Mapping[int, SparseAutoencoder], layout: ModelLayout, like: Tensor) -> None:
    """Refuses an SAE that does not fit its block; `like` is any parameter of the model."""
    if not isinstance(saes, Mapping):
        raise TypeError(f"saes: expected a mapping from block to SparseAutoencoder, got {type(saes).__name__}")
    for block, sae in saes.items():
        if not isinstance(sae, SparseAutoencoder):
            raise TypeError(f"saes[{block}]: expected a SparseAutoencoder, got {type(sae).__name__}")
        if not is_whole(block) or not 0 <= block < len(layout.blocks):
            raise ValueError(f"saes: expected blocks 0 to {len(layout.blocks) - 1} as keys, got {block!r}")
        if layout.d_model is not None and sae.d_model != layout.d_model:
            raise ValueError(
                f"saes[{block}]: the SAE reads a residual stream of width {sae.d_model}, the model's has width "
                f"{layout.d_model}; use an SAE trained on this model"
            )
        if sae.device != like.device:
            raise ValueError(f"saes[{block}]: is on {sae.device}, the model on {like.device}; move one with .to()")
        wide = relevance_dtype(like.dtype)
        if sae.dtype not in (like.dtype, wide):
            raise ValueError(
                f"saes[{block}]: is {sae.dtype} for a model of {like.dtype}; convert it with sae.to({like.dtype})"
            )


def check_fit(settings: Settings, saes: Mapping[int, SparseAutoencoder], layout: ModelLayout) -> None:
    """Refuses settings that do not fit the model or its SAEs."""
    start = settings.start_block
    check_count("start_block", start, 0, len(layout.blocks) - 1, "blocks")
    for block in saes:
        if block < start:
            raise ValueError(
                f"saes[{block}]: would gate nothing, since start_block={start} skips block {block}; lower "
                "start_block or remove the SAE"
            )
    if settings.top_features:
        if not saes:
            raise ValueError(f"top_features: got {settings.top_features}, but there are no SAEs; give saes={{...}}")
        fewest = min(sae.d_sae for sae in saes.values())
        check_count("top_features", settings.top_features, 0, fewest, "features of the smallest SAE")


def weights_of(model: nn.Module, layout: ModelLayout) -> list[tuple[str, nn.Parameter]]:
    """Named weights of the explained tower; of the whole model where the layout names only its blocks."""
    return list((model if layout.tower is None else layout.tower).named_parameters())


def check_weights(model: nn.Module, layout: ModelLayout) -> None:
    """Refuses a model on several devices, a tower of several dtypes, and weights that autograd cannot work with."""
    weights = weights_of(model, layout)
    if not weights:
        raise ValueError(
            f"model: {type(model).__name__} has no weights (nn.Parameter), so its dtype and device are unknown"
        )
    parameter = weights[0][1]
    for name, other in model.named_parameters():
        if other.device != parameter.device:
            raise ValueError(
                f"model: weight '{name}' is on {other.device}, others on {parameter.device}; move all with model.to()"
            )
    for name, other in weights:
        if other.is_floating_point() and other.dtype != parameter.dtype:
            raise ValueError(
                f"model: weight '{name}' of the tower is {other.dtype}, others are {parameter.dtype}; convert it with "
                f"model.to({parameter.dtype})"
            )
    if parameter.is_inference():
        raise ValueError(
            "model: its weights were made under torch.inference_mode(), so autograd cannot use them; build or load "
            "the model outside of it"
        )


def check_images(images: Tensor, channels: int, size: tuple[int, int] | None, like: Tensor) -> None:
    """Refuses images that the model does not take; `like` is any parameter of the model.

    Args:
        size: (height, width); None if unknown: then the model's own forward pass checks it.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor [B, {channels}, H, W], got {type(images).__name__}")
    if not _is_plain(images):
        raise TypeError(
            f"images: expected a plain tensor [B, {channels}, H, W], got a {type(images).__name__}, which has "
            "operators of its own; pass the tensor that it wraps, or its local part"
        )
    height, width = size or ("H", "W")
    expected = (channels, *(images.shape[2:] if size is None else size))
    if images.dim() != 4 or tuple(images.shape[1:]) != expected or 0 in images.shape[1:]:
        hint = "; add a batch dimension with images[None]" if images.dim() == 3 else ""
        raise ValueError(f"images: expected shape [B, {channels}, {height}, {width}], got {list(images.shape)}{hint}")
    if images.dtype != like.dtype:
        raise ValueError(f"images: expected dtype {like.dtype} like the model, got {images.dtype}; convert with .to()")
    if images.device != like.device:
        raise ValueError(f"images: expected device {like.device} like the model, got {images.device}; move with .to()")


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of a class without operators of its own, unlike quantised tensors and DTensor. Those may lack
    an operator, or wait for other processes in it."""
    kind: Any = type(tensor)
    return isinstance(tensor, FakeTensor) or kind.__torch_dispatch__ is cast(Any, Tensor).__torch_dispatch__


def check_finite(
    values: Tensor, what: str, model: nn.Module, images: Tensor, saes: Mapping[int, SparseAutoencoder] | None = None
) -> None:
    """Raises ValueError if `values` contain NaN or Inf, and names the cause: images, a weight, an SAE, or overflow."""
    if bool(torch.isfinite(values).all()):
        return
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images: contain NaN or Inf; check the preprocessing")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if _is_plain(tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"model: weight '{name}' contains NaN or Inf; reload the checkpoint")
    for block, sae in (saes or {}).items():
        for name, tensor in sae.named_buffers():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"saes[{block}]: {name} contains NaN or Inf; reload the SAE")
    raise ValueError(
        f"{what} came out NaN or Inf although images and weights are finite: an overflow in {values.dtype}; "
        "run the model in a wider dtype"
    )
