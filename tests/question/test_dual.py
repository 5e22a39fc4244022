"""Dual encoders against their own logits_per_image: random weights, tiny sizes, a tokenizer of ten lines."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fga_fast import Explainer
from fga_fast.models.find import find_layout
from fga_fast.models.follower import followed_by, is_following
from fga_fast.question.dual import MAX_PROMPTS, DualEncoder, library_of
from fga_fast.question.readout import Embedding, Readout

WORDS, LENGTH = 60, 8
PROMPTS = ["a cat", "two dogs on grass", "an owl"]


def tokenize(texts: list[str]) -> Tensor:  # -> [T, LENGTH]
    """Words by the sum of their letters; the last and largest number ends the text, as CLIP wants it."""
    tokens = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in enumerate(texts):
        words = [3 + sum(map(ord, word)) % (WORDS - 5) for word in text.split()][: LENGTH - 1]
        tokens[row, : len(words) + 1] = torch.tensor([*words, WORDS - 1])
    return tokens


def open_clip_model(kind: str, **settings: Any) -> nn.Module:
    models = pytest.importorskip("open_clip.model")
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}
    text = {"context_length": LENGTH, "vocab_size": WORDS, "width": 16, "heads": 2, "layers": 2}
    return getattr(models, kind)(12, vision, text, **settings)  # type: ignore[no-any-return]


def transformers_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": WORDS, "max_position_embeddings": LENGTH, "pad_token_id": 0, "bos_token_id": 1}
    text["eos_token_id"] = WORDS - 1
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    more = {"projection_dim": 12} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **more)
    return getattr(transformers, f"{kind}Model")(config)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "open_clip CLIP": lambda: open_clip_model("CLIP"),
    "open_clip CLIP with a bias": lambda: open_clip_model("CustomTextCLIP", init_logit_bias=-3.0, init_logit_scale=1.0),
    "open_clip CLIP, scale of shape [1]": lambda: open_clip_model("CLIP", nonscalar_logit_scale=True),
    "transformers CLIP": lambda: transformers_model("CLIP"),
    "transformers SigLIP": lambda: transformers_model("Siglip"),
}


def build(name: str) -> nn.Module:
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def own_logits(model: Any, images: Tensor, prompts: list[str]) -> Tensor:  # -> [B, T]
    if library_of(model) == "open_clip":
        found: Tensor = model.get_logits(images, tokenize(prompts))[0]
    else:
        found = model(input_ids=tokenize(prompts), pixel_values=images).logits_per_image
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_models_own(name: str) -> None:
    """Gradients with respect to the images; there are none to the texts."""
    model, images = build(name), torch.randn(3, 3, 32, 32, requires_grad=True)
    readout = Readout(model, tokenizer=tokenize)
    output = readout.run(images)
    torch.testing.assert_close(output.norm(dim=-1), torch.ones(3))
    answer = readout.answer([["an owl", "a cat", "two dogs on grass", "a cat"]], output)
    want = own_logits(model, images, ["an owl", "a cat", "two dogs on grass"])
    torch.testing.assert_close(answer.logits, want.detach(), rtol=1e-5, atol=1e-5)
    assert answer.names == ("an owl", "a cat", "two dogs on grass")
    assert answer.targets.tolist() == [[0, 1, 2, 1]] * 3
    torch.testing.assert_close(answer.values, want[:, [0, 1, 2, 1]], rtol=1e-5, atol=1e-5)

    model, images = model.double(), images[:2].double().detach().requires_grad_()
    values = readout.answer(["a cat", "an owl"], readout.run(images)).values
    want = own_logits(model, images, ["a cat", "an owl"]).diagonal()
    texts = [p for n, p in model.named_parameters() if not n.startswith("vis")]
    found, *none = torch.autograd.grad(values.sum(), [images, *texts], allow_unused=True)
    torch.testing.assert_close(found, torch.autograd.grad(want.sum(), images)[0], rtol=1e-9, atol=1e-12)
    assert texts and none == [None] * len(texts)


class Counting:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, texts: list[str]) -> Tensor:
        self.seen += texts
        return tokenize(texts)


def test_each_prompt_is_encoded_once() -> None:
    model, counting = build("open_clip CLIP"), Counting()
    dual = DualEncoder(model, counting)
    first = dual.text_features(["a cat", "an owl", "a cat"])
    assert counting.seen == ["a cat", "an owl"] and torch.equal(first[0], first[2])
    assert torch.equal(dual.text_features(["an owl", "a cat"]), first[[1, 0]])
    dual.text_features(["an owl", "a fox"])
    assert counting.seen == ["a cat", "an owl", "a fox"]
    assert not first.requires_grad


def test_changed_weights_are_seen() -> None:
    model, counting = build("transformers CLIP"), Counting()
    dual = DualEncoder(model, counting)
    before = dual.text_features(["a cat"])
    with torch.no_grad():
        model.text_projection.weight.mul_(-1)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(dual.text_features(["a cat"]), -before)
    model.double()
    assert dual.text_features(["a cat"]).dtype == torch.float64
    with torch.no_grad():
        model.visual_projection.weight.mul_(-1)  # type: ignore[union-attr,operator]
    dual.text_features(["a cat"])
    assert counting.seen == ["a cat"] * 3  # the image tower's weights have no say in it


def test_autocast_has_features_of_its_own() -> None:
    model, images = build("transformers SigLIP"), torch.randn(1, 3, 32, 32)
    readout = Readout(model, tokenizer=tokenize)
    exact = readout.answer(PROMPTS[:1], readout.run(images)).logits
    with torch.autocast("cpu", torch.bfloat16):
        low = readout.answer(PROMPTS[:1], readout.run(images)).logits
        want = own_logits(model, images, PROMPTS[:1])
    assert not torch.equal(low, exact)
    torch.testing.assert_close(low.float(), want.float(), rtol=0.03, atol=0.03)
    assert torch.equal(readout.answer(PROMPTS[:1], readout.run(images)).logits, exact)
    with torch.autocast("cpu", torch.bfloat16):
        fresh = Readout(model, tokenizer=tokenize)
        fresh.answer(PROMPTS[:1], fresh.run(images))
    assert torch.equal(fresh.answer(PROMPTS[:1], fresh.run(images)).logits, exact)


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fga_fast.question.dual.MAX_PROMPTS", 3)
    counting = Counting()
    dual = DualEncoder(build("open_clip CLIP"), counting)
    dual.text_features(["a", "b", "c"])
    dual.text_features(["a", "d"])  # b was used longest ago
    assert len(dual._features) == 3
    dual.text_features(["a"])
    dual.text_features(["b"])
    assert counting.seen == ["a", "b", "c", "d", "b"]
    with pytest.raises(ValueError, match="targets: expected 1 to 3 distinct prompts, got 4"):
        dual.text_features(["a", "b", "c", "d"])


def test_many_prompts_are_encoded_in_chunks() -> None:
    dual = DualEncoder(build("open_clip CLIP"), tokenize)
    prompts = [f"number {'x' * i}" for i in range(130)]
    found = dual.text_features(prompts)
    torch.testing.assert_close(found[[129, 64, 0]], DualEncoder(dual.model, tokenize).text_features(
        [prompts[i] for i in (129, 64, 0)]
    ))  # fmt: skip


class Watching(TorchFunctionMode):
    """Counts what an explained forward pass would see."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += is_following(self)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ("open_clip CLIP", "transformers SigLIP"))
