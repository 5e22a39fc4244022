"""Residual streams of a model that only runs: read and replaced after chosen blocks, in every family."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import families
import pytest
import torch
from families import Family
from own_vit import IMAGES, own_vit
from pair_vit import PairViT, Step, by_function, by_names, in_place, plainly
from torch import Tensor

from fga_fast.engine.streams import edited, streams_of
from fga_fast.models.block_io import TapeError
from fga_fast.question.readout import Readout
from fga_fast.reference.recording import recording


@pytest.mark.parametrize("family", families.registry(), ids=lambda family: family.id)
def test_families(family: Family) -> None:
    """The same streams as those that the reference differentiates; one that is set to zero changes the output."""
    pytest.importorskip(families.LIBRARIES[family.library])
    model, images = family.build(), family.images()
    layout = families.layout_of(family, model)
    run = Readout(model, tokenizer=families.tokenize if family.prompts else None, layout=layout).run
    last = len(layout.blocks) - 1
    got = streams_of(run, layout, images, (last, 0))
    with recording(layout, images) as record:
        plain = run(images)
    assert list(got) == [last, 0]
    for block, x in got.items():
        assert x.shape == (len(images), layout.tokens, layout.d_model) and not x.requires_grad
        torch.testing.assert_close(x, record.batch_first(record.streams[block]).detach(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        with edited(layout, {last: torch.zeros_like}, len(images)):
            emptied = run(images)
        assert not torch.allclose(emptied, plain, rtol=1e-2)
        assert torch.equal(run(images), run(images))
    assert all(not module._forward_hooks for block in layout.blocks for module in block.modules())


@pytest.mark.parametrize("step", (plainly, in_place, by_function, by_names))
def test_blocks_that_are_lists(step: Step) -> None:
    own, images = own_vit(), torch.randn(IMAGES).double()
    pairs = PairViT(own, step).eval()
    want = streams_of(own, own.layout(), images, (0, 2))
    got = streams_of(pairs, pairs.layout(), images, (0, 2))
    for block, x in want.items():
        torch.testing.assert_close(got[block], x)

    def halve(x: Tensor) -> Tensor:
        return x / 2

    with torch.no_grad(), edited(own.layout(), {1: halve}, len(images)):
        wanted = own(images)
    with torch.no_grad(), edited(pairs.layout(), {1: halve}, len(images)):
        torch.testing.assert_close(pairs(images), wanted)


def test_what_does_not_fit() -> None:
    model, images = own_vit(), torch.randn(IMAGES).double()
    layout = model.layout()
    with pytest.raises(ValueError, match=r"blocks: expected numbers from 0 to 2, got 3"):
        streams_of(model, layout, images, (3,))
    with pytest.raises(TapeError, match=r"block 1 \(Block\) did not end in the forward pass"):
        streams_of(lambda _: None, layout, images, (1,))
    with pytest.raises(TapeError, match=r"layout: block 0 \(Block\) returned \[2, 7, 16\], expected \[3, 7, C\]"):
        streams_of(lambda images: model(images[:2]), layout, torch.cat([images, images])[:3], (0,))
    assert not any(module._forward_hooks for module in model.modules())


def test_other_threads_and_errors_inside() -> None:
    model, images = own_vit(), torch.randn(IMAGES).double()
    seen: list[Tensor] = []

    def edit(x: Tensor) -> None:
        seen.append(x)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), edited(model.layout(), {0: edit}, len(images)):
        model(images)
    plain = model(images)
    with torch.no_grad(), edited(model.layout(), {0: torch.zeros_like}, len(images)):
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(model, images).result(), plain)
        assert not torch.allclose(model(images), plain)
    assert len(seen) == 1 and not any(module._forward_hooks for module in model.modules())
