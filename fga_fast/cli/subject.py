"""The model that a command works on, with its preprocessing, autoencoders and class names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fga_fast.cli.other_models import is_other
from fga_fast.cli.other_models import load as load_other
from fga_fast.io.checkpoint import Checkpoint
from fga_fast.io.images import Preprocess
from fga_fast.models.timm_import import import_timm
from fga_fast.question.names import class_number
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder


@dataclass(frozen=True)
class Subject:
    """A model ready to be explained."""

    name: str  # for the reader
    model: nn.Module  # in eval mode, on its device
    preprocess: Preprocess  # from pictures to its input
    saes: dict[int, SparseAutoencoder]  # block -> SAE, on the same device
    class_names: Sequence[str] | None  # one for each logit, if known
    multi_label: bool  # probabilities are sigmoids of single logits rather than a softmax
    weights: dict[str, Any] | None = None  # the checkpoint: its file, what it has before the names, what was left out


def target_number(given: str, classes: int, names: Sequence[str] | None) -> int:
    """Class number of `--target`'s value: a number from 0, or a name as `names.class_number` finds it."""
    try:
        number = int(given)
    except ValueError:
        if names is None:
            expected = f"a number from 0 to {classes - 1}, since the names of the classes are not known"
            raise ValueError(f"--target: expected {expected}, got {given!r}") from None
        return class_number(given, names, "--target")
    if not 0 <= number < classes:
        raise ValueError(f"--target: expected a class from 0 to {classes - 1}, got {number}")
    return number


def load_subject(args: argparse.Namespace, make: Callable[[argparse.Namespace], Subject] | None = None) -> Subject:
    """The subject that the arguments name: a model of timm, transformers or the user's, or the shipped fashion demo.

    Args:
        make: makes the subject with --model, if that is none of these; it gives no autoencoders.
    """
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: got {args.device!r}, but torch sees no CUDA device; leave it out to use the CPU")
    if args.model is None:
        for name in ("checkpoint", "checkpoint_key", "pretrained", "random_weights"):
            if getattr(args, name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag}: expected --model MODEL with it; without --model the demo is explained")
    saes = _load_saes(args)
    subject = _fashion_subject() if args.model is None else (make or _named_subject)(args)
    saes = saes or subject.saes
    model = subject.model.to(device).eval().requires_grad_(False)
    return replace(subject, model=model, saes={block: sae.to(device) for block, sae in saes.items()})


def _load_saes(args: argparse.Namespace) -> dict[int, SparseAutoencoder]:
    saes: dict[int, SparseAutoencoder] = {}
    for spec in args.sae:
        block, sae = read_sae(spec, args)
        if block in saes:
            raise ValueError(f"--sae: expected one autoencoder a block, got two for block {block}; drop one")
        saes[block] = sae
    return saes


def read_sae(spec: str, args: argparse.Namespace, option: str = "--sae") -> tuple[int, SparseAutoencoder]:
    """Block and SAE that BLOCK=PATH names, on the CPU; `option` is what errors call it."""
    number, equals, path = spec.partition("=")
    if not equals or not number.strip().isdecimal() or not path:
        raise ValueError(f"{option}: expected BLOCK=PATH, e.g. 9=sae_block_9, got {spec!r}")
    if not Path(path).exists():
        raise FileNotFoundError(f"{option}: no file or folder {path}; expected a saved SAE after {number}=")
    normalize = {None: "as stored", "none": None}.get(args.sae_normalize, args.sae_normalize)
    return int(number), SparseAutoencoder.from_pretrained(
        path, allow_pickled_config=args.allow_pickled_config, normalize=normalize
    )


def _fashion_subject() -> Subject:
    from fga_fast.assets import fashion_config, fashion_model, fashion_saes

    config, model = fashion_config(), fashion_model()
    preprocess = Preprocess((config.model_args["img_size"],) * 2, config.mean, config.std)
    return Subject("the fashion demo model", model, preprocess, fashion_saes(), config.class_names, True)