def test_texts_are_encoded_unseen_and_without_gradient_whatever_surrounds_it(name: str) -> None:
    model = build(name)
    want = DualEncoder(model, tokenize).text_features(PROMPTS)
    dual = DualEncoder(model, tokenize)
    with Watching() as watching, followed_by(watching), torch.enable_grad():
        dual.text_features(PROMPTS)
        encoding, watching.calls = watching.calls, 0
        dual.text_features(PROMPTS)
    assert watching.calls <= encoding <= watching.calls + 2  # as few as when nothing is left to be encoded
    with torch.inference_mode():
        inside = DualEncoder(model, tokenize).text_features(PROMPTS)
    assert not inside.is_inference() and not inside.requires_grad
    torch.testing.assert_close(inside, want)


def test_threads_share_a_cache() -> None:
    model, counting = build("open_clip CLIP"), Counting()
    dual, found = DualEncoder(model, counting), {}

    def work(i: int) -> None:
        found[i] = dual.text_features([PROMPTS[i % 3], PROMPTS[(i + 1) % 3]])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counting.seen) == sorted(PROMPTS)
    for i in range(6):
        assert torch.equal(found[i], dual.text_features([PROMPTS[i % 3], PROMPTS[(i + 1) % 3]]))


def test_readouts_can_be_copied() -> None:
    readout = Readout(build("open_clip CLIP"), tokenizer=tokenize)
    images = torch.randn(1, 3, 32, 32)
    want = readout.answer("a cat", readout.run(images)).logits
    for other in (copy.deepcopy(readout), pickle.loads(pickle.dumps(readout))):
        assert torch.equal(other.answer("a cat", other.run(images)).logits, want)


