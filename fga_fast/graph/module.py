"""An explanation as a plain module, for tools that take modules: `torch.export`, other compilers, other runtimes."""

from __future__ import annotations

from torch import Tensor, nn

from fga_fast.engine.plan import Plan
from fga_fast.graph.trace import flatten
from fga_fast.settings import TargetMode


class ExplanationModule(nn.Module):
    """What `Explainer.module` returns; see there.

    Attributes:
        names: of the tensors that a call returns, in order.
    """

    def __init__(self, plan: Plan, example: Tensor, target_mode: TargetMode) -> None:
        super().__init__()
        flat = flatten(plan, example, target_mode)
        # The same memory under names of its own: what a graph computes has no gradients.
        for name, parameter in list(flat.module.named_parameters()):
            setattr(flat.module, name, nn.Parameter(parameter.detach(), requires_grad=False))
        self.graph_module = flat.module
        self.names = flat.outputs

    def forward(self, images: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        """Explains images of the example's shape, dtype and device, for which alone it was made; not under autocast.

        Args:
            images: [B, channels, H, W], not checked.
            targets: for "given", class numbers [B] int64, not checked; for "predicted" nothing.
        """
        return dict(zip(self.names, self.graph_module(images.detach(), *targets), strict=True))
