"""LeGrad: the gradient with respect to attention maps, block by block, without the maps themselves.

    s_l = the target's logit that the head reads of x_l, the output of block l
    relevance = 1/L sum_l 1/(H N) sum_h sum_i relu(d s_l / d A_l[h, i, :])        at the patches

W. Bousselham, A. Boggust, S. Chaybouti, H. Strobelt, H. Kuehne: LeGrad: An Explainability Method for Vision
Transformers via Feature Formation Sensitivity, ICCV 2025, arXiv:2404.03214, section 3.

As in the paper, block l is differentiated alone: the head reads x_l as if the blocks after it were not there. The head
is the model's own, with its final norm and its pooling. No minimum or maximum is taken off. The paper treats attention
pools apart; that is not done here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fga_fast.engine.function_mode import FunctionMode
from fga_fast.engine.torch_functions import Function
from fga_fast.evaluation.methods.recorded import follow, usable
from fga_fast.evaluation.subject import Subject
from fga_fast.models.block_io import Arguments, ForwardPass
from fga_fast.models.layout import ModelLayout
from fga_fast.models.naming import differentiating, running


def legrad(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    """LeGrad over all blocks up to the one that the head reads. It runs the model once more for each of them.

    Args:
        images: [B, channels, H, W].
        targets: [B].

    Returns:
        [B, P], at least 0.

    Raises:
        ValueError: an attention pool, or a head that reads several blocks.
    """
    with torch.inference_mode(False), torch.enable_grad():
        images = usable(images)
        record, reads, _ = follow(subject, images, targets)
        if reads.pool:
            raise ValueError("legrad: not defined here for a head that is an attention pool; leave the method out")
        if len(reads.blocks) != 1:
            raise ValueError(
                f"legrad: the head reads the outputs of blocks {', '.join(map(str, reads.blocks))}, expected one block "
                "in whose place others can be read; leave the method out"
            )
        layout, last, found = record.layout, reads.deepest, []
        for block in range(record.passed.first, last + 1):
            if block not in record.maps:  # it did not run
                continue
            x, maps = record.streams[block], record.maps[block]
            gradient = _read(subject, layout, images, targets, last, x.detach())
            with differentiating(record.passed), torch.autocast(images.device.type, enabled=False):
                (of_maps,) = torch.autograd.grad(x, maps, gradient, retain_graph=True)  # [B, H, N, N]
            found.append(of_maps.to(record.dtype).clamp(min=0).mean((1, 2)))  # [B, N]
    return torch.stack(found).mean(0)[:, layout.prefix_tokens :]


class _InPlaceOf(FunctionMode):
    """A pass in which one block hands on given tokens in place of its own."""

    def __init__(self, passed: ForwardPass, block: int, tokens: Tensor) -> None:  # [B, N, C] or [N, B, C]
        super().__init__(passed)
        self._block, self._tokens = block, tokens

    def tap_attention(
        self, function: Function, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        out: Tensor = function(query, key, value, mask, scale=scale)
        return out

    def tap_map(self, maps: Tensor, logits: Tensor) -> Tensor:
        return maps

    def tap_input(self, index: int, arguments: Arguments) -> Arguments | None:
        return None

    def tap_output(self, index: int, x: Tensor) -> Tensor | None:
        return self._tokens.clone() if index == self._block else None

    def is_own(self, leaf: Tensor) -> bool:
        return leaf is self._tokens


def _read(
    subject: Subject,
    layout: ModelLayout,
    images: Tensor,  # [B, channels, H, W]
    targets: Tensor,  # [B]
    last: int,
    x: Tensor,  # [B, N, C] or [N, B, C]
) -> Tensor:
    """The gradient of the logits that the head reads of x, with respect to x."""
    plan, x = subject.explainer().plan, x.requires_grad_()
    passed = ForwardPass(layout, len(images))
    with _InPlaceOf(passed, last, x).following(), running(passed):
        values = plan.readout.answer(targets, plan.readout.run(images)).values
    with torch.autocast(images.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return gradient
