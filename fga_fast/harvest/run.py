"""Harvests residual streams: a model runs over images once, and what leaves chosen blocks is kept on disk.

Images are cut into shards of a fixed length, and each shard into the same batches in every run. So a run that goes on
after a break computes the missing shards only, and writes the same bytes as a run without one.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

import fga_fast
from fga_fast.dataset.ahead import read_ahead
from fga_fast.dataset.items import Item, choose, digest_of, load, stable_number
from fga_fast.harvest import folder as files
from fga_fast.harvest.checksum import model_checksum
from fga_fast.harvest.folder import Listed, Shard
from fga_fast.harvest.source import Source, source_of
from fga_fast.io.atomic import atomic_write, check_writable_folder
from fga_fast.io.images import Preprocess
from fga_fast.io.resume import check_same, only_writer, remove_leftovers
from fga_fast.io.window import Window, check_window
from fga_fast.models.layout import ModelLayout

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20  # about as much as a shard holds
_LIST_BYTES = 512  # about as much as an image takes in a list


def harvest(
    model: nn.Module, items: Sequence[Item], blocks: Sequence[int], *, out: str | Path,
    layout: ModelLayout | None = None, preprocess: Preprocess | None = None, model_name: str = "",
    dtype: str = "float32", class_token: bool = False, batch_size: int = 8, workers: int = 2,
    window: Window | None = None, limit: int | None = None, progress: bool = True,
) -> Path:  # fmt: skip
    """Keeps the residual streams after some blocks for all images, as `Activations` reads them.

    A call with the folder of a run that was stopped goes on with it, whatever stopped it. A call with that of a
    complete run returns at once. Images are stored in an order that is drawn by their names, so that each file is a
    sample of all. An image that cannot be read costs that image; the manifest lists it. A file that several items share
    is taken once. Memory: three shards of about 64 MiB, or three batches where these are larger, and two batches of
    images.

    Args:
        model: any model that `Explainer` takes, in eval mode. Not changed.
        items: the images, with keys that stay the same from run to run; masks and boxes are not read.
        blocks: numbers of the blocks, from 0.
        out: folder of the harvest; made if it is missing.
        layout: where the model's blocks and tokens are; None: `find_layout(model)`.
        preprocess: how pictures become the model's input; tensors are taken as they are.
        model_name: for the reader; by default the name of the model's class.
        dtype: "float32", or "bfloat16" for half the space and 3 significant digits.
        class_token: also keep the tokens in front of the patches (class, distillation, registers).
        batch_size: images in a forward pass.
        workers: threads that read images ahead.
        window: how values of more than 8 bits are read, see `load_image`.
        limit: take at most so many images, drawn by their names.
        progress: show a bar with rate and time left.

    Returns:
        `out` as a Path.

    Raises:
        TypeError, ValueError: an argument does not fit, `out` holds a harvest with other settings or of another model,
            no image could be read, or a stream holds NaN or Inf; the message names the image and the block.
        OSError: the disk has too little space, checked before anything is written, or does not take a file; then the
            same call goes on later.
    """
    if dtype not in files.DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(files.DTYPES)}, got {dtype!r}")
    for name, number in (("batch_size", batch_size), ("workers", workers)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    check_window(window)
    chosen = _in_order(choose(items, "both", limit))
    source = source_of(model, blocks, layout, _image_size(chosen, preprocess), preprocess)
    settings = _settings(source, chosen, preprocess, model_name, dtype, class_token)
    per_shard = batch_size * max(1, SHARD_BYTES // (batch_size * _image_bytes(settings)))
    settings |= {"batch_size": batch_size, "shard_images": per_shard, "window": window}
    run = _Run(Path(out), settings, source, [chosen[at : at + per_shard] for at in range(0, len(chosen), per_shard)])
    if not run.complete():
        run.check_space()
        check_writable_folder(run.folder)
        with only_writer(run.folder):
            if not run.complete():  # which another run may have changed
                run.begin()
                run.go_on(partial(_read, source=source, preprocess=preprocess, window=window), workers, progress)
                run.finish()
    return run.folder


def _in_order(items: Sequence[Item]) -> list[Item]:
    """One item for each file, in an order drawn by their names."""
    found: dict[Path | str, Item] = {}
    for item in items:
        name = item.image if isinstance(item.image, Path) else item.key
        first = found.get(name, item)
        target = first.target if first.target == item.target else None
        found[name] = replace(first, target=target, mask=None, box=None)
    return sorted(found.values(), key=lambda item: (stable_number(item.key, "order"), item.key))


def _image_size(items: Sequence[Item], preprocess: Preprocess | None) -> tuple[int, int]:
    picture = next((item for item in items if not isinstance(item.image, Tensor)), None)
    if preprocess is not None and picture is not None:
        return preprocess.image_size
    if picture is not None:
        raise ValueError(f"preprocess: expected a Preprocess for the picture {picture.key}, got None")
    tensor = items[0].image
    assert isinstance(tensor, Tensor)
    if tensor.dim() != 3:
        raise ValueError(f"items: expected a tensor [channels, H, W] for {items[0].key}, got {list(tensor.shape)}")
    return tensor.shape[1], tensor.shape[2]


def _settings(
    source: Source, items: Sequence[Item], preprocess: Preprocess | None, model_name: str, dtype: str, prefix: bool
) -> dict[str, Any]:
    """All that the bytes depend on."""
    layout, like = source.layout, source.like
    if prefix and not layout.prefix_tokens:
        raise ValueError("class_token: the model has no tokens in front of its patches; leave it out")
    return {
        "model": model_name or type(source.model).__name__,
        "model_checksum": model_checksum(source.model),
        "model_dtype": str(like.dtype).removeprefix("torch."),
        "device": like.device.type,
        "blocks": [*source.blocks],
        "d_model": source.d_model,
        "dtype": dtype,
        "grid": [*layout.grid],
        "prefix_tokens": layout.prefix_tokens if prefix else 0,
        "image_size": [*source.image_size],
        "preprocess": None if preprocess is None else asdict(preprocess),
        "items": len(items),
        "data": digest_of(items),
        "fga_fast": fga_fast.__version__,
        "torch": torch.__version__,
    }


def _tokens(settings: Mapping[str, Any]) -> int:
    tokens: int = settings["prefix_tokens"] + settings["grid"][0] * settings["grid"][1]
    return tokens


def _image_bytes(settings: Mapping[str, Any]) -> int:
    """Bytes of an image's tokens, for all blocks."""
    numbers: int = len(settings["blocks"]) * _tokens(settings) * settings["d_model"]
    return numbers * files.DTYPES[settings["dtype"]].itemsize


