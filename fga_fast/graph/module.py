"""An explanation as a plain module, for `torch.export`, other compilers and other runtimes."""

from __future__ import annotations

from torch import Tensor, nn

from fga_fast.engine.plan import Plan
from fga_fast.graph.passes.bounds import without_bounds
from fga_fast.graph.trace import flatten
from fga_fast.settings import TargetMode


class ExplanationModule(nn.Module):
    """The result of `Explainer.module`.

    Attributes:
        names: names of the tensors that a call returns, in order.
    """

    def __init__(self, plan: Plan, example: Tensor, target_mode: TargetMode) -> None:
        super().__init__()
        flat = flatten(plan, example, target_mode)
        module = without_bounds(flat.module)
        # New parameters in the same memory, because the graph needs no gradients.
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(parameter.detach(), requires_grad=False))
        self.graph_module = module
        self.names = flat.outputs

    def forward(self, images: Tensor, *targets: Tensor) -> dict[str, Tensor]:
        """Explains images of exactly the example's shape, dtype and device. Do not call it under autocast.

        Args:
            images: [B, channels, H, W], not checked.
            targets: for "given", class numbers [B] int64, not checked, -1 for the predicted; for "predicted", none.
        """
        return dict(zip(self.names, self.graph_module(images.detach(), *targets), strict=True))
