"""From a configuration's groups to a recipe, and from a recipe to what its configuration has to say."""

from dataclasses import fields
from typing import Any

from diffrl.finetuning.credit.registry import CREDITS
from diffrl.finetuning.placement.registry import PLACEMENTS
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.rollouts.registry import ROLLOUTS
from diffrl.finetuning.surrogate import SURROGATES
from diffrl.finetuning.updates.registry import UPDATES
from diffrl.registry import Config, Registry

__all__ = ["PIECES", "build_recipe", "recipe_config"]

PIECES: dict[str, Registry] = {
    "rollouts": ROLLOUTS,
    "placement": PLACEMENTS,
    "credit": CREDITS,
    "updates": UPDATES,
    "surrogate": SURROGATES,
}
"""Pieces of a recipe that are chosen by name; the group of each has the piece's name."""


def build_recipe(config: Config) -> Recipe:
    """The recipe that a configuration's groups make.

    Raises:
        ValueError: pieces that do not go together, or an option outside its range.
    """
    pieces = {name: registry.build(config[name]) for name, registry in PIECES.items()}
    return Recipe(**pieces, regulariser=Regulariser(**config["regulariser"]))


def recipe_config(recipe: Recipe) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """What a configuration has to choose and to set, so that `build_recipe` gives this recipe.

    Returns:
        The option of each group, and of each piece the options that differ from the constructor's defaults.
    """
    chosen = {name: registry.name_of(getattr(recipe, name)) for name, registry in PIECES.items()}
    given = {name: _deviations(piece) for name, piece in vars(recipe).items()}
    return chosen, {name: options for name, options in given.items() if options}


def _deviations(piece: Any) -> dict[str, Any]:
    usual = type(piece)()
    names = [field.name for field in fields(piece) if field.init]
    return {k: v for k in names if (v := getattr(piece, k)) != getattr(usual, k)}
