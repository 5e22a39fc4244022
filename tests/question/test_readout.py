"""Readout: what every kind of target stands for, and which outputs and class names are taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from explaining import PIXELS, Build, sae_for
from families_towers import open_clip_tower, torchvision_vit
from torch import Tensor, nn

from fga_fast import Explainer
from fga_fast.models.find import find_layout
from fga_fast.question.readout import Difference, Embedding, Readout

NAMES = ("cat", "dog, hound", "cow", "owl", "crane")
LOGITS = torch.tensor([[1.0, 5.0, 2.0, -3.0, 0.5], [4.0, 0.0, 2.5, 4.5, 1.0], [0.0, 1.0, 2.0, 3.0, 9.0]])


class Returning(nn.Module):
    """Turns images into whatever it is told to make of LOGITS."""

    def __init__(self, make: Any = lambda logits: logits) -> None:
        super().__init__()
        self.make = make

    def forward(self, images: Tensor) -> Any:
        return self.make(images)


def ask(targets: Any, names: Any = NAMES, logits: Tensor = LOGITS) -> Any:
    logits = logits.clone().requires_grad_() * 1.0
    return Readout(Returning(), names).answer(targets, logits)


@pytest.mark.parametrize(
    ("targets", "columns"),
    [
        (None, [1, 3, 4]),
        (2, [2, 2, 2]),
        ("owl", [3, 3, 3]),
        ([2, 0, 1], [2, 0, 1]),
        ((2, 0, 1), [2, 0, 1]),
        (["cow", 0, "dog, hound"], [2, 0, 1]),
        (["Cow", " CAT ", "hound"], [2, 0, 1]),
        ([0, None, "cow"], [0, 3, 2]),
        (np.array([None, 0, None], dtype=object), [1, 0, 4]),
        ([[None, 0]], [[1, 0], [3, 0], [4, 0]]),
        (torch.tensor([2, 0, 1]), [2, 0, 1]),
        (torch.tensor([2, 0, 1], dtype=torch.uint8), [2, 0, 1]),
        (torch.tensor(4), [4, 4, 4]),
        (np.array([2, 0, 1]), [2, 0, 1]),
        (np.int32(3), [3, 3, 3]),
        (np.array(["cow", "cat", "dog"]), [2, 0, 1]),
        (np.array(["cow", 0, "dog"], dtype=object), [2, 0, 1]),
        ([torch.tensor(2), np.int64(0), 1], [2, 0, 1]),
        ([[2, "cat"]], [[2, 0]] * 3),
        (torch.tensor([[2, 0]]), [[2, 0]] * 3),
        ([[0, 1], [1, 2], [2, 2]], [[0, 1], [1, 2], [2, 2]]),
        ([torch.tensor([0, 1]), np.array([1, 2]), ("cow", 2)], [[0, 1], [1, 2], [2, 2]]),
        (np.array([[0, 1], [1, 2], [2, 2]]), [[0, 1], [1, 2], [2, 2]]),
        ([["crane"]], [[4]] * 3),
        ([[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]] * 3),
        ([["cat", "dog", "cat", "cat", "cat"]], [[0, 1, 0, 0, 0]] * 3),
    ],
)
def test_targets_pick_columns(targets: Any, columns: Any) -> None:
    answer = ask(targets)
    assert answer.targets.tolist() == columns and answer.targets.dtype == torch.int64
    picked = torch.tensor(columns).reshape(3, -1)
    assert torch.equal(answer.values.detach().reshape(3, -1), LOGITS.gather(1, picked))
    assert answer.values.shape == answer.targets.shape and answer.values.requires_grad
    assert torch.equal(answer.logits, LOGITS) and not answer.logits.requires_grad
    assert answer.names == NAMES


def test_both_of_two_classes_are_no_one_hot_row() -> None:
    assert ask([[0, 1], [1, 0], [0, 1]], None, LOGITS[:, :2]).targets.tolist() == [[0, 1], [1, 0], [0, 1]]


def test_targets_are_copied() -> None:
    given = torch.tensor([[1, 2, 3]])
    answer = ask(given)
    given += 1
    assert answer.targets.tolist() == [[1, 2, 3]] * 3 and answer.targets.is_contiguous()


@pytest.mark.parametrize(
    ("a", "b", "columns", "values"),
    [
        ("dog", 0, [1, 1, 1], [4.0, -4.0, 1.0]),
        (None, [0, 1, 2], [1, 3, 4], [4.0, 4.5, 7.0]),
        ([[0, 1]], [[2, 3]], [[0, 1]] * 3, [[-1.0, 8.0], [1.5, -4.5], [-2.0, -2.0]]),
        (0, [[1, 2]], [[0, 0]] * 3, [[-4.0, -1.0], [4.0, 1.5], [-1.0, -2.0]]),
        ([[1, 2]], "cat", [[1, 2]] * 3, [[4.0, 1.0], [-4.0, -1.5], [1.0, 2.0]]),
    ],
)
def test_differences(a: Any, b: Any, columns: Any, values: Any) -> None:
    answer = ask(Difference(a, b))
    assert answer.targets.tolist() == columns and answer.values.tolist() == values


def test_embeddings() -> None:
    torch.manual_seed(1)
    one, each, several = torch.randn(5), torch.randn(3, 5), torch.randn(3, 2, 5)
    answer = ask(Embedding(one))
    torch.testing.assert_close(answer.values.detach(), F.cosine_similarity(LOGITS, one, dim=-1))
    torch.testing.assert_close(answer.logits, answer.values.detach()[:, None])
    assert answer.targets.tolist() == [0, 0, 0] and answer.names == ("embedding",)
    want = F.cosine_similarity(LOGITS, each, dim=-1)
    for vector in (each, each.double().numpy(), (1e6 * each).tolist()):
        torch.testing.assert_close(ask(Embedding(vector)).values.detach(), want)
    answer = ask(Embedding(several))
    torch.testing.assert_close(answer.values.detach(), F.cosine_similarity(LOGITS[:, None], several, dim=-1))
    assert answer.targets.tolist() == [[0, 1]] * 3 and torch.equal(answer.logits, answer.values.detach())
    torch.testing.assert_close(ask(Embedding(one[None])).values, ask(Embedding(one)).values)
    assert ask(Embedding(several[:1])).values.shape == (3, 2)
    low = ask(Embedding(one), logits=LOGITS.bfloat16()).values
    assert low.dtype == torch.float32


def test_functions() -> None:
    answer = ask(lambda logits: logits.softmax(-1)[:, 2])
    torch.testing.assert_close(answer.values.detach(), LOGITS.softmax(-1)[:, 2])
    assert answer.targets.tolist() == [-1, -1, -1] and torch.equal(answer.logits, LOGITS)
    answer = ask(lambda logits: torch.stack([logits[:, 0], logits[:, 1] - logits[:, 2]], 1))
    assert answer.targets.tolist() == [[-1, -1]] * 3 and answer.values.tolist()[0] == [1.0, 3.0]
    assert ask(lambda logits: logits.mul_(2)[:, 0]).logits.tolist() == LOGITS.tolist()  # not theirs to change
    assert ask(nn.Linear(5, 2)).values.shape == (3, 2)
    assert ask(lambda logits: logits - logits[0].detach()).values.shape == (3, 5)


def test_bad_functions() -> None:
    def rank(logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    for function, message in (
        (rank, "expected rank to return a floating-point tensor, one value an image, got torch.int64"),
        (lambda logits: 3.0, "expected <lambda> to return a floating-point tensor.* got float"),
        (lambda logits: logits.detach().numpy(), "got ndarray"),
        (
            lambda logits: logits.mean(),
            r"one value an image, shape \[3\] \(or \[3, K\]\), from logits \[3, 5\], got \[\]",
        ),
        (lambda logits: logits[:2, 0], r"got \[2\]"),
        (lambda logits: logits[:, None, :], r"got \[3, 1, 5\]"),
        (lambda logits: logits[:, :0], r"got \[3, 0\]"),
        (lambda logits: logits.detach()[:, 0], "carries no gradient to the logits; compute it with torch"),
        (lambda logits: torch.ones(3, requires_grad=True) * 2, "carries no gradient to the logits"),
        (lambda logits: (logits[:, 0] - 10).log(), "<lambda> returned NaN or Inf for finite logits"),
        (lambda logits: logits.softmax(0)[:, 1], "a value depends on the logits of other images"),
        (lambda logits: logits[:, 1] - logits[:, 1].mean(), "depends on the logits of other images"),
        (lambda logits: logits[:, 1] - logits[0, 1], "depends on the logits of other images"),
        (lambda logits: logits.flip(0)[:, 1].roll(1), "depends on the logits of other images"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"targets: .*{message}"):
            ask(function)


def test_bad_targets() -> None:
    for targets, message in (
        (5, "expected classes 0 to 4, got 5"),
        (-1, "expected classes 0 to 4, got -1"),
        (2**80, "expected classes 0 to 4, got 1208925819614629174706176"),
        ([0, 1, 7], "expected classes 0 to 4, got 7"),
        (torch.tensor([[0, 1, -2]]), "expected classes 0 to 4, got -2"),
        ([0, 1], r"expected one class an image, shape \[3\], got \[2\]; K classes an image are \[3, K\]"),
        ([], r"shape \[3\], got \[0\]"),
        (torch.zeros(2, 2, dtype=torch.int64), r"shape \[3\], got \[2, 2\]"),
        (torch.zeros(3, 0, dtype=torch.int64), r"shape \[3\], got \[3, 0\]"),
        (torch.zeros(3, 1, 1, dtype=torch.int64), r"got \[3, 1, 1\]"),
        (True, r"expected None, an int or integers .*got True \(bool\)"),
        ([0, 1.0, 2], r"expected integer class indices, names or prompts, got 1.0 \(float\)"),
        (np.array([0.0, 1, 2]), "expected integer class indices, got dtype torch.float64"),
        (F.one_hot(torch.tensor([1, 4, 0]), 5), r"rows of 0 and 1, .*\(5\).* one-hot .*give targets.argmax\(1\)"),
        (np.eye(5, dtype=np.int64)[:3], "one-hot or multi-label"),
        ([[0, 1, 0, 0, 0]], "one-hot or multi-label"),
        ([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], r"multi-label .*\(logits \* targets\).sum\(1\)"),
        (Difference(0, torch.eye(5, dtype=torch.int32)[:3]), "one-hot or multi-label"),
        (torch.eye(5)[:3], r"got dtype torch.float32; for one-hot rows or probabilities give targets.argmax\(1\)"),
        (torch.eye(5)[:3].bool(), r"got dtype torch.bool; for one-hot rows"),
        (torch.ones(3), "got dtype torch.float32; convert them"),
        ([[0], [1, 2], [3]], r"lists of different lengths or empty ones \(1, 2\)"),
        ([0, [1], 2], r"lists of different lengths or empty ones \(one without a list, 1\)"),
        ([[], [], []], "or empty ones"),
        ([[[0]]], "got deeper ones"),
        (b"cat", "expected None, an int or integers .*got b'cat'"),
        (bytearray(3), "expected None, an int or integers .*got bytearray"),
        ({0, 1}, r"got \{0, 1\} \(set\)"),
        (nn.Linear, "got <class 'torch.nn.modules.linear.Linear'>"),
        (" ", "expected the name of a class, got an empty one"),
        ("cats", r"'cats' is not among the names of the 5 classes; did you mean 'cat'\?"),
        ("ow", r"did you mean 'cow' or 'owl'\?"),
        ("houndd", r"did you mean 'dog, hound'\?"),
        ("zebra fish", "they are 'cat', 'dog, hound', 'cow', 'owl', 'crane'"),
        (Difference(1, 1), "two different classes in a Difference, got the same one twice for image 0, 1, 2; that"),
        (Difference(None, 4), "twice for image 2;"),
        (Difference([[0, 1]], [[2, 3, 4]]), "as many classes in both parts of a Difference, got 2 and 3"),
        (Difference(Difference(0, 1), 2), "expected classes, names or prompts in a Difference, got Difference"),
        (Difference(0, Embedding([1.0])), r"got Embedding\("),
        (Difference(0, lambda logits: logits), "got <function"),
        (Embedding(torch.ones(4)), r"shape \[5\], \[3, 5\] or \[3, K, 5\] .*\[3, 5\], got \[4\]"),
        (Embedding(torch.ones(2, 5)), r"got \[2, 5\]"),
        (Embedding(torch.ones(())), r"got \[\]"),
        (Embedding(torch.ones(3, 0, 5)), r"got \[3, 0, 5\]"),
        (Embedding(torch.ones(3, 1, 1, 5)), r"got \[3, 1, 1, 5\]"),
        (Embedding(torch.zeros(5)), "zero, or holds NaN or Inf"),
        (Embedding([1.0, torch.nan, 0, 0, 0]), "zero, or holds NaN or Inf"),
        (Embedding(torch.ones(5, dtype=torch.bool)), "expected real numbers in an Embedding, got dtype torch.bool"),
        (Embedding("cat"), "expected numbers .* in an Embedding, got 'cat'"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"targets: .*{message}"):
            ask(targets)


def test_class_names() -> None:
    with pytest.raises(ValueError, match=r"targets: got the class name 'cat', but .* class_names=\[...\]"):
        ask("cat", names=None)
    birds = ["bird, crane", "crane", "Crane", "b, crane", "c, b"]
    assert ask("crane", names=birds).targets.tolist() == [1] * 3  # an exact name wins
    for name, found in (("CRANE", "4 classes: 0 .bird, crane., 1 .crane., 2"), ("b", "2 classes: 3 .b, crane., 4")):
        with pytest.raises(ValueError, match=f"targets: '{name}' is a name of {found} .*; give the number"):
            ask(name, names=birds)
    with pytest.raises(ValueError, match=r"targets: 'crane' is a name of 2 classes: 1 \(crane\), 3 \(crane\); give"):
        ask("crane", names=["a", "crane", "b", "crane", "c"])
    with pytest.raises(ValueError, match="the names of the 21 classes; they begin '0', '1'"):
        ask("zebra", names=[str(number) for number in range(21)], logits=torch.zeros(3, 21))
    some = ask("owl", names={3: "owl", 0: "cat"})
    assert some.targets.tolist() == [3, 3, 3] and some.names == ("cat", "class 1", "class 2", "owl", "class 4")
    for names, message in (
        ("cat", "expected a sequence of str or a mapping from int to str, got 'cat'"),
        (3, "expected a sequence of str or a mapping"),
        (["a", "b", "c"], "expected 5 names, one for each class of the model, got 3"),
        (["a", 1], r"expected a name \(str\) for class 1, got 1"),
        (["a", " "], r"for class 1, got ' '"),
        ({"cat": 0}, r"expected class numbers \(int from 0\) as keys, got 'cat'"),
        ({True: "cat"}, "as keys, got True"),
        ({-1: "cat"}, "as keys, got -1"),
        ({7: "cat"}, "the model has classes 0 to 4, got a name for 7"),
        ([], "got none; leave the argument out"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"class_names: .*{message}"):
            ask(None, names=names)


def test_names_of_a_transformers_model() -> None:
    def own(labels: Any, classes: int = 5) -> Any:
        model = Returning()
        model.config = SimpleNamespace(id2label=labels)  # type: ignore[assignment]
        return Readout(model).names(classes)

    assert own(dict(enumerate(NAMES))) == NAMES
    assert own({str(number): name for number, name in enumerate(NAMES)}) == NAMES
    assert own({number: f"LABEL_{number}" for number in range(5)}) is None
    assert own(dict(enumerate(NAMES)), classes=7) is None  # a head that was replaced
    assert own({0: "cat", 5: "dog"}) is None and own({}) is None and own(None) is None


def test_one_output_has_two_directions() -> None:
    with pytest.raises(ValueError, match=r"classes 0 to 0, got 1; the model has one output: .* `lambda y: -y\[:, 0\]`"):
        ask(1, None, LOGITS[:, :1])
    with pytest.raises(ValueError, match="expected classes 0 to 4, got 5; classes are counted from 0"):
        ask(5)


def test_outputs() -> None:
    for make in (
        lambda x: x,
        lambda x: {"loss": None, "logits": x},
        lambda x: SimpleNamespace(logits=x, hidden_states=()),
        lambda x: SimpleNamespace(image_embeds=x, last_hidden_state=x[:, None]),
        lambda x: SimpleNamespace(pooler_output=x),
    ):
        assert torch.equal(Readout(Returning(make)).run(LOGITS), LOGITS)
    for make, message in (
        (lambda x: (x, None), r"got tuple of \[3, 5\], NoneType; wrap it .* that returns the entry with the logits"),
        (lambda x: {"scores": x}, r"got dict of scores \[3, 5\]; wrap it in a module that returns the entry"),
        (lambda x: SimpleNamespace(scores=x, aux=()), r"SimpleNamespace of scores \[3, 5\], aux tuple; wrap it"),
        (lambda x: x[:, None], r"with B = 3, got \[3, 1, 5\] torch.float32; if these are tokens, wrap it"),
        (lambda x: x[:, :, None, None], r"got \[3, 5, 1, 1\] .* pixels, .*\(images\)\[:, :, row, column\]"),
        (lambda x: x[:, 0], r"got \[3\] torch.float32; wrap it .* model\(images\)\[:, None\]"),
        (lambda x: torch.cat([x, x]), r"with B = 3, got \[6, 5\]"),
        (lambda x: x.argmax(-1), r"got \[3\] torch.int64"),
        (lambda x: x > 0, r"got \[3, 5\] torch.bool"),
        (lambda x: x[:, :0], r"got \[3, 0\]; give it a head"),
        (lambda x: None, "got NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"model: expected logits \[.*{message}"):
            Readout(Returning(make)).run(LOGITS)


def test_towers_without_a_head_have_no_predicted_class() -> None:
    readout = Readout(Returning(lambda x: SimpleNamespace(pooler_output=x)))
    output = readout.run(LOGITS)
    for targets in (None, Difference(None, 1)):
        with pytest.raises(ValueError, match="targets: None is the predicted class, but the model has no classif"):
            readout.answer(targets, output)
    assert readout.answer(Embedding(torch.ones(5)), output).values.shape == (3,)
    assert readout.answer(2, output).targets.tolist() == [2, 2, 2]


class Wrapper(nn.Module):
    def __init__(self, tower: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.tower, self.after = tower, after

    def forward(self, images: Tensor) -> Tensor:
        features = self.tower(images)
        return features if self.after is None else self.after(features)  # type: ignore[no-any-return]


def test_features_are_not_taken_for_logits(tiny_vit: Build) -> None:
    """However the head was taken off, the largest feature is no predicted class. A feature's number may be given."""
    images, replaced = torch.randn(2, *PIXELS), tiny_vit()
    replaced.head = nn.Identity()
    headless = tiny_vit(num_classes=0)
    for model in (headless, replaced, Wrapper(headless), Wrapper(replaced, nn.Softmax(1)), nn.Sequential(headless)):
        with pytest.raises(ValueError, match="targets: None is the predicted class, but the model has no classif"):
            Explainer(model, preset="published")(images)
        assert Explainer(model, preset="published")(images, 3).targets.tolist() == [3, 3]
    for model in (tiny_vit(), tiny_vit(num_classes=16), Wrapper(headless, nn.Linear(16, 16)), Wrapper(tiny_vit())):
        assert Explainer(model, preset="published")(images).targets.tolist() == model(images).argmax(1).tolist()


