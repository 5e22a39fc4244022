"""What a recipe is, and how folders with one folder a class become items."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fga_fast.dataset.items import Item
from fga_fast.io.images import Preprocess, list_images
from fga_fast.metrics.checks import Variant
from fga_fast.metrics.perturb import Probability

Explained = Literal["predicted", "label"]

# What timm gives `vit_base_patch16_224`. How the thesis prepared its images for that network is not known.
VIT_B_16 = Preprocess((224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)


@dataclass(frozen=True)
class Recipe:
    """How one set-up is evaluated.

    Attributes:
        name: what `--recipe` calls it.
        model: timm's name of the network, or open_clip's.
        preprocess: from pictures to the model's input.
        layout: what the folder has to look like, for messages.
        classes: gives the name of each class by its folder, in the order of the model's outputs. It may import timm
            and open_clip.
        read: from the folder, the class folders wanted and all that are known, to items whose targets are labels.
        prompts: texts around a class's name, for a model that is a dual encoder; None: it has a head.
        tag: of open_clip, which weights are meant.
        saes: block -> Hugging Face repository of a public SAE of the residual stream after it.
        metrics, variant, probability: as `run.evaluate` takes them.
    """

    name: str
    model: str
    preprocess: Preprocess
    layout: str
    classes: Callable[[], dict[str, str]]
    read: Callable[[Path, Sequence[str], Collection[str]], list[Item]]
    prompts: Callable[[], Sequence[Callable[[str], str]]] | None = None
    tag: str | None = None
    saes: Mapping[int, str] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("saco", "faithfulness_correlation", "pixel_flipping")
    variant: Variant = "author"
    probability: Probability = "softmax"

    def items(
        self, folder: str | Path, classes: Sequence[str] | None = None, explained: Explained = "predicted"
    ) -> list[Item]:
        """The images of a downloaded folder, with their masks if there are some.

        Args:
            folder: as `layout` says, or the folder of the archive around it.
            classes: folders of the classes that the model knows, in the order of its outputs; the images of others are
                left out. None: all classes of the recipe, in its order.
            explained: the class that the model predicts, as in the author's runs, or the folder's.

        Raises:
            NotADirectoryError, ValueError: the folder is not as expected; the message says what is missing, and what
                was expected.
            ImportError: the names of the classes need a library that is not installed.
        """
        if explained not in ("predicted", "label"):
            raise ValueError(f"explained: expected 'predicted' or 'label', got {explained!r}")
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"{self.name}: no folder {folder}; expected {self.layout}")
        known = self.classes()
        wanted = list(known if classes is None else classes)
        if not wanted or len({*wanted}) < len(wanted):
            raise ValueError(f"classes: expected different folders of classes, got {', '.join(wanted) or 'none'}")
        try:
            items = self.read(Path(folder), wanted, known)
        except (ValueError, NotADirectoryError) as error:  # no folder of images or masks
            raise ValueError(f"{self.name}: {error}; expected {self.layout}") from error
        return items if explained == "label" else [dataclasses.replace(item, target=None) for item in items]

    def class_names(self, classes: Sequence[str] | None = None) -> list[str]:
        """Names of the classes in the order of the model's outputs; a folder that is not known is its own name.

        Raises:
            ValueError: a folder that is not known, where names go into prompts.
        """
        known = self.classes()
        nameless = [] if self.prompts is None else [folder for folder in classes or () if folder not in known]
        if nameless:
            raise ValueError(f"classes: expected classes of {self.name}, which have names, got {_some(nameless)}")
        return [known.get(folder, folder) for folder in (known if classes is None else classes)]


def root_of(folder: Path, inner: str, wanted: Collection[str]) -> Path:
    """Where one of the `wanted` folders is: in `folder` or its folder `inner`, which archives hold in itself once more.

    Raises:
        ValueError: nowhere.
    """
    for root in (folder, folder / folder.name, folder / inner, folder / inner / inner):
        if any((root / name).is_dir() for name in wanted):
            return root
    raise ValueError(f"no folder {_some(wanted)} in {folder} or in its folder {inner!r}")


def by_class(folders: Iterable[Path], classes: Sequence[str], known: Collection[str]) -> dict[str, Path]:
    """The folder of each class, in the order of `classes`, from all that there are.

    Raises:
        ValueError: a class without a folder, or with two; a folder that is no class.
    """
    found: dict[str, Path] = {}
    for path in sorted(folders):
        if not path.is_dir() or path.name.startswith("."):
            continue
        if path.name in found:
            raise ValueError(f"class {path.name} has two folders, {found[path.name]} and {path}")
        found[path.name] = path
    missing = [name for name in classes if name not in found]
    if missing:
        raise ValueError(f"no folder of {len(missing)} of {len(classes)} classes: {_some(missing)}")
    unknown = [name for name in found if name not in known and name not in classes]
    if unknown:
        raise ValueError(f"{len(unknown)} folder(s) of no known class: {_some(unknown)}, such as {found[unknown[0]]}")
    return {name: found[name] for name in classes}


def items_of(root: Path, folders: Mapping[str, Path], masks: str | None = None) -> list[Item]:
    """The images of the classes' folders, labelled, with keys relative to `root`.

    Args:
        masks: name of the folder beside each class's own with a mask for each image, of the image's name.

    Raises:
        ValueError: no image of a class, an image without a mask, or a mask without an image.
    """
    items = []
    for target, (name, folder) in enumerate(folders.items()):
        paired: dict[str, Path] = {}
        images = list_images(folder)
        if masks is not None:
            paired = {path.stem: path for path in list_images(folder.parent / masks)}
            alone = sorted({path.stem for path in images} ^ {*paired})
            if alone:
                what = "a mask without an image" if alone[0] in paired else "an image without a mask"
                raise ValueError(f"{len(alone)} of the files of {name} have no partner: {alone[0]} is {what}")
        items += [Item(path.relative_to(root).as_posix(), path, target, paired.get(path.stem)) for path in images]
    return items


def _some(names: Collection[str]) -> str:
    return ", ".join([*names][:5]) + (", ..." if len(names) > 5 else "")
