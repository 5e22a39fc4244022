"""A checksum of a model's weights, by which a model that has changed is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fga_fast.io.digest import bytes_of
from fga_fast.models.checks import is_plain


def model_checksum(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and bytes of a model's parameters and buffers, as 64 hexadecimal digits.

    It is the same on every device and in every process. A buffer that is not saved with the model counts too.

    Raises:
        TypeError: a tensor of a class that does not say what it holds.
    """
    digest = hashlib.sha256()
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        for part, values in _parts(name, tensor):
            digest.update(f"{part}\0{[*values.shape]}\0{values.dtype}\0".encode())
            digest.update(bytes_of(values))
    return digest.hexdigest()


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that a tensor of another class is made of, such as integers and a scale."""
    if is_plain(tensor):
        yield name, tensor
        return
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    inner = flatten()[0] if flatten else [key for key, value in vars(tensor).items() if isinstance(value, Tensor)]
    if not inner:
        raise TypeError(f"model: '{name}' is a {type(tensor).__name__}, whose bytes cannot be read for a checksum")
    for key in inner:
        yield from _parts(f"{name}.{key}", getattr(tensor, key))