def _read(item: Item, *, source: Source, preprocess: Preprocess | None, window: Window | None) -> Tensor | str:
    """An item's image [channels, H, W], or why there is none."""
    try:
        image = load(item, preprocess, window).image
    except Exception as error:  # whatever a file, or a user's function, does
        return f"{type(error).__name__}: {error}"
    expected = [source.layout.in_chans, *source.image_size]
    return image if [*image.shape] == expected else f"ValueError: expected {expected}, got {[*image.shape]}"


@dataclass
class _Run:
    """One harvest: its folder, its settings and the items of each shard."""

    folder: Path
    settings: dict[str, Any]
    source: Source
    shards: list[list[Item]]
    done: dict[int, tuple[Shard, Listed]] = field(default_factory=dict)

    def complete(self) -> bool:
        """Whether there is nothing to do. Refuses a folder with something else in it, and notes which shards it has."""
        if not (self.folder / files.MANIFEST).exists():
            if (self.folder / files.SHARDS).exists():
                raise ValueError(f"out: {self.folder} holds shards without {files.MANIFEST}; name another folder")
            return False
        manifest = files.read_manifest(self.folder)
        check_same(manifest["settings"], self.settings, self.folder)
        if manifest.get("complete") is True:
            return True
        for number in range(len(self.shards)):
            path = self.folder / files.tensors_file(number)
            if (self.folder / files.list_file(number)).exists() and path.exists():
                shard, listed = files.read_listed(self.folder, number)
                if path.stat().st_size == shard.bytes:
                    self.done[number] = shard, listed
        return False

    def check_space(self) -> None:
        """Refuses to begin what the disk has no room for; makes nothing."""
        there = self.folder.absolute()
        while not there.exists():
            there = there.parent
        images = sum(len(items) for number, items in enumerate(self.shards) if number not in self.done)
        needed, free = images * (_image_bytes(self.settings) + _LIST_BYTES), shutil.disk_usage(there).free
        if needed > free:
            raise OSError(
                f"out: {images} images need {_size(needed)} in {self.folder}, {_size(free)} are free; free some space, "
                "name a folder on another disk, store bfloat16, or take fewer images or blocks"
            )
        logger.info("harvest: %d images, %s of %s free in %s", images, _size(needed), _size(free), self.folder)

    def begin(self) -> None:
        """Makes what a harvest begins with, and deletes what a killed one left half-written."""
        remove_leftovers(self.folder, files.MANIFEST)
        remove_leftovers(self.folder / files.SHARDS, "[0-9]*")
        if not (self.folder / files.MANIFEST).exists():
            self._manifest(complete=False)
        (self.folder / files.SHARDS).mkdir(exist_ok=True)  # after it: without a manifest they are refused

    def go_on(self, read: Callable[[Item], Tensor | str], workers: int, progress: bool) -> None:
        """Writes the shards that are missing."""
        missing = [number for number in range(len(self.shards)) if number not in self.done]
        size = self.settings["batch_size"]
        batches = [
            self.shards[number][at : at + size] for number in missing for at in range(0, len(self.shards[number]), size)
        ]
        total = self.settings["items"]
        left = sum(map(len, batches))
        coming = zip(batches, read_ahead(batches, read, workers), strict=True)
        desc = f"harvesting {_size(left * _image_bytes(self.settings))}"
        with tqdm(total=total, initial=total - left, unit="image", desc=desc, disable=not progress) as bar:
            for number in missing:
                self._shard(number, coming, bar)

    def _shard(self, number: int, coming: Iterator[tuple[list[Item], list[Tensor | str]]], bar: Any) -> None:
        items, settings = self.shards[number], self.settings
        shape = (len(items), _tokens(settings), settings["d_model"])
        dtype = files.DTYPES[settings["dtype"]]
        kept = {block: torch.empty(shape, dtype=dtype) for block in self.source.blocks}
        readable: list[Item] = []
        predicted: list[int] = []
        errors: list[tuple[str, str]] = []
        while len(readable) + len(errors) < len(items):
            batch, loaded = next(coming)
            good = [(item, one) for item, one in zip(batch, loaded, strict=True) if isinstance(one, Tensor)]
            errors += [(item.key, one) for item, one in zip(batch, loaded, strict=True) if isinstance(one, str)]
            if good:
                streams, classes = self.source.run(torch.stack([image for _, image in good]))
                rows = slice(len(readable), len(readable) + len(good))
                for block, x in streams.items():
                    kept[block][rows] = x[:, x.shape[1] - shape[1] :]
                    self.source.check_finite(block, kept[block][rows], [item.key for item, _ in good])
                readable += [item for item, _ in good]
                predicted += classes
            bar.update(len(batch))
        data = save({files.tensor_name(block): x[: len(readable)] for block, x in kept.items()})
        shard = Shard(files.tensors_file(number), len(readable), len(data), hashlib.sha256(data).hexdigest())
        listed = Listed(
            [item.key for item in readable],
            [str(item.image.absolute()) if isinstance(item.image, Path) else None for item in readable],
            [item.target for item in readable], predicted, errors,
        )  # fmt: skip
        self._write(shard.file, data)
        self._write(files.list_file(number), files.listed_to_json(shard, listed))
        self.done[number] = shard, listed

    def finish(self) -> None:
        """Makes the harvest complete."""
        if not any(shard.images for shard, _ in self.done.values()):
            key, reason = next(error for _, listed in self.done.values() for error in listed.errors)
            raise ValueError(
                f"items: none of the {self.settings['items']} images could be read; of {key}: {reason}; correct it and "
                "name another folder"
            )
        self._manifest(complete=True)

    def _manifest(self, complete: bool) -> None:
        ordered = [self.done[number] for number in sorted(self.done)] if complete else []
        parts = {
            "images": sum(shard.images for shard, _ in ordered),
            "errors": [error for _, listed in ordered for error in listed.errors],
            "shards": [asdict(shard) for shard, _ in ordered],
        }
        begun = {"format": files.FORMAT, "version": files.VERSION, "complete": complete, "settings": self.settings}
        self._write(files.MANIFEST, files.to_json({**begun, **(parts if complete else {})}))

    def _write(self, name: str, data: bytes) -> None:
        try:
            atomic_write(self.folder / name, data)
        except OSError as error:
            raise OSError(
                f"out: cannot write {self.folder / name} ({error.strerror or error}); all files that are there are "
                "whole: free some space, give the same call again, and it goes on"
            ) from error


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
