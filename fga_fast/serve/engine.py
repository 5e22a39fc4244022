"""Explains pictures as a service needs it: encoded bytes in, one answer each, questions of all kinds in one batch.

It knows nothing of HTTP, so that other servers can use it too.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fga_fast.explainer import Explainer
from fga_fast.graph.package.metadata import DTYPES
from fga_fast.io.images import Preprocess, load_image
from fga_fast.question.names import class_number
from fga_fast.result.explanation import Explanation
from fga_fast.result.notices import value_notices
from fga_fast.serve.limits import Refused
from fga_fast.serve.questions import Picks, Question, one_each, plain_targets

if TYPE_CHECKING:
    from fga_fast.graph.compiled import CompiledExplainer
    from fga_fast.graph.package.load import Package

logger = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP")  # of PIL; fewer decoders, fewer holes
_NAME_CHARS = 200
Probability = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Facts:
    """What the model is and how it is explained. `gate` has base and slope, where known."""

    model: str
    image_size: tuple[int, int]  # (height, width)
    grid: tuple[int, int]  # patches (rows, columns)
    classes: int  # 0: a dual encoder without prompts of its own
    class_names: tuple[str, ...] | None
    blocks: tuple[int, ...]  # with a gate
    method: str
    backward: str
    signed: bool  # maps may have negative values
    probability_is: Probability | None
    takes_prompts: bool
    top_features: int  # the most that can be asked for
    gate: dict[str, float]


class Picture(NamedTuple):
    """A decoded picture."""

    view: Image.Image  # what the model sees
    image: Tensor  # [channels, H, W] float32, the same as the model's input
    box: tuple[float, ...] = (0, 0, 1, 1)  # left, top, right and bottom of the view, as shares of the upright picture


class Answered(NamedTuple):
    """The answer to one question."""

    explanation: Explanation  # of one image, on the CPU
    batch: int  # how many were explained together


class Engine:
    """One model and the ways to ask it. `explain` is for one thread; `decode` and `question` for any.

    Args:
        explainer: an `Explainer`, or a `Package` from `load_package`.
        preprocess: from pictures to the model's input; a package may have its own.
        listing: the same explainer with `top_features`, for questions that ask for features; None: none are listed.
        compiled: what `compile(..., target_mode="given")` of `listing` returned, or of `explainer` where there is no
            `listing`; it then answers all questions about one class.
        name: of the model, for readers.
        probability_is: what turns logits into probabilities; None: not known.
        max_pixels: of a picture, checked before it is decoded.

    Raises:
        TypeError, ValueError: the model cannot be asked for classes or prompts, there is no preprocessing, or
            `compiled` is another graph.
    """

    def __init__(
        self, explainer: Explainer | Package, preprocess: Preprocess | None = None, *,
        listing: Explainer | None = None, compiled: CompiledExplainer | None = None, name: str = "",
        probability_is: Probability | None = None, max_pixels: int = 40_000_000,
    ) -> None:  # fmt: skip
        self._explainer, self._listing = explainer, listing
        self._max_pixels = max_pixels
        self._package = None if isinstance(explainer, Explainer) else explainer
        if compiled is not None:
            _check_compiled(compiled, listing or explainer)
        self._graph = self._package or compiled  # answers questions about one class, or about none
        if self._package is not None:
            preprocess = preprocess or self._package.preprocess
        if preprocess is None:
            raise ValueError("preprocess: expected one, since this model or package brings none; give a Preprocess")
        self._preprocess = preprocess
        self._dual = isinstance(explainer, Explainer) and explainer.plan.readout.dual is not None
        if not isinstance(explainer, Explainer):
            self._like = torch.empty(0, dtype=DTYPES[explainer.metadata.dtype], device=explainer.metadata.device)
            self.facts = _facts_of_package(explainer, name, probability_is)
        else:
            self._like = next(explainer.model.parameters()).detach()
            self.facts = self._facts_of_explainer(explainer, name, probability_is)

    def _facts_of_explainer(self, explainer: Explainer, name: str, probability_is: Probability | None) -> Facts:
        channels = len(self._preprocess.mean)
        blank = torch.zeros(1, channels, *self._preprocess.image_size).to(self._like)
        dual = explainer.plan.readout.dual
        try:
            known = explainer(blank)
        except TypeError:
            if dual is None or dual.tokenizer is None:
                raise
            known = replace(explainer(blank, "a photo"), names=None)
            known = replace(known, logits=known.logits[:, :0])
        settings = explainer.settings
        listed = 0 if self._listing is None else self._listing.settings.top_features
        return Facts(
            name or type(explainer.model).__name__, known.image_size, known.grid, known.logits.shape[1], known.names,
            tuple(sorted(explainer.saes)), settings.method, settings.backward,
            settings.has_signs, probability_is,
            dual is not None and dual.tokenizer is not None, listed,
            {"base": settings.gate.bound, "slope": settings.gate.slope},
        )  # fmt: skip

    def decode(self, data: bytes) -> Picture:
        """The picture in an encoded image.

        Raises:
            Refused: no image, damaged, of a format that is not taken, or with too many pixels.
        """
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                if file.width * file.height > self._max_pixels:
                    raise Refused(
                        "too_large",
                        f"image: expected at most {self._max_pixels} pixels, got {file.width} x {file.height}; scale "
                        "it down first",
                    )
                upright = load_image(file)
                view = self._preprocess.view(upright)
                box = self._preprocess.box(upright.width, upright.height)
        except Refused:
            raise
        except UnidentifiedImageError:
            raise Refused("bad_image", f"image: expected a file of {', '.join(FORMATS)}, got something else") from None
        except Image.DecompressionBombError:
            raise Refused("too_large", "image: it has too many pixels; scale it down first") from None
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, ... on damaged files
            raise Refused("bad_image", f"image: damaged or not taken ({error})") from error
        size = (upright.width, upright.height) * 2
        shares = tuple(edge / side for edge, side in zip(box, size, strict=True))
        return Picture(view, self._preprocess.normalise(view), shares)

    def question(
        self, targets: Sequence[int | str] = (), rather_than: int | str | None = None, prompts: Sequence[str] = (),
        top_features: int = 0,
    ) -> Question:  # fmt: skip
        """A question, checked.

        Args:
            targets: classes by number or name; none: the predicted one.
            rather_than: explain why the one target rather than this class.
            prompts: texts, for dual encoders; instead of targets.
            top_features: features listed for each patch.

        Raises:
            Refused: something that this model cannot be asked.
        """
        facts = self.facts
        if not 0 <= top_features <= facts.top_features:
            raise Refused(
                "bad_parameter", f"top_features: expected 0 to {facts.top_features}, as this server was started"
            )
        if prompts:
            if not facts.takes_prompts:
                raise Refused("bad_target", "prompt: this model takes none; give a target")
            if targets or rather_than is not None:
                raise Refused("bad_target", "prompt: expected prompts alone, got target or rather_than too")
            if not all(prompt.strip() for prompt in prompts):
                raise Refused("bad_target", "prompt: expected a text, got an empty one")
            return Question(prompts=tuple(prompts), top_features=top_features)
        picked = tuple(self._class(target, "target") for target in targets)
        against = None if rather_than is None else self._class(rather_than, "rather_than")
        if against is not None and len(picked) != 1:
            raise Refused("bad_target", f"rather_than: expected exactly one target with it, got {len(picked)}")
        if picked[:1] == (against,):
            raise Refused("bad_target", f"rather_than: expected another class than the target, got {against} twice")
        if not picked and not facts.classes:
            raise Refused("bad_target", "prompt: this model has no classes of its own; give one or several prompts")
        self._check_package(picked, against)
        return Question(picked, against, top_features=top_features)

    def _class(self, given: int | str, what: str) -> int:
        facts = self.facts
        if isinstance(given, str) and len(given) > _NAME_CHARS:  # looking for close names takes long
            raise Refused(
                "bad_target", f"{what}: expected a class's number or name of at most {_NAME_CHARS} characters"
            )
        try:
            number = int(given)
        except ValueError:
            if facts.class_names is None:
                raise Refused("bad_target", f"{what}: classes have no names here; give a number") from None
            try:
                return class_number(str(given), facts.class_names, what)
            except ValueError as error:
                raise Refused("bad_target", str(error)) from None
        if not 0 <= number < facts.classes:
            raise Refused("bad_target", f"{what}: expected a class from 0 to {facts.classes - 1}, got {number}")
        return number

    def _check_package(self, picked: tuple[int, ...], against: int | None) -> None:
        if self._package is None:
            return
        about = self._package.metadata
        if against is not None:
            raise Refused("bad_target", "rather_than: the served package compares no classes; leave it out")
        most, least = int(about.target_mode == "given"), int(not about.predicts)
        if not least <= len(picked) <= most:
            told = f"{least}" if least == most else f"{least} or {most}"
            raise Refused("bad_target", f"target: expected {told}, as the served package was made, got {len(picked)}")

    def explain(self, asked: Sequence[tuple[Picture, Question]]) -> list[Answered | Exception]:
        """Answers, in order; an exception stands for one that could not be answered, and the others are answered."""
        groups: dict[Hashable, list[int]] = {}
        for place, (_, question) in enumerate(asked):
            groups.setdefault(self._kind(question), []).append(place)
        found: dict[int, Answered | Exception] = {}
        for places in groups.values():
            answers = self._group([asked[place] for place in places])
            found |= dict(zip(places, answers, strict=True))
        return [found[place] for place in range(len(asked))]

    def warm_up(self, size: int) -> None:
        """Explains `size` blank pictures, so that later ones find everything loaded.

        Raises:
            Exception: whatever the explainer raised.
        """
        blank = Picture(Image.new("RGB", (1, 1)), torch.zeros(len(self._preprocess.mean), *self.facts.image_size))
        prompts = () if self.facts.classes else ("a photo",)
        headless = self._package is not None and not self._package.metadata.predicts
        questions = {Question((0,) if headless else (), prompts=prompts)}
        if self._graph is not None and self._package is None:
            questions |= {Question((0, 0))}  # what the graph does not answer
        questions |= {question._replace(top_features=self.facts.top_features) for question in questions}
        for question in questions:
            for answer in self.explain([(blank, question)] * size):
                if isinstance(answer, Exception):
                    raise answer

    def _kind(self, question: Question) -> Hashable:
        """Questions of the same kind are explained in one call."""
        if self._for_graph(question):
            return "graph"
        listed = question.top_features > 0
        if question.prompts:
            return listed, question.prompts
        if self._dual:
            return listed, len(question.targets), question.rather_than is not None
        return listed, max(len(question.targets), 1)

    def _for_graph(self, question: Question) -> bool:
        one = len(question.targets) <= 1 and question.rather_than is None and not question.prompts
        return self._graph is not None and one

    def _group(self, asked: Sequence[tuple[Picture, Question]]) -> list[Answered | Exception]:
        """The answers of one kind; where they fail together, each alone, so that one does not cost the others."""
        try:
            with torch.inference_mode(False):
                return list(self._answers(asked))
        except Exception as error:
            if len(asked) == 1:
                return [_reason(error)]
            return [answer for one in asked for answer in self._group([one])]

    def _answers(self, asked: Sequence[tuple[Picture, Question]]) -> list[Answered]:
        images = torch.stack([picture.image for picture, _ in asked]).to(self._like)
        questions = [question for _, question in asked]
        first = questions[0]
        explainer: Any = self._explainer
        if first.top_features and self._listing is not None:
            explainer = self._listing
        if self._graph is not None and self._for_graph(first):
            whole = self._graph(images, one_each(questions))
        elif first.prompts:
            whole = explainer(images, first.prompts[0] if len(first.prompts) == 1 else [list(first.prompts)])
        elif self._dual:
            whole = explainer(images, plain_targets(questions))
        else:
            picks = Picks(questions, images.device)
            whole = explainer(images, picks)
            whole = replace(whole, targets=picks.picked.reshape(whole.targets.shape))
        whole = whole.to("cpu")
        # A notice about values may be about one of the images only.
        general = [notice for notice in whole.notices if notice not in _value_notices(whole)]
        answers = []
        for one, question in zip(whole, questions, strict=True):
            one = replace(one, notices=(*general, *value_notices(vars(one))))
            answers.append(Answered(_first_features(one, question.top_features), len(asked)))
        return answers


def _check_compiled(compiled: CompiledExplainer, explainer: Explainer | Package) -> None:
    listed = compiled.plan.settings.top_features
    want = explainer.settings.top_features if isinstance(explainer, Explainer) else 0
    if compiled.target_mode != "given" or listed != want:
        raise ValueError(
            f'compiled: expected a graph of target_mode "given" and top_features {want}, as `listing` has, got '
            f"{compiled.target_mode!r} and {listed}"
        )


def _value_notices(whole: Explanation) -> set[str]:
    """All notices about values: of the batch as the explainer saw it, and of what can be said of functions."""
    functions = torch.full_like(whole.targets, -1)
    return {*value_notices(vars(whole)), *value_notices({**vars(whole), "targets": functions})}


def _first_features(explanation: Explanation, k: int) -> Explanation:
    """With the k strongest features; they are recorded strongest first."""
    features = {block: type(top)(*(part[..., :k] for part in top)) for block, top in explanation.features.items()}
    return replace(explanation, features=features if k else {})


def _reason(error: Exception) -> Exception:
    """What to tell the one who asked; the log has the rest."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, (ValueError, TypeError)) and str(error).startswith("targets:"):
        return Refused("bad_target", str(error))
    logger.error("an image could not be explained", exc_info=error)
    return Refused("internal", "the image could not be explained; the server's log says why")


def _facts_of_package(package: Package, name: str, probability_is: Probability | None) -> Facts:
    about = package.metadata
    entries = asdict(about)["gate"]
    gate = {key: float(entries[key]) for key in ("base", "slope") if key in entries}
    return Facts(
        name or package.path.name, (about.height, about.width), about.grid, about.classes, about.class_names,
        about.gated_blocks, about.method, about.backward, about.has_signs, probability_is,
        False, 0, gate,
    )  # fmt: skip