# tokenizers


def word_tokenizer() -> Any:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 2, "a": 3, "cat": 4, "two": 5, "dogs": 6, "</s>": WORDS - 1}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", WORDS - 1)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize("name", ("transformers CLIP", "transformers SigLIP", "open_clip CLIP"))
def test_tokenizers_of_transformers_are_called_as_the_model_wants(name: str) -> None:
    """SigLIP and open_clip were trained on texts padded to full length, CLIP masks its padding."""
    model: Any = build(name)
    texts, tokenizer = ["a cat", "two dogs a cat"], word_tokenizer()
    found = DualEncoder(model, tokenizer).text_features(texts)
    padding = True if name == "transformers CLIP" else "max_length"
    tokens = tokenizer(texts, padding=padding, truncation=True, max_length=LENGTH, return_tensors="pt")
    if name == "open_clip CLIP":
        want = model.encode_text(tokens["input_ids"])
    else:
        want = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
    if name == "transformers CLIP":
        torch.testing.assert_close(found[0], DualEncoder(model, tokenizer).text_features(["a cat"])[0])
    torch.testing.assert_close(found, torch.nn.functional.normalize(want, dim=-1).detach(), rtol=1e-4, atol=1e-5)
    assert DualEncoder(model, tokenizer).text_features(["a " * 20]).shape == (1, found.shape[1])  # cut to length


def test_a_processor_gives_its_tokenizer() -> None:
    class Processor:
        tokenizer = staticmethod(tokenize)

        def __call__(self, images: Any) -> None:
            raise AssertionError("its first argument is images")

    Processor.__module__ = "transformers.processing"
    model = build("open_clip CLIP")
    found = DualEncoder(model, Processor()).text_features(["a cat"])  # type: ignore[arg-type]
    assert torch.equal(found, DualEncoder(model, tokenize).text_features(["a cat"]))


def test_bad_tokenizers() -> None:
    model, images = build("open_clip CLIP"), torch.randn(1, 3, 32, 32)
    for tokenizer, message in (
        (None, r"targets: prompts such as 'a cat' need the model's tokenizer.*open_clip.get_tokenizer"),
        (lambda texts: tokenize(texts)[0], r"tokenizer: expected integer tokens \[1, n\] for 1 prompts.*got \[8\]"),
        (lambda texts: tokenize(texts).float(), r"got \[1, 8\] torch.float32"),
        (lambda texts: tokenize(texts).tolist(), r"tokenizer: expected integer tokens .*got list"),
        (lambda texts: {"ids": tokenize(texts)}, r"tokenizer: expected integer tokens .*got dict"),
        (lambda texts: tokenize(texts) + 1, "tokenizer: expected tokens 0 to 59, .*got 1 to 60"),
        (lambda texts: tokenize(texts)[:, :0], r"does not take its tokens of shape \[1, 0\]"),
        (
            lambda texts: tokenize(texts).repeat(1, 3),
            r"does not take its tokens of shape \[1, 24\].*belongs to the model",
        ),
    ):
        readout = Readout(model, tokenizer=tokenizer)
        with pytest.raises(ValueError, match=message):
            readout.answer("a cat", readout.run(images))
    with pytest.raises(TypeError, match="tokenizer: expected a callable from a list of str to tokens"):
        Readout(model, tokenizer="ViT-B-32")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokenizer: expected a dual encoder.*got Linear.*by class_names"):
        Readout(nn.Linear(2, 2), tokenizer=tokenize)


