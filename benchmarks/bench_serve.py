"""`fga-fast serve` under load: what requests take beyond the explanation, and how near to its rate the service comes.

A real server in a process of its own, asked over HTTP from this one, beside the explainer alone in the same run. Client
and server share the processors.
"""

from __future__ import annotations

import http.client
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from conftest import Scale
from peak import resident_bytes
from rows import Row
from torch import Tensor, nn

from fga_fast import Explainer
from fga_fast.assets import fashion_model, fashion_saes, fashion_scenes

CLIENTS = (1, 8, 32, 128)
CHROMIUM = os.environ.get("FGA_FAST_CHROMIUM", "/usr/bin/chromium")
BATCH = 8
DEADLINE = 600  # seconds, more than the queue of the slowest model takes


def vit() -> nn.Module:
    import timm

    found: nn.Module = timm.create_model("vit_base_patch16_224").eval()
    return found


# Name -> (arguments of the command, explainer, side of its images)
SERVED: dict[str, tuple[list[str], Callable[[], Explainer], int]] = {
    "demo": (["demo"], lambda: Explainer(fashion_model(), fashion_saes(), ungated=True), 56),
    "ViT-B/16": (["--model", "vit_base_patch16_224", "--random-weights"], lambda: Explainer(vit()), 224),
}


@contextmanager
def serving(arguments: list[str]) -> Iterator[tuple[str, int]]:
    """The address and process of a server."""
    command = [sys.executable, "-m", "fga_fast.cli", "serve", *arguments, "--port", "0", "--queue", "256"]
    command += ["--deadline-ms", str(1000 * DEADLINE)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        url = next((line.split()[-1] for line in lines if "serving at" in line), None)
        if url is None:
            raise RuntimeError(f"{' '.join(command)} ended before it served; see above")
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


class Load(NamedTuple):
    """What came of requests."""

    took: list[float]  # seconds of each
    batches: list[int]  # how many were explained together with each
    beside: list[float]  # seconds that the server spent on each beside the explanation
    duration: float  # seconds


def load(url: str, clients: int, seconds: float, requests: int | None = None) -> Load:
    """Asks from clients that ask again at once, each with a connection of its own.

    Every other request names its class. It ends after `seconds`, or after so many requests. The client is the standard
    library's, since those with more comfort take milliseconds a request from the processors that the server needs.
    """
    pictures = [path.read_bytes() for path in fashion_scenes()]
    took, batches, beside = list[float](), list[int](), list[float]()

    def ask(_: int) -> None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=DEADLINE)
        for number in numbers:
            start = time.perf_counter()
            if start > end:
                break
            query = f"?target={number % 9}" if number % 2 else ""
            connection.request("POST", f"/v1/explain{query}", pictures[number % len(pictures)])
            reply = connection.getresponse()
            content = reply.read()
            took.append(time.perf_counter() - start)
            if reply.status != 200:
                raise RuntimeError(content.decode())
            answer = json.loads(content)
            batches.append(answer["batch"])
            beside.append((answer["milliseconds"]["total"] - answer["milliseconds"]["explain"]) / 1000)
        connection.close()

    start = time.perf_counter()
    end = start + seconds
    numbers = itertools.count() if requests is None else iter(range(requests))
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    return Load(took, batches, beside, time.perf_counter() - start)


def alone(explainer: Explainer, images: Tensor, seconds: float) -> list[float]:
    """Seconds of each call of the explainer alone."""
    took = list[float]()
    end = time.perf_counter() + seconds
    while not took or time.perf_counter() < end:
        start = time.perf_counter()
        explainer(images)
        took.append(time.perf_counter() - start)
    return took


