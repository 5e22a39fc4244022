"""Compares fga_fast with the libraries whose SAE files it reads and writes, one library a run, in its environment.

    python scripts/interop.py saelens          # or saev, overcomplete, sparsify, visaebench, dictionary_learning

"theirs -> ours": the library trains a small SAE on synthetic tokens with its own trainer or loss, writes it with its
own function, and both read the file. "ours -> theirs": fga_fast writes an SAE, and the library reads it. Each row holds
the largest difference of the codes, and of the reconstructions, of 100 float32 tokens, divided by the largest value. A
run fails if one is above 1e-6. docs/interop.md holds the results.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fga_fast.sae import SparseAutoencoder
from fga_fast.sae.formats import saev as saev_format

C, F, K = 24, 64, 6
TOKENS, BATCH, STEPS = 100, 256, 60
TOLERANCE = 1e-6
THEIRS, OURS = "theirs -> ours", "ours -> theirs"


@dataclass(frozen=True)
class Row:
    """One SAE, and how far the two sides' results are apart, relative to the largest value."""

    way: str
    sae: str
    codes: float
    reconstruction: float
    l0: float


def tokens(count: int, seed: int) -> Tensor:  # [T, C]
    """Sparse mixtures of fixed directions around a mean, as a residual stream is thought to be."""
    directions = torch.randn(3 * C, C, generator=torch.Generator().manual_seed(0))
    directions = nn.functional.normalize(directions, dim=1)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, 3 * C, generator=generator) * (torch.rand(count, 3 * C, generator=generator) < 0.07)
    noise = 0.02 * torch.randn(count, C, generator=generator)
    return 2 * weights @ directions + noise + 0.3 * directions[0]


def batches() -> Iterator[Tensor]:
    """Batches [T, C] without end."""
    step = 0
    while True:
        step += 1
        yield tokens(BATCH, seed=step)


def row(way: str, name: str, sae: SparseAutoencoder, codes: Tensor, reconstruction: Tensor) -> Row:
    """Ours against the library's codes [T, F] and reconstruction [T, C] of the same tokens."""
    x = tokens(TOKENS, seed=12_345)

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / b.abs().max())

    l0 = float((codes != 0).sum(dim=1).float().mean())
    if not 0 < l0 < F:
        raise ValueError(f"{name}: {l0} codes a token; a comparison of them would show nothing")
    ours = sae.encode(x)
    return Row(way, name, apart(ours, codes.detach()), apart(sae.decode(ours, x), reconstruction.detach()), l0)


def ours(activation: str, **settings: Any) -> SparseAutoencoder:
    """An SAE of ours with random weights, of the kinds that a library may read."""
    draw = torch.Generator().manual_seed(7)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(*shape, generator=draw)

    features = settings.pop("features", F)
    if activation == "gated":
        settings |= {name: random(features, size=0.3) for name in ("b_gate", "r_mag", "b_mag")}
    if activation == "jumprelu":
        settings["threshold"] = random(features).abs()
    if activation == "batch_topk":
        settings |= {"threshold": 0.7, "k": K}
    if activation in ("topk", "topk_signed"):
        settings["k"] = K
    return SparseAutoencoder(
        random(C, features, size=0.5), random(features, size=0.3), random(features, C), random(C, size=0.3),
        activation=activation, metadata={"layer": "9", "model_name": "some-vit"}, **settings,
    )  # fmt: skip


def fit(parameters: Iterator[nn.Parameter], loss: Callable[[Tensor], Tensor], after: Callable[[], None]) -> None:
    """A plain training loop, for libraries whose own trainer takes only a language model or recorded images."""
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _, x in zip(range(STEPS), batches(), strict=False):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
        after()


