"""Numbers that say how good a relevance map is: faithfulness, localisation, stability, dependence on the weights.

Every metric gives one float64 value an image, [B]. It takes maps [B, P], or those of M methods at once, [M, B, P], and
then gives [M, B]. Methods that are compared in one call share forward passes. No metric knows where a map comes from.
"""

from __future__ import annotations

from fga_fast.metrics.faithfulness_correlation import faithfulness_correlation
from fga_fast.metrics.insertion_deletion import InsertionDeletion, insertion_deletion
from fga_fast.metrics.localisation import Localisation, localisation
from fga_fast.metrics.pixel_flipping import pixel_flipping
from fga_fast.metrics.randomisation import Randomisation, randomisation
from fga_fast.metrics.road import Road, road
from fga_fast.metrics.saco import saco
from fga_fast.metrics.sensitivity import sensitivity

__all__ = [
    "InsertionDeletion",
    "Localisation",
    "Randomisation",
    "Road",
    "faithfulness_correlation",
    "insertion_deletion",
    "localisation",
    "pixel_flipping",
    "randomisation",
    "road",
    "saco",
    "sensitivity",
]
