"""The method in its textbook form: full attention maps, the rollout as a matrix, dense codes and gradients.

Nothing here is fast. Every fast path in the library is tested against these functions, and each of them quotes the
equation that it computes, so that they can be checked by reading.
"""

from __future__ import annotations

from fga_fast.precision import relevance_dtype
from fga_fast.reference.attention import attention, attention_backward, attention_relevance
from fga_fast.reference.explain import explain
from fga_fast.reference.gate import gate, unit
from fga_fast.reference.input_x_gradient import input_x_gradient
from fga_fast.reference.rollout import gate_columns, rollout
from fga_fast.reference.score import contributions, score, top_features
from fga_fast.reference.starts import start_rows

__all__ = [
    "attention",
    "attention_backward",
    "attention_relevance",
    "contributions",
    "explain",
    "gate",
    "gate_columns",
    "input_x_gradient",
    "relevance_dtype",
    "rollout",
    "score",
    "start_rows",
    "top_features",
    "unit",
]