def saelens(folder: Path) -> Iterator[Row]:
    """SAELens: its trainer, the files of its `save_inference_model`, and of its `save_model`."""
    import sae_lens as lens

    x = tokens(TOKENS, seed=12_345)
    whole = {"d_in": C, "d_sae": F}
    layers = [8, F // 2, F]
    kinds: dict[str, tuple[Any, Any]] = {
        "standard": (lens.StandardTrainingSAE, lens.StandardTrainingSAEConfig(**whole, l1_coefficient=0.05)),
        "standard, layer_norm": (
            lens.StandardTrainingSAE,
            lens.StandardTrainingSAEConfig(**whole, l1_coefficient=0.05, normalize_activations="layer_norm"),
        ),
        "standard, b_dec not subtracted": (
            lens.StandardTrainingSAE,
            lens.StandardTrainingSAEConfig(**whole, l1_coefficient=0.05, apply_b_dec_to_input=False),
        ),
        "standard, mean norm folded in": (
            lens.StandardTrainingSAE,
            lens.StandardTrainingSAEConfig(
                **whole, l1_coefficient=0.05, normalize_activations="expected_average_only_in"
            ),
        ),
        "topk": (lens.TopKTrainingSAE, lens.TopKTrainingSAEConfig(**whole, k=K)),
        "batchtopk": (lens.BatchTopKTrainingSAE, lens.BatchTopKTrainingSAEConfig(**whole, k=K)),
        "matryoshka batchtopk": (
            lens.MatryoshkaBatchTopKTrainingSAE,
            lens.MatryoshkaBatchTopKTrainingSAEConfig(**whole, k=K, matryoshka_widths=layers),
        ),
        "jumprelu": (lens.JumpReLUTrainingSAE, lens.JumpReLUTrainingSAEConfig(**whole, l0_coefficient=0.01)),
        "gated": (lens.GatedTrainingSAE, lens.GatedTrainingSAEConfig(**whole, l1_coefficient=0.05)),
    }
    settings = lens.config.SAETrainerConfig(
        total_training_samples=BATCH * STEPS, train_batch_size_samples=BATCH, lr=3e-3, lr_end=3e-3,
        n_batches_for_norm_estimate=5,
    )  # fmt: skip
    for name, (kind, config) in kinds.items():
        config.metadata.hook_name = "blocks.9.hook_resid_post"
        trained = lens.SAETrainer(settings, kind(config), batches()).fit()
        trained.save_inference_model(folder / name)
        theirs = lens.SAE.load_from_disk(folder / name)
        codes, reconstruction = theirs.encode(x), theirs(x)
        yield row(THEIRS, name, SparseAutoencoder.from_pretrained(folder / name), codes, reconstruction)
        if name in ("topk", "gated"):
            trained.save_model(folder / f"{name} training")
            sae = SparseAutoencoder.from_pretrained(folder / f"{name} training")
            yield row(THEIRS, f"{name}, training checkpoint", sae, trained.encode(x), trained(x))
    for name, sae in _ours_for_saelens().items():
        theirs = lens.SAE.load_from_disk(sae.save(folder / f"ours {name}", format="saelens"))
        yield row(OURS, name, sae, theirs.encode(x), theirs(x))


def _ours_for_saelens() -> dict[str, SparseAutoencoder]:
    kinds = {kind: ours(kind) for kind in ("relu", "topk", "jumprelu", "batch_topk", "gated")}
    return kinds | {f"topk, {kind}": ours("topk", normalize=kind) for kind in ("layer_norm", "constant_norm")}


def saev(folder: Path) -> Iterator[Row]:
    """saev 0.1.0: its loss and its file. It knows relu only; its trainer needs recorded images."""
    from saev import config
    from saev import nn as theirs_nn

    x = tokens(TOKENS, seed=12_345)
    theirs = theirs_nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=C, exp_factor=3, n_reinit_samples=BATCH))
    theirs.init_b_dec(tokens(BATCH, seed=1))
    fit(theirs.parameters(), lambda x: theirs(x)[2].loss, theirs.normalize_w_dec)
    theirs_nn.dump(str(folder / "theirs" / "sae.pt"), theirs)
    back = theirs_nn.load(str(folder / "theirs" / "sae.pt"))
    sae = SparseAutoencoder.from_pretrained(folder / "theirs" / "sae.pt")
    yield row(THEIRS, "relu", sae, back(x)[1], back(x)[0])
    sae = ours("relu", features=3 * C)
    back = theirs_nn.load(str(saev_format.save(sae, folder / "ours.pt", schema=None)))
    yield row(OURS, "relu, layout of 0.1.0", sae, back(x)[1], back(x)[0])


