"""What holds for all methods: the table, controls, batches, dtypes, errors, and models that are left as they came."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explaining import PIXELS, Build, sae_for
from subjects import Images
from torch import Tensor, nn

from fga_fast import Gate, SparseAutoencoder
from fga_fast.evaluation.methods import METHODS, NEEDS_SAES, grad_cam, integrated_gradients, sae_part, sae_score
from fga_fast.evaluation.subject import Subject
from fga_fast.models.find import find_layout

Make = Callable[..., Subject]
ALL = pytest.mark.parametrize("name", METHODS)


def run(name: str, subject: Subject, images: Images) -> Tensor:
    if name == "integrated_gradients":
        pytest.importorskip("captum")
        return integrated_gradients(4)(subject, *images)
    return METHODS[name](subject, *images)


def test_the_table() -> None:
    assert list(METHODS)[:3] == ["transmm", "transmm_conservative", "fga"]
    assert {name for name in METHODS if name.startswith(("fga", "sae_")) or "gated" in name} == NEEDS_SAES
    assert len(NEEDS_SAES) == 16


@ALL
def test_saes_are_needed_or_ignored(name: str, make_subject: Make, images: Images) -> None:
    subject = make_subject()
    without = replace(subject, saes={})
    if name in NEEDS_SAES:
        with pytest.raises(ValueError, match=f"^{name}: needs SAEs"):
            run(name, without, images)
    else:
        assert torch.equal(run(name, subject, images), run(name, without, images))


@ALL
def test_images_are_explained_apart(name: str, make_subject: Make, images: Images) -> None:
    subject = make_subject("registers")
    together = run(name, subject, images)
    assert together.shape == (3, 6)
    assert bool((together.std(1) > 0).any())
    for part in (slice(0, 1), slice(1, 3)):
        apart = run(name, subject, (images[0][part], images[1][part]))
        torch.testing.assert_close(together[part], apart, rtol=1e-9, atol=1e-9 * float(apart.abs().max()))


def state(model: nn.Module) -> list[Any]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training, m.__dict__.keys()) for m in model.modules()]
    return [hooks, [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()], torch.get_rng_state()]


@ALL
def test_the_model_is_left_as_it_came(name: str, make_subject: Make, images: Images) -> None:
    subject = make_subject()
    next(subject.model.parameters()).requires_grad_(False)
    values = {key: value.clone() for key, value in subject.model.state_dict().items()}

    def check(before: list[Any]) -> None:
        now = state(subject.model)
        assert now[:2] == before[:2]
        assert torch.equal(now[2], before[2])
        assert all(torch.equal(value, values[key]) for key, value in subject.model.state_dict().items())

    before, given = state(subject.model), images[0].clone()
    run(name, subject, images)
    check(before)
    assert torch.equal(images[0], given)
    assert not images[0].requires_grad

    class Broken(RuntimeError):
        pass

    def fail(*_: Any) -> None:
        raise Broken

    handle = subject.model.blocks[2].mlp.register_forward_hook(fail)  # type: ignore[index,union-attr]
    before = state(subject.model)
    if name != "random":  # which runs no model
        with pytest.raises((Broken, ValueError)):
            run(name, subject, images)
    check(before)
    handle.remove()


@ALL
def test_float32_and_inference_mode(name: str, make_subject: Make, images: Images) -> None:
    double = make_subject()
    want = run(name, double, images)
    single = Subject(double.model.float(), {block: sae.float() for block, sae in double.saes.items()})
    with torch.inference_mode():
        got = run(name, single, (images[0].float(), images[1]))
    assert (want.dtype, got.dtype) == (torch.float64, torch.float32)
    if "random" not in name:  # the numbers depend on the image's values
        assert float((got - want).norm()) < 2e-2 * float(want.norm())


@pytest.mark.parametrize("name", ["random", "fga_random_gates", "fga_shuffled"])
def test_random_controls_are_drawn_from_the_seed(name: str, make_subject: Make, images: Images) -> None:
    subject = make_subject(seed=3)
    first = run(name, subject, images)
    torch.rand(5)
    assert torch.equal(run(name, replace(subject), images), first)
    assert not torch.allclose(run(name, replace(subject, seed=4), images), first)
    assert not torch.allclose(first, run("fga", subject, images))


def test_random_maps_differ_by_image_and_target(make_subject: Make) -> None:
    subject, image = make_subject(), torch.randn(1, *PIXELS, dtype=torch.float64)
    same = image.expand(3, -1, -1, -1)
    a, b, c = run("random", subject, (same, torch.tensor([1, 1, 2])))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    many = run("random", subject, (torch.randn(500, *PIXELS, dtype=torch.float64), torch.zeros(500, dtype=torch.int64)))
    assert abs(float(many.mean())) < 0.1
    assert abs(float(many.std()) - 1) < 0.1


@pytest.mark.parametrize("name", ["fga_no_sae", "fga_no_sae_centred", "fga_random_gates"])
def test_controls_without_an_sae_read_no_weight_of_it(name: str, make_subject: Make, images: Images) -> None:
    subject = make_subject()
    other = replace(subject, saes={block: sae_for(subject.model) for block in subject.saes})
    assert torch.equal(run(name, subject, images), run(name, other, images))
    assert not torch.allclose(run("fga", subject, images), run("fga", other, images))


def test_gates_of_one_kind_differ_from_those_of_another(make_subject: Make, images: Images) -> None:
    subject = make_subject()
    found = {name: run(name, subject, images) for name in METHODS if name.startswith(("fga", "transmm"))}
    for name, a in found.items():
        for other, b in found.items():
            assert name == other or not torch.allclose(a, b), (name, other)


def test_reconstruction_and_error_add_up(make_subject: Make, images: Images) -> None:
    """To x . g, which is what the reconstruction contributes where there is no error."""
    subject = make_subject()
    parts = sae_part("reconstruction", 0)(subject, *images), sae_part("error", 0)(subject, *images)
    whole = replace(subject, saes={0: Whole(16)})
    torch.testing.assert_close(parts[0] + parts[1], sae_part("reconstruction", 0)(whole, *images))
    assert float(sae_part("error", 0)(whole, *images).abs().max()) < 1e-12


class Whole(SparseAutoencoder):
    """Which reconstructs all of its input."""

    def __init__(self, width: int) -> None:
        eye = torch.eye(width, dtype=torch.float64)
        both = torch.cat((eye, -eye), 1)
        super().__init__(both, None, both.T.contiguous(), torch.zeros(width, dtype=torch.float64))


def test_an_sae_after_the_last_block(tiny_vit: Build, images: Images) -> None:
    model = tiny_vit().double()
    subject = Subject(model, {1: sae_for(model), 2: sae_for(model)})
    assert torch.equal(run("sae_score", subject, images), sae_score(1)(subject, *images))
    for method in (sae_score(), sae_part("error")):
        with pytest.raises(ValueError, match=r"^sae_\w+: the only SAE is after block 2 or later"):
            method(Subject(model, {2: sae_for(model)}), *images)
    average = tiny_vit(global_pool="avg").double()
    subject = Subject(average, {2: sae_for(average)})
    assert bool((run("sae_score", subject, images) != 0).all())


def test_float16_is_refused(tiny_vit: Build, images: Images) -> None:
    subject = Subject(tiny_vit().half())
    for name in ("grad_cam", "raw_attention", "legrad"):
        with pytest.raises(ValueError, match="images: float16 is too narrow"):
            run(name, subject, (images[0].half(), images[1]))


def test_gates_with_permutations_have_explainers_of_their_own(make_subject: Make) -> None:
    subject = make_subject()
    first, second = (Gate(mode="shuffled", permutation=torch.arange(40).roll(shift)) for shift in (1, 2))
    assert subject.explainer(first) is subject.explainer(first) is not subject.explainer(second)


def test_errors_name_the_method(tiny_vit: Build, make_subject: Make, images: Images, monkeypatch: Any) -> None:
    subject = make_subject()
    with pytest.raises(ValueError, match="sae_score: expected a block with an SAE"):
        sae_score(3)(subject, *images)
    with pytest.raises(ValueError, match="block: expected one that has a gradient"):
        grad_cam(9)(subject, *images)
    with pytest.raises(ValueError, match="targets"):
        run("legrad", subject, (images[0], torch.tensor([1, 2])))
    with pytest.raises(ValueError, match="expected dtype"):
        run("raw_attention", subject, (images[0].float(), images[1]))
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match="integrated_gradients needs captum"):
        METHODS["integrated_gradients"](subject, *images)


@ALL
def test_an_attention_pool(name: str, tiny_vit: Build, images: Images) -> None:
    model = tiny_vit(global_pool="map", class_token=False).double()
    subject = Subject(model, {0: sae_for(model), 1: sae_for(model)})
    if name == "legrad":
        with pytest.raises(ValueError, match=r"^legrad: .*attention pool"):
            run(name, subject, images)
        return
    found = run(name, subject, images)
    assert found.shape == (3, 6)
    assert bool((found.std(1) > 0).any())


def test_the_row_of_an_attention_pool(tiny_vit: Build, images: Images) -> None:
    model = tiny_vit(global_pool="map", class_token=False).double()
    maps: list[Tensor] = []
    for module in (*model.blocks, model):  # type: ignore[misc]
        (module.attn_pool if module is model else module.attn).fused_attn = False
    softmax = Tensor.softmax

    def kept(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        maps.append(softmax(x, *args, **kwargs))
        return maps[-1]

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "softmax", kept)
        model(images[0])
    *blocks, pool = (a.mean(1) for a in maps)  # [B, N, N] each, [B, 1, N]
    assert len(blocks) == 3
    subject = Subject(model)
    torch.testing.assert_close(run("raw_attention", subject, images), (pool @ blocks[-1])[:, 0])
    want = pool
    for a in reversed(blocks):
        want = want / 2 + want @ a / 2
    torch.testing.assert_close(run("attention_rollout", subject, images), want[:, 0])


class Probe(nn.Module):
    """Reads the class token after block 1, and of later ones too if there are `more`."""

    def __init__(self, tower: nn.Module, more: bool) -> None:
        super().__init__()
        self.tower, self.more = tower, more

    def forward(self, x: Tensor) -> Tensor:
        tower: Any = self.tower
        x = tower._pos_embed(tower.patch_embed(x))
        read = []
        for block in tower.blocks:
            x = block(x)
            read.append(tower.head(F.layer_norm(x[:, 0], (16,))))
        return read[1] + read[2] if self.more else read[1]


def test_heads_that_read_earlier_blocks(tiny_vit: Build, images: Images) -> None:
    tower = tiny_vit(depth=4).double()
    short = tiny_vit(depth=2).double()
    short.load_state_dict(tower.state_dict(), strict=False)
    short.norm = nn.LayerNorm(16, eps=1e-5, dtype=torch.float64)
    probe = Subject(Probe(tower, False).eval(), layout=find_layout(tower))
    for name in ("attention_rollout", "raw_attention", "grad_cam", "legrad"):
        torch.testing.assert_close(run(name, probe, images), run(name, Subject(short.eval()), images))
    both = Subject(Probe(tower, True).eval(), layout=find_layout(tower))
    with pytest.raises(ValueError, match=r"^legrad: the head reads the outputs of blocks 1, 2"):
        run("legrad", both, images)
    assert run("raw_attention", both, images).shape == (3, 6)


def test_patches_that_do_not_divide_the_image(tiny_vit: Build) -> None:
    pytest.importorskip("captum")
    model = tiny_vit().double()
    resized = nn.Sequential(nn.Upsample((32, 48)), model).eval()
    subject = Subject(resized, layout=replace(find_layout(model), image_size=None))
    images = torch.randn(2, 3, 33, 47, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"^integrated_gradients: .* 2 x 3 does not divide images of 33 x 47"):
        run("integrated_gradients", subject, images)
