"""Models whose heads read different tokens, for the tests of methods."""

from __future__ import annotations

from typing import Any

from torch import Tensor

MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average": {"global_pool": "avg", "fc_norm": True, "class_token": False},
    "registers": {"reg_tokens": 2},
}
Images = tuple[Tensor, Tensor]  # [B, 3, 32, 48] [B]
