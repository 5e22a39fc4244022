"""Checks of a user's model, layout, SAEs and images: errors name the argument, the expected, the found, the remedy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fga_fast.models import refused
from fga_fast.models.block_io import ForwardPass, stream_of
from fga_fast.models.find import active_randomness
from fga_fast.models.layout import ModelLayout, is_whole
from fga_fast.precision import relevance_dtype
from fga_fast.sae import SparseAutoencoder
from fga_fast.settings import Settings, check_count

logger = logging.getLogger(__name__)

_PIXELS = 50  # normalised images stay within about 3, standardised medical ones within about 20


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


def probe_layout(layout: ModelLayout, run: Callable[[Tensor], Any], images: Tensor) -> None:
    """Runs the model on some images, no more or less than it has tokens, to see whether blocks return [B, N, C] or
    [N, B, C] as the layout says.

    A run that fails says nothing about the layout, so it passes; the call that explains will say what is wrong.

    Raises:
        TapeError: the first block returns another shape than the layout says.
    """
    seen: list[Any] = []
    handle = layout.blocks[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        with torch.no_grad():
            run(images)
    except Exception as error:
        logger.debug("the run that checks the layout failed: %s", error)
    finally:
        handle.remove()
    if seen:
        passed = ForwardPass(layout, len(images))
        passed.check_stream(0, stream_of(seen[0], passed.name(0)))


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


def typical_weight(model: nn.Module, layout: ModelLayout) -> nn.Parameter:
    """The weight that tells a model's device and dtype: the first matrix of its first block.

    Not any weight: 16-bit models may keep norms, tokens and adapters in float32.
    """
    matrices = (p for p in layout.blocks[0].parameters() if p.dim() > 1 and p.is_floating_point())
    return next(chain(matrices, (model if layout.tower is None else layout.tower).parameters()))


def weights_of(model: nn.Module, layout: ModelLayout) -> list[tuple[str, nn.Parameter]]:
    """Named weights of the explained tower; of the whole model where the layout names only its blocks."""
    return list((model if layout.tower is None else layout.tower).named_parameters())


def check_present(model: nn.Module) -> None:
    """Refuses a model with weights that hold no values: those that accelerate offloads, or that were never loaded."""
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"model: weight '{name}' holds no values, it is on the meta device. If accelerate offloads the model "
                "to the CPU or to disk (device_map, cpu_offload), load it whole on one device: without device_map, or "
                "after accelerate.hooks.remove_hook_from_module(model, recurse=True). If it was built on meta, load "
                "its weights first"
            )


def check_weights(model: nn.Module, layout: ModelLayout) -> None:
    """Refuses a model on several devices, a tower of several dtypes, and weights that autograd cannot work with."""
    check_present(model)
    for name, module in model.named_modules():
        reason = refused.wrapper(module)
        if reason is not None:
            where = f" (at '{name}')" if name else ""
            raise ValueError(f"model: {type(module).__name__}{where} cannot be explained: {reason}")
    weights = weights_of(model, layout)
    if not weights:
        raise ValueError(
            f"model: {type(model).__name__} has no weights (nn.Parameter), so its dtype and device are unknown"
        )
    parameter = typical_weight(model, layout)
    for name, other in model.named_parameters():
        if other.device != parameter.device:
            raise ValueError(
                f"model: weight '{name}' is on {other.device}, others on {parameter.device}; move all with model.to(), "
                "or load the model without device_map"
            )
    for name, other in weights:
        if other.is_floating_point() and other.dtype not in _beside(parameter.dtype):
            raise ValueError(
                f"model: weight '{name}' of the tower is {other.dtype}, others are {parameter.dtype}; convert it with "
                f"model.to({parameter.dtype})"
            )
    if parameter.is_inference():
        raise ValueError(
            "model: its weights were made under torch.inference_mode(), so autograd cannot use them; build or load "
            "the model outside of it"
        )


def _beside(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes that weights of a tower of this dtype may have."""
    return (dtype, torch.float32) if dtype in (torch.float16, torch.bfloat16) else (dtype,)


def _to_tensor(images: object) -> str:
    """What to do with images that are no tensor."""
    if isinstance(images, Mapping):
        key = "pixel_values" if "pixel_values" in images else "..."
        return f'give the tensor in it, such as images["{key}"]'
    if isinstance(images, (list, tuple)):
        return "torch.stack() joins images of one size; of a loader's batch [images, labels] give the first"
    return "preprocess pictures as the model was trained: resize, divide by 255, normalise, torch.as_tensor()"


