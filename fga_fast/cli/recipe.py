"""`--recipe`: the images, model and settings of a set-up of the thesis."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch

from fga_fast.cli import items
from fga_fast.cli.subject import Subject, check_weights, load_into, load_subject
from fga_fast.dataset.extras import need
from fga_fast.dataset.items import Item
from fga_fast.evaluation.recipes import RECIPES
from fga_fast.evaluation.recipes.imagenet_clip import prompt_classifier
from fga_fast.evaluation.recipes.recipe import Explained, Recipe
from fga_fast.io.checkpoint import Checkpoint


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds what `load` reads beside images and model."""
    parser.add_argument(
        "--recipe", choices=[*RECIPES],
        help="IMAGES is this downloaded data set: sets model, preprocessing, class names and metrics (docs/recipes.md)",
    )  # fmt: skip
    parser.add_argument(
        "--classes", nargs="+", metavar="FOLDER",
        help="with --recipe: the folders of the classes that the model knows, in the order of its outputs",
    )  # fmt: skip
    parser.add_argument(
        "--explain", choices=get_args(Explained),
        help="with --recipe: the class that the model predicts, or the image's label (default: predicted)",
    )  # fmt: skip


def load(args: argparse.Namespace) -> tuple[Subject, list[Item], dict[str, int]]:
    """Model, items, and with --recipe the labels of the items by their keys; sets the recipe's defaults in `args`.

    Raises:
        ValueError, OSError, ImportError: the arguments do not fit each other, or name what cannot be read.
    """
    if args.recipe is None:
        for name in ("classes", "explain"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name}: expected --recipe with it; without a recipe give --manifest FILE")
        subject = load_subject(args)
        return subject, items.items_of(args, subject.class_names), {}
    recipe = RECIPES[args.recipe]
    if len(args.images) != 1 or args.manifest is not None or args.dataset is not None:
        raise ValueError(f"--recipe: expected one folder as IMAGES, which comes first, with {recipe.layout}")
    if recipe.prompts is not None and args.model is not None:
        raise ValueError(f"--model: expected none with --recipe {recipe.name}, whose model is {recipe.model}; drop it")
    labelled = recipe.items(args.images[0], args.classes, "label")  # before the model, which may take minutes
    args.model, args.metrics = args.model or recipe.model, args.metrics or [*recipe.metrics]
    args.variant, args.probability = args.variant or recipe.variant, args.probability or recipe.probability
    names = recipe.class_names(args.classes)
    if recipe.prompts is None:
        subject = _with_head(load_subject(args), names)
    else:
        subject = load_subject(args, lambda args: _with_prompts(args, recipe, names))
    labels = {item.key: item.target for item in labelled if item.target is not None}
    found = labelled if args.explain == "label" else [replace(item, target=None) for item in labelled]
    return subject, found, {} if args.explain == "label" else labels


def agreement(predicted: Mapping[str, int | None], labels: Mapping[str, int]) -> str:
    """How often the model predicts the label; a low number hints at another order of classes or preprocessing."""
    known = {key: number for key, number in predicted.items() if number is not None}
    right = sum(labels[key] == number for key, number in known.items())
    return f"accuracy {right} of {len(known)} images: the class of their folder is predicted"


def _with_head(subject: Subject, names: list[str]) -> Subject:
    outputs = getattr(subject.model, "num_classes", None)
    if outputs != len(names):
        raise ValueError(
            f"--recipe: expected a model with {len(names)} outputs, one a class in the order {', '.join(names)}, got "
            f"{outputs}; give --checkpoint FILE of a fine-tuned model, and --classes if it knows other classes"
        )
    return replace(subject, class_names=names)


def _with_prompts(args: argparse.Namespace, recipe: Recipe, names: list[str]) -> Subject:
    """A classifier from an open_clip model and the recipe's prompts."""
    assert recipe.prompts is not None
    open_clip: Any = need("open_clip")
    check_weights(
        args,
        f"no weights for {recipe.model}: give --checkpoint FILE, open_clip's own file of the weights {recipe.tag}; "
        "--pretrained to download them now; or --random-weights, for timing only",
    )
    weights = None
    if args.pretrained:
        try:
            clip = open_clip.create_model(recipe.model, pretrained=recipe.tag)
        except Exception as error:  # hub clients raise many kinds for a missing network
            raise ValueError(
                f"--pretrained: open_clip could not get the weights ({error}); give --checkpoint"
            ) from error
    else:
        torch.manual_seed(0)  # of random weights
        clip = open_clip.CLIP(**open_clip.get_model_config(recipe.model))
    if args.checkpoint is not None:
        weights = load_into(clip, Checkpoint(args.checkpoint, args.checkpoint_key))
    clip = clip.eval().to(args.device)  # where the prompts are encoded
    model = prompt_classifier(clip, open_clip.get_tokenizer(recipe.model), names, recipe.prompts())
    return Subject(recipe.model, model, recipe.preprocess, {}, names, multi_label=False, weights=weights)
