"""Reading harvests: shuffled tokens, damaged folders, checksums, and the same tokens straight from the model."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from harvesting import PATCHES, PREPROCESS, SHARD, SIZE, items, model, picture, returned, small
from own_vit import WIDTH
from torch import Tensor, nn

from fga_fast.dataset.items import Item
from fga_fast.harvest import run as module
from fga_fast.harvest.activations import Activations, HarvestTokens
from fga_fast.harvest.checksum import model_checksum
from fga_fast.harvest.live import ImageBatches, LiveTokens
from fga_fast.harvest.tokens import Tokens

COUNT = 13  # images
TOKENS = COUNT * PATCHES


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Activations]:
    """Thirteen images in seven shards, with class token."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "SHARD_BYTES", SHARD)
        yield small(tmp_path_factory.mktemp("harvest") / "out", items(COUNT), class_token=True)


def rows(x: Tensor) -> Counter[tuple[float, ...]]:
    return Counter(map(tuple, x.tolist()))


@pytest.mark.parametrize(("size", "shards"), ((7, 2), (40, 3), (26, 99), (1000, 1)))
def test_every_token_once_in_each_epoch(found: Activations, size: int, shards: int) -> None:
    """Batches from the first step on, and the same ones from any other."""
    tokens: Tokens = HarvestTokens(found, seed=3, shards=shards)
    assert (tokens.blocks, tokens.d_model) == ((0, 2), WIDTH)
    size = min(size, TOKENS)
    each = TOKENS // size
    batches = list(islice(tokens.batches(size), 2 * each + 1))
    assert all(x.shape == (size, WIDTH) and x.dtype == torch.float32 for batch in batches for x in batch.values())
    stored = {block: found.read(block, 0, COUNT).flatten(0, 1) for block in (0, 2)}
    for epoch in (0, 1):
        seen = rows(torch.cat([batch[0] for batch in batches[epoch * each : (epoch + 1) * each]]))
        assert seen <= rows(stored[0]) and seen.total() == each * size
    place = {tuple(row): number for number, row in enumerate(stored[0].tolist())}
    for batch in batches:  # row t is the same token for all blocks
        order = [place[tuple(row)] for row in batch[0].tolist()]
        assert torch.equal(batch[2], stored[2][order])
    for start in (1, each - 1, each, each + 1, 2 * each):
        again = next(tokens.batches(size, start))
        assert all(torch.equal(again[block], batches[start][block]) for block in (0, 2))
    assert not torch.equal(batches[0][0], batches[each][0])


def test_seeds_samples_and_about(found: Activations) -> None:
    one, other = HarvestTokens(found, seed=0), HarvestTokens(found, seed=2**40)
    first = next(one.batches(20))
    assert torch.equal(first[0], next(HarvestTokens(found).batches(20))[0])
    assert not torch.equal(first[0], next(other.batches(20))[0])
    assert torch.equal(one.sample(30)[2], one.sample(30)[2]) and one.sample(30)[2].shape == (30, WIDTH)
    assert one.sample(10**6)[0].shape == (TOKENS, WIDTH)
    about = one.about
    assert about == json.loads(json.dumps(about))
    assert about["model_checksum"] == found.about.model_checksum and about["tokens"] == TOKENS and about["seed"] == 0
    images = {
        tuple(row): number // PATCHES for number, row in enumerate(found.read(0, 0, COUNT).flatten(0, 1).tolist())
    }
    drawn = [images[tuple(row)] for row in first[0].tolist()]
    assert len({*drawn}) > 6  # not image by image
    for wrong in ({"seed": -1}, {"shards": 0}):
        with pytest.raises(ValueError, match="seed, shards: expected at least 0 and 1"):
            HarvestTokens(found, **wrong)
    for size, start in ((0, 0), (3, -1)):
        with pytest.raises(ValueError, match="size, start: expected at least 1 and 0"):
            next(one.batches(size, start))


