"""What the reports of SAEs say: numbers to read, what is suspicious about them, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fga_fast.quality.behaviour import Behaviour, Effect
from fga_fast.quality.cosines import Stability
from fga_fast.quality.run import Quality

_TOKENS = 10_000  # below which features that are seldom active look dead
_IMAGES = 100  # below which loss and accuracy are rough


def share(value: float | None) -> str:
    """A share in percent, or a dash for none."""
    return "–" if value is None or not math.isfinite(value) else f"{value * 100 + 0.0:.1f} %"


def number(value: float) -> str:
    """Three digits, whole numbers in full."""
    text = f"{value + 0.0:.3g}"
    return f"{value:.0f}" if "e+" in text else text


def summary(one: Quality) -> dict[str, str]:
    """Column -> value, one row of the table."""
    row = {
        "block": str(one.block), "features": f"{one.features:,}", "explained variance": share(one.explained_variance),
        "L0": number(one.l0), "dead": share(one.dead), "copies": share(one.copies),
        "recovered": share(one.behaviour.recovered),
        "same prediction": "–" if one.behaviour.agreement is None else share(one.behaviour.agreement.spliced),
    }  # fmt: skip
    return row if one.stability is None else row | {"shared": share(one.stability.forth.matched)}


def is_constant(one: Quality) -> bool:
    """Whether all patches have the same L0."""
    edges = one.l0_histogram.edges
    return edges[-1] - edges[0] == 1


def sae_line(one: Quality) -> str:
    """What the SAE is, in a line."""
    expected = "" if one.expected_l0 is None else f", expected L0 {number(one.expected_l0)}"
    constant = f" Every patch has {number(one.l0)} active features." if is_constant(one) else ""
    return (
        f"After block {one.block}, counted from 0. {one.activation}, {one.features:,} features of width "
        f"{one.width:,}{expected}.{constant}"
    )


def effects(found: Behaviour) -> dict[str, tuple[Effect, str]]:
    """What is measured -> its three values, and the share recovered in words ("" where that means nothing)."""
    names = {"softmax": "cross-entropy", "sigmoid": "binary cross-entropy", "features": ""}
    apart = "1 - cosine to the plain output" if found.output == "features" else "KL divergence from the plain model"
    rows: dict[str, tuple[Effect, str]] = {}
    if found.loss is not None and found.accuracy is not None:
        rows[f"loss ({names[found.output]})"] = found.loss, share(found.loss_recovered)
        rows["accuracy"] = found.accuracy, ""
    if found.agreement is not None:
        rows["same prediction as the plain model"] = found.agreement, ""
    rows[apart] = found.divergence, share(found.divergence_recovered)
    return rows


def value_of(what: str, value: float) -> str:
    """A value of `effects`: shares in percent, others with four digits."""
    return share(value) if what.startswith(("accuracy", "same")) else f"{value:.4g}"


def count(number: int, what: str) -> str:
    """Such as "1 image" or "1,000 images"."""
    return f"{number:,} {what}{'' if number == 1 else 'es' if what.endswith('ch') else 's'}"


def warnings(one: Quality) -> list[str]:
    """What is suspicious about an SAE, each with what to do."""
    found = [*_of_reconstruction(one), *_of_features(one), *_of_behaviour(one)]
    return found if one.stability is None else [*found, *_of_stability(one.stability)]


def warnings_of_images(one: Quality) -> list[str]:
    """What is to be known about the images, which is the same for all SAEs."""
    found = []
    if one.errors:
        found.append(f"{count(len(one.errors), 'image')} could not be measured; the reasons are listed below.")
    if one.tokens < _TOKENS:
        found.append(
            f"Only {count(one.tokens, 'patch')} were seen. Features that are seldom active look dead; give images with "
            f"{_TOKENS:,} patches or more before you judge that."
        )
    if one.behaviour.loss is None and one.images < _IMAGES:
        found.append(
            f"What is recovered is rough, as a mean over {count(one.images, 'image')}; give {_IMAGES} or more."
        )
    elif one.behaviour.loss is not None and one.behaviour.known < _IMAGES:
        found.append(
            f"Loss, accuracy and what is recovered are rough, as means over {count(one.behaviour.known, 'image')} with "
            f"a known class; give {_IMAGES} or more."
        )
    return found


def _of_reconstruction(one: Quality) -> list[str]:
    found = []
    ev = share(one.explained_variance)
    if one.explained_variance < 0.1:
        found.append(
            f"Explained variance is {ev}: the mean of all patches would be about as good. Block, model, preprocessing "
            "or normalisation is not the one the SAE was trained with. Look these up on its card, and try the blocks "
            "beside it."
        )
    elif one.explained_variance < 0.6:
        found.append(
            f"Explained variance is only {ev}; SAEs of vision transformers usually reach 60 to 99 %. Are these images "
            "of the kind that it was trained on? If you train it: train longer, or allow more active features."
        )
    if one.expected_l0 is not None and not one.expected_l0 / 2 <= one.l0 <= one.expected_l0 * 2:
        found.append(
            f"L0 is {number(one.l0)}, and {number(one.expected_l0)} was expected. Check block and normalisation first, "
            "then threshold and scale of the inputs."
        )
    elif one.l0 < 1:
        found.append(
            f"L0 is {number(one.l0)}: most patches activate nothing. Check threshold and normalisation; if you train "
            "it, make the sparsity penalty smaller."
        )
    elif one.l0 > one.features / 4:
        found.append(
            f"L0 is {number(one.l0)} of {one.features:,} features: these codes are not sparse, so single features say "
            "little. Check threshold and normalisation; if you train it, make the sparsity penalty larger."
        )
    return found


def _of_features(one: Quality) -> list[str]:
    found = []
    if one.dead > 0.1 and one.tokens >= _TOKENS:
        found.append(
            f"{share(one.dead)} of the features are dead: no patch activated them. They cost time and memory and say "
            "nothing. If you train the SAE: fewer features, a smaller learning rate, or a loss that revives them. If "
            "these images are of a narrow kind, that may be the reason too."
        )
    if one.copies > 0.1:
        found.append(
            f"{share(one.copies)} of the features are near-copies of another one (cosine above 0.9), so what they "
            "stand for is split. If you train the SAE: fewer features, or fewer active ones."
        )
    return found


def _of_behaviour(one: Quality) -> list[str]:
    found, recovered = [], one.behaviour.recovered
    if recovered is None:
        found.append(
            f"What is recovered cannot be said: the model does no worse when the mean stands for its patches after "
            f"block {one.block}. With a class token, late blocks leave little for the patches to do. Give more images, "
            "or judge by an SAE of an earlier block."
        )
    elif recovered < 0.5:
        found.append(
            f"Only {share(recovered)} of what the patches are worth to the model is recovered, so the SAE misses what "
            "the model needs. Do not explain the model with it before that is better; check block and normalisation."
        )
    return found


def _of_stability(found: Stability) -> list[str]:
    if found.forth.matched >= 0.3:
        return []
    return [
        f"{share(found.forth.matched)} of the features have a partner in the second SAE. So most of them belong to "
        "this one run of training; do not take them for the model's own. A smaller SAE is usually more stable."
    ]


def meanings(saes: Mapping[str, Quality]) -> dict[str, str]:
    """Term -> what it means, for the terms that are on the page."""
    said = {
        "Explained variance": "1 - squared error / squared distance to the mean of all patches. 100 %: every patch is "
        "reconstructed exactly. 0 %: no better than that mean. SAEs of vision transformers usually reach 60 to 99 %.",
        "L0": "active features of a patch. Fewer are easier to read; more reconstruct better. So compare explained "
        "variance only at a similar L0.",
        "Dead": "share of the features that no patch activated. Depends on the number of patches that were seen.",
        "Density": "share of the patches that activate a feature, as a power of ten: -3 is one patch in a thousand. "
        "A heap at the right end: features that are nearly always on. They seldom mean much.",
        "Copies": "share of the features whose decoder row has a cosine above 0.9 with another one.",
        "Recovered": "(loss with the mean - loss with the reconstruction) / (loss with the mean - loss of the plain "
        "model). The reconstruction, or the mean of all patches, stands in the place of the stream at the patches; "
        "class tokens and registers are left alone. 100 %: the model works as before. 0 %: as if patches said nothing. "
        "Above 100 %: better than before. Without known classes, the divergence takes the place of the loss.",
        "Same prediction": "how often the model predicts the same with the reconstruction.",
        "Divergence": "how far the output is from the plain model's: KL divergence in nats, or 1 - cosine of features.",
        "Unexplained by position": "squared error / squared distance to the mean, for each place in the image. A place "
        "that stands out holds something the SAE does not know.",
    }
    if any(one.behaviour.output == "sigmoid" for one in saes.values()):
        said["Several classes"] = (
            "each class has a sigmoid of its own. Loss is binary cross-entropy, accuracy and same prediction count "
            "images x classes, all means over classes. A class that nobody named for an image is taken to be absent."
        )
    if any(one.stability is not None for one in saes.values()):
        said["Shared"] = (
            "share of the features whose decoder row has a cosine above 0.9 with one of the second SAE. By chance: the "
            "same with random rows in place of the second SAE. For SAEs that differ in their seed only, Paulo and "
            "Belrose (arXiv:2501.16615) found from 30 % (131,072 features) to more in smaller ones."
        )
    return said
