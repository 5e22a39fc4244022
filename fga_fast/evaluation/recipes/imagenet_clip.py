"""ImageNet's validation images, classified by the prompts of CLIP ViT-B/32, for which Prisma published SAEs.

Sources: Russakovsky et al., IJCV 115 (2015); Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", ICML 2021 (the classifier of prompts); Joseph et al., "Prisma", arXiv:2504.19475 (the SAEs).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn, stack
from tqdm import tqdm

from fga_fast.dataset.extras import need
from fga_fast.dataset.items import Item
from fga_fast.evaluation.recipes.recipe import Recipe, by_class, items_of, root_of
from fga_fast.io.images import Preprocess
from fga_fast.models.timm_import import import_timm
from fga_fast.question.dual import DualEncoder


class PromptClassifier(nn.Module):
    """A CLIP's image tower as a classifier: images [B, 3, H, W] -> logits [B, classes], its own scaled cosines.

    Args:
        clip: one of open_clip's, in eval mode. Its image tower is shared, and nothing of it is changed.
        texts: [classes, E], a vector of length 1 for each class.
    """

    texts: Tensor  # [classes, E], scaled

    def __init__(self, clip: Any, texts: Tensor) -> None:
        super().__init__()
        self.visual = clip.visual
        self.register_buffer("texts", clip.logit_scale.detach().exp() * texts)
        self.training = clip.training

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, classes]
        return F.normalize(self.visual(images), dim=-1) @ self.texts.t()


def prompt_classifier(
    clip: nn.Module, tokenizer: Callable[..., Any], names: Sequence[str], prompts: Sequence[Callable[[str], str]]
) -> PromptClassifier:
    """The classifier of `names`: a class is the mean of its prompts' text features, scaled to length 1.

    It runs the text tower names x prompts times: some minutes on a CPU for 1,000 names and 7 prompts.

    Args:
        prompts: functions from a name to a text.

    Raises:
        ValueError: no names or prompts, or a tokenizer that does not fit; the message says which.
    """
    if not names or not prompts:
        raise ValueError(f"names, prompts: expected at least one of each, got {len(names)} and {len(prompts)}")
    encoder = DualEncoder(clip, tokenizer)
    means = [
        encoder.text_features([prompt(name) for prompt in prompts]).mean(0)  # [E]
        for name in tqdm(names, desc="encoding prompts", unit="class", disable=len(names) < 100)
    ]
    return PromptClassifier(clip, F.normalize(stack(means), dim=-1))


def _classes() -> dict[str, str]:
    """ImageNet's numbers of classes in WordNet, which are the folders, and open_clip's names for prompts.

    Both lists are in the order of the numbers, which is that of ImageNet's models.
    """
    timm: Any = import_timm()
    numbers: list[str] = timm.data.ImageNetInfo("imagenet-1k").label_names()
    return dict(zip(numbers, need("open_clip").IMAGENET_CLASSNAMES, strict=True))


def _prompts() -> Sequence[Callable[[str], str]]:
    found: Sequence[Callable[[str], str]] = need("open_clip").SIMPLE_IMAGENET_TEMPLATES
    return found


def _read(folder: Path, classes: Sequence[str], known: Collection[str]) -> list[Item]:
    root = root_of(folder, "val", classes)
    return items_of(root, by_class(root.iterdir(), classes, known))


# docs/sae_table.md of ViT-Prisma lists these as "Vanilla SAEs (All Patches)", one a block.
_SAE = "Prisma-Multimodal/sparse-autoencoder-clip-b-32-sae-vanilla-x64-layer-{}-hook_resid_post-l1-{}"

RECIPE = Recipe(
    name="imagenet-clip",
    model="ViT-B-32",
    preprocess=Preprocess(
        (224, 224), mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
    ),
    layout="val/CLASS/*.JPEG, where CLASS is the class's number in WordNet, such as n01440764, with all 1,000 classes "
    "unless others are asked for",
    classes=_classes,
    read=_read,
    prompts=_prompts,
    tag="datacomp_xl_s13b_b90k",
    saes={block: _SAE.format(block, "5e-05" if block == 2 else "1e-05") for block in range(12)},
)