def test_memory_is_bounded(found: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch reads the shards of its window, and no others."""
    asked: list[int] = []
    shard = Activations.shard

    def noted(self: Activations, number: int) -> dict[int, Tensor]:
        asked.append(number)
        return shard(self, number)

    monkeypatch.setattr(Activations, "shard", noted)
    batches = HarvestTokens(found, shards=2).batches(5)
    for count in (2, 2, 2):
        next(batches)
        assert len({*asked}) == len(asked) == count
    asked.clear()
    found.read(0, 5, 6)
    assert asked == [2]
    asked.clear()
    next(HarvestTokens(found, shards=2).batches(5, start=TOKENS // 5 - 1))
    assert len(asked) <= 3  # those of the last tokens; it does not read its way to them


def test_bfloat16_tokens(tmp_path: Path) -> None:
    found = small(tmp_path / "out", items(3), dtype="bfloat16")
    batch = next(HarvestTokens(found).batches(3 * PATCHES))
    assert rows(batch[2]) == rows(found.read(2, 0, 3).flatten(0, 1)) and batch[2].dtype == torch.float32


def test_reads_that_do_not_fit(found: Activations) -> None:
    with pytest.raises(ValueError, match=r"block: expected one of \(0, 2\), got 1"):
        found.read(1, 0, 1)
    for start, stop in ((-1, 2), (3, 2), (0, COUNT + 1)):
        with pytest.raises(ValueError, match="start, stop: expected 0 <= start <= stop <= 13"):
            found.read(0, start, stop)


def damaged(folder: Path, found: Activations) -> Path:
    """A copy of the harvest."""
    for path in sorted(found.folder.rglob("*")):
        copy = folder / path.relative_to(found.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            copy.write_bytes(path.read_bytes())
    return folder


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_shards_that_were_damaged(tmp_path: Path, found: Activations) -> None:
    folder = damaged(tmp_path, found)
    path = folder / "shards" / "000002.safetensors"
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    changed = Activations(folder)
    with pytest.raises(ValueError, match=r"000002\.safetensors: its bytes have changed since the harvest"):
        changed.verify()
    path.write_bytes(whole.replace(b"block_2", b"block_1", 1))
    with pytest.raises(ValueError, match=r"000002\.safetensors: expected \(2, 7, 16\) for the blocks \(0, 2\), got"):
        next(HarvestTokens(changed).batches(TOKENS))
    path.write_bytes(whole.replace(b'"F32"', b'"I32"'))
    with pytest.raises(ValueError, match=r"000002\.safetensors: expected float32 as the manifest says"):
        changed.read(0, 4, 5)
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(ValueError, match=r"000002\.safetensors: a header of"):
        changed.read(0, 4, 5)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"000002\.safetensors: expected \d+ bytes as the manifest says, got \d+"):
        Activations(folder)
    with pytest.raises(ValueError, match=r"000002\.safetensors: expected \d+ bytes"):
        changed.read(0, 4, 5)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"000002\.safetensors: no such file, but the manifest names it"):
        Activations(folder)
    with pytest.raises(FileNotFoundError, match=r"harvest: no manifest\.json in"):
        Activations(tmp_path / "gone")


@pytest.mark.parametrize(
    ("message", "change"),
    (
        ("is not complete", lambda m: m.update(complete=False)),
        ("is not complete", lambda m: m.update(complete="yes")),
        (
            "expected 'fga_fast harvest' of version 1, got 'fga_fast harvest' of version 2",
            lambda m: m.update(version=2),
        ),
        ("damaged: expected settings by name", lambda m: m.update(settings=[1])),
        ("damaged manifest: KeyError", lambda m: m["settings"].pop("grid")),
        ("damaged manifest: ValueError: impossible sizes", lambda m: m["settings"].update(d_model=-1)),
        ("damaged manifest: ValueError: impossible tokens", lambda m: m["settings"].update(blocks=[2, 2])),
        ("expected at least .* bytes by the manifest's sizes", lambda m: m["settings"].update(d_model=10**12)),
        ("expected 10000000000 images in its shards", lambda m: m.update(images=10**10)),
        (r"expected shards/000001\.safetensors as shard 1", lambda m: m["shards"][1].update(file="../../secret")),
        ("damaged manifest: TypeError", lambda m: m.update(shards=3)),
    ),
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_manifests_that_are_not_trusted(tmp_path: Path, found: Activations, message: str, change: Any) -> None:
    folder = damaged(tmp_path, found)
    edit(folder / "manifest.json", change)
    with pytest.raises(ValueError, match=message):
        Activations(folder)


def test_numbers_that_are_none(tmp_path: Path, found: Activations) -> None:
    folder = damaged(tmp_path, found)
    path = folder / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"d_model": 16', '"d_model": 1e999'), encoding="utf-8")
    with pytest.raises(ValueError, match="damaged manifest: OverflowError"):
        Activations(folder)


def test_lists_that_are_not_trusted(tmp_path: Path, found: Activations) -> None:
    folder = damaged(tmp_path, found)
    path = folder / "shards" / "000003.json"
    whole = path.read_bytes()
    edit(path, lambda one: one["keys"].pop())
    with pytest.raises(ValueError, match=r"000003\.json: damaged: expected 2 images in every list, got \[1, 2\]"):
        _ = Activations(folder).keys
    path.write_bytes(whole)
    edit(path, lambda one: one["shard"].update(sha256="0" * 64))
    with pytest.raises(ValueError, match=r"the list of shards/000003\.safetensors is that of another harvest"):
        _ = Activations(folder).predicted
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"000003\.json: no such file"):
        _ = Activations(folder).paths


def test_the_checksum_of_a_model() -> None:
    def build(value: float = 1.0, name: str = "noise", dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        net.register_buffer(name, torch.full((2, 3), value, dtype=dtype), persistent=False)
        return net

    want = model_checksum(build())
    assert len(want) == 64 and model_checksum(build()) == want == model_checksum(build().requires_grad_(False))
    turned = build()
    turned.noise = torch.full((3, 2), 1.0).t()  # other strides, the same values
    assert model_checksum(turned) == want
    reshaped = build()
    reshaped.noise = torch.full((3, 2), 1.0)
    assert len({want, model_checksum(reshaped), *(model_checksum(build(*a)) for a in ((2.0,), (1.0, "other")))}) == 4
    assert model_checksum(build(dtype=torch.bfloat16)) != want
    assert model_checksum(build().half()) != want


def close(a: Tensor, b: Tensor) -> None:
    """The same rows in any order."""
    torch.testing.assert_close(a[a[:, 0].argsort()], b[b[:, 0].argsort()], rtol=1e-5, atol=1e-5)


def test_live_tokens_are_those_of_a_harvest(found: Activations) -> None:
    own = model()
    images = ImageBatches(items(COUNT), batch_size=4, seed=5)
    live: Tokens = LiveTokens(own, own.layout(), (0, 2), images, {"data": "mine"})
    assert (live.blocks, live.d_model) == ((0, 2), WIDTH)
    assert live.about["model_checksum"] == found.about.model_checksum and live.about["data"] == "mine"
    assert live.about["model"] == type(own).__name__
    assert LiveTokens(own, own.layout(), (0,), images, {"model": "mine"}).about["model"] == "mine"
    batches = list(islice(live.batches(1), 7))
    assert [*batches[0][0].shape] == [4 * PATCHES, WIDTH]
    for step, batch in enumerate(batches):
        want = returned(own, images(step), (0, 2))
        assert all(torch.equal(batch[block], want[block][:, 1:].flatten(0, 1)) for block in (0, 2))
    for start in (1, 2, 3, 6):
        assert torch.equal(next(live.batches(99, start))[2], batches[start][2])
    sample = live.sample(30)
    assert torch.equal(sample[0], torch.cat([batches[0][0], batches[1][0]])[:30])
    assert torch.equal(live.sample(24)[2], batches[0][2])
    assert not torch.equal(images(0), images(3))  # another epoch, another order
    all_at_once = LiveTokens(own, own.layout(), (0, 2), ImageBatches(items(COUNT), batch_size=99), None)
    for block in (0, 2):
        close(all_at_once.sample(TOKENS)[block], found.read(block, 0, COUNT).flatten(0, 1))


def test_live_images_that_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    given = [Item(name, tmp_path / name) for name in ("a.png", "b.png")]
    with caplog.at_level(logging.WARNING, "fga_fast"):
        assert ImageBatches(given, PREPROCESS, batch_size=2)(0).shape == (1, 3, *SIZE)
    assert "left out b.png: ImageFileError: " in caplog.text
    with pytest.raises(ValueError, match="no image of step 0 could be read"):
        ImageBatches(given[1:], PREPROCESS)(0)
    with pytest.raises(ValueError, match="batch_size, seed: expected at least 1 and 0"):
        ImageBatches(given, batch_size=0)
    own = model()
    steps = [torch.zeros(2, 3, *SIZE), torch.full((2, 3, *SIZE), float("nan")), torch.zeros(2, 3, 8, 8)]
    tokens = LiveTokens(own, own.layout(), [1], lambda step: steps[step])
    with pytest.raises(ValueError, match="after block 1 for the image 0 of step 1"):
        next(tokens.batches(1, 1))
    with pytest.raises(ValueError, match=r"images: expected the size of step 0 for step 2, got \[2, 3, 8, 8\]"):
        next(tokens.batches(1, 2))
    with pytest.raises(ValueError, match=r"images: expected a tensor \[B, channels, H, W\] for step 0, got \[3\]"):
        LiveTokens(own, own.layout(), [1], lambda step: torch.zeros(3))
    with pytest.raises(ValueError, match="model: expected a model in eval mode"):
        LiveTokens(own.train(), own.layout(), [1], lambda step: steps[0])
