"""FGA as a captum attribution method: `FeatureGradientAttribution(model, saes=...).attribute(inputs, target)`.

For what captum builds on attributions: `visualization`, `metrics.infidelity`, `metrics.sensitivity_max`,
`attr.NoiseTunnel`. Source of the interface: captum 0.9, https://captum.ai/api/attribution.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from fga_fast.engine.plan import ExplainerSettings
from fga_fast.explainer import Explainer
from fga_fast.integrations import as_pixels
from fga_fast.sae import SparseAutoencoder

try:
    from captum.attr import Attribution  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from captum.log import log_usage  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError as error:
    raise ImportError("fga_fast.integrations.captum needs captum: pip install captum") from error


class FeatureGradientAttribution(Attribution):  # type: ignore[misc, unused-ignore] # Any where captum is not installed
    """Feature-gradient attribution of a vision transformer's images.

    Args:
        model: the model to explain, as for `Explainer`.
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
        super().__init__(model)
        self.explainer = Explainer(model, saes, **settings)

    @log_usage()  # type: ignore[misc, untyped-decorator, unused-ignore] # NoiseTunnel calls what this decorator wraps
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],  # [B, channels, H, W]
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Relevance of every pixel, which is that of the patches around it, the same in all channels.

        Patches are upsampled bilinearly, not rescaled and not divided among pixels: to compare in units of the logit,
        as infidelity does, use captum's `normalize=True`.

        Args:
            inputs: normalised images [B, channels, H, W], or a tuple of that one tensor.
            target: captum's ways to choose a class: an int or a tuple (class,) for all images, a tensor [B] or a list
                of ints or of tuples (class,) for each. None is the predicted class of each image, which under
                NoiseTunnel or sensitivity_max may change from one noisy copy to the next. Anything else that
                `Explainer` takes, such as a class name or a callable, is passed on.
            additional_forward_args: must be None; the model takes images only.

        Returns:
            [B, channels, H, W], contiguous, float32 (float64 for float64 models), on the images' device; in a tuple if
            the inputs came in one.

        Raises:
            TypeError, ValueError: arguments that do not fit; the message says which.
        """
        if additional_forward_args is not None:
            raise ValueError("additional_forward_args: expected None; wrap the model in a module that fixes them")
        if isinstance(inputs, tuple) and len(inputs) != 1:
            raise ValueError(f"inputs: expected one tensor of images, got a tuple of {len(inputs)}")
        images = inputs[0] if isinstance(inputs, tuple) else inputs
        e = self.explainer(images, _as_targets(target))
        # Contiguous, since captum's metrics flatten it with view().
        pixels = as_pixels(e, images).expand(images.shape).contiguous()
        return (pixels,) if isinstance(inputs, tuple) else pixels


def _as_targets(target: Any) -> Any:
    """Captum's targets as those of `Explainer`, which reads a tuple as one class for each image."""
    if isinstance(target, Tensor) and target.numel() == 1 and not target.is_floating_point():
        return int(target)
    if isinstance(target, tuple):
        return _only(target)
    if isinstance(target, list):
        return [_only(entry) if isinstance(entry, tuple) else entry for entry in target]
    return target


def _only(index: tuple[Any, ...]) -> Any:
    if len(index) != 1:
        raise ValueError(f"target: logits [B, classes] take one index an image, got the tuple {index}")
    return index[0]
