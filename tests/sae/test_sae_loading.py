"""Every format that is read, against a plain version of what its description says it computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import formats_dictionary_learning
import formats_overcomplete
import formats_saelens
import formats_saev
import formats_sparsify
import formats_visaebench
import pytest
import torch
from formats_case import C, Case, F, T, activations, draw
from safetensors.torch import load_file, save_file

from fga_fast.reference.score import contributions
from fga_fast.sae import SparseAutoencoder

MAKERS = {
    "saelens": formats_saelens,
    "saev": formats_saev,
    "overcomplete": formats_overcomplete,
    "sparsify": formats_sparsify,
    "visaebench": formats_visaebench,
    "dictionary_learning": formats_dictionary_learning,
}
CASES: list[tuple[str, str]] = [(name, case) for name, maker in MAKERS.items() for case in maker.CASES]


def made(name: str, case: str, folder: Path) -> Case:
    maker: Callable[[Path], Case] = MAKERS[name].CASES[case]
    return maker(folder / "sae")


@pytest.mark.parametrize(("name", "case"), CASES)
def test_codes_contributions_and_reconstruction(tmp_path: Path, name: str, case: str) -> None:
    truth = made(name, case, tmp_path)
    sae = SparseAutoencoder.from_pretrained(truth.path, **truth.options)
    x, g = activations(), draw(T, C, seed=98)
    codes = truth.codes(x)
    assert 0 < int((codes != 0).sum()) < codes.numel()
    assert (sae.d_model, sae.d_sae, sae.dtype) == (C, F, torch.float64)
    torch.testing.assert_close(sae.encode(x), codes, rtol=1e-10, atol=1e-11)
    expected = codes * (g @ truth.decoder.t())  # f_k (W_dec[k] . g)
    found = contributions(x[None], g[None], sae)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sae(x), truth.reconstruct(x), rtol=1e-4, atol=1e-4)  # layer_norm's eps is not undone
    assert sae.metadata == truth.metadata


@pytest.mark.parametrize(("name", "case"), CASES)
def test_saved_as_our_own_format_it_stays_the_same(tmp_path: Path, name: str, case: str) -> None:
    truth = made(name, case, tmp_path)
    sae = SparseAutoencoder.from_pretrained(truth.path, **truth.options)
    back = SparseAutoencoder.from_pretrained(sae.save(tmp_path / "saved"))
    assert torch.equal(back.encode(activations()), sae.encode(activations()))
    assert repr(back) == repr(sae)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_callers_surroundings_do_not_matter(tmp_path: Path, name: str, case: str) -> None:
    """Another default device, inference mode, or weights that were saved while they required a gradient."""
    truth = made(name, case, tmp_path)
    expected = SparseAutoencoder.from_pretrained(truth.path, **truth.options).encode(activations())
    with torch.device("meta"), torch.inference_mode():
        sae = SparseAutoencoder.from_pretrained(truth.path, **truth.options)
    assert torch.equal(sae.encode(activations()), expected)
    assert not any(buffer.is_inference() or buffer.requires_grad for buffer in sae.buffers())


def test_the_state_dict_of_a_module(tmp_path: Path) -> None:
    """What users save: an OrderedDict with a `_metadata` attribute, of parameters."""

    class Sae(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for key, value in formats_saev.tensors().items():
                self.register_parameter(key, torch.nn.Parameter(value))

    truth = formats_saev.case(tmp_path / "sae")
    module = Sae()
    for state in (module.state_dict(), dict(module.named_parameters())):
        formats_saev.write(truth.path, state, formats_saev.header(5))
        sae = SparseAutoencoder.from_pretrained(truth.path)
        torch.testing.assert_close(sae.encode(activations()), truth.codes(activations()), rtol=1e-10, atol=1e-11)
        assert not any(buffer.requires_grad for buffer in sae.buffers())


@pytest.mark.parametrize(("name", "case"), [(name, next(iter(maker.CASES))) for name, maker in MAKERS.items()])
def test_a_file_is_as_good_as_its_folder(tmp_path: Path, name: str, case: str) -> None:
    truth = made(name, case, tmp_path)
    folder = truth.path if truth.path.is_dir() else truth.path.parent
    file = folder / truth.metadata["source_file"]
    codes = [
        SparseAutoencoder.from_pretrained(path, **truth.options).encode(activations())
        for path in (file, str(folder), str(file))
    ]
    assert all(torch.equal(found, codes[0]) for found in codes)
    by_subfolder = SparseAutoencoder.from_pretrained(folder.parent, subfolder=folder.name, **truth.options).encode(
        activations()
    )
    assert torch.equal(by_subfolder, codes[0])


def test_thresholds_are_reached_or_passed_as_each_format_says(tmp_path: Path) -> None:
    """A code that equals its threshold: overcomplete and visaebench keep it; visaebench's jumprelu, SAELens, saev and
    dictionary_learning do not."""
    eye, zero = torch.eye(2, 3, dtype=torch.float32), torch.zeros(3)
    x = torch.tensor([[1.0, 0.75]])
    encoder = {"encoder.weight": eye.t(), "encoder.bias": zero}
    decoder = torch.eye(3, 2)
    decoder[2, 0] = 1.0
    cases = {
        "visaebench": formats_visaebench.write(
            tmp_path / "v" / "sae.pt", encoder | {"decoder.weight": decoder}, {"threshold": 0.75, "layer": 1}
        ),
        "visaebench, jump": formats_visaebench.write(
            tmp_path / "j" / "sae.pt",
            encoder | {"decoder.weight": decoder, "jump_thresholds": zero + 0.75},
            {"activation": "jumprelu", "layer": 1},
        ),
        "dictionary_learning": formats_dictionary_learning.write(
            tmp_path / "d",
            encoder
            | {"decoder.weight": decoder.t().contiguous(), "b_dec": torch.zeros(2), "k": torch.tensor(1)}
            | {"threshold": torch.tensor(0.75)},
            formats_dictionary_learning.settings("BatchTopKSAE", activation_dim=2, dict_size=3),
        ),
        "saelens": formats_saelens.write(
            tmp_path / "l",
            {"W_enc": eye, "b_enc": zero, "W_dec": decoder, "b_dec": torch.zeros(2), "threshold": zero + 0.75},
            formats_saelens.settings(architecture="jumprelu", d_in=2, d_sae=3),
        ),
    }
    kept = {name: SparseAutoencoder.from_pretrained(path).encode(x).tolist()[0] for name, path in cases.items()}
    assert kept.pop("visaebench") == [1.0, 0.75, 0.0]
    assert list(kept.values()) == 3 * [[1.0, 0.0, 0.0]]
    state = encoder | {"dictionary._weights": decoder}
    path = formats_overcomplete.write(tmp_path / "o" / "sae.pt", state)
    options = {"activation": "batch_topk", "threshold": 0.75}
    assert SparseAutoencoder.from_pretrained(path, **options).encode(x).tolist() == [[1.0, 0.75, 0.0]]
    state["thresholds"] = torch.tensor([0.0, 0.0, 0.0])  # logs: 1.0 is reached, 0.75 is not
    formats_overcomplete.write(path, state)
    assert SparseAutoencoder.from_pretrained(path).encode(x).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Where nothing is folded the dtype is kept; a 16-bit file that needs folding becomes float32."""
    kept = formats_sparsify.case(tmp_path).path / "sae.safetensors"
    folded = formats_saelens.case(tmp_path / "l", apply_b_dec_to_input=False).path / "sae_weights.safetensors"
    for file in (kept, folded):
        save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file)
    assert SparseAutoencoder.from_pretrained(kept.parent).dtype == dtype
    sae = SparseAutoencoder.from_pretrained(folded.parent)
    assert sae.dtype == torch.float32
    rounded = load_file(folded)
    z = activations().float() @ rounded["W_enc"].float() + rounded["b_enc"].float()
    torch.testing.assert_close(sae.encode(activations().float()), torch.relu(z), rtol=1e-5, atol=1e-5)


def test_sparsify_takes_its_encoders_dtype(tmp_path: Path) -> None:
    truth = formats_sparsify.case(tmp_path)
    file = truth.path / "sae.safetensors"
    save_file({n: t if n == "encoder.weight" else t.float() for n, t in load_file(file).items()}, file)
    assert SparseAutoencoder.from_pretrained(truth.path).dtype == torch.float64


def test_a_zero_decoder_row_switches_its_feature_off(tmp_path: Path) -> None:
    """rescale_acts_by_decoder_norm multiplies by a norm of 0: no code, and no division by 0."""
    truth = formats_saelens.case(tmp_path / "sae", "topk", k=3, rescale_acts_by_decoder_norm=True)
    state = load_file(truth.path / "sae_weights.safetensors")
    state["W_dec"][4] = 0.0
    settings = json.loads((truth.path / "cfg.json").read_text())
    sae = SparseAutoencoder.from_pretrained(formats_saelens.write(truth.path, state, settings))
    assert float(sae.encode(activations())[:, 4].abs().max()) == 0.0