@pytest.mark.parametrize("name", SERVED)
def test_load(name: str, scale: Scale, record: Callable[[Row], None]) -> None:
    """Each load in turn with the explainer alone, since the machine's speed changes from minute to minute."""
    arguments, make, side = SERVED[name]
    explainer, seconds = make(), 1.0 if scale.quick else 20.0
    blank = Row("serve", "", 1, explainer.layout.tokens, threads=torch.get_num_threads())
    images = {batch: torch.rand(batch, 3, side, side) for batch in (1, BATCH)}
    took: dict[int, list[float]] = {1: [], BATCH: []}
    for batch in images:
        alone(explainer, images[batch], 0)
    with serving([*arguments, "--threads", str(blank.threads)]) as (url, _):
        for clients in CLIENTS[: 2 if scale.quick else None]:
            batch = 1 if clients == 1 else BATCH
            load(url, clients, seconds / 4)
            before = alone(explainer, images[batch], seconds / 2)
            found = load(url, clients, seconds)
            around = [*before, *alone(explainer, images[batch], seconds / 2)]
            took[batch] += around
            rate = len(found.took) / found.duration
            record(row(blank, f"{name}, {clients} clients", clients, found.took, rate, compared(found, batch, around)))
    for batch, all_of_them in took.items():
        rate = batch / statistics.median(all_of_them)
        record(row(blank, f"{name}, explainer alone", batch, all_of_them, rate))


def compared(found: Load, batch: int, around: list[float]) -> str:
    """A load beside the explainer alone, which took `around` seconds for so many images just before and after."""
    # A request counts once in a batch of its own, and eight times in a batch of eight.
    note = f"mean batch {len(found.batches) / sum(1 / size for size in found.batches):.1f}"
    median = statistics.median(around)
    if batch == 1:
        note += f", {1e3 * (statistics.median(found.took) - median):.1f} ms over the explainer alone"
        return f"{note}, {1e3 * statistics.median(found.beside):.1f} ms in the server beside its explainer"
    share = len(found.took) / found.duration * statistics.mean(around) / batch
    return f"{note}, {100 * share:.0f} % of the explainer's rate in batches of {batch}"


def test_memory(scale: Scale, record: Callable[[Row], None]) -> None:
    """What 20,000 requests leave behind."""
    first, all_of_them = (100, 400) if scale.quick else (2_000, 20_000)
    with serving(SERVED["demo"][0]) as (url, process):
        load(url, BATCH, math.inf, first)
        before = resident_bytes(process)
        took, _, _, total = load(url, BATCH, math.inf, all_of_them - first)
        after = resident_bytes(process)
    blank = Row("serve", "", BATCH, 65, threads=1)
    note = f"resident {before / 2**20:.0f} MiB after {first} requests, {after / 2**20:.0f} MiB after {all_of_them}"
    record(row(blank, f"demo, {all_of_them} requests of {BATCH} clients", BATCH, took, len(took) / total, note))


@pytest.mark.parametrize("more", [[], ["--compile", "--max-batch", "1"]], ids=["eager", "compiled"])
def test_webcam(more: list[str], scale: Scale, record: Callable[[Row], None]) -> None:
    """Frames a second that the page shows, of a fake camera's 30. Browser and server share the processors."""
    browser = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream=fps=30", "--use-fake-ui-for-media-stream"]
    with serving([*SERVED["demo"][0], *more]) as (url, _), browser.sync_playwright() as started:
        page = started.chromium.launch(executable_path=CHROMIUM, args=flags).new_page()
        page.goto(url)
        page.locator("#webcam").click()
        said = []
        for _ in range(2 if scale.quick else 12):  # the page counts over two seconds
            page.wait_for_timeout(2500)
            said.append(page.locator("#pace").inner_text())
    rates = [float(text.split()[0]) for text in said[1:]]
    blank = Row("serve", " ".join(["demo, webcam page", *more]), 1, 65, threads=1, rounds=len(rates))
    record(replace(blank, images_per_s=statistics.median(rates), note=f"frames shown; in the end: {said[-1]}"))


def row(blank: Row, name: str, batch: int, took: list[float], rate: float, note: str = "") -> Row:
    ranked = sorted(took)
    return replace(
        blank, name=name, batch=batch, rounds=len(took), median_s=statistics.median(took), min_s=ranked[0],
        p99_s=ranked[int(0.99 * (len(ranked) - 1))], images_per_s=rate, note=note,
    )  # fmt: skip
