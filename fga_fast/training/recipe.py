"""What kind of sparse autoencoder is trained, how wide and how sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["topk", "batch_topk", "matryoshka", "jumprelu", "relu"]


@dataclass(frozen=True)
class Recipe:
    """One sparse autoencoder to train.

    Everything that has a size is meant after the tokens were centred and divided by their scale (see `Scale`), so a
    recipe fits any block of any model.

    Attributes:
        kind: "topk" keeps k features a token (Gao et al. 2024, arXiv:2406.04093). "batch_topk" keeps k a token on the
            mean over a batch, and finds the threshold that does so for single tokens (Bussmann et al. 2024,
            arXiv:2412.06410). "matryoshka" is the same, and the first features must explain the token without the
            others (Bussmann et al. 2025, arXiv:2503.17547). "jumprelu" learns a threshold for each feature, pressed
            towards k features a token (Rajamanoharan et al. 2024, arXiv:2407.14435). "relu" presses by an L1 penalty.
        features: F, at least 2.
        k: features a token, 1 <= k <= F; all kinds but "relu" need it.
        l1: weight of the mean sum of codes, divided by sqrt(C), beside the unexplained share; "relu" needs it.
        prefixes: sizes of the nested dictionaries of "matryoshka", rising up to F; empty: F/16, F/8, F/4, F/2, F.
        l0: weight of (L0 / k - 1)^2 beside the unexplained share, for "jumprelu".
        bandwidth: width of the window in which a threshold has a gradient, for "jumprelu".
        aux: weight of the loss that makes dead features explain what is left (AuxK of Gao et al.); 0: none. "relu" has
            none: nothing of its dead features is above 0.
        dead_after: tokens without a code after which a feature counts as dead.

    Raises:
        TypeError, ValueError: an attribute of the wrong type, out of its range, or of another kind.
    """

    kind: Kind = "topk"
    features: int = 768
    k: int | None = None
    l1: float | None = None
    prefixes: tuple[int, ...] = ()
    l0: float = 1.0
    bandwidth: float = 0.5
    aux: float = 1 / 32
    dead_after: int = 400_000

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        _check_whole("features", self.features, 2, None)
        _check_whole("dead_after", self.dead_after, 1, None)
        if self.kind == "relu":
            if self.k is not None:
                raise ValueError(f"k: 'relu' takes l1 instead, got k={self.k}; leave it out")
            _check_size("l1", self.l1, above=True)
        else:
            if self.l1 is not None:
                raise ValueError(f"l1: only 'relu' takes it, got l1={self.l1} with {self.kind!r}; give k instead")
            _check_whole("k", self.k, 1, self.features)
        _check_size("bandwidth", self.bandwidth, above=True)
        _check_size("aux", self.aux, above=False)
        _check_size("l0", self.l0, above=True)
        if self.prefixes and self.kind != "matryoshka":
            raise ValueError(f"prefixes: only 'matryoshka' takes them, got {self.prefixes} with {self.kind!r}")
        if self.kind == "matryoshka":
            object.__setattr__(self, "prefixes", _prefixes(self.prefixes, self.features))

    @property
    def rate(self) -> float:
        """The learning rate that suits the width: as 1 / sqrt(F) (Gao et al. 2024, fig. 3), 6e-4 at 2^14 features.

        That is three times theirs, since gradients are scaled to length 1 here (`Trainee.level_gradient`).
        """
        return 6e-4 * math.sqrt(2**14 / self.features)


def _prefixes(given: tuple[int, ...], features: int) -> tuple[int, ...]:
    sizes = tuple(given) or tuple(dict.fromkeys(max(1, features // part) for part in (16, 8, 4, 2, 1)))
    for size in sizes:
        _check_whole("prefixes", size, 1, features)
    if list(sizes) != sorted({*sizes}) or sizes[-1] != features:
        raise ValueError(f"prefixes: expected rising sizes of which the last is features={features}, got {sizes}")
    return sizes


def _check_whole(name: str, value: object, low: int, high: int | None) -> None:
    upto = f"from {low} to {high} (features)" if high is not None else f"of at least {low}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number {upto}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected a whole number {upto}, got {value}")


def _check_size(name: str, value: object, *, above: bool) -> None:
    expected = "a finite number above 0" if above else "a finite number of at least 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not math.isfinite(value) or value < 0 or (above and value == 0):
        raise ValueError(f"{name}: expected {expected}, got {value}")
