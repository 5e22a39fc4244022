"""Metrics that remove patches: compared with as many plain forward passes, and with Quantus for the same definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Scale
from rows import Row
from subjects import images
from timing import Race, Timing
from torch import Tensor, nn

from fga_fast import metrics
from fga_fast.models.timm_import import import_timm

PATCHES, BATCH = 196, 32


def vit_tiny(depth: int, channels: int = 3) -> nn.Module:
    """timm's ViT-Ti/16 at 224 px with random weights."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(embed_dim=192, depth=depth, num_heads=3, in_chans=channels)
    return model.eval().requires_grad_(False)


def forwards(model: nn.Module, pictures: Tensor, count: int) -> None:
    """Plain forward passes of `count` images, in the metrics' batches."""
    several = pictures[:1].expand(BATCH, -1, -1, -1).contiguous()
    with torch.no_grad():
        for start in range(0, count, BATCH):
            model(several[: min(BATCH, count - start)])


def counted(model: nn.Module, work: Callable[[], Any]) -> int:
    """Images that the work runs the model on."""
    seen: list[int] = []
    handle = model.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    work()
    handle.remove()
    return sum(seen)


def row(name: str, batch: int, timing: Timing, **values: Any) -> Row:
    """A row of this benchmark, with the ratio to plain forward passes."""
    return Row(
        "metrics", name, batch, PATCHES + 1, threads=torch.get_num_threads(), rounds=timing.rounds,
        median_s=timing.median, min_s=timing.minimum, ratio_to_forward=timing.ratio,
        min_ratio_to_forward=timing.best_ratio, **values,
    )  # fmt: skip


def ways(model: nn.Module, pictures: Tensor, relevance: Tensor) -> dict[str, Callable[[], Any]]:
    asked = (model, pictures, None, relevance)
    flip: Callable[..., Any] = partial(metrics.pixel_flipping, *asked, batch_size=BATCH)
    return {
        "saco": partial(metrics.saco, *asked, bins=49, batch_size=BATCH),
        "faithfulness_correlation": partial(metrics.faithfulness_correlation, *asked, runs=50, batch_size=BATCH),
        "pixel_flipping": partial(flip, step=4),
        "insertion_deletion": partial(metrics.insertion_deletion, *asked, step=8, batch_size=BATCH),
        "road": partial(metrics.road, *asked, batch_size=BATCH),
    }


@pytest.mark.parametrize("methods", (1, 4))
def test_overhead(methods: int, scale: Scale, race: Callable[..., Race], record: Callable[[Row], None]) -> None:
    """A metric's time, as a multiple of as many plain forward passes as it runs."""
    model, pictures = vit_tiny(scale.depth), images(1)
    relevance = torch.randn(methods, 1, PATCHES)
    for name, way in ways(model, pictures, relevance).items():
        count = counted(model, way)
        found = race(partial(forwards, model, pictures, count), {name: way}, seconds=20.0, least=2)
        record(row(f"{name}, {methods} method(s)", 1, found.result(name), note=f"{count} images run"))


def test_quantus(scale: Scale, race: Callable[..., Race], record: Callable[[Row], None]) -> None:
    """Pixel flipping of grey images, 14 patches at a time, filled with 0.

    Quantus flips pixels. Its map is constant on each patch, so a step of as many pixels as 14 patches have flips 14
    patches. It takes no such step for colour.
    """
    quantus = pytest.importorskip("quantus")
    model, pictures, step = vit_tiny(scale.depth, channels=1), images(4)[:, :1].contiguous(), 14
    relevance = torch.rand(4, PATCHES)
    pixels = relevance.view(4, 1, 14, 14).repeat_interleave(16, 2).repeat_interleave(16, 3)
    targets = model(pictures).argmax(1)
    metric = quantus.PixelFlipping(
        features_in_step=16 * 16 * step, perturb_baseline=0.0, disable_warnings=True, display_progressbar=False
    )
    asked = {"x_batch": pictures.numpy(), "y_batch": targets.numpy(), "a_batch": pixels.numpy()}
    known = {
        "fga_fast": partial(
            metrics.pixel_flipping, model, pictures, targets, relevance, step=step, fill=0.0, batch_size=BATCH
        ),
        "quantus": partial(metric, model=model, **asked, channel_first=True, softmax=True, device="cpu"),
    }
    # The curve of Quantus lacks its start.
    curve = torch.from_numpy(np.array(known["quantus"]())).double().view(4, -1)
    clean = model(pictures).softmax(1).gather(1, targets[:, None]).double()
    want = torch.trapezoid(torch.cat([clean, curve], 1)) * step
    torch.testing.assert_close(known["fga_fast"](), want, rtol=1e-3, atol=1e-3)
    count = counted(model, known["fga_fast"])
    found = race(partial(forwards, model, pictures, count), known, seconds=30.0, least=2)
    for name in known:
        against = found.result("fga_fast").ratio / found.result(name).ratio
        note = f"{count} images run, fga_fast / this {against:.2f}"
        record(row(f"pixel_flipping, {name}", 4, found.result(name), note=note))
