"""Raw attention of one block.

    row A_L        at the patches, A_L averaged over heads

For a class token, that is its attention to the patches; for averaged patches, the mean of their rows; for an attention
pool, their mean weighed by the pool's own attention (`recorded.record`). The usual look at a class token's attention,
as in M. Caron et al.: Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021, there head by head.
"""

from __future__ import annotations

from torch import Tensor

from fga_fast.evaluation.methods.recorded import record
from fga_fast.evaluation.subject import Subject


def raw_attention(subject: Subject, images: Tensor, targets: Tensor) -> Tensor:
    """Attention of the last block that the head reads.

    Args:
        images: [B, channels, H, W].
        targets: [B]; the map is the same for all.

    Returns:
        [B, P], at least 0.
    """
    found = record(subject, images, targets)
    attention = found.maps[found.deepest].mean(1)  # [B, N, N]
    return found.patches((found.rows[found.deepest].unsqueeze(1) @ attention).squeeze(1))