# what a dual encoder can be asked


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("name", MODELS)
def test_explained_as_the_zero_shot_head_around_its_image_tower(name: str, backend: Any) -> None:
    """A wrapper with the texts' features in its weights explains the same, and in particular knows no text tower."""
    model, images = build(name).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    got = Explainer(model, tokenizer=tokenize, backend=backend, preset="published")(images, [PROMPTS])
    dual = DualEncoder(model, tokenize)
    texts = dual.text_features(PROMPTS)

    class ZeroShot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return dual.image_features(x) @ texts.t() * model.logit_scale.exp()  # type: ignore[operator,no-any-return]

    want = Explainer(ZeroShot(), layout=find_layout(model), backend="reference", preset="published")(
        images, [[0, 1, 2]]
    )
    assert got.relevance.shape == (2, 3, 4) and float(got.relevance.abs().max()) > 1e-6
    torch.testing.assert_close(got.relevance, want.relevance, rtol=1e-9, atol=1e-15)
    assert got.names == tuple(PROMPTS) and got.targets.tolist() == [[0, 1, 2]] * 2
    assert got.values is not None
    torch.testing.assert_close(got.values, got.logits)


def test_bad_prompts() -> None:
    readout = Readout(build("transformers CLIP"), tokenizer=tokenize)
    output = readout.run(torch.randn(2, 3, 32, 32))
    for targets, message in (
        (None, r"expected prompts \(str\) for the dual encoder CLIPModel, .*got None \(NoneType\); give e.g. targets="),
        (3, r"expected prompts .*got 3 \(int\)"),
        (torch.tensor([0, 1]), "expected prompts .*Tensor"),
        (["a cat", 1], "expected prompts"),
        ({"a cat": 1}, "expected prompts"),
        ("", "got an empty one"),
        (["a cat", "  "], "got an empty one"),
        (["a cat", "an owl", "a fox"], r"shape \[2\], got \[3\]; K classes an image"),
        ([["a cat"], ["an owl", "a fox"]], r"lists of different lengths"),
        ([[str(i) for i in range(MAX_PROMPTS + 1)]], f"1 to {MAX_PROMPTS} distinct prompts, got {MAX_PROMPTS + 1}"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"targets: .*{message}"):
            readout.answer(targets, output)


def test_class_names_are_prompts_to_choose_among() -> None:
    model, images = build("open_clip CLIP"), torch.randn(3, 3, 32, 32)
    readout = Readout(model, PROMPTS, tokenize)
    output = readout.run(images)
    want = own_logits(model, images, PROMPTS).detach()
    answer = readout.answer(None, output)
    torch.testing.assert_close(answer.logits, want, rtol=1e-5, atol=1e-5)
    assert answer.names == tuple(PROMPTS) and torch.equal(answer.targets, want.argmax(-1))
    assert readout.answer([["an owl", 0, "a fox"]], output).targets.tolist() == [[2, 0, 3]] * 3
    with pytest.raises(ValueError, match="targets: expected classes 0 to 2, got 3"):
        readout.answer(["a fox", 3, 0], output)
    with pytest.raises(ValueError, match="class_names: expected different prompts"):
        Readout(model, ["a cat", "a cat"], tokenize)
    with pytest.raises(TypeError, match="class_names: expected a list of prompts"):
        Readout(model, {0: "a cat"}, tokenize)


def test_embeddings_and_functions_see_the_image_features() -> None:
    readout = Readout(build("transformers SigLIP"), tokenizer=tokenize)
    output = readout.run(torch.randn(2, 3, 32, 32))
    assert readout.dual is not None
    texts = readout.dual.text_features(PROMPTS[:2])
    answer = readout.answer(Embedding(5 * texts), output)
    torch.testing.assert_close(answer.values, (output * texts).sum(-1))
    answer = readout.answer(lambda features: features @ texts.t(), output)
    torch.testing.assert_close(answer.values, output @ texts.t())
    assert answer.targets.tolist() == [[-1, -1]] * 2 and answer.names is None


def test_no_images() -> None:
    readout = Readout(build("open_clip CLIP"), tokenizer=tokenize)
    output = readout.run(torch.randn(1, 3, 32, 32))[:0]
    assert readout.answer([["a cat", "an owl"]], output).values.shape == (0, 2)
    assert readout.answer([], output).logits.shape == (0, 0)
    assert readout.answer("a cat", output).logits.shape == (0, 1)


def test_damaged_text_weights_are_said() -> None:
    model: Any = build("transformers CLIP")
    with torch.no_grad():
        model.text_projection.weight[0, 0] = torch.nan
    readout = Readout(model, tokenizer=tokenize)
    with pytest.raises(ValueError, match=r"model: text features of \['a cat'\] contain NaN or Inf"):
        readout.answer("a cat", readout.run(torch.randn(1, 3, 32, 32)))
