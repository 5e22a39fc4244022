"""A model as a source of residual streams, checked once and then run on batches of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fga_fast.engine.streams import streams_of
from fga_fast.io.images import Preprocess
from fga_fast.models import checks
from fga_fast.models.find import find_layout
from fga_fast.models.layout import ModelLayout, is_whole
from fga_fast.question.readout import Readout


@dataclass(frozen=True, eq=False)
class Source:
    """See `source_of`."""

    model: nn.Module
    layout: ModelLayout  # for images of `image_size`
    readout: Readout
    blocks: tuple[int, ...]
    image_size: tuple[int, int]
    d_model: int  # C
    like: Tensor  # a weight, of the dtype and on the device of the images

    def run(self, images: Tensor) -> tuple[dict[int, Tensor], list[int]]:
        """Streams and predicted classes of some images.

        Args:
            images: [B, channels, H, W] of any dtype, on any device.

        Returns:
            Block -> x [B, N, C] in the model's dtype and on its device, and B classes, -1 without a head.
        """
        outputs: list[Tensor] = []

        def run(images: Tensor) -> None:
            outputs.append(self.readout.run(images))

        streams = streams_of(run, self.layout, images.to(self.like), self.blocks)
        classes = self.readout.predicted(outputs[0])
        return streams, [-1] * len(images) if classes is None else classes.tolist()

    def check_finite(self, block: int, x: Tensor, names: Sequence[str]) -> None:  # [B, T, C]
        """Refuses a stream with NaN or Inf.

        Args:
            names: of the B images.

        Raises:
            ValueError: naming the first such image and the block.
        """
        wrong = ~x.isfinite().flatten(1).all(1)
        if bool(wrong.any()):
            name = names[int(wrong.nonzero()[0])]
            raise ValueError(
                f"model: NaN or Inf in the residual stream after block {block} for the image {name}; check the model's "
                "weights, run it in float32, or leave the image out"
            )


def source_of(
    model: nn.Module, blocks: Sequence[int], layout: ModelLayout | None, image_size: tuple[int, int],
    preprocess: Preprocess | None = None,
) -> Source:  # fmt: skip
    """Checks a model and runs it once, on an image of zeros.

    Args:
        model: any model that `Explainer` takes, in eval mode.
        blocks: numbers of its blocks, from 0.
        layout: None: `find_layout(model)`.
        image_size: (height, width) of the images.
        preprocess: what makes them, if known, to compare its channels.

    Raises:
        TypeError, ValueError: the model cannot be explained, is in train mode or does not take such images, or there
            is no such block; the message says what to do.
    """
    if layout is None:
        layout = find_layout(model)
        if layout.image_size not in (None, image_size):
            layout = find_layout(model, image_size)
    checks.check_layout(layout, model)
    checks.check_weights(model, layout)
    if model.training:
        raise ValueError("model: expected a model in eval mode, got one in train mode; call model.eval() first")
    checks.check_eval(model)
    last = len(layout.blocks) - 1
    if not blocks or not all(is_whole(block) and 0 <= block <= last for block in blocks):
        raise ValueError(f"blocks: expected some of 0 to {last}, got {[*blocks]}")
    if len({*blocks}) < len(blocks):
        raise ValueError(f"blocks: expected different blocks, got {[*blocks]}")
    channels = layout.in_chans if preprocess is None else len(preprocess.mean)
    like = checks.typical_weight(model, layout).detach()
    images = like.new_zeros(2 if layout.tokens == 1 else 1, channels, *image_size)
    checks.check_images(images, layout.in_chans, layout.image_size, like)
    readout = Readout(model, layout=layout)
    streams = streams_of(readout.run, layout, images, blocks)
    widths = {block: x.shape[2] for block, x in streams.items()}
    if len({*widths.values()}) > 1:
        raise ValueError(f"blocks: expected blocks of one width, got {widths}; take them one by one")
    return Source(model, layout, readout, tuple(map(int, blocks)), image_size, streams[blocks[0]].shape[2], like)