def _to_dtype(images: Tensor) -> str:
    """What to do with images of another dtype."""
    if images.is_floating_point():
        return "convert with .to()"
    return "preprocess them as the model was trained: for most models divide by 255, then normalise"


def image_notices(images: Tensor, layout: ModelLayout) -> tuple[str, ...]:  # [B, channels, H, W], checked
    """What looks wrong about images that the model takes. It looks at their values, so the host waits for a device."""
    if not images.numel():
        return ()
    found = []
    if float(images.detach().abs().max()) > _PIXELS:
        found.append(
            f"images: values go beyond {_PIXELS}, as pixels that were not normalised do; most models expect (pixels / "
            "255 - mean) / std. Ignore this if the model normalises its images itself"
        )
    (height, width), (rows, columns) = images.shape[-2:], layout.grid
    tall, wide = height / rows, width / columns
    if max(tall, wide) > 1.5 * min(tall, wide):
        found.append(
            f"layout: a grid of {rows} x {columns} over images of {height} x {width} makes patches of {tall:.3g} x "
            f"{wide:.3g} pixels; the grid is (rows, columns). Ignore this if the model's patches are no squares"
        )
    return tuple(found)


def check_images(images: Tensor, channels: int, size: tuple[int, int] | None, like: Tensor) -> None:
    """Refuses images that the model does not take; `like` is a weight of the model.

    Args:
        size: (height, width); None if unknown: then the model's own forward pass checks it.
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images: expected a tensor [B, {channels}, H, W], got {type(images).__name__}; {_to_tensor(images)}"
        )
    if not is_plain(images):
        raise TypeError(
            f"images: expected a plain tensor [B, {channels}, H, W], got a {type(images).__name__}, which has "
            "operators of its own; pass the tensor that it wraps, or its local part"
        )
    height, width = size or ("H", "W")
    expected = (channels, *(images.shape[2:] if size is None else size))
    if images.dim() != 4 or tuple(images.shape[1:]) != expected or 0 in images.shape[1:]:
        raise ValueError(
            f"images: expected shape [B, {channels}, {height}, {width}], got {list(images.shape)}"
            f"{_shape_hint(images, channels)}"
        )
    if images.dtype != like.dtype:
        raise ValueError(f"images: expected dtype {like.dtype} like the model, got {images.dtype}; {_to_dtype(images)}")
    if images.device != like.device:
        raise ValueError(f"images: expected device {like.device} like the model, got {images.device}; move with .to()")


def plain(images: Tensor) -> Tensor:
    """The images without their subclass, such as MONAI's MetaTensor, whose metadata would stick to relevance."""
    return images if type(images) is Tensor or not is_plain(images) else images.as_subclass(Tensor)


def _shape_hint(images: Tensor, channels: int) -> str:
    """What to do about images of a wrong shape, where the shape tells."""
    if images.dim() == 3:
        return "; add a batch dimension with images[None]"
    if images.dim() == 5:
        return "; only models of 2-D images are explained, not of volumes [B, C, D, H, W] or videos"
    if images.dim() != 4 or images.shape[1] == channels:
        return ""
    if images.shape[3] == channels:
        return "; put the channels first with images.permute(0, 3, 1, 2)"
    found = images.shape[1]
    grey = f"repeat grey images with images.expand(-1, {channels}, -1, -1), or " if found == 1 else ""
    return f"; {grey}if the model takes {found} channels, say so: ModelLayout(..., in_chans={found})"


def is_plain(tensor: Tensor) -> bool:
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
        if is_plain(tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            remedy = "reload the checkpoint"
            if tensor.dtype == torch.float16:  # the usual reason
                remedy += ", in torch.float32 or bfloat16 if it holds numbers beyond 65504, where float16 ends"
            raise ValueError(f"model: weight '{name}' contains NaN or Inf; {remedy}")
    for block, sae in (saes or {}).items():
        for name, tensor in sae.named_buffers():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"saes[{block}]: {name} contains NaN or Inf; reload the SAE")
    raise ValueError(
        f"{what} came out NaN or Inf although images and weights are finite: an overflow in {values.dtype}; "
        "run the model in a wider dtype, or, if it masks classes by -Inf, wrap it to leave them out"
    )
