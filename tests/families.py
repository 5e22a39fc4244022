"""Every supported model family as a small random model: for the tests of all families and the table in docs/models.md.

Models are built by their own libraries from configurations, so nothing is downloaded. A library is imported only when
one of its models is built.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fga_fast import Explainer, Explanation, Gate, SparseAutoencoder
from fga_fast.models.find import find_layout
from fga_fast.models.layout import ModelLayout

# What a family's library is called in the table -> what Python imports.
LIBRARIES = {"timm": "timm", "open_clip": "open_clip", "Hugging Face": "transformers", "torchvision": "torchvision"}
CLASSES = 6


@dataclass(frozen=True)
class Family:
    """One row of the table, and how to make a model of it."""

    name: str  # as in the table
    library: str  # key of LIBRARIES
    model: str  # class or model name in that library
    make: Callable[[], nn.Module]
    image_size: tuple[int, int]
    grid: tuple[int, int]
    prefix: int
    pooling: str
    pooled: tuple[int, int]
    attention: str = "fused"  # "fused" scaled_dot_product_attention, "eager" softmax, "MultiheadAttention"
    note: str = ""  # footnote of the table
    reads_more: bool = False  # the logits read tokens besides `pooled`
    resized: bool = False  # images are not of the size that the model was configured for
    prompts: tuple[str, ...] = ()  # dual encoders: what is asked for

    @property
    def id(self) -> str:
        return f"{self.library}-{self.name}-{self.attention}".replace(" ", "_")

    def build(self) -> nn.Module:
        """The model in eval mode; its weights are perturbed, since initial ones make attention nearly uniform."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.make().eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "logit_" not in name:  # a dual encoder's temperature stays what it is
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    def images(self, batch: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(8)
        return torch.randn(batch, 3, *self.image_size, generator=generator)

    def installed(self) -> bool:
        return importlib.util.find_spec(LIBRARIES[self.library]) is not None


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """What the plain model answers: logits [B, classes] of a classifier, image features [B, E] of anything else."""
    for encode in ("encode_image", "get_image_features"):
        if hasattr(model, encode):
            output: Any = getattr(model, encode)(images)
            break
    else:
        output = model(images)
    for field in ("logits", "image_embeds", "pooler_output"):
        value = getattr(output, field, None)
        if value is not None:
            return value
    if not isinstance(output, Tensor):
        raise TypeError(f"no logits or image features in {type(output).__name__}")
    return output


def tokenize(texts: list[str]) -> Tensor:
    """A tokenizer for the small text towers: one number a letter, an end mark, zeros up to 8 tokens."""
    rows = [[1 + ord(letter) % 40 for letter in text[:7]] + [49] for text in texts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


def eager(model: nn.Module) -> nn.Module:
    """Switches timm's fused attention off in a model that is already built."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def autoencoder(width: int = 48, features: int = 90) -> SparseAutoencoder:
    """A random autoencoder for a family's residual stream."""
    generator = torch.Generator().manual_seed(9)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return SparseAutoencoder(random(width, features), random(features), random(features, width), random(width))


def layout_of(family: Family, model: nn.Module) -> ModelLayout:
    return find_layout(model, image_size=family.image_size if family.resized else None)


def explain(family: Family, model: nn.Module, backend: Any, **settings: Any) -> Explanation:
    """Explains the family's two images, each for one target."""
    settings["layout"] = layout_of(family, model)
    if family.prompts:
        settings["tokenizer"] = tokenize
    explainer = Explainer(model, gate=Gate(base=4.0), backend=backend, **settings)
    # Of a tower without a head, this explains one of its features.
    return explainer(family.images(), list(family.prompts) if family.prompts else 1)


def autoencoders(layout: ModelLayout) -> dict[int, SparseAutoencoder]:
    """An autoencoder after the first block, and one after the last at which a gate does something."""
    last = len(layout.blocks) - (1 if layout.pooled[1] > layout.prefix_tokens else 2)
    return {layer: autoencoder(int(layout.d_model or 0)) for layer in (0, last)}


def seed(layout: ModelLayout) -> Tensor:
    """What the patches' relevance starts from, [P]: for average pooling most of it, for the others nothing."""
    start, stop = layout.pooled
    tokens = torch.zeros(layout.tokens)
    if layout.pooling == "average":
        tokens[start:stop] = 1 / (stop - start)
    return tokens[layout.prefix_tokens :]


def error(got: Tensor, want: Tensor) -> float:
    """Relative error, by norms; infinite where there is nothing to compare."""
    return float((got - want).norm() / want.norm()) if float(want.norm()) > 0 else float("inf")


def registry() -> list[Family]:
    """All families, in the order of the table."""
    import families_huggingface
    import families_timm
    import families_towers

    return [*families_timm.FAMILIES, *families_huggingface.FAMILIES, *families_towers.FAMILIES]
