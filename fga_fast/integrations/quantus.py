"""FGA as a Quantus explanation function: `metric(..., explain_func=explain_func, explain_func_kwargs={"saes": saes})`.

Quantus itself is not needed here. Source of the interface: Quantus 0.6, `quantus.functions.explanation_func.explain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Unpack

from fga_fast.engine.plan import ExplainerSettings
from fga_fast.explainer import Explainer
from fga_fast.integrations import as_images, as_pixels
from fga_fast.sae import SparseAutoencoder
from fga_fast.settings import Method


def explain_func(
    model: nn.Module,
    inputs: Tensor | NDArray[Any],  # [B, channels, H, W] or [B, H, W, channels]
    targets: Any,
    *,
    saes: Mapping[int, SparseAutoencoder] | None = None,
    device: torch.device | str | None = None,
    channel_first: bool | None = None,
    **settings: Unpack[ExplainerSettings],
) -> NDArray[Any]:
    """Raw relevance of every pixel, which is that of the patches around it.

    Each call makes an `Explainer`, in about a thousandth of a forward pass's time. It keeps nothing of the models
    that Quantus copies and randomises.

    Args:
        model: the model to explain, as for `Explainer`.
        inputs: normalised images; NumPy arrays of any float dtype and strides.
        targets: class of each image, integers [B]; or anything else that `Explainer` takes.
        saes: block -> SAE, as for `Explainer`. Empty: no gates.
        device: Quantus's device; the model must already be there, this function does not move it.
        channel_first: None reads it from the shape.
        settings: other arguments of `Explainer`, such as `gate`, `backward`, `layout`. `quantus.evaluate` passes its
            own name of the explanation as `method`, so give it the name of a method of `Explainer` there; with
            `preset="published"`, "rollout" is TransMM or FGA.

    Returns:
        [B, 1, H, W] float32 (float64 for float64 models), channels first as Quantus wants it. Metrics take absolute
        values and normalise where they need to.

    Raises:
        TypeError, ValueError, RuntimeError: as `Explainer`; or another device.
    """
    method: str | None = settings.get("method")
    known = get_args(Method)
    if method is not None and method not in known:
        raise ValueError(
            f"method: expected one of {', '.join(map(repr, known))}, got {method!r}; quantus.evaluate passes "
            "the key of xai_methods here, so use one of these as the key"
        )
    explainer = Explainer(model, saes, **settings)
    images = as_images(inputs, explainer.plan.parameter, explainer.layout.in_chans, channel_first)
    _check_device(device, images.device)
    pixels: NDArray[Any] = as_pixels(explainer(images, targets), images).cpu().numpy()
    return pixels


def _check_device(device: torch.device | str | None, found: torch.device) -> None:
    wanted = found if device is None else torch.device(device)
    if wanted.type != found.type or wanted.index not in (None, found.index):
        raise ValueError(f"device: the model is on {found}, asked for {wanted}; move it there with model.to()")
