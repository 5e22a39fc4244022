"""Compiled explanations on a CUDA device: replayed graphs, streams, and the explainer's own numbers."""

from __future__ import annotations

import collections
import os

import families
import pytest
import torch
from explaining import PIXELS, Build, sae_for

from fga_fast import Explainer

# Where a device is required, a missing one is a failure.
if os.environ.get("FGA_FAST_REQUIRE_CUDA") != "1":
    pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["composite", "native"])
def test_small_replays_are_the_explainers_numbers(tiny_vit: Build, backend: str, dtype: torch.dtype) -> None:
    model = tiny_vit(depth=2, embed_dim=64, num_heads=2).to("cuda", dtype)
    explainer = Explainer(model, {0: sae_for(model, 64).to("cuda")}, backend=backend, preset="published")  # type: ignore[arg-type]
    batch = torch.randn(3, *PIXELS, device="cuda").to(dtype)
    compiled = explainer.compile(batch, batches=(1, 4))
    for _ in range(3):
        for count in (1, 3):
            got, want = compiled(batch[:count]), explainer(batch[:count])
            assert families.error(got.relevance, want.relevance) < (1e-4 if dtype == torch.float32 else 0.1)


def test_small_replays_on_two_streams(tiny_vit: Build) -> None:
    model = tiny_vit(depth=2).to("cuda")
    first, second = (torch.randn(1, *PIXELS, device="cuda") for _ in range(2))
    compiled = Explainer(model, backend="composite", preset="published").compile(first)
    want = [compiled(first).relevance, compiled(second).relevance]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(10):
        got = []
        for stream, images in zip(streams, (first, second), strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got.append(compiled(images).relevance)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_small_replays_allocate_nothing_new(tiny_vit: Build) -> None:
    model = tiny_vit(depth=2).to("cuda")
    images = torch.randn(1, *PIXELS, device="cuda")
    compiled = Explainer(model, backend="composite", preset="published").compile(images)
    for _ in range(3):
        compiled(images)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for _ in range(20):
        compiled(images)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


@pytest.mark.parametrize("targets", ["an int", "a tensor of the device"])
def test_small_replays_never_make_the_host_wait(tiny_vit: Build, targets: str) -> None:
    model = tiny_vit(depth=2).to("cuda")
    images = torch.randn(2, *PIXELS, device="cuda")
    compiled = Explainer(model, backend="composite", preset="published").compile(images, target_mode="given")
    chosen = 1 if targets == "an int" else torch.tensor([1, 1], device="cuda")
    want = compiled(images, chosen).relevance
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = compiled(images, chosen).relevance
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


def test_small_replays_are_one_launch(tiny_vit: Build) -> None:
    """Beside it, a copy of the images in and one of the results out."""
    model = tiny_vit(depth=2).to("cuda")
    images = torch.randn(1, *PIXELS, device="cuda")
    compiled = Explainer(model, {0: sae_for(model).to("cuda")}, backend="composite", preset="published").compile(images)
    compiled(images)
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        compiled(images)
        torch.cuda.synchronize()
    calls = collections.Counter(event.key for event in profile.events())
    assert calls["cudaGraphLaunch"] == 1
    assert not any(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in calls)
    assert calls["cudaMemcpyAsync"] <= 2


def test_small_classes_that_are_not_there_give_nan(tiny_vit: Build) -> None:
    model = tiny_vit(depth=2).to("cuda")
    images = torch.randn(2, *PIXELS, device="cuda")
    compiled = Explainer(model, backend="composite", preset="published").compile(images, target_mode="given")
    got = compiled(images, torch.tensor([1, 10_000], device="cuda")).relevance
    assert bool(got[0].isfinite().all()) and bool(got[1].isnan().all())
    with pytest.raises(ValueError, match=r"targets: .*10000"):
        compiled(images, 10_000)
