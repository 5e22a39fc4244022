"""Answers as JSON, safetensors, npz and PNG."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from fga_fast.question.names import whole_label
from fga_fast.result.explanation import Explanation
from fga_fast.result.fields import flat
from fga_fast.result.file import to_bytes
from fga_fast.serve.engine import Answered, Facts, Picture
from fga_fast.serve.limits import Refused
from fga_fast.serve.questions import Question

JSON, SAFETENSORS, NPZ, PNG = "application/json", "application/x-safetensors", "application/x-npz", "image/png"
FORMS = (JSON, SAFETENSORS, NPZ, PNG)


class Form(NamedTuple):
    """How an answer is to look."""

    media_type: str = JSON  # one of FORMS
    opacity: float = 0.5  # of PNG, in [0, 1]
    colormap: str | None = None  # of PNG; see `Explanation.overlay`


class Packed(NamedTuple):
    """A finished answer."""

    content: bytes
    media_type: str
    milliseconds: dict[str, float]


def wanted(accept: str) -> str:
    """The first form that an Accept header takes; of equal ones JSON.

    Raises:
        Refused: it takes none.
    """
    ranked: list[tuple[float, str]] = []
    for part in (accept or "*/*").split(","):
        kind, *parameters = (word.strip().lower() for word in part.split(";"))
        quality = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        known = next((form for form in FORMS if kind in (form, form.split("/")[0] + "/*", "*/*")), None)
        try:
            if known is not None and float(quality) > 0:
                ranked.append((float(quality), known))
        except ValueError:
            continue
    if not ranked:
        raise Refused("not_acceptable", f"Accept: expected one of {', '.join(FORMS)}, got {accept[:80]!r}")
    return max(ranked, key=lambda pair: pair[0])[1]


def pack(
    answer: Answered, picture: Picture, question: Question, facts: Facts, form: Form, milliseconds: dict[str, float],
    began: float, extra: dict[str, Any],
) -> Packed:  # fmt: skip
    """An answer in the form that was asked for.

    Args:
        milliseconds: of the stages before this one; "pack" and "total" are added.
        began: `time.perf_counter()` at the start of the request.
        extra: entries to add to JSON.
    """
    start, explanation = time.perf_counter(), answer.explanation
    content = b""
    fields: dict[str, Any] = {}
    if form.media_type == SAFETENSORS:
        content = to_bytes(vars(explanation))
    elif form.media_type == NPZ:
        content = _npz(explanation)
    elif form.media_type == PNG:
        content = _png(explanation, picture, form)
    else:
        fields = {**_fields(explanation, question, facts), "view": list(picture.box)}
    now = time.perf_counter()
    taken = {**milliseconds, "pack": 1000 * (now - start), "total": 1000 * (now - began)}
    taken = {name: round(value, 3) for name, value in taken.items()}
    if form.media_type == JSON:
        content = json_bytes({**extra, **fields, "milliseconds": taken, "batch": answer.batch})
    return Packed(content, form.media_type, taken)


def json_bytes(content: Any) -> bytes:
    """JSON in UTF-8, without NaN and Inf, which JSON has not."""
    return json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def _fields(explanation: Explanation, question: Question, facts: Facts) -> dict[str, Any]:
    targets = explanation.targets[0].reshape(-1).tolist()
    values = explanation.values
    return {
        "model": facts.model,
        "image_size": list(explanation.image_size),
        "grid": list(explanation.grid),
        "probability_is": facts.probability_is,
        "logits": explanation.logits[0].tolist(),
        "targets": targets,
        "names": [whole_label(target, explanation.names) for target in targets],
        "values": [] if values is None else values[0].reshape(-1).tolist(),
        "rather_than": question.rather_than,
        "relevance": _maps(explanation.relevance),
        "signed": facts.signed,
        "ungated": None if explanation.ungated is None else _maps(explanation.ungated),
        "scores": {str(block): _maps(scores) for block, scores in sorted(explanation.scores.items())},
        "gates": {str(block): _maps(gates) for block, gates in sorted(explanation.gates.items())},
        "gate": facts.gate,
        "notices": list(explanation.notices),
    } | ({"features": _features(explanation)} if question.top_features else {})


def _maps(maps: Tensor) -> list[list[float]]:  # [1, (K,) P] -> K lists of P
    found: list[list[float]] = maps.flatten(0, -2).tolist()
    return found


def _features(explanation: Explanation) -> dict[str, Any]:
    """Block -> for each target and patch the strongest features as [feature, contribution], strongest first."""
    found = {}
    for block, top in sorted(explanation.features.items()):
        index, value = (part.flatten(0, -3).tolist() for part in (top.patch_index, top.patch_contribution))
        found[str(block)] = [
            [_pairs(*patch) for patch in zip(*target, strict=True)] for target in zip(index, value, strict=True)
        ]
    return found


def _pairs(index: Sequence[int], value: Sequence[float]) -> list[list[float]]:
    return [[i, v] for i, v in zip(index, value, strict=True) if i >= 0]  # -1: none


def _npz(explanation: Explanation) -> bytes:
    """Arrays by the names that saved explanations have ("relevance", "gates.2"), with "grid", "names" and so on."""
    arrays = {name: tensor.numpy() for name, tensor in flat(_tensor_fields(explanation)).items()}
    arrays |= {name: np.asarray(getattr(explanation, name)) for name in ("grid", "image_size", "notices")}
    if explanation.names is not None:
        arrays["names"] = np.asarray(explanation.names)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _tensor_fields(explanation: Explanation) -> dict[str, Any]:
    """The fields that are tensors, or hold tensors."""
    return {name: value for name, value in vars(explanation).items() if isinstance(value, (Tensor, dict))}


def _png(explanation: Explanation, picture: Picture, form: Form) -> bytes:
    """The heat map over what the model saw; of several targets side by side."""
    painted = explanation.overlay(picture.view.convert("RGB"), form.colormap, form.opacity)
    tiles = painted.flatten(0, -4)  # [K, H, W, 3]
    buffer = io.BytesIO()
    Image.fromarray(tiles.transpose(0, 1).flatten(1, 2).numpy()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
