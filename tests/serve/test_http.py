"""What the real server answers on a loopback port, over real connections."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import serving
import torch
from explaining import agree
from packages import NAMES, PREPROCESS
from PIL import Image
from serving import ask, client_of, code_of, same_numbers, until

from fga_fast import Difference, Explanation
from fga_fast.result.fields import flat

FORMS = ("application/json", "application/x-safetensors", "application/x-npz", "image/png")


@pytest.mark.parametrize(
    ("query", "targets"),
    [
        ({}, None),
        ({"target": "cat"}, "cat"),
        ({"target": ["4", "0"]}, [[4, 0]]),
        ({"target": "1", "rather_than": "dog"}, Difference(1, 3)),
        ({"target": "1", "top_features": 3}, 1),
    ],
    ids=["predicted", "name", "two", "difference", "features"],
)
def test_json_is_what_the_explainer_says(http: httpx.Client, query: dict[str, Any], targets: Any) -> None:
    response = ask(http, serving.png(5), **query)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    got, want = response.json(), serving.direct(serving.picture(5), targets, query.get("top_features", 0))
    count = want.targets[0].numel()
    assert (got["model"], got["image_size"], got["grid"]) == ("tiny", [16, 24], [2, 3])
    assert (got["probability_is"], got["signed"], got["notices"]) == ("softmax", True, [])
    assert got["targets"] == want.targets[0].reshape(-1).tolist()
    assert got["names"] == [NAMES[target] for target in got["targets"]]
    assert got["rather_than"] == (3 if "rather_than" in query else None)
    assert got["gate"] == {"base": 2.0, "slope": 1.0}
    assert want.values is not None and want.ungated is not None
    same_numbers(got["logits"], want.logits[0])
    same_numbers(got["values"], want.values[0].reshape(count))
    for name in ("relevance", "ungated"):
        same_numbers(got[name], getattr(want, name).reshape(count, 6))
    for name in ("scores", "gates"):
        assert got[name].keys() == {"0", "1"}
        for block, maps in getattr(want, name).items():
            same_numbers(got[name][str(block)], maps.reshape(count, 6))
    assert got["milliseconds"].keys() == {"decode", "queue", "explain", "pack", "total"}
    assert got["milliseconds"]["total"] >= got["milliseconds"]["explain"] > 0
    assert got["batch"] == 1
    if "top_features" not in query:
        assert "features" not in got
        return
    for block in (0, 1):
        for place, found in enumerate(got["features"][str(block)][0]):
            listed = want.top_features(block, patch=divmod(place, 3))[0]
            assert [feature for feature, _ in found] == [feature for feature, _ in listed]
            assert [value for _, value in found] == pytest.approx([value for _, value in listed])
            assert 0 < len(found) <= 3


def test_safetensors_is_a_saved_explanation(http: httpx.Client, tmp_path: Path) -> None:
    for query, targets in (({}, None), ({"target": ["2", "1"], "top_features": 2}, [[2, 1]])):
        response = ask(http, serving.png(6), FORMS[1], **query)
        assert response.headers["content-type"] == FORMS[1]
        path = tmp_path / "answer.safetensors"
        path.write_bytes(response.content)
        want = serving.direct(serving.picture(6), targets, 2 if query else 0)
        agree(Explanation.load(path), want, 1e-9)


def test_npz_has_the_arrays_of_the_explanation(http: httpx.Client) -> None:
    response = ask(http, serving.png(6), FORMS[2], target=["2", "1"], top_features=2)
    want = serving.direct(serving.picture(6), [[2, 1]], 2)
    expected = flat({k: v for k, v in vars(want).items() if isinstance(v, (torch.Tensor, dict))})
    with np.load(io.BytesIO(response.content), allow_pickle=False) as found:
        assert set(found) == {*expected, "grid", "image_size", "names", "notices"}
        for name, tensor in expected.items():
            same_numbers(found[name], tensor)
        assert (found["grid"].tolist(), found["names"].tolist()) == ([2, 3], NAMES)


def test_png_is_the_overlay(http: httpx.Client) -> None:
    query = {"target": ["2", "1"], "colormap": "viridis", "opacity": 0.25}
    response = ask(http, serving.png(6), FORMS[3], **query)
    want = serving.direct(serving.picture(6), [[2, 1]]).overlay(PREPROCESS.view(serving.picture(6)), "viridis", 0.25)
    got = np.asarray(Image.open(io.BytesIO(response.content)))
    assert np.array_equal(got, np.concatenate(list(want[0].numpy()), axis=1))
    assert response.headers["server-timing"].startswith("decode;dur=")


@pytest.mark.parametrize(
    ("accept", "given"),
    [
        ("", FORMS[0]), ("text/html, */*;q=0.1", FORMS[0]), ("application/*", FORMS[0]), ("image/*", FORMS[3]),
        ("application/json;q=0.2, application/x-npz", FORMS[2]), ("text/html", None), ("image/png;q=0", None),
        ("image/png;q=x", None),
    ],
)  # fmt: skip
def test_accept(http: httpx.Client, accept: str, given: str | None) -> None:
    response = ask(http, serving.png(), accept)
    if given is None:
        assert code_of(response) == (406, "not_acceptable")
    else:
        assert (response.status_code, response.headers["content-type"]) == (200, given)


def test_forms(http: httpx.Client) -> None:
    data = serving.png(8)
    want = ask(http, data, target="2").json()["relevance"]
    response = http.post("/v1/explain", files={"image": ("a.png", data, "image/png")}, params={"target": "2"})
    assert response.json()["relevance"] == want
    bad: list[Any] = [
        {"files": {"other": ("a.png", data)}}, {"files": [("image", ("a", data)), ("image", ("b", data))]},
        {"files": {"x": (None, b"text")}}, {"content": b"no form", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"no form", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ]  # fmt: skip
    for given in bad:
        assert code_of(http.post("/v1/explain", **given)) == (400, "bad_request")
    assert code_of(http.post("/v1/explain", files={"image": ("a", b"")})) == (400, "bad_image")
    assert code_of(http.post("/v1/explain", files={"image": ("a", bytes(200_000))})) == (413, "too_large")


def test_many_at_once_each_get_their_own() -> None:
    """Mixed questions are answered in common batches."""
    engine = serving.engine(serving.Held)
    with serving.running(engine) as server, ThreadPoolExecutor(12) as pool, client_of(server) as http:
        engine.hold()
        queries: list[dict[str, Any]] = [{}, {"target": "2"}, {"target": "1", "rather_than": "0"}]
        first = pool.submit(ask, http, serving.png(0))
        assert engine.begun.acquire(timeout=10)
        rest = [pool.submit(ask, http, serving.png(n), **queries[n % 3]) for n in range(1, 12)]
        until(lambda: b"fga_fast_queue_length 11.0" in http.get("/metrics").content)
        engine.go.set()
        batches = list[int]()
        for number, response in enumerate([first, *rest]):
            got = response.result().json()
            targets = (None, 2, Difference(1, 0))[number % 3]
            want = serving.direct(serving.picture(number), targets)
            same_numbers(got["relevance"], want.relevance)
            batches.append(got["batch"])
        assert sorted(batches) == [1, *[3] * 3, *[8] * 8]
        assert 'fga_fast_batch_size_bucket{le="8.0"}' in http.get("/metrics").text
