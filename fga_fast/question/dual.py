"""Dual encoders: an image tower and a text tower whose features are compared (CLIP, SigLIP).

Written for open_clip 3.3 (`model.CLIP`, `model.CustomTextCLIP`) and transformers 5 (`CLIPModel`, `SiglipModel`).
Neither is imported: their classes are recognised by name and defining module.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fga_fast.models.common import class_of
from fga_fast.models.follower import followed_by

_IMAGE_PARTS = ("visual", "vision_model", "visual_projection")  # all other weights are the text tower's

MAX_PROMPTS = 4096  # distinct ones in a call and in the cache: 12 MiB of features at width 768
_CHUNK = 64  # prompts encoded at once, which bounds the text tower's memory


def library_of(module: nn.Module) -> str:
    """Which library's dual encoder this is, "open_clip" or "transformers"; "" for any other module."""
    if class_of(module, ("CLIP", "CustomTextCLIP"), "open_clip.model"):
        return "open_clip"
    return "transformers" if class_of(module, ("CLIPModel", "SiglipModel"), "transformers.models") else ""


class DualEncoder:
    """Features of images and texts of one dual encoder, and the logits it computes from them.

    The text features of the `MAX_PROMPTS` prompts used last are kept. They are computed again after a weight of the
    text tower was changed in place, replaced, moved or converted. A change that PyTorch does not count goes unnoticed
    (through `weight.data`, as some merges of adapters do): make a new explainer after one. Several threads may use one
    object.

    Args:
        model: one that `library_of` recognises.
        tokenizer: turns a list of T prompts into integers [T, n], or into a mapping with `input_ids` (and
            `attention_mask`); a tokenizer or processor of transformers, or what `open_clip.get_tokenizer` returns.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Any] | None = None) -> None:
        self.model: Any = model
        self.library = library_of(model)
        self.tokenizer = _text_tokenizer(tokenizer)
        self._lock = threading.Lock()
        self._features: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()  # (prompt, autocast) -> [E]
        self._weights: tuple[object, ...] = ()  # of the text tower that `_features` are from

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "tokenizer": self.tokenizer}  # locks cannot be pickled or copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def image_features(self, images: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, E]
        """Features of length 1, attached to the graph."""
        if self.library == "open_clip":
            found = self.model.encode_image(images)
        else:
            found = _pooled(self.model.get_image_features(pixel_values=images))
        # Both libraries divide by the length; this is the spelling that a conservative backward pass knows.
        return F.normalize(found, dim=-1)

    def logits(self, features: Tensor, prompts: Sequence[str]) -> Tensor:  # [B, E] -> [B, T]
        """The model's own logits_per_image: scale * cosine + bias, without a gradient to texts, scale and bias."""
        texts = self.text_features(prompts).to(features.dtype)  # [T, E]
        logits: Tensor = self.model.logit_scale.detach().exp() * (features @ texts.t())
        bias = getattr(self.model, "logit_bias", None)
        if bias is not None:
            logits = logits + bias.detach()
        return logits

    def text_features(self, prompts: Sequence[str]) -> Tensor:  # -> [T, E]
        """Features of length 1 of T prompts, without a gradient; each distinct prompt is encoded once."""
        wanted = list(dict.fromkeys(prompts))
        if not wanted or len(wanted) > MAX_PROMPTS:
            raise ValueError(
                f"targets: expected 1 to {MAX_PROMPTS} distinct prompts, got {len(wanted)}; make several calls"
            )
        kind = next(self._text_parameters()).device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # What follows the explained forward pass must not see this one: it is meant for the image tower.
        with self._lock, followed_by(None), torch.inference_mode(False), torch.no_grad():
            weights = tuple(map(_state, self._text_parameters()))
            if weights != self._weights:
                self._features.clear()
                self._weights = weights
            missing = [prompt for prompt in wanted if (prompt, precision) not in self._features]
            for start in range(0, len(missing), _CHUNK):
                chunk = missing[start : start + _CHUNK]
                for prompt, feature in zip(chunk, self._encode(chunk), strict=True):
                    self._features[prompt, precision] = feature.clone()  # a view would keep the whole chunk alive
            for prompt in wanted:
                self._features.move_to_end((prompt, precision))
            found = torch.stack([self._features[prompt, precision] for prompt in prompts])
            while len(self._features) > MAX_PROMPTS:
                self._features.popitem(last=False)
        return found

    def _text_parameters(self) -> Iterator[nn.Parameter]:
        return (p for name, p in self.model.named_parameters() if name.split(".")[0] not in _IMAGE_PARTS)

    def _encode(self, prompts: list[str]) -> Tensor:  # -> [T, E]
        tokens = self._tokens(prompts)
        shape = list(tokens["input_ids"].shape)
        try:
            if self.library == "open_clip":
                found = self.model.encode_text(tokens["input_ids"])
            else:
                found = _pooled(self.model.get_text_features(**tokens))
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise ValueError(
                f"tokenizer: the text tower of {type(self.model).__name__} does not take its tokens of shape {shape}: "
                f"{error}; use the tokenizer that belongs to the model"
            ) from error
        if not bool(torch.isfinite(found).all()):
            raise ValueError(
                f"model: text features of {prompts[:3]} contain NaN or Inf; check the text tower's weights, or run it "
                f"in a wider dtype than {found.dtype}"
            )
        return F.normalize(found, dim=-1)

    def _tokens(self, prompts: list[str]) -> dict[str, Tensor]:
        if self.tokenizer is None:
            example = 'transformers.AutoTokenizer.from_pretrained("openai/clip-vit-base-patch32")'
            if self.library == "open_clip":
                example = 'open_clip.get_tokenizer("ViT-B-32")'
            raise ValueError(
                f"targets: prompts such as {prompts[0]!r} need the model's tokenizer, got none; construct "
                f"Explainer(..., tokenizer={example}) with the model's own name"
            )
        found = self.tokenizer(prompts, **self._padding())
        if isinstance(found, Mapping):
            # Token types and the like belong to other models; positions are the text tower's own business.
            tokens = {name: found[name] for name in ("input_ids", "attention_mask") if name in found}
        else:
            tokens = {"input_ids": found}
        ids = tokens.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != len(prompts) or ids.is_floating_point():
            got = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(found).__name__
            raise ValueError(
                f"tokenizer: expected integer tokens [{len(prompts)}, n] for {len(prompts)} prompts (or a mapping with "
                f"them as input_ids), got {got}; wrap yours in a function from a list of str to that tensor"
            )
        known = self._vocabulary()
        if known and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known:
            raise ValueError(
                f"tokenizer: expected tokens 0 to {known - 1}, which the text tower knows, got {int(ids.min())} to "
                f"{int(ids.max())}; use the tokenizer that belongs to the model"
            )
        device = next(self._text_parameters()).device
        return {name: value.to(device) for name, value in tokens.items()}

    def _padding(self) -> dict[str, Any]:
        """Further arguments for transformers' tokenizers; others need none."""
        if not _of_transformers(self.tokenizer):
            return {}
        if self.library == "transformers":
            length = self.model.config.text_config.max_position_embeddings
        else:
            length = self.model.context_length
        # SigLIP always reads the last token, and open_clip's towers take one length only.
        padding = "max_length" if self.library == "open_clip" or hasattr(self.model, "logit_bias") else True
        return {"padding": padding, "truncation": True, "max_length": length, "return_tensors": "pt"}

    def _vocabulary(self) -> int:
        """Number of tokens that the text tower knows; 0 if that is unknown."""
        if self.library == "open_clip":
            embedding = getattr(getattr(self.model, "text", self.model), "token_embedding", None)
        else:
            embedding = self.model.text_model.get_input_embeddings()
        return int(getattr(embedding, "num_embeddings", 0))


def _of_transformers(tokenizer: object) -> bool:
    return any(cls.__module__.startswith("transformers.") for cls in type(tokenizer).__mro__)


def _text_tokenizer(tokenizer: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The tokenizer itself, or that of a transformers processor, which takes images as its first argument."""
    if _of_transformers(tokenizer):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(
            f"tokenizer: expected a callable from a list of str to tokens [T, n], got {type(tokenizer).__name__}; pass "
            "what open_clip.get_tokenizer or transformers.AutoTokenizer.from_pretrained returns"
        )
    return tokenizer


def _pooled(output: Any) -> Tensor:
    """Features [B, E]: transformers 4 returns them, 5 an output with them as `pooler_output` or as second entry."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = output.pooler_output if hasattr(output, "pooler_output") else output[1]
    return found


def _state(parameter: Tensor) -> tuple[object, ...]:
    """Differs after the values were changed in place, or the tensor was moved, converted or replaced."""
    version = 0 if parameter.is_inference() else parameter._version
    return id(parameter), parameter.data_ptr(), version, parameter.dtype, parameter.device
