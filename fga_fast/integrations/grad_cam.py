"""FGA with the interface of pytorch-grad-cam: `FGACam(model, saes=...)(input_tensor, targets)`.

This module does not need the library, but takes its targets and makes maps for its `show_cam_on_image`. There is no
`target_layers` and no `reshape_transform`: `Explainer` finds out from the model. Source of the interface: grad-cam 1.5,
https://github.com/jacobgil/pytorch-grad-cam.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Unpack

from fga_fast.engine.plan import ExplainerSettings
from fga_fast.explainer import Explainer
from fga_fast.integrations import as_images
from fga_fast.sae import SparseAutoencoder

Target = Callable[[Tensor], Tensor]  # output of one image, [classes] -> a scalar


class FGACam:
    """Heat maps of a vision transformer's images; also a context manager, as the library's are.

    Args:
        model: the model to explain, as for `Explainer`; in eval mode.
        saes: block -> SAE, as for `Explainer`. Empty: no gates.
        settings: other arguments of `Explainer`, such as `gate`, `method`, `backward`, `layout`.

    Raises:
        TypeError, ValueError, RuntimeError: as `Explainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        saes: Mapping[int, SparseAutoencoder] | None = None,
        **settings: Unpack[ExplainerSettings],
    ) -> None:
        unused = [name for name in ("target_layers", "reshape_transform") if name in settings]
        if unused:
            raise TypeError(
                f"{' and '.join(unused)}: FGACam reads blocks, class token and grid from the model; give neither"
            )
        self.explainer = Explainer(model, saes, **settings)

    def __call__(
        self,
        input_tensor: Tensor | NDArray[Any],  # [B, channels, H, W]
        targets: Any = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> NDArray[np.float32]:
        """One heat map an image. Negative relevance, where the method has any, is cut off at 0 as in the library.

        Args:
            input_tensor: normalised images; NumPy arrays also with channels last.
            targets: one callable an image, from that image's output [classes] to the scalar that is explained, such as
                the library's `ClassifierOutputTarget(281)`; None for the predicted classes; or anything else that
                `Explainer` takes.
            aug_smooth: the mean over the image and its mirror image, each at 0.9, 1 and 1.1 times its values.
            eigen_smooth: must be False; there are no activations to take principal components of.

        Returns:
            [B, H, W] float32 in [0, 1], scaled from minimum to maximum one by one.

        Raises:
            TypeError, ValueError: arguments that do not fit; the message says which.
        """
        if eigen_smooth:
            raise ValueError("eigen_smooth: expected False; FGA weighs patches, it has no activations to project")
        images = as_images(input_tensor, self.explainer.plan.parameter, self.explainer.layout.in_chans)
        chosen = _together(targets, len(images))
        if not aug_smooth:
            return self._maps(images, chosen)
        plain = [self._maps(images * factor, chosen) for factor in (0.9, 1, 1.1)]
        mirrored = [self._maps(images.flip(-1) * factor, chosen)[..., ::-1] for factor in (0.9, 1, 1.1)]
        mean: NDArray[np.float32] = np.mean([*plain, *mirrored], axis=0, dtype=np.float32)
        return mean

    def _maps(self, images: Tensor, targets: Any) -> NDArray[np.float32]:  # [B, channels, H, W] -> [B, H, W]
        e = self.explainer(images, targets).single()
        heat = e.heatmap((images.shape[2], images.shape[3]))
        return heat.float().cpu().numpy()

    def __enter__(self) -> FGACam:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing to undo: hooks live only during a call."""


def _together(targets: Any, batch: int) -> Any:
    """A list of callables, one an image, as one callable on the logits of the batch; anything else unchanged."""
    if not isinstance(targets, Sequence) or not targets or not all(map(callable, targets)):
        return targets
    if len(targets) != batch:
        raise ValueError(
            f"targets: expected one callable an image, {batch}, got {len(targets)}; for the same class in all images "
            "give its number alone"
        )
    each: Sequence[Target] = targets
    return lambda logits: torch.stack([_scalar(target, row) for target, row in zip(each, logits, strict=True)])


def _scalar(target: Target, output: Tensor) -> Tensor:  # [classes] -> []
    value = target(output)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"targets: {type(target).__name__} gave {found} for the output {list(output.shape)} of one image, expected "
            "one number; choose one, for example with ClassifierOutputTarget(category)"
        )
    return value.reshape(())
