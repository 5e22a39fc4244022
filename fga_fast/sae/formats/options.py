"""What a caller of `SparseAutoencoder.from_pretrained` can say where the checkpoint does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import Tensor

AS_STORED = "as stored"

_WHAT = {
    "normalize": "normalisation",
    "activation": "activation",
    "k": "number of features kept",
    "threshold": "threshold, or has none",
    "decoder_norm": "decoder as it is used",
    "pre_mean": "input statistics, or has none",
    "pre_scale": "input statistics, or has none",
    "subtract_b_dec": "use of b_dec",
}


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
            value = getattr(self, field.name)
            if field.name in (*taken, "allow_pickled_config") or value is field.default:
                continue
            if isinstance(value, str) and value == field.default:
                continue
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{field.name}: {where} ({format_name}) stores its own {_WHAT[field.name]}; got {field.name}={got}, "
                "leave it out"
            )
