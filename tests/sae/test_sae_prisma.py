"""ViT-Prisma's two layouts: what is read from them, and which settings and tensors are refused."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import MODULE, C, F, config, public_folder, state_dict, tokens, trainer_file
from formats_case import refused

from fga_fast.sae import SparseAutoencoder


@pytest.mark.parametrize(
    ("stored", "normalize"),
    [(None, None), ("none", None), ("layer_norm", "layer_norm"), ("constant_norm_rescale", "constant_norm")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prisma_public_layout(tmp_path: Path, stored: str | None, normalize: str | None, dtype: torch.dtype) -> None:
    state = state_dict(dtype=dtype)
    folder = public_folder(tmp_path / "sae", state, normalize_activations=stored)
    expected = SparseAutoencoder(**state, normalize=normalize)
    for path in (folder, folder / "n_images_2600058.pt"):
        sae = SparseAutoencoder.from_pretrained(path)
        assert torch.equal(sae.encode(tokens(dtype)), expected.encode(tokens(dtype)))
        assert (sae.normalize, sae.activation, sae.dtype) == (normalize, "relu", dtype)
        assert sae.metadata == {
            "source_format": "vit-prisma",
            "source_file": "n_images_2600058.pt",
            "hook": "blocks.9.hook_resid_post",
            "layer": "9",  # not the 6 that cached_activations_path names
            "model_name": "open-clip:laion/some-model",
        }


def test_prisma_topk_and_gated(tmp_path: Path) -> None:
    kwargs = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    topk = SparseAutoencoder.from_pretrained(public_folder(tmp_path / "topk", **kwargs))
    assert (topk.activation, topk.k) == ("topk", 3)
    state = state_dict(gated=True)
    gated = SparseAutoencoder.from_pretrained(public_folder(tmp_path / "gated", state, architecture="gated"))
    expected = SparseAutoencoder(**state, activation="gated", normalize="layer_norm")
    assert torch.equal(gated.encode(tokens()), expected.encode(tokens()))
    del state["b_enc"]  # unused by gated SAEs
    again = SparseAutoencoder.from_pretrained(public_folder(tmp_path / "bare", state, architecture=...))
    assert torch.equal(again.encode(tokens()), expected.encode(tokens()))


def test_prisma_trainer_layout_needs_the_flag(tmp_path: Path) -> None:
    file = trainer_file(tmp_path / "n_images_20.pt")
    with pytest.raises(
        ValueError, match=r"pickled object \(fake_prisma\.sae\.config\.VisionModelSAERunnerConfig\).*allow"
    ):
        SparseAutoencoder.from_pretrained(file)


@pytest.mark.parametrize("gated", [False, True])
def test_prisma_trainer_layout(tmp_path: Path, gated: bool) -> None:
    state = state_dict(gated)
    file = trainer_file(tmp_path / "n_images_20.pt", state, architecture="gated" if gated else "standard")
    shutil.copy(file, tmp_path / "n_images_20_log_feature_sparsity.pt")  # written beside it; not an SAE
    # The configuration is the one in the file: one beside it belongs to something else.
    (tmp_path / "config.json").write_text(json.dumps(config(normalize_activations=None)))
    expected = SparseAutoencoder(**state, activation="gated" if gated else "relu", normalize="layer_norm")
    for path in (file, tmp_path):
        sae = SparseAutoencoder.from_pretrained(path, allow_pickled_config=True)
        assert torch.equal(sae.encode(tokens()), expected.encode(tokens())) and sae.metadata["layer"] == "9"
    assert MODULE not in sys.modules


def test_prisma_plain_dict_configuration_needs_no_flag(tmp_path: Path) -> None:
    torch.save({"cfg": config(), "state_dict": state_dict()}, tmp_path / "sae.pt")
    assert SparseAutoencoder.from_pretrained(tmp_path / "sae.pt").normalize == "layer_norm"


CONFIG_CASES: list[tuple[dict[str, Any], str]] = [
    ({"normalize_activations": ...}, "normalize_activations is missing, and ViT-Prisma's default changed over time"),
    ({"normalize_activations": "batch"}, "normalize_activations: expected one of None, 'none', 'layer_norm'"),
    ({"normalize_activations": True}, "normalize_activations: expected one of"),
    ({"normalize_activations": []}, "normalize_activations: expected one of"),
    ({"cls_token_only": True}, "cls_token_only: this SAE was trained on the class token only"),
    ({"is_transcoder": True}, "is_transcoder: a transcoder's decoder writes to another space"),
    ({"hook_point_head_index": 3}, "hook_point_head_index: expected null"),
    ({"layer_subtype": "hook_mlp_out"}, "layer_subtype: expected 'hook_resid_post'"),
    ({"layer_subtype": ..., "hook_point": "blocks.9.hook_mlp_out"}, "layer_subtype: expected 'hook_resid_post'"),
    ({"activation_fn_str": "tanh-relu"}, "activation_fn_str: 'tanh-relu' is not supported"),
    ({"activation_fn_str": "gelu"}, "activation_fn_str: expected 'relu' or topk for this SAE, got 'gelu'"),
    ({"activation_fn_str": ...}, "activation_fn_str: expected 'relu' or topk for this SAE, got None"),
    ({"activation_fn_str": "topk"}, "activation_fn_kwargs.k: activation 'topk' needs an integer, got None"),
    ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 99}}, "k: expected 1 <= k <= 10"),
    ({"architecture": "jumprelu"}, "architecture: the weights are those of a standard SAE, got 'jumprelu'"),
    ({"architecture": "gated"}, "architecture: the weights are those of a standard SAE, got 'gated'"),
    ({"d_in": 768}, "d_in: the weights have 6, got 768; files of different SAEs?"),
    ({"d_sae": 11}, "d_sae: the weights have 10, got 11"),
]


@pytest.mark.parametrize("layout", ["public", "trainer"])
@pytest.mark.parametrize(("changes", "message"), CONFIG_CASES)
def test_prisma_configurations_that_are_refused(
    tmp_path: Path, layout: str, changes: dict[str, Any], message: str
) -> None:
    if layout == "public":
        path = public_folder(tmp_path / "sae", **changes)
    else:
        path = trainer_file(tmp_path / "sae.pt", **changes)
    refused(path, message, allow_pickled_config=True)


def test_prisma_missing_normalisation_may_be_given(tmp_path: Path) -> None:
    folder = public_folder(tmp_path / "old", normalize_activations=...)
    for given in (None, "layer_norm", "constant_norm"):
        assert SparseAutoencoder.from_pretrained(folder, normalize=given).normalize == given
    refused(folder, "normalize: expected None or one of", normalize="rms")
    new = public_folder(tmp_path / "new")
    assert SparseAutoencoder.from_pretrained(new, normalize="layer_norm").normalize == "layer_norm"
    refused(new, "says 'layer_norm', got None; leave normalize out", normalize=None)


def test_prisma_unnamed_activations_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = public_folder(tmp_path / "sae", layer_subtype=...)
    with caplog.at_level(logging.WARNING, logger="fga_fast"):
        SparseAutoencoder.from_pretrained(folder)
    assert "does not say which activations the SAE was trained on" in caplog.text


STATE_CASES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda s: s.pop("W_dec"), "tensors missing: W_dec; not known: none"),
    (lambda s: s.pop("b_enc"), "tensors missing: b_enc"),
    (lambda s: s.update(r_mag=torch.zeros(F)), "tensors missing: b_gate, b_mag"),
    (lambda s: s.update(W_skip=torch.zeros(C, C)), "not known: W_skip"),
    (lambda s: s.update(W_dec=s["W_dec"].t()), "W_dec: expected shape [10, 6] ([F, C], from W_enc"),
    (lambda s: s.update(W_dec=s["W_dec"].t()), "it looks transposed"),
    (lambda s: s.update(W_enc=s["W_enc"].t(), W_dec=s["W_dec"].t()), "b_dec: expected shape [10], got [6]"),
    (lambda s: s.update(W_dec=s["W_dec"].double()), "W_dec: expected dtype torch.float32"),
    (lambda s: s.update(b_dec=[0.0] * C), "b_dec: expected a dense floating-point tensor, got list"),
    (lambda s: s.update(W_enc=torch.zeros(1).expand(C, F)), "W_enc: claims 240 bytes, the file stores 4"),
    (lambda s: s["W_enc"].fill_(float("nan")), "W_enc: holds NaN or Inf (60 of 60 elements"),
]


@pytest.mark.parametrize(("change", "message"), STATE_CASES)
def test_prisma_tensors_that_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    state: dict[str, Any] = state_dict()
    change(state)
    refused(public_folder(tmp_path / "sae", state), message)


def test_prisma_strided_weights(tmp_path: Path) -> None:
    state = state_dict()
    tied = state["W_dec"]
    state["W_enc"] = tied.t()  # tied initialisation: a view of the same storage
    sae = SparseAutoencoder.from_pretrained(public_folder(tmp_path / "sae", state))
    assert torch.equal(sae.W_enc, tied.t()) and torch.equal(sae.W_dec, tied)


def test_prisma_which_file(tmp_path: Path) -> None:
    folder = public_folder(tmp_path / "sae")
    shutil.copy(folder / "n_images_2600058.pt", folder / "n_images_5.pt")
    with pytest.raises(ValueError, match=r"expected one \.pt file, got 2 \(n_images_2600058\.pt, n_images_5\.pt\)"):
        SparseAutoencoder.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        SparseAutoencoder.from_pretrained(folder / "n_images_5.pt")
    for file in folder.glob("*.pt"):
        file.unlink()
    sparsity = folder / "n_images_5_log_feature_sparsity.pt"
    torch.save(torch.zeros(F), sparsity)
    with pytest.raises(FileNotFoundError, match="no SAE weights"):
        SparseAutoencoder.from_pretrained(folder)
    refused(sparsity, "holds the features' sparsity, not an SAE")


def test_prisma_configuration_names_no_files_that_are_followed(tmp_path: Path) -> None:
    other = public_folder(tmp_path / "other", {name: value + 1 for name, value in state_dict().items()})
    target = str(other / "n_images_2600058.pt")
    folder = public_folder(
        tmp_path / "sae", from_pretrained_path=target, checkpoint_path=target, cached_activations_path=target
    )
    assert torch.equal(SparseAutoencoder.from_pretrained(folder).W_dec, state_dict()["W_dec"])