def overcomplete(folder: Path) -> Iterator[Row]:
    """overcomplete: its trainer; users save state dicts, right after training or in eval mode."""
    from overcomplete import sae as library

    def loss(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
        return (x - x_hat).square().mean() + 1e-3 * codes.abs().mean()

    x = tokens(TOKENS, seed=12_345)
    linear = {"nb_concepts": F, "device": "cpu"}
    scaled = {"dictionary_params": {"use_multiplier": True}}
    kinds: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "relu": (library.SAE(C, **linear), {"activation": "relu"}),
        "relu, max_l2, multiplier": (
            library.SAE(C, **linear, dictionary_params={"normalization": "max_l2", "use_multiplier": True}),
            {"activation": "relu", "decoder_norm": "max_l2"},
        ),
        "relu, untied, no bias": (library.SAE(C, **linear).untied(), {"activation": "relu"}),
        "topk": (library.TopKSAE(C, top_k=K, **linear, **scaled), {"activation": "topk", "k": K}),
        "batch topk": (library.BatchTopKSAE(C, top_k=K * BATCH, **linear), {"activation": "batch_topk"}),
        "jump": (library.JumpSAE(C, **linear), {}),
        "archetypal topk": (
            library.RATopKSAE(C, F, points=tokens(200, seed=3), top_k=K),
            {"activation": "topk", "k": K},
        ),
    }
    for name, (theirs, options) in kinds.items():
        data = [batch for _, batch in zip(range(STEPS), batches(), strict=False)]
        optimizer = torch.optim.Adam(theirs.parameters(), lr=3e-3)
        library.train_sae(theirs, data, loss, optimizer, nb_epochs=1, monitoring=0)
        if name == "batch topk":
            options["threshold"] = float(theirs.running_threshold)
        for moment in ("after training", "in eval mode"):
            theirs.train(moment == "after training")
            path = folder / f"{name} {moment}.pt"
            torch.save(theirs.state_dict(), path)
            theirs.eval()
            _, codes, reconstruction = theirs(x)
            sae = SparseAutoencoder.from_pretrained(path, **options)
            yield row(THEIRS, f"{name}, saved {moment}", sae, codes, reconstruction)


def sparsify(folder: Path) -> Iterator[Row]:
    """EleutherAI's sparsify: its loss and its files; its trainer needs a language model."""
    import sparsify as library

    x = tokens(TOKENS, seed=12_345)
    for name, sizes in (("topk, num_latents", {"num_latents": F}), ("topk, expansion_factor", {"expansion_factor": 3})):
        theirs = library.SparseCoder(C, library.SparseCoderConfig(k=K, **sizes))
        fit(theirs.parameters(), lambda x, theirs=theirs: theirs(x).fvu, theirs.set_decoder_norm_to_unit_norm)
        place = folder / name / "layers.9"
        theirs.save_to_disk(place)
        back = library.SparseCoder.load_from_disk(place)
        values, indices, _ = back.encode(x)
        codes = torch.zeros(TOKENS, back.num_latents).scatter(1, indices, values.detach())
        yield row(THEIRS, name, SparseAutoencoder.from_pretrained(place), codes, back(x).sae_out)


def visaebench(folder: Path) -> Iterator[Row]:
    """visaebench: a reader without a trainer; the weights are random."""
    from visaebench import hub

    x = tokens(TOKENS, seed=12_345)
    made = ours("relu")
    assert made.b_enc is not None
    own = {"encoder.weight": made.W_enc.t(), "encoder.bias": made.b_enc, "decoder.weight": made.W_dec}
    encoder = {"encoder.final_block.0.weight": made.W_enc.t(), "encoder.final_block.0.bias": made.b_enc}
    borrowed = encoder | {"dictionary._weights": made.W_dec, "dictionary.multiplier": torch.tensor(0.4)}
    stored = {"_running_threshold": torch.tensor(0.3)}
    jump = {"jump_thresholds": torch.rand(F, generator=torch.Generator().manual_seed(3))}
    kinds: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
        "batchtopk": (own, {"activation": "batchtopk", "threshold": 0.7}),
        "batchtopk, decoder bias, stored threshold": (
            own | stored | {"decoder.bias": made.b_dec},
            {"sae_type": "batchtopk"},
        ),
        "batchtopk, two thresholds": (own | stored, {"activation": "batchtopk", "threshold": 0.7}),
        "jumprelu": (own | jump, {"architecture": "jumprelu"}),
        "jumprelu, plain name": (own | {"thresholds": jump["jump_thresholds"]}, {"activation": "jumprelu"}),
        "topk": (own, {"activation": "topk", "k": K}),
        "k and no name of an activation": (own, {"k": K}),
        "overcomplete's names": (borrowed, {"activation": "batchtopk", "threshold": 0.7}),
        "overcomplete's names, jumprelu": (borrowed | jump, {"activation": "jumprelu"}),
    }
    for name, (state, settings) in kinds.items():
        place = folder / name
        place.mkdir()
        torch.save({key: value.contiguous() for key, value in state.items()}, place / "sae.pt")
        (place / "config.json").write_text(json.dumps(settings | {"input_dim": C, "hidden_dim": F, "layer": 9}))
        codes, reconstruction = hub.load_sae(str(place), device="cpu")(x)
        yield row(THEIRS, name, SparseAutoencoder.from_pretrained(place), codes, reconstruction)


