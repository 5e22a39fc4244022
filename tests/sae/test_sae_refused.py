"""What cannot gate patches of the residual stream, or cannot be read for sure, is refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formats_dictionary_learning as dictionary_learning
import formats_overcomplete as overcomplete
import formats_saelens as saelens
import formats_saev as saev
import formats_sparsify as sparsify
import formats_visaebench as visaebench
import pytest
import torch
from formats_case import C, F, draw, refused
from torch import Tensor

from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.formats.scope import residual_layer

Change = Callable[[dict[str, Any]], Any]


def hooked(name: str) -> dict[str, Any]:
    return {"metadata": {"hook_name": name}}


SAELENS_SETTINGS: list[tuple[dict[str, Any], str]] = [
    (
        {"architecture": "transcoder"},
        "architecture: 'transcoder' is a transcoder, whose decoder writes to another space",
    ),
    ({"architecture": "skip_transcoder"}, "'skip_transcoder' is a transcoder"),
    ({"architecture": "jumprelu_transcoder", "d_out": C}, "is a transcoder"),
    ({"d_out": C}, "is a transcoder"),
    (
        {"architecture": "matching_pursuit"},
        "architecture: expected one of 'standard', 'topk', 'jumprelu', 'gated', got",
    ),
    ({"architecture": "temporal"}, "got 'temporal'"),
    ({"architecture": "batchtopk"}, "got 'batchtopk'; save the trained SAE for inference, as jumprelu"),
    ({"architecture": ["topk"]}, "architecture: expected one of"),
    (
        {"activation_fn_str": "tanh-relu"},
        "activation_fn: expected 'relu' or 'topk', got 'tanh-relu', whose codes cannot",
    ),
    (hooked("blocks.3.hook_mlp_out"), "'blocks.3.hook_mlp_out', which cannot gate patches"),
    (hooked("blocks.3.attn.hook_z"), "which cannot gate patches"),
    (hooked("blocks.3.hook_attn_out"), "which cannot gate patches"),
    (hooked("blocks.3.hook_resid_mid"), "which cannot gate patches"),
    (hooked("blocks.0.hook_resid_pre"), "which cannot gate patches"),
    (hooked("vision_model.encoder.layers.3.mlp.fc2"), "which cannot gate patches"),
    (hooked("blocks.3.mlp.0"), "which cannot gate patches"),
    (hooked("hook_embed"), "which cannot gate patches"),
    ({"metadata": {"hook_name": "blocks.3.hook_resid_post", "hook_head_index": 2}}, "hook_head_index: expected null"),
    ({"reshape_activations": "hook_z"}, "reshape_activations: expected 'none', got 'hook_z'"),
    ({"cls_token_only": True}, "cls_token_only: this SAE was trained on the class token only"),
    ({"token_type": "CLS"}, "token_type: this SAE was trained on the class token only"),
    ({"normalize_activations": "expected_average_only_in"}, "needs the scale the activations were trained with"),
    ({"normalize_activations": True}, "needs the scale the activations were trained with"),
    ({"normalize_activations": "batch"}, "normalize_activations: expected one of 'none', 'layer_norm'"),
    ({"normalize_activations": ["none"]}, "normalize_activations: expected one of"),
    ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm: known for 'topk' only, got 'standard'"),
    ({"architecture": "topk"}, "k: architecture 'topk' needs an integer, got None"),
    ({"architecture": "topk", "k": F + 1}, "k: expected 1 <= k <= 10"),
    ({"architecture": "jumprelu"}, "tensors missing: threshold"),
    ({"architecture": "gated"}, "tensors missing: b_gate, r_mag, b_mag"),
    ({"d_in": 768}, "d_in: the weights have 6, got 768; files of different SAEs?"),
    ({"d_sae": 11}, "d_sae: the weights have 10, got 11"),
]


@pytest.mark.parametrize(("changes", "message"), SAELENS_SETTINGS)
def test_saelens_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    refused(saelens.write(tmp_path / "sae", saelens.tensors(), saelens.settings(**changes)), message)


SAEV_HEADERS: list[tuple[Change, str]] = [
    (lambda h: h.update(schema=6), "schema: expected 1 to 5 or none, got 6"),
    (lambda h: h.update(schema="5"), "schema: expected 1 to 5 or none, got '5'"),
    (lambda h: h.update(schema=True), "schema: expected 1 to 5 or none, got True"),
    (lambda h: h.update(cfg=[1]), "cfg: expected an object, got list"),
    (lambda h: h.pop("cfg"), "cfg: expected an object, got NoneType"),
    (
        lambda h: h["cfg"]["activation"].update(cls="Gelu"),
        "activation: expected one of Relu, TopK, BatchTopK, got 'Gelu'",
    ),
    (lambda h: h["cfg"]["activation"].update(cls="SparseAutoencoder"), "activation: expected one of Relu"),
    (lambda h: h["cfg"]["activation"].update(cls=["Relu"]), "activation: expected one of Relu"),
    (lambda h: h["cfg"]["activation"].update(cls="TopK"), "top_k: activation TopK needs an integer, got None"),
    (lambda h: h["cfg"]["activation"].update(cls="TopK", params={"top_k": 99}), "k: expected 1 <= k <= 10"),
    (
        lambda h: h["cfg"]["activation"].update(cls="BatchTopK"),
        "BatchTopK without activation.threshold is of an early version",
    ),
    (lambda h: h["cfg"].update(d_model=768), "d_model: the weights have 6, got 768"),
    (lambda h: h["cfg"].update(d_sae=11), "d_sae: the weights have 10, got 11"),
    (lambda h: h.update(tokens="cls"), "tokens: this SAE was trained on the class token only"),
]


@pytest.mark.parametrize(("change", "message"), SAEV_HEADERS)
def test_saev_headers(tmp_path: Path, change: Change, message: str) -> None:
    head = saev.header(5)
    change(head)
    refused(saev.write(tmp_path / "sae.pt", saev.tensors(), head), message)


SPARSIFY_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"transcode": True}, "transcode: a transcoder's decoder writes to another space and cannot gate patches"),
    ({"skip_connection": True}, "skip_connection: a transcoder's decoder"),
    ({"activation": "groupmax"}, "activation: expected 'topk', got 'groupmax', which keeps the largest of each group"),
    ({"activation": "relu"}, "activation: expected 'topk', got 'relu'"),
    ({"k": ...}, "k: expected an integer, got None"),
    ({"k": 99}, "k: expected 1 <= k <= 10"),
    ({"d_in": 7}, "d_in: the weights have 6, got 7"),
    ({"num_latents": 11}, "num_latents: the weights have 10, got 11"),
]


@pytest.mark.parametrize(("changes", "message"), SPARSIFY_SETTINGS)
def test_sparsify_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    refused(sparsify.case(tmp_path, **changes).path, message)


@pytest.mark.parametrize("name", ["layers.3.mlp", "h.3.attn", "encoder.layers.3.self_attn", "layers.3.mlp.fc2"])
def test_sparsify_folders_of_other_hook_points(tmp_path: Path, name: str) -> None:
    refused(sparsify.case(tmp_path, name).path, f"got '{name}', which cannot gate patches")


VISAEBENCH_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"threshold": ...}, "threshold: expected one among the tensors (_running_threshold, running_threshold, jump_"),
    ({"threshold": "high"}, "threshold: expected a number or a tensor, got 'high'"),
    ({"threshold": True}, "threshold: expected a number or a tensor, got True"),
    ({"threshold": 10**400}, "threshold: expected a number of a usual size"),
    ({"architecture": "matching_pursuit"}, "architecture: expected one of batchtopk, jumprelu"),
    ({"architecture": "topk", "k": ...}, "k: activation 'topk' needs the number of features"),
    ({"hook": "blocks.11.attn"}, "hook: expected the residual stream after a block"),
    ({"layer": "blocks.11.mlp"}, "hook: expected the residual stream after a block"),
    ({"cls_only": True}, "cls_only: this SAE was trained on the class token only"),
    ({"d_in": 7}, "d_in: the weights have 6, got 7"),
    ({"n_features": 7}, "n_features: the weights have 10, got 7"),
]


@pytest.mark.parametrize(("changes", "message"), VISAEBENCH_SETTINGS)
def test_visaebench_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    refused(visaebench.write(tmp_path / "sae.pt", visaebench.tensors(), visaebench.settings(**changes)), message)


ENCODERS: list[tuple[dict[str, Tensor], str]] = [
    ({"encoder.mlp_blocks.0.0.weight": torch.zeros(C, C)}, "encoder: an MLP encoder is not linear"),
    ({"encoder.attention_blocks.0.norm1.weight": torch.zeros(C)}, "encoder: an attention encoder is not linear"),
    ({"encoder.resnet_blocks.0.conv1.weight": torch.zeros(C, C, 3, 3)}, "encoder: a ResNet encoder is not linear"),
    ({"Q": torch.zeros(4)}, "Q: the quantised codes of a QSAE are not supported"),
    (
        {"encoder.final_block.1.weight": torch.ones(F), "encoder.final_block.1.bias": torch.ones(F)},
        "a layer norm between",
    ),
    ({"surprise": torch.zeros(1)}, "tensors not known: surprise"),
    ({"dictionary.surprise": torch.zeros(1)}, "dictionary: expected _weights, or C, W and Relax, and multiplier, got"),
    ({"dictionary.multiplier": torch.zeros(F).double()}, "dictionary.multiplier: expected one number, got shape [10]"),
    ({"dictionary._weights": draw(C, F, seed=1)}, "dictionary._weights: expected shape [10, 6] (that of the encoder)"),
]


@pytest.mark.parametrize(("more", "message"), ENCODERS)
def test_overcomplete_encoders_and_dictionaries(tmp_path: Path, more: dict[str, Tensor], message: str) -> None:
    state = overcomplete.encoder() | overcomplete.dictionary()[0] | more
    refused(overcomplete.write(tmp_path / "sae.pt", state), message, activation="relu")


OVERCOMPLETE_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({}, "a state dict of overcomplete, which does not say how codes are chosen; pass activation= one of 'relu'"),
    (
        {"activation": "matching_pursuit"},
        "got 'matching_pursuit'; codes found by iteration (matching pursuit) or quant",
    ),
    ({"activation": "topk"}, "k: activation 'topk' needs the number of features"),
    ({"activation": "batch_topk"}, "threshold: activation 'batch_topk' needs one"),
    ({"activation": "batch_topk", "threshold": "0.1"}, "threshold: expected a number or a tensor, got '0.1'"),
    ({"activation": "batch_topk", "threshold": float("inf")}, "threshold: holds NaN or Inf"),
    ({"activation": "relu", "threshold": 0.1}, "threshold: belongs to activation 'batch_topk'"),
    ({"activation": "relu", "decoder_norm": "l3"}, "decoder_norm: expected one of 'l2', 'max_l2', 'l1'"),
]


@pytest.mark.parametrize(("options", "message"), OVERCOMPLETE_ARGUMENTS)
def test_overcomplete_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    refused(overcomplete.case(tmp_path / "sae").path, message, **options)


def test_overcomplete_without_an_encoder_or_with_an_unclear_dictionary(tmp_path: Path) -> None:
    rows = overcomplete.dictionary("identity")[0]
    refused(
        overcomplete.write(tmp_path / "a" / "sae.pt", rows), "codes found by iteration (matching pursuit and others)"
    )
    path = overcomplete.write(tmp_path / "b" / "sae.pt", overcomplete.encoder() | rows)
    refused(path, "so it was not trained with the default normalisation 'l2'", activation="relu")
    points = overcomplete.encoder() | overcomplete.dictionary("archetypal")[0]
    path = overcomplete.write(tmp_path / "c" / "sae.pt", points)
    refused(path, "an archetypal dictionary is not normalised, got 'l2'", activation="relu", decoder_norm="l2")
    path = overcomplete.write(tmp_path / "d" / "sae.pt", points | {"dictionary.W": draw(F, 3, seed=1)})
    refused(path, "dictionary: expected C [P, 6], W [10, P] and Relax [10, 6], got [7, 6], [10, 3]", activation="relu")


def test_archetypal_shifts_of_a_larger_bound_are_kept(tmp_path: Path) -> None:
    state = overcomplete.encoder() | overcomplete.dictionary("archetypal")[0]
    state["dictionary.Relax"] = state["dictionary.Relax"] * 3
    sae = SparseAutoencoder.from_pretrained(overcomplete.write(tmp_path / "sae.pt", state), activation="relu")
    convex = torch.relu(state["dictionary.W"])
    convex = convex / convex.sum(1, keepdim=True)
    rows = (convex @ state["dictionary.C"] + state["dictionary.Relax"]) * state["dictionary.multiplier"].exp()
    torch.testing.assert_close(sae.W_dec, rows, rtol=1e-6, atol=1e-6)


def test_transcoder_weights_are_refused_by_their_names(tmp_path: Path) -> None:
    skip = {"W_skip": torch.zeros(C, C).double()}
    refused(saelens.write(tmp_path / "l", saelens.tensors() | skip, saelens.settings()), "is a transcoder")
    refused(sparsify.write(tmp_path / "s", sparsify.tensors() | skip, sparsify.settings()), "W_skip: a transcoder's")
    without = {name: value for name, value in sparsify.tensors().items() if name != "W_dec"}
    refused(sparsify.write(tmp_path / "n", without, sparsify.settings()), "tensors missing: W_dec; not known: none")


def test_formats_that_look_alike(tmp_path: Path) -> None:
    """Weights of another library with names that overlap are refused, and its names are told."""
    state = visaebench.tensors(bias=False) | {"b_dec": draw(C, seed=1), "k": torch.tensor(3)}  # and no threshold
    refused(visaebench.write(tmp_path / "ae.pt", state, None), "not known: b_dec, k; an SAE of visaebench holds")


def test_dictionary_learning(tmp_path: Path) -> None:
    """Two classes of the same names, k that is none, and settings of another SAE."""
    state = dictionary_learning.tensors()

    def folder(state: dict[str, Tensor], config: dict[str, Any] | None) -> Path:
        return dictionary_learning.write(tmp_path / "sae", state, config)

    message = refused(folder(state, None), "pass activation='topk' or 'batch_topk', got None")
    assert "AutoEncoderTopK and of BatchTopKSAE" in message
    refused(folder(state, None), "pass activation='topk' or 'batch_topk', got 'relu'", activation="relu")
    settings = dictionary_learning.settings
    refused(folder(state, settings(dict_size=7)), "dict_size: the weights have 10, got 7")
    refused(folder(state, settings(submodule_name="mlp_out_layer_8")), "expected the residual stream after a block")
    for k in (torch.tensor([3, 4]), torch.tensor(3.0), 3):
        refused(folder(state | {"k": k}, settings()), "k: expected one whole number, got")  # type: ignore[dict-item]
    refused(folder(state | {"k": torch.tensor(0)}, settings()), "k: expected 1 <= k <= 10")
    whole = {"b_dec": torch.ones(C).long()}
    refused(folder(state | whole, settings()), "b_dec: expected a dense floating-point tensor")
    turned = {"encoder.weight": draw(F, C + 1, seed=1)}
    refused(folder(state | turned, settings()), "encoder: expected shape [10, 6] or [6, 10]")


def test_square_weights_are_ambiguous(tmp_path: Path) -> None:
    square = {"W_enc": (C, C), "W_dec": (C, C), "b_enc": (C,), "b_dec": (C,)}
    state = {name: draw(*shape, seed=1) for name, shape in square.items()}
    config = saelens.settings(d_sae=C)
    refused(
        saelens.write(tmp_path / "sae", state, config), "W_enc: its orientation cannot be told from the shape [6, 6]"
    )
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    stored = {new: state[old].clone() for new, old in names.items()}
    refused(sparsify.write(tmp_path / "s", stored, sparsify.settings()), "its orientation cannot be told")
    plain = {"encoder.weight": draw(C, C, seed=2), "dictionary._weights": draw(C, C, seed=3)}
    refused(overcomplete.write(tmp_path / "o.pt", plain), "its orientation cannot be told", activation="relu")


def test_transposed_weights_are_turned(tmp_path: Path) -> None:
    state, x = saelens.tensors(), draw(4, C, seed=5)
    right = SparseAutoencoder.from_pretrained(saelens.write(tmp_path / "a", state, saelens.settings()))
    state |= {name: state[name].t() for name in ("W_enc", "W_dec")}
    turned = SparseAutoencoder.from_pretrained(saelens.write(tmp_path / "b", state, saelens.settings()))
    assert torch.equal(turned.encode(x), right.encode(x)) and torch.equal(turned.W_dec, right.W_dec)


STATISTICS: list[tuple[dict[str, Any], str]] = [
    ({"pre_mean": [0.0] * 5}, "pre_mean: expected shape [6] (the SAE's width), got [5]"),
    ({"pre_mean": 0.5}, "pre_mean: expected shape [6] (the SAE's width), got []"),
    ({"pre_mean": "imagenet"}, "pre_mean: expected numbers, got str"),
    ({"pre_scale": 0.0}, "pre_scale: expected numbers above 0"),
    ({"pre_scale": -1.0}, "pre_scale: expected numbers above 0"),
    ({"pre_scale": float("nan")}, "pre_scale: holds NaN or Inf"),
    ({"pre_scale": torch.ones(C, 1)}, "pre_scale: expected shape [6] (the SAE's width) or a number, got [6, 1]"),
]


@pytest.mark.parametrize(("options", "message"), STATISTICS)
def test_input_statistics(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    refused(saev.case(tmp_path / "sae").path, message, **options)


def test_a_scale_a_channel(tmp_path: Path) -> None:
    path, x = saev.case(tmp_path / "sae").path, draw(5, C, seed=6)
    mean, scale = draw(C, seed=7), draw(C, seed=8).abs() + 0.5
    plain = SparseAutoencoder.from_pretrained(path)
    sae = SparseAutoencoder.from_pretrained(path, pre_mean=mean, pre_scale=scale)
    torch.testing.assert_close(sae.encode(x), plain.encode((x - mean) / scale))
    torch.testing.assert_close(sae(x), plain((x - mean) / scale) * scale + mean)


def test_arguments_a_format_leaves_no_room_for(tmp_path: Path) -> None:
    lens, layer_norm = saelens.case(tmp_path / "l").path, {"normalize_activations": "layer_norm"}
    refused(lens, "(saelens) stores its own, or needs none; got k=3, leave it out", k=3)
    refused(lens, "(saelens) stores its own, or needs none; got normalize=None", normalize=None)
    refused(lens, "got threshold=a tensor of shape [2]", threshold=torch.zeros(2))
    refused(sparsify.case(tmp_path / "s").path, "(sparsify) stores its own", activation="topk")
    refused(saev.case(tmp_path / "v").path, "threshold: ", threshold=0.5)
    refused(saev.case(tmp_path / "b", 5, "BatchTopK", 0.6).path, "the file stores its own; leave it out", threshold=0.5)
    refused(visaebench.own(tmp_path / "x").path, "the checkpoint stores its own; leave it out", threshold=0.5)
    jump = overcomplete.case(tmp_path / "o", activation="jump").path
    refused(jump, "holds the thresholds of a JumpSAE; leave them out", activation="relu")
    normed = saelens.write(tmp_path / "n", saelens.tensors(), saelens.settings(**layer_norm))
    refused(normed, "pre_mean, pre_scale: the file says normalisation 'layer_norm'", pre_scale=2.0)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.9.hook_resid_post", 9),
        ("blocks.9.hook_resid_pre", 8),
        ("vision_model.encoder.layers.10", 10),
        ("encoder.layer.4.output", 4),
        ("visual.transformer.resblocks.0", 0),
        ("model/layers/11", 11),
        ("0.encoder.layers.7", 7),
        ("layer_5", 5),
        ("hook_resid_post", None),
    ],
)
def test_hooks_of_the_residual_stream(hook: str, layer: int | None) -> None:
    assert residual_layer(hook, "here") == layer


def test_hooks_that_nobody_knows_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fga_fast"):
        assert residual_layer("my_favourite_place", "here") is None
        config = saelens.settings(metadata=...)
        sae = SparseAutoencoder.from_pretrained(saelens.write(tmp_path / "sae", saelens.tensors(), config))
        config = saelens.settings(metadata={"hook_name": "my_favourite_place", "hook_layer": 4})
        placed = SparseAutoencoder.from_pretrained(saelens.write(tmp_path / "placed", saelens.tensors(), config))
    assert "hook 'my_favourite_place' is not known" in caplog.text
    assert "does not say which activations the SAE was trained on" in caplog.text
    assert "layer" not in sae.metadata and "hook" not in sae.metadata
    assert (placed.metadata["layer"], placed.metadata["hook"]) == ("4", "my_favourite_place")
