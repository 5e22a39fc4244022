"""The set-ups of the FGA thesis: which files, which model, and what `evaluate` takes; see docs/recipes.md.

Source: Šula, TU Wien 2026, doi 10.34726/hss.2026.132361.
"""

from __future__ import annotations

from collections.abc import Mapping

from fga_fast.evaluation.recipes import covid_qu_ex, hyperkvasir, imagenet_clip
from fga_fast.evaluation.recipes.recipe import Recipe

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe for recipe in (imagenet_clip.RECIPE, hyperkvasir.RECIPE, covid_qu_ex.RECIPE)
}