def dictionary_learning(folder: Path) -> Iterator[Row]:
    """dictionary_learning: its trainers and the files they leave."""
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k
    from dictionary_learning.training import trainSAE

    x = tokens(TOKENS, seed=12_345)
    common = {"activation_dim": C, "dict_size": F, "steps": STEPS, "warmup_steps": 5, "layer": 9, "lm_name": "some-vit"}
    common |= {"lr": 3e-3, "device": "cpu", "submodule_name": "resid_post"}
    early = {"sparsity_warmup_steps": 5}
    started = {"threshold_start_step": 5, "threshold_beta": 0.9, "k": K}
    nested = matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer
    runs: dict[str, tuple[dict[str, Any], Any, bool]] = {
        "AutoEncoder": ({"trainer": standard.StandardTrainer, **early}, AutoEncoder, False),
        "AutoEncoderNew": (
            {"trainer": standard.StandardTrainerAprilUpdate, "dict_class": AutoEncoderNew, **early},
            AutoEncoderNew,
            False,
        ),
        "AutoEncoderTopK": ({"trainer": top_k.TopKTrainer, **started}, top_k.AutoEncoderTopK, False),
        "AutoEncoderTopK, scaled": ({"trainer": top_k.TopKTrainer, **started}, top_k.AutoEncoderTopK, True),
        "BatchTopKSAE": ({"trainer": batch_top_k.BatchTopKTrainer, **started}, batch_top_k.BatchTopKSAE, False),
        "MatryoshkaBatchTopKSAE": (
            {"trainer": nested, **started, "group_fractions": [0.25, 0.75]},
            matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
            True,
        ),
        "GatedAutoEncoder": ({"trainer": gdm.GatedSAETrainer, **early}, GatedAutoEncoder, False),
        "JumpReluAutoEncoder": ({"trainer": jumprelu.JumpReluTrainer, **early}, JumpReluAutoEncoder, True),
    }
    for name, (settings, kind, scaled) in runs.items():
        trainSAE(
            batches(), [common | settings], STEPS, save_dir=str(folder / name), normalize_activations=scaled,
            device="cpu",
        )  # fmt: skip
        place = folder / name / "trainer_0" / "ae.pt"
        more = {"normalize_decoder": False} if kind is AutoEncoder else {}
        theirs = kind.from_pretrained(place, **more)
        yield row(THEIRS, name, SparseAutoencoder.from_pretrained(place), theirs.encode(x), theirs(x))


LIBRARIES: dict[str, tuple[str, str, Callable[[Path], Iterator[Row]]]] = {
    "saelens": ("sae-lens", "sae_lens", saelens),
    "saev": ("saev", "saev.nn", saev),
    "overcomplete": ("overcomplete", "overcomplete.sae", overcomplete),
    "sparsify": ("eai-sparsify", "sparsify", sparsify),
    "visaebench": ("visaebench", "visaebench.hub", visaebench),
    "dictionary_learning": ("dictionary-learning", "dictionary_learning", dictionary_learning),
}


def compare(library: str) -> list[Row]:
    """All comparisons with one library.

    Raises:
        ImportError: it is not installed.
        KeyError: not in `LIBRARIES`.
    """
    module, run = LIBRARIES[library][1:]
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # for sparsify, whose Triton kernel needs a GPU
    importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        return list(run(Path(folder)))


def main() -> None:
    """Prints the table of one library; ends with an error if a difference is too large."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=LIBRARIES)
    options = parser.parse_args()
    rows = compare(options.library)
    version = importlib.metadata.version(LIBRARIES[options.library][0])
    print(f"### {options.library}\n\n{LIBRARIES[options.library][0]} {version}, torch {torch.__version__}\n")
    print("| way | SAE | codes | reconstruction | codes a token |\n|---|---|---|---|---|")
    for one in rows:
        print(f"| {one.way} | {one.sae} | {one.codes:.1e} | {one.reconstruction:.1e} | {one.l0:.1f} |")
    wrong = [one.sae for one in rows if not (one.codes <= TOLERANCE and one.reconstruction <= TOLERANCE)]
    if wrong:
        raise SystemExit(f"above {TOLERANCE}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
