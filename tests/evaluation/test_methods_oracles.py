"""Every method against a textbook of it: `PlainViT`, one image at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from plain_vit import PlainViT, activation_only, combined, gate
from subjects import MODELS, Images
from torch import Tensor

from fga_fast.evaluation.methods import METHODS, grad_cam, sae_part, sae_score
from fga_fast.evaluation.methods.random_map import draw
from fga_fast.evaluation.subject import Method, Subject
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder

Oracle = Callable[[Subject, Tensor, int], Tensor]  # subject, image [3, H, W], target -> [P]


def plain(subject: Subject, image: Tensor, target: int, conservative: bool = False) -> PlainViT:
    return PlainViT(subject.model, image, target, conservative)


def scored(score: str, seed: int) -> Callable[..., Tensor]:  # x [P, C], g [P, C], sae -> [P]
    def shuffled(x: Tensor, g: Tensor, sae: SparseAutoencoder) -> Tensor:
        order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(seed))
        return (sae.encode(x) * (g @ sae.W_dec[order].T)).sum(-1)

    return {
        "combined": combined,
        "activation_only": activation_only,
        "gradient_only": lambda x, g, sae: (g @ sae.W_dec.T).sum(-1),
        "no_sae": lambda x, g, sae: (x * g).sum(-1),
        "centred": lambda x, g, sae: ((x - x.mean(0)) * g).sum(-1),
        "shuffled": shuffled,
    }[score]


def gated(score: str, base: float = 10.0) -> Oracle:
    def oracle(subject: Subject, image: Tensor, target: int) -> Tensor:
        p = plain(subject, image, target)
        return p.transmm(p.gates(subject.saes, scored(score, subject.seed), base))

    return oracle


def random_gates(subject: Subject, image: Tensor, target: int) -> Tensor:
    drawn = {
        block: draw(f"random_gates {block}", subject.seed, image[None], torch.tensor([target]), 6)[0]
        for block in subject.saes
    }
    return plain(subject, image, target).transmm({block: gate(s, 10.0) for block, s in drawn.items()})


def contribution(conservative: bool, with_gates: bool = False) -> Oracle:
    def oracle(subject: Subject, image: Tensor, target: int) -> Tensor:
        p = plain(subject, image, target, conservative)
        found = p.contribution()
        for w in p.gates(subject.saes, combined, 2.0).values() if with_gates else ():
            found = found * w
        return found

    return oracle


def block_mean(score: str | None = None) -> Oracle:
    def oracle(subject: Subject, image: Tensor, target: int) -> Tensor:
        p = plain(subject, image, target, conservative=True)
        gates = p.gates(subject.saes, scored(score, subject.seed), 2.0) if score else {}
        found = [p.contribution(block) for block in range(4)]
        for block, w in gates.items():
            found = [c * w if entered <= block else c for entered, c in enumerate(found)]
        return torch.stack(found).mean(0)

    return oracle


def reconstruction(conservative: bool = False, block: int = 1) -> Oracle:
    def oracle(subject: Subject, image: Tensor, target: int) -> Tensor:
        x, g = plain(subject, image, target, conservative).after(block)
        return (subject.saes[block](x) * g).sum(-1)

    return oracle


def error(subject: Subject, image: Tensor, target: int) -> Tensor:
    return plain(subject, image, target).contribution(2) - reconstruction()(subject, image, target)


def score_of(block: int) -> Oracle:
    return lambda subject, image, target: combined(*plain(subject, image, target).after(block), subject.saes[block])


def attention_rollout(subject: Subject, image: Tensor, target: int) -> Tensor:
    p = plain(subject, image, target)
    R = torch.eye(len(p.streams[0]), dtype=torch.float64)
    for maps in p.maps:
        A = 0.5 * maps.mean(0) + 0.5 * torch.eye(len(R), dtype=torch.float64)
        R = (A / A.sum(-1, keepdim=True)) @ R
    return (p.row() @ R)[p.prefix :]


def raw_attention(subject: Subject, image: Tensor, target: int) -> Tensor:
    p = plain(subject, image, target)
    return (p.row() @ p.maps[-1].mean(0))[p.prefix :]


def cam(index: int) -> Oracle:
    def oracle(subject: Subject, image: Tensor, target: int) -> Tensor:
        x, g = plain(subject, image, target).patches(index)
        return (x @ g.mean(0)).relu()

    return oracle


def legrad(subject: Subject, image: Tensor, target: int) -> Tensor:
    p = plain(subject, image, target)
    found = []
    for block in range(4):
        (d,) = torch.autograd.grad(p.head(p.streams[block + 1]), p.maps[block], retain_graph=True)  # [H, N, N]
        found.append(d.relu().sum((0, 1)) / (2 * len(d[0])))
    return torch.stack(found).mean(0)[p.prefix :]


def integrated(subject: Subject, image: Tensor, target: int) -> Tensor:
    """Over 20 Gauss-Legendre points on the way from 0 to the image."""
    points, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(20))
    at = ((points + 1) / 2).view(-1, 1, 1, 1) * image
    at.requires_grad_()
    (g,) = torch.autograd.grad(subject.model(at)[:, target].sum(), at)
    pixels = image * (weights.view(-1, 1, 1, 1) / 2 * g).sum(0)
    return torch.stack([pixels[:, r : r + 16, c : c + 16].sum() for r in (0, 16) for c in (0, 16, 32)])


ORACLES: dict[str, Oracle] = {
    "transmm": lambda s, i, t: plain(s, i, t).transmm(),
    "transmm_conservative": lambda s, i, t: plain(s, i, t, True).transmm(),
    "fga": gated("combined"),
    "fga_base2": gated("combined", 2.0),
    "fga_activation_only": gated("activation_only"),
    "fga_gradient_only": gated("gradient_only"),
    "fga_no_sae": gated("no_sae"),
    "fga_no_sae_centred": gated("centred"),
    "fga_shuffled": gated("shuffled"),
    "fga_random_gates": random_gates,
    "input_x_gradient": contribution(False),
    "input_x_gradient_gated": contribution(False, True),
    "input_x_gradient_conservative": contribution(True),
    "input_x_gradient_conservative_gated": contribution(True, True),
    "block_x_gradient": block_mean(),
    "block_x_gradient_gated": block_mean("combined"),
    "block_x_gradient_gated_no_sae": block_mean("no_sae"),
    "block_x_gradient_gated_shuffled": block_mean("shuffled"),
    "sae_score": score_of(1),
    "sae_reconstruction": reconstruction(),
    "sae_error": error,
    "attention_rollout": attention_rollout,
    "raw_attention": raw_attention,
    "grad_cam": cam(3),
    "legrad": legrad,
    "integrated_gradients": integrated,
}
WITH_SETTINGS: dict[str, tuple[Method, Oracle]] = {
    "grad_cam": (grad_cam(0), cam(1)),
    "sae_score": (sae_score(0), score_of(0)),
    "sae_part": (sae_part("reconstruction", 0, "conservative"), reconstruction(True, 0)),
}


def agree(method: Method, oracle: Oracle, subject: Subject, images: Images, tolerance: float = 1e-9) -> None:
    got = method(subject, *images)
    pairs = zip(*images, strict=True)
    want = torch.stack([oracle(subject, image, int(target)) for image, target in pairs]).detach()
    assert (got.dtype, got.requires_grad) == (torch.float64, False)
    assert float(want.norm()) > 0
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ORACLES)
def test_method(name: str, kind: str, make_subject: Callable[..., Subject], images: Images) -> None:
    tolerance = 1e-9
    if name == "integrated_gradients":
        pytest.importorskip("captum")
        tolerance = 1e-6  # captum rounds the weights of its points to float32
    agree(METHODS[name], ORACLES[name], make_subject(kind, seed=5), images, tolerance)


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_settings(name: str, make_subject: Callable[..., Subject], images: Images) -> None:
    agree(*WITH_SETTINGS[name], make_subject(), images)


def test_every_method_has_a_textbook() -> None:
    assert ORACLES.keys() | {"random"} == METHODS.keys()
