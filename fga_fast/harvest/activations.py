"""Reads a harvest: residual streams of many images on disk, by image or as shuffled tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fga_fast.dataset.items import stable_number
from fga_fast.harvest.checksum import model_checksum
from fga_fast.harvest.folder import DTYPES, Listed, Shard, read_listed, read_manifest, shard_of, tensor_name
from fga_fast.io.safetensors_file import SafetensorsFile

_MOST_READ = 1 << 20  # bytes of a file that are hashed at once


@dataclass(frozen=True)
class About:
    """What a harvest was made from.

    Attributes:
        model: its name, as the harvest was told.
        model_checksum: see `model_checksum`.
        blocks: numbers of the blocks, from 0.
        d_model: width C of the stream.
        dtype: "float32" or "bfloat16", as stored.
        grid: (rows, columns) of the P patches.
        prefix_tokens: tokens in front of the patches that are stored; 0 if none are.
        image_size: (height, width) of the model's input.
        preprocess: the fields of the `Preprocess`, or None where images were tensors.
        images: I, how many are stored.
        errors: key and reason of each image that could not be read.
    """

    model: str
    model_checksum: str
    blocks: tuple[int, ...]
    d_model: int
    dtype: str
    grid: tuple[int, int]
    prefix_tokens: int
    image_size: tuple[int, int]
    preprocess: Mapping[str, Any] | None
    images: int
    errors: tuple[tuple[str, str], ...]

    @property
    def patches(self) -> int:
        """Number of patches P of an image."""
        return self.grid[0] * self.grid[1]


class Activations:
    """Residual streams of a complete harvest, memory-mapped: memory does not grow with the number of images.

    Args:
        folder: what `harvest` wrote.

    Raises:
        FileNotFoundError: no harvest there, or a shard is missing.
        ValueError: the harvest is not complete, or a file is damaged.

    Attributes:
        folder: where it is.
        about: what it was made from.
        shards: its files of tensors, in order.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest.get("complete") is not True:
            raise ValueError(
                f"harvest: {self.folder} is not complete; call harvest() or `fga-fast harvest` again with the same "
                "arguments, and it goes on"
            )
        try:
            self.about = _about(manifest)
            self.shards = tuple(shard_of(one, number) for number, one in enumerate(manifest["shards"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.folder}: damaged manifest: {type(error).__name__}: {error}") from error
        if sum(shard.images for shard in self.shards) != self.about.images:
            raise ValueError(f"{self.folder}: damaged manifest: expected {self.about.images} images in its shards")
        each = len(self.about.blocks) * (self.about.prefix_tokens + self.about.patches) * self.about.d_model
        for shard in self.shards:
            path, least = self._check_file(shard), shard.images * each * DTYPES[self.about.dtype].itemsize
            if shard.bytes < least:  # so that nobody allocates more than there is
                raise ValueError(f"{path}: expected at least {least} bytes by the manifest's sizes, got {shard.bytes}")

    def __len__(self) -> int:
        """Number of images I."""
        return self.about.images

    @property
    def keys(self) -> list[str]:
        """Names of the images, in order."""
        return [key for listed in self._listed for key in listed.keys]

    @property
    def paths(self) -> list[Path | None]:
        """Files of the images; None for what was no file."""
        return [None if path is None else Path(path) for listed in self._listed for path in listed.paths]

    @property
    def targets(self) -> list[int | None]:
        """Classes of the images, where they are known."""
        return [target for listed in self._listed for target in listed.targets]

    @property
    def predicted(self) -> Tensor:  # [I]
        """Classes [I] int64 that the model predicted; -1 without a classification head."""
        return torch.tensor([one for listed in self._listed for one in listed.predicted], dtype=torch.int64)

    def read(self, block: int, start: int, stop: int, *, prefix: bool = False) -> Tensor:  # -> [n, P, C]
        """The stream after a block of images `start` to `stop` - 1, [n, P, C] float32.

        Args:
            block: one of `about.blocks`.
            prefix: also the stored prefix tokens, in front of the patches.

        Raises:
            ValueError: no such block or images.
            ValueError, FileNotFoundError: a shard is damaged or missing.
        """
        if block not in self.about.blocks:
            raise ValueError(f"block: expected one of {self.about.blocks}, got {block}")
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"start, stop: expected 0 <= start <= stop <= {len(self)}, got {start} and {stop}")
        tokens = self.about.patches + (self.about.prefix_tokens if prefix else 0)
        found = torch.empty(stop - start, tokens, self.about.d_model)
        first = 0
        for number, shard in enumerate(self.shards):
            low, high = max(start - first, 0), min(stop - first, shard.images)
            if low < high:
                x = self.shard(number)[block]
                found[first + low - start : first + high - start] = x[low:high, x.shape[1] - tokens :]
            first += shard.images
        return found

    def shard(self, number: int) -> dict[int, Tensor]:
        """Block -> [n, T, C] of a shard as stored, T = prefix tokens + patches; values are read when they are used.

        Raises:
            ValueError, FileNotFoundError: the shard is damaged or missing.
        """
        shard, about = self.shards[number], self.about
        path = self._check_file(shard)
        expected = (shard.images, about.prefix_tokens + about.patches, about.d_model)
        shapes = SafetensorsFile(path).shapes
        wrong = {name: shape for name, shape in shapes.items() if shape != expected}
        if wrong or {*shapes} != {tensor_name(block) for block in about.blocks}:
            raise ValueError(f"{path}: expected {expected} for the blocks {about.blocks}, got {shapes}; harvest again")
        with safe_open(path, framework="pt") as file:
            found: dict[int, Tensor] = {block: file.get_tensor(tensor_name(block)) for block in about.blocks}
        if any(x.dtype != DTYPES[about.dtype] for x in found.values()):
            raise ValueError(f"{path}: expected {about.dtype} as the manifest says; harvest again")
        return found

    def verify(self) -> None:
        """Reads all shards and compares them with their checksums.

        Raises:
            ValueError: naming the first shard that has changed.
        """
        for shard in self.shards:
            path, digest = self._check_file(shard), hashlib.sha256()
            with path.open("rb") as file:
                while data := file.read(_MOST_READ):
                    digest.update(data)
            if digest.hexdigest() != shard.sha256:
                raise ValueError(
                    f"{path}: its bytes have changed since the harvest (checksum {digest.hexdigest()[:12]}, expected "
                    f"{shard.sha256[:12]}); harvest again"
                )

    def check_model(self, model: nn.Module) -> None:
        """Compares a model with the one whose streams these are.

        Raises:
            ValueError: its weights are others.
        """
        found = model_checksum(model)
        if found != self.about.model_checksum:
            raise ValueError(
                f"model: expected the model of the harvest {self.folder} ({self.about.model or 'no name'}, checksum "
                f"{self.about.model_checksum[:12]}), got one with checksum {found[:12]}; load the weights of then, or "
                "harvest again"
            )

    @cached_property
    def _listed(self) -> list[Listed]:
        found = []
        for number, shard in enumerate(self.shards):
            listed_shard, listed = read_listed(self.folder, number)
            if listed_shard != shard:
                raise ValueError(f"{self.folder}: the list of {shard.file} is that of another harvest; harvest again")
            found.append(listed)
        return found

    def _check_file(self, shard: Shard) -> Path:
        path = self.folder / shard.file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, but the manifest names it; harvest again")
        size = path.stat().st_size
        if size != shard.bytes:
            raise ValueError(f"{path}: expected {shard.bytes} bytes as the manifest says, got {size}; harvest again")
        return path


def _about(manifest: Mapping[str, Any]) -> About:
    settings = manifest["settings"]
    rows, columns = map(int, settings["grid"])
    height, width = map(int, settings["image_size"])
    found = About(
        model=str(settings["model"]),
        model_checksum=str(settings["model_checksum"]),
        blocks=tuple(map(int, settings["blocks"])),
        d_model=int(settings["d_model"]),
        dtype=str(settings["dtype"]),
        grid=(rows, columns),
        prefix_tokens=int(settings["prefix_tokens"]),
        image_size=(height, width),
        preprocess=None if settings["preprocess"] is None else dict(settings["preprocess"]),
        images=int(manifest["images"]),
        errors=tuple((str(key), str(reason)) for key, reason in manifest["errors"]),
    )
    if found.dtype not in DTYPES or not found.blocks or min(rows, columns, found.d_model) < 1 or found.images < 1:
        raise ValueError(f"impossible sizes: {found}")
    if found.prefix_tokens < 0 or len({*found.blocks}) < len(found.blocks):
        raise ValueError(f"impossible tokens or blocks: {found}")
    return found


def _joined(parts: list[dict[int, Tensor]]) -> dict[int, Tensor]:
    return {block: torch.cat([part[block] for part in parts]) for block in parts[0]}


class HarvestTokens:
    """Patch tokens of a harvest in random order, for training; implements `Tokens`.

    Each epoch takes the shards in a new order and reads `shards` of them at once, one after the other from start to
    end, as disks like it. Their tokens are shuffled with each other. A harvest stores its images in random order, so
    every shard, and so every batch, is a sample of all images. Memory: the patches of `shards` shards as stored, for
    all blocks (by default up to 8 x 64 MiB), one batch, and 8 bytes a token for the order.

    Args:
        activations: a complete harvest.
        seed: of the order.
        shards: how many shards are shuffled together.
        images: take the first so many images only, and so hold back the others; None: all.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self, activations: Activations, seed: int = 0, *, shards: int = 8, images: int | None = None
    ) -> None:  # fmt: skip
        if seed < 0 or shards < 1:
            raise ValueError(f"seed, shards: expected at least 0 and 1, got {seed} and {shards}")
        about = activations.about
        images = about.images if images is None else images
        if not 1 <= images <= about.images:
            raise ValueError(f"images: expected 1 to {about.images}, as many as the harvest has, got {images}")
        self._images: list[int] = []  # taken of each shard
        for shard in activations.shards:
            self._images.append(min(shard.images, images - sum(self._images)))
        self.blocks, self.d_model = about.blocks, about.d_model
        self._activations, self._seed, self._shards = activations, seed, shards
        self._count = images * about.patches
        checksums = "".join(shard.sha256 for shard in activations.shards)
        told = asdict(about) | {"errors": len(about.errors), "tokens": self._count, "seed": seed, "shards": shards}
        told["images"] = images
        told["harvest"] = hashlib.sha256(checksums.encode()).hexdigest()
        self.about: Mapping[str, Any] = json.loads(json.dumps(told))

    def sample(self, count: int) -> dict[int, Tensor]:
        """See `Tokens`; the first tokens of the first epoch, at most all of them."""
        return next(self.batches(count))

    def batches(self, size: int, start: int = 0) -> Iterator[dict[int, Tensor]]:
        """See `Tokens`; of `size` tokens each, or of all of them if there are fewer.

        Raises:
            ValueError: a size below 1 or a start below 0; a damaged shard.
        """
        if size < 1 or start < 0:
            raise ValueError(f"size, start: expected at least 1 and 0, got {size} and {start}")
        size = min(size, self._count)
        each = self._count // size  # batches an epoch; the rest of an epoch's tokens are left out
        step = start
        while True:
            yield from self._epoch(step // each, size, step % each, each)
            step = (step // each + 1) * each

    def _epoch(self, epoch: int, size: int, first: int, stop: int) -> Iterator[dict[int, Tensor]]:
        """Batches `first` to `stop` - 1 of an epoch."""
        skip, left = first * size, stop - first
        parts: list[dict[int, Tensor]] = []  # of the batch that is begun
        for numbers, generator in self._windows(epoch):
            images = sum(self._images[number] for number in numbers)
            count = images * self._activations.about.patches
            if skip >= count:
                skip -= count
                continue
            streams = self._read(numbers, images)
            order = torch.randperm(count, generator=generator)[skip:]
            skip = 0
            while len(order) and left:
                missing = size - sum(len(part[self.blocks[0]]) for part in parts)
                rows, order = order[:missing], order[missing:]
                parts.append({block: x[rows].float() for block, x in streams.items()})
                if len(rows) == missing:
                    left -= 1
                    yield parts[0] if len(parts) == 1 else _joined(parts)
                    parts.clear()
            if not left:
                return
            del streams  # before the next ones are read

    def _windows(self, epoch: int) -> Iterator[tuple[list[int], torch.Generator]]:
        """Shards that are shuffled together, with the generator of their order."""

        def generator(place: int) -> torch.Generator:
            return torch.Generator().manual_seed(stable_number("order", self._seed, epoch, place))

        order = torch.randperm(len(self._activations.shards), generator=generator(-1)).tolist()
        for place in range(0, len(order), self._shards):
            yield order[place : place + self._shards], generator(place)

    def _read(self, numbers: list[int], images: int) -> dict[int, Tensor]:
        """Block -> patches [images * P, C] of some shards, in the stored dtype."""
        about = self._activations.about
        shape, dtype = (images, about.patches, about.d_model), DTYPES[about.dtype]
        found = {block: torch.empty(shape, dtype=dtype) for block in self.blocks}
        row = 0
        for number in numbers:
            count = self._images[number]
            for block, x in self._activations.shard(number).items():
                found[block][row : row + count] = x[:count, about.prefix_tokens :]
            row += count
        return {block: x.flatten(0, 1) for block, x in found.items()}
