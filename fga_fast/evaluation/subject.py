"""What is evaluated, and the form that every method of explanation has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from fga_fast.explainer import Explainer
from fga_fast.models.layout import ModelLayout
from fga_fast.sae.sparse_autoencoder import SparseAutoencoder
from fga_fast.settings import Backward, Gate
from fga_fast.settings import Method as Way


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model, its SAEs and where its blocks are.

    Attributes:
        model: any module from images [B, channels, H, W] to logits [B, classes] that `Explainer` takes, in eval mode.
        saes: block (from 0) -> SAE of the residual stream after it. Do not change it afterwards.
        layout: where the model's blocks and tokens are; None: `find_layout(model)`.
        seed: of random maps, random gates and shuffled decoders.
    """

    model: nn.Module
    saes: Mapping[int, SparseAutoencoder] = field(default_factory=dict)
    layout: ModelLayout | None = None
    seed: int = 0
    # Kept, since a new one for each batch would check the weights and log its warnings again.
    _explainers: dict[Any, Explainer] = field(default_factory=dict, init=False, repr=False, compare=False)

    def explainer(
        self, gate: Gate | None = None, method: Way = "rollout", backward: Backward = "exact", per_block: bool = False
    ) -> Explainer:
        """The `Explainer` of this model with these settings; made once.

        Args:
            gate: None: without the SAEs.

        Raises:
            TypeError, ValueError, RuntimeError: as `Explainer`.
        """
        order = None if gate is None or gate.permutation is None else tuple(gate.permutation.tolist())
        key = (gate, order, method, backward, per_block)
        if key not in self._explainers:
            self._explainers[key] = Explainer(
                self.model, self.saes if gate else {}, gate=gate, method=method, backward=backward, layout=self.layout,
                per_block=per_block,
            )  # fmt: skip
        return self._explainers[key]

    def check_saes(self, method: str) -> None:
        """Refuses a method that needs SAEs where there are none.

        Raises:
            ValueError: naming the method.
        """
        if not self.saes:
            raise ValueError(f"{method}: needs SAEs, the subject has none; give Subject(model, saes={{block: sae}})")


# (subject, images [B, channels, H, W], targets int64 [B]) -> relevance [B, P], in `relevance_dtype` of the images
Method: TypeAlias = Callable[[Subject, Tensor, Tensor], Tensor]