def test_features_of_other_libraries_are_not_taken_for_logits() -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("open_clip")
    replaced = torchvision_vit()
    replaced.heads = nn.Identity()
    for model in (replaced, open_clip_tower()):
        layout = find_layout(model)
        assert layout.image_size is not None
        with pytest.raises(ValueError, match="targets: None is the predicted class, but the model has no classif"):
            Explainer(model.eval(), preset="published")(torch.randn(1, 3, *layout.image_size))


@pytest.mark.parametrize("backend", ("native", "reference"))
def test_explained_by_any_spelling(backend: Any, tiny_vit: Build) -> None:
    """A class, its name, a function that returns its logit: the same question, so the same relevance."""
    model, images = tiny_vit().double(), torch.randn(2, *PIXELS, dtype=torch.float64)
    explainer = Explainer(
        model, {1: sae_for(model)}, class_names=NAMES, backend=backend, top_features=2, preset="published"
    )
    want = explainer(images, 3)
    vector = torch.randn(5, dtype=torch.float64)
    lesser = explainer(images, lambda logits: logits[:, 3] - logits[:, 1])
    alike = explainer(images, lambda logits: F.cosine_similarity(logits, vector[None]))
    for targets, same in (
        ("owl", want), ([3, "owl"], want), (lambda logits: logits[:, 3], want), ([["dog", 3]], want),
        (Difference(3, 1), lesser), (Embedding(vector), alike),
    ):  # fmt: skip
        got = explainer(images, targets)
        relevance = got.relevance[:, 1] if got.relevance.dim() == 3 else got.relevance
        torch.testing.assert_close(relevance, same.relevance, rtol=1e-9, atol=1e-14)
        assert got.values is not None and same.values is not None
        assert torch.allclose(got.values.reshape(2, -1)[:, -1], same.values)
    assert want.names == NAMES and "owl" in repr(want)


def test_an_error_of_a_function_names_it() -> None:
    def ninth(logits: Tensor) -> Tensor:
        return logits[:, 9]

    with pytest.raises(
        ValueError, match=r"targets: ninth raised IndexError: .*; it gets the model's output \[3, 5\]"
    ) as e:
        Readout(Returning(lambda x: x)).answer(ninth, LOGITS)
    assert isinstance(e.value.__cause__, IndexError)
