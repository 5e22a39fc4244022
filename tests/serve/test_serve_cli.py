"""`fga-fast serve` as a process: what it serves, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from fga_fast import Explainer, load_image
from fga_fast.assets import fashion_config, fashion_model, fashion_saes, fashion_scenes
from fga_fast.cli.main import main
from fga_fast.io.images import Preprocess
from fga_fast.serve.threads import apart

TOKEN = "a-long-token"


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def demo(tmp_path: Path) -> Any:
    pytest.importorskip("timm")
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    command = [sys.executable, "-m", "fga_fast.cli", "serve", "demo", "--port", "0", "--token-file", str(token)]
    process = subprocess.Popen(
        [*command, "--max-batch", "4", "--queue", "6"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def wanted() -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Scene -> of the predicted class and of class 1: the class, and its relevance."""
    config = fashion_config()
    explainer = Explainer(fashion_model(), fashion_saes())
    preprocess = Preprocess((config.model_args["img_size"],) * 2, config.mean, config.std)
    found = {}
    for path in fashion_scenes():
        answers = [explainer(preprocess(load_image(path))[None], target) for target in (None, 1)]
        found[str(path)] = [(int(answer.targets[0]), answer.relevance[0]) for answer in answers]
    return found


@pytest.mark.slow
def test_the_demo_under_load_until_it_is_ended(demo: subprocess.Popen[str]) -> None:
    """No answer is wrong, and every request has an answer or an error, before and after the signal."""
    expected = wanted()
    lines = [demo.stdout.readline() for _ in range(2)] if demo.stdout else []
    assert lines[0] == "fga-fast: the fashion demo model is warming up\n"
    url = lines[1].removeprefix("fga-fast: serving at ").strip()
    assert url.startswith("http://127.0.0.1:"), lines
    outcomes, sent, lock, over = Counter[str](), [0], threading.Lock(), threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(trust_env=False, timeout=30, headers={"Authorization": f"Bearer {TOKEN}"}) as http:
            while not over.is_set():
                path, given = fashion_scenes()[number % 6], number % 2
                number += 1
                with lock:
                    sent[0] += 1
                outcome = one(http, path, given)
                with lock:
                    outcomes[outcome] += 1
                if outcome == "lost":
                    time.sleep(0.05)

    def one(http: httpx.Client, path: Path, given: int) -> str:
        query = {"target": "Trouser"} if given else {}
        try:
            response = http.post(f"{url}/v1/explain", content=path.read_bytes(), params=query)
        except httpx.TransportError:
            return "lost"
        if response.status_code != 200:
            return str(response.json()["error"]["code"])
        got, (target, relevance) = response.json(), expected[str(path)][given]
        near = torch.allclose(torch.tensor(got["relevance"][0]), relevance, rtol=1e-3, atol=1e-5)
        return "right" if got["targets"] == [target] and near else "wrong"

    threads = [threading.Thread(target=ask, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while outcomes["right"] < 40 and time.monotonic() < end:
        time.sleep(0.02)
    before = outcomes.copy()
    demo.send_signal(signal.SIGTERM)
    demo.wait(20)
    over.set()
    for thread in threads:
        thread.join(30)
    assert before["right"] >= 40 and before["lost"] == 0
    assert outcomes.keys() <= {"right", "lost", "busy", "stopping"}
    assert sum(outcomes.values()) == sent[0]
    assert demo.returncode == -signal.SIGTERM
    assert demo.stderr is not None and "Traceback" not in demo.stderr.read()


@pytest.mark.parametrize(("given", "wanted"), [([], 1), (["--threads", "3"], 3)])
def test_threads_of_an_explanation(given: list[str], wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """New threads take so many; the demo's one leaves the other processors to a browser."""
    pytest.importorskip("timm")
    seen = list[int]()
    monkeypatch.setattr("fga_fast.serve.server.serve", lambda *_: seen.append(apart(torch.get_num_threads)))
    assert main(["serve", "demo", *given]) == 0
    assert seen == [wanted]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "expected exactly one of them"),
        (["demo", "--model", "vit_tiny_patch16_224"], "expected exactly one of them"),
        (["demo", "--queue", "0"], "queue: expected a number above 0, got 0"),
        (["demo", "--max-wait-ms", "-1"], "max_wait: expected a number above 0"),
        (["demo", "--token-file", "nowhere"], "No such file"),
        (["--package", "nowhere.pt2"], "package: no file nowhere.pt2"),
        (["demo", "--host", "192.0.2.1"], "192.0.2.1"),
        (["demo", "--top-features", "-1"], "top_features: expected"),
        (["demo", "--threads", "0"], "threads: expected at least 1, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments(
    given: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *given]) == 2
    assert told in capsys.readouterr().err


def test_short_tokens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    monkeypatch.setenv("FGA_FAST_TOKEN", "short")
    assert main(["serve", "demo", "--port", "0"]) == 2
    assert "token: expected at least 8" in capsys.readouterr().err
