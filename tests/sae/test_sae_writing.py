"""SAEs written in the layouts of SAELens and saev: what is in the files, what comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import C, F, state_dict, tokens
from safetensors.torch import load_file

from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.formats import saev

SAELENS = [
    ("relu", None), ("relu", "layer_norm"), ("topk", None), ("topk", "constant_norm"), ("jumprelu", None),
    ("batch_topk", None), ("gated", None), ("gated", "layer_norm"),
]  # fmt: skip


def built(activation: str, normalize: str | None = None, **changes: Any) -> SparseAutoencoder:
    extra: dict[str, Any] = {}
    if "topk" in activation:
        extra["k"] = 4
    if activation == "jumprelu":
        extra["threshold"] = torch.rand(F, generator=torch.Generator().manual_seed(1))
    if activation == "batch_topk":
        extra["threshold"] = 0.3
    metadata = {"layer": "3", "model_name": "some-vit", "note": "mine"}
    state = state_dict(activation == "gated") | changes
    return SparseAutoencoder(
        **state, activation=activation, normalize=normalize, metadata=metadata, expected_l0=2.5, **extra
    )


def same_codes(sae: SparseAutoencoder, other: SparseAutoencoder) -> None:
    x = tokens()
    assert 0 < int((sae.encode(x) != 0).sum()) < sae.encode(x).numel()
    torch.testing.assert_close(other.encode(x), sae.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other(x), sae(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("activation", "normalize"), SAELENS)
def test_saelens_comes_back(tmp_path: Path, activation: str, normalize: str | None) -> None:
    sae = built(activation, normalize)
    assert sae.save(tmp_path / "sae", format="saelens") == tmp_path / "sae"
    back = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    same_codes(sae, back)
    assert back.activation == ("jumprelu" if activation == "batch_topk" else activation)
    assert (back.k, back.normalize) == (4 if activation == "topk" else None, normalize)
    assert back.expected_l0 == 2.5
    assert back.metadata["layer"] == "3" and back.metadata["model_name"] == "some-vit"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["cfg.json", "sae", "sae_weights.safetensors"]


def test_what_saelens_looks_for(tmp_path: Path) -> None:
    sae = built("batch_topk", "constant_norm")
    sae.save(tmp_path, format="saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    told = {"hook_name": "blocks.3.hook_resid_post", "model_name": "some-vit", "l0": 2.5}
    assert config == {
        "architecture": "jumprelu", "d_in": C, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "constant_norm_rescale", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", **told, "fga_fast": sae.metadata},
    }  # fmt: skip
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: list(value.shape) for name, value in weights.items()} == {
        "W_enc": [C, F], "W_dec": [F, C], "b_enc": [F], "b_dec": [C], "threshold": [F],
    }  # fmt: skip
    built("topk").save(tmp_path, format="saelens")  # which replaces both files
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["k"], config["rescale_acts_by_decoder_norm"]) == ("topk", 4, False)
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {"W_enc", "W_dec", "b_enc", "b_dec"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(tmp_path: Path, dtype: torch.dtype) -> None:
    sae = SparseAutoencoder(**state_dict(dtype=dtype))
    sae.save(tmp_path / "folder", format="saelens")
    sae.save(tmp_path / "sae.pt", format="saev")
    assert json.loads((tmp_path / "folder" / "cfg.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    folded = torch.promote_types(dtype, torch.float32)  # of saev's bias, see docs/sae_formats.md
    for place, expected in (("folder", dtype), ("sae.pt", folded)):
        back = SparseAutoencoder.from_pretrained(tmp_path / place)
        assert back.dtype == expected
        assert torch.equal(back.W_dec, sae.W_dec.to(expected)) and torch.equal(back.W_enc, sae.W_enc.to(expected))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "topk_signed", "batch_topk"])
def test_saev_comes_back(tmp_path: Path, activation: str, bias: bool) -> None:
    sae = built(activation, **({} if bias else {"b_enc": None}))
    assert sae.save(str(tmp_path / "sae.pt"), format="saev") == tmp_path / "sae.pt"
    same_codes(sae, back := SparseAutoencoder.from_pretrained(tmp_path / "sae.pt"))
    assert (back.activation, back.k) == (sae.activation, sae.k)
    assert [file.name for file in tmp_path.iterdir()] == ["sae.pt"]


def test_saev_header(tmp_path: Path) -> None:
    built("batch_topk").save(tmp_path / "sae.pt", format="saev")
    header = json.loads((tmp_path / "sae.pt").read_bytes().split(b"\n", 1)[0])
    activation = {"cls": "BatchTopK", "params": {"top_k": 4}}
    assert header["schema"] == 4 and header["cfg"] == {"d_model": C, "d_sae": F, "activation": activation}


@pytest.mark.parametrize("bias", [True, False])
def test_saev_of_its_first_release(tmp_path: Path, bias: bool) -> None:
    """Which subtracts b_dec, so the bias stays as it is."""
    wide = torch.randn(F, C, generator=torch.Generator().manual_seed(2))
    state = {"W_enc": wide, "W_dec": wide.t().contiguous(), "b_enc": torch.ones(C), "b_dec": state_dict()["b_enc"]}
    sae = SparseAutoencoder(**state | ({} if bias else {"b_enc": None}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a multiple of the width 10 as the number of features, got 6"):
        saev.save(sae, tmp_path / "sae.pt", schema=None)
    double = {"W_enc": wide.repeat(1, 10), "W_dec": wide.t().repeat(10, 1), "b_dec": state["b_dec"]}
    sae = SparseAutoencoder(b_enc=torch.rand(60) if bias else None, **double)
    saev.save(sae, tmp_path / "sae.pt", schema=None)
    header = json.loads((tmp_path / "sae.pt").read_bytes().split(b"\n", 1)[0])
    assert header == {"d_vit": 10, "exp_factor": 6}
    x = torch.randn(5, 10)
    back = SparseAutoencoder.from_pretrained(tmp_path / "sae.pt")
    assert torch.equal(back.encode(x), sae.encode(x))


def test_what_the_layouts_cannot_say(tmp_path: Path) -> None:
    def message(sae: SparseAutoencoder, format: str, **settings: Any) -> str:
        with pytest.raises(ValueError) as caught:
            saev.save(sae, tmp_path / "x", **settings) if settings else sae.save(tmp_path / "x", format=format)
        return str(caught.value)

    assert "activation: SAELens has no 'topk_signed', only 'relu', 'topk'" in message(built("topk_signed"), "saelens")
    for activation in ("topk", "jumprelu", "gated"):
        found = message(built(activation), "saev")
        assert f"only 'relu', 'topk_signed', 'batch_topk', got {activation!r}; save with format=" in found
    assert "normalize: saev's layout has none, got 'layer_norm'" in message(built("relu", "layer_norm"), "saev")
    assert "only 'relu', got 'batch_topk'" in message(built("batch_topk"), "saev", schema=None)
    assert "schema: expected 4 or None, got 3" in message(built("relu"), "saev", schema=3)
    each = SparseAutoencoder(**state_dict(), activation="batch_topk", k=3, threshold=torch.linspace(0, 1, F))
    assert "threshold: saev has one for all features" in message(each, "saev")
    no_k = SparseAutoencoder(**state_dict(), activation="batch_topk", threshold=0.5)
    assert "k: saev's BatchTopK stores the number of features" in message(no_k, "saev")
    assert "format: expected one of 'fga_fast', 'saelens', 'saev', got 'prisma'" in message(built("relu"), "prisma")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["saelens", "saev"])
def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    place = tmp_path / "sae"
    built("relu").save(place, format=format)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(PermissionError):
            built("batch_topk").save(place, format=format)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    with pytest.raises(FileNotFoundError):
        built("relu").save(tmp_path / "missing" / "sae", format=format)