def _named_subject(args: argparse.Namespace) -> Subject:
    if not is_other(args.model):
        return _timm_subject(args)
    model, preprocess, names, several = load_other(args)
    return Subject(args.model, model, preprocess, {}, names, multi_label=several)


def _timm_subject(args: argparse.Namespace) -> Subject:
    timm: Any = import_timm()
    model, weights = _timm_model(args, timm)
    data = timm.data.resolve_model_data_config(model)
    preprocess = Preprocess(
        image_size=tuple(data["input_size"][-2:]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        crop_pct=min(float(data["crop_pct"]), 1.0),
        interpolation=data["interpolation"] if data["interpolation"] in ("bilinear", "nearest") else "bicubic",
        squash=data.get("crop_mode") == "squash",
    )
    subset = timm.data.infer_imagenet_subset(model)
    names = None if subset is None else timm.data.ImageNetInfo(subset).label_descriptions()
    return Subject(args.model, model, preprocess, {}, names, multi_label=False, weights=weights)


def _timm_model(args: argparse.Namespace, timm: Any) -> tuple[nn.Module, dict[str, Any] | None]:
    name = args.model
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"--model: timm has no model {name!r}; timm.list_models('vit*') lists what it has")
    check_weights(args, _no_weights(name))
    if args.pretrained:
        try:
            return _create(timm, name, pretrained=True), None
        except Exception as error:  # hub clients raise many kinds for a missing network
            raise ValueError(f"--pretrained: timm could not get the weights ({error}).\n{_no_weights(name)}") from error
    if args.random_weights:
        torch.manual_seed(0)
        return _create(timm, name, pretrained=False), None
    checkpoint = Checkpoint(args.checkpoint, args.checkpoint_key)
    # A fine-tuned model's own number of classes; a mismatch anywhere else is reported by load_into.
    head = checkpoint.shape("head.weight")
    model = _create(timm, name, pretrained=False, **({"num_classes": head[0]} if head else {}))
    return model, load_into(model, checkpoint)


def check_weights(args: argparse.Namespace, advice: str) -> None:
    """Raises ValueError unless one source of weights is given; `advice` is what it says where there is none."""
    if args.checkpoint_key is not None and args.checkpoint is None:
        raise ValueError("--checkpoint-key: expected --checkpoint FILE with it")
    given = [args.checkpoint is not None, args.pretrained, args.random_weights]
    if sum(given) > 1:
        raise ValueError("--checkpoint, --pretrained, --random-weights: expected one of them, got several; choose one")
    if not any(given):
        raise ValueError(advice)


def load_into(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Any]:
    """Copies a file's weights into the model; returns `Subject.weights`, and says on stderr where they were found."""
    prefix, left_out = checkpoint.load_into(model)
    if prefix:
        rest = f"; left out: {', '.join(left_out)}" if left_out else ""
        print(f"fga-fast: --checkpoint: took the weights under {prefix!r}{rest}", file=sys.stderr)
    return {"file": str(checkpoint.path), "prefix": prefix, "left_out": left_out}


def _create(timm: Any, name: str, **settings: Any) -> nn.Module:
    model: nn.Module = timm.create_model(name, **settings)
    if getattr(model, "dynamic_img_size", False):
        # The same weights with a fixed patch grid; preprocessing makes all pictures one size anyway.
        model = timm.create_model(name, dynamic_img_size=False, **settings)
    return model


def _no_weights(name: str) -> str:
    return (
        f"no weights for {name}: nothing is downloaded unless you ask for it. Give one of\n"
        "  --checkpoint FILE   a state dict (safetensors or .pt); where there is a network, write one with\n"
        '      python -c "import timm, safetensors.torch as s; '
        f"s.save_file(timm.create_model('{name}', pretrained=True).state_dict(), '{name}.safetensors')\"\n"
        "  --pretrained        let timm use its cache or download them now\n"
        "  --random-weights    for timing only: the explanation means nothing"
    )
