"""What a caller of `SparseAutoencoder.from_pretrained` can say where the checkpoint does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import Tensor

AS_STORED = "as stored"


@dataclass(frozen=True)
class Options:
    """Arguments of `SparseAutoencoder.from_pretrained` that a format may take; each is documented there."""

    allow_pickled_config: bool = False
    normalize: str | None = AS_STORED
    activation: str | None = None
    k: int | None = None
    threshold: float | Tensor | None = None  # [] or [F]
    decoder_norm: str | None = None
    pre_mean: Tensor | Sequence[float] | None = None  # [C]
    pre_scale: float | Tensor | None = None  # [] or [C]
    subtract_b_dec: bool | None = None

    def check(self, format_name: str, taken: tuple[str, ...], where: object) -> None:
        """Raise ValueError for an option that files of this format store themselves."""
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            unset = value is field.default or (isinstance(value, str) and value == field.default)
            if not unset and name not in (*taken, "allow_pickled_config"):
                got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(
                    f"{name}: {where} ({format_name}) stores its own, or needs none; got {name}={got}, leave it out"
                )
