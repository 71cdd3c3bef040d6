"""Recipes by name: `recipes.sdpo()` and every other registered method, and what a recipe is made of."""

from typing import Any

from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.updates.samples import SampleUpdates
from diffrl.finetuning.updates.steps import Updates

__all__ = ["METHODS", "Recipe", "Regulariser", "Rollouts", "SampleUpdates", "Updates"]


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in METHODS:
        raise AttributeError(f"there is no recipe {name!r}: there are {', '.join(METHODS)}")
    return METHODS[name]


def __dir__() -> list[str]:
    return sorted([*__all__, *METHODS])
