"""The native SAE format: round trips, saving whole or not at all, damaged files; and paths that hold no SAE."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import C, F, RunsOnLoad, state_dict, tokens, touch
from formats_case import refused
from safetensors.torch import save_file

from fga_fast.io.safetensors_file import MAX_HEADER_BYTES
from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.formats import native


def native_sae(activation: str = "relu", dtype: torch.dtype = torch.float32) -> SparseAutoencoder:
    extra: dict[str, Any] = {}
    if activation in ("topk", "topk_signed"):
        extra["k"] = 4
    if activation == "jumprelu":
        extra["threshold"] = torch.rand(F, generator=torch.Generator().manual_seed(1)).to(dtype)
    if activation == "batch_topk":
        extra |= {"k": 3, "threshold": 0.3}
    state = state_dict(activation == "gated", dtype)
    settings = {"normalize": "constant_norm", "metadata": {"layer": "3"}, "expected_l0": 2.5}
    return SparseAutoencoder(**state, activation=activation, **settings, **extra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "topk", "topk_signed", "jumprelu", "batch_topk", "gated"])
def test_native_round_trip(tmp_path: Path, activation: str, dtype: torch.dtype) -> None:
    sae = native_sae(activation, dtype)
    assert sae.save(tmp_path / "sae") == tmp_path / "sae"
    for path in (tmp_path / "sae", tmp_path / "sae" / "sae.safetensors"):
        back = SparseAutoencoder.from_pretrained(path)
        assert repr(back) == repr(sae) and back.dtype == dtype
        assert back.state_dict().keys() == sae.state_dict().keys()
        assert all(torch.equal(value, back.state_dict()[name]) for name, value in sae.state_dict().items())
        assert torch.equal(back.encode(tokens(dtype)), sae.encode(tokens(dtype)))
        assert back.W_enc.t().is_contiguous()
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["config.json", "sae", "sae.safetensors"]


def test_native_without_encoder_bias(tmp_path: Path) -> None:
    state = state_dict() | {"b_enc": None}
    SparseAutoencoder(**state).save(str(tmp_path / "sae"))
    assert SparseAutoencoder.from_pretrained(str(tmp_path / "sae")).b_enc is None


@pytest.mark.parametrize(("stored", "expected"), [("3.5", 3.5), ("many", None), ("nan", None), ("11", None)])
def test_files_that_keep_l0_in_their_metadata(saved: Path, stored: str, expected: float | None) -> None:
    entries = json.loads((saved / native.CONFIG).read_text()) | {"metadata": {"l0": stored}}
    assert entries.pop("expected_l0") == 2.5
    (saved / native.CONFIG).write_text(json.dumps(entries))
    sae = SparseAutoencoder.from_pretrained(saved)
    assert (sae.expected_l0, sae.metadata) == (expected, {"l0": stored})


def test_native_save_replaces_an_earlier_one(tmp_path: Path) -> None:
    native_sae("topk").save(tmp_path)
    (tmp_path / "card.md").write_text("kept")
    native_sae("gated").save(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path).activation == "gated"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["card.md", "config.json", "sae.safetensors"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("failing", ["mkdir", "write_text", "replace"])
def test_failed_save_leaves_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, existing: bool
) -> None:
    folder = tmp_path / "sae"
    if existing:
        native_sae("topk").save(folder)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, failing, refuse)
        with pytest.raises(PermissionError):
            native_sae("gated").save(folder)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert folder.exists() == existing


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        native_sae().save(tmp_path / "sae")
    tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


def test_what_save_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(NotADirectoryError, match="expected a folder to save the SAE in, got a file"):
        native_sae().save(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="make it before saving the SAE in sae"):
        native_sae().save(tmp_path / "missing" / "sae")
    sae = native_sae()
    sae.expected_l0 = 0.0
    with pytest.raises(ValueError, match="expected_l0: expected 0 < expected_l0 <= 10"):
        sae.save(tmp_path / "sae")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def rewrite_header(weights: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = weights.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    native_sae("gated").save(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize("keep", [0, 7, 8, 60, 900, -1])
def test_native_truncated(saved: Path, keep: int) -> None:
    weights = saved / native.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"sae\.safetensors: truncated"):
        SparseAutoencoder.from_pretrained(saved)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**40, 2**64 - 1])
def test_native_oversized_header(saved: Path, length: int) -> None:
    weights = saved / native.WEIGHTS
    weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])
    with pytest.raises(ValueError, match=rf"a header of {length} bytes, over the limit of {MAX_HEADER_BYTES}"):
        SparseAutoencoder.from_pretrained(saved)


HEADER_CASES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda h: h.pop("W_dec"), "not a readable safetensors file"),
    (lambda h: h.update(W_skip=h.pop("b_mag")), "tensors missing: none; not known: W_skip"),
    (lambda h: h["W_enc"].update(shape=[F, C]), "W_enc: expected {'d_model': 6, 'd_sae': 10"),
    (lambda h: h["W_enc"].update(shape=[C, 10**15]), "not a readable safetensors file"),
    (lambda h: h["b_dec"].update(dtype="I32"), "b_dec: expected a dense floating-point tensor, got torch.int32"),
    (lambda h: h["b_dec"].update(dtype="F64"), "not a readable safetensors file"),
    (lambda h: h.update(b_dec=[1, 2]), "not a readable safetensors file"),
    (lambda h: h["b_dec"].update(data_offsets=[0, 10**12]), "not a readable safetensors file"),
    (lambda h: h.pop("__metadata__"), "do not belong together"),
]


@pytest.mark.parametrize(("change", "message"), HEADER_CASES)
def test_native_header_that_lies(saved: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    rewrite_header(saved / native.WEIGHTS, change)
    refused(saved, message)


@pytest.mark.parametrize("text", [b"{" * 100_000, b"[" * 100_000, b"[1]", b"\xff\xfe", b"nonsense", b'{"k": NaN}', b""])
def test_broken_json(saved: Path, text: bytes) -> None:
    (saved / native.CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json: (.*not valid JSON|expected a JSON object)"):
        SparseAutoencoder.from_pretrained(saved)


def test_oversized_json(saved: Path) -> None:
    (saved / native.CONFIG).write_bytes(b" " * (1 << 20) + b"{}")
    refused(saved, "expected a file of at most 1048576 bytes, got 1048578")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format: expected 'fga_fast.sae', got 'other'"),
        ({"format_version": 2}, "format_version: expected 1, got 2"),
        ({"k": ...}, "missing k"),
        ({"d_sae": "10"}, "W_enc: expected {'d_model': 6, 'd_sae': '10', 'dtype'"),
        ({"d_model": -1}, "expected {'d_model': -1, "),
        ({"d_model": True}, "expected {'d_model': True, "),
        ({"dtype": "int8"}, "'dtype': 'int8'} (from config.json), got shape [6, 10], torch.float32"),
        ({"metadata": {"a": 1}}, "metadata['a']: expected str keys and values"),
        ({"activation": "relu"}, "do not belong together"),
        ({"normalize": "layer_norm"}, "do not belong together"),
        ({"d_sae": F + 1}, "(from config.json), got"),
    ],
)
def test_native_config_that_lies(saved: Path, change: dict[str, Any], message: str) -> None:
    entries = json.loads((saved / native.CONFIG).read_text()) | change
    (saved / native.CONFIG).write_text(json.dumps({k: v for k, v in entries.items() if v is not ...}))
    refused(saved, message)


WRONG = (("activation", "gelu"), ("k", "four"), ("k", 3), ("normalize", [1]), ("expected_l0", 0), ("expected_l0", []))


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_native_settings_that_agree_and_are_wrong(saved: Path, name: str, value: Any) -> None:
    entries = json.loads((saved / native.CONFIG).read_text()) | {name: value}
    (saved / native.CONFIG).write_text(json.dumps(entries))
    copy = json.dumps({key: entries[key] for key in entries if key not in ("metadata", "expected_l0")})
    rewrite_header(saved / native.WEIGHTS, lambda h: h["__metadata__"].update(fga_fast=copy))
    with pytest.raises(ValueError, match=f"sae: {name}: "):
        SparseAutoencoder.from_pretrained(saved)


def test_native_nan_names_the_tensor(saved: Path) -> None:
    weights = saved / native.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4] + struct.pack("<f", float("nan")))
    with pytest.raises(ValueError, match=r"sae: \w+: holds NaN or Inf \(1 of"):
        SparseAutoencoder.from_pretrained(saved)


@pytest.mark.parametrize("missing", [native.WEIGHTS, native.CONFIG])
def test_native_missing_file(saved: Path, missing: str) -> None:
    (saved / missing).unlink()
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        SparseAutoencoder.from_pretrained(saved)
    assert "sae.safetensors" in str(caught.value) or "config.json: no such file" in str(caught.value)


def test_native_keeps_its_normalisation(saved: Path) -> None:
    refused(saved, "stores its own, or needs none; got normalize=None", normalize=None)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no such file or folder \(nothing is downloaded\); expected a folder with"
    ):
        SparseAutoencoder.from_pretrained(tmp_path / "Prisma-Multimodal" / "sae")


def test_unknown_folder_and_file(tmp_path: Path) -> None:
    refused(tmp_path, "found nothing")
    save_file({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=r"not an SAE checkpoint .*; model\.safetensors holds bias, weight"):
            SparseAutoencoder.from_pretrained(path)
    (tmp_path / "model.onnx").write_bytes(b"\x08")
    with pytest.raises(ValueError, match=r"not an SAE checkpoint that can be read; .*; found model\.onnx"):
        SparseAutoencoder.from_pretrained(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["n_images_1.pkl.gz", "n_images_1.pkl", "sae.pickle"])
@pytest.mark.parametrize("allow", [False, True])
def test_raw_pickles_are_refused_by_name(tmp_path: Path, name: str, allow: bool) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(RunsOnLoad(touch, str(tmp_path / "marker"))))
    with pytest.raises(ValueError, match=r"a raw pickle \(.* can run any code when it is read, and is refused"):
        SparseAutoencoder.from_pretrained(tmp_path / name, allow_pickled_config=allow)
    assert not (tmp_path / "marker").exists()
