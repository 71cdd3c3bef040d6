"""Which target a configuration chooses: by λ, by n or by the look-ahead, and what it is called."""

from collections.abc import Mapping
from typing import Any, cast

from diffrl.errors import InputError
from diffrl.objectives.annealing import written
from diffrl.objectives.lambda_schedule import LambdaSchedule
from diffrl.objectives.lookahead import Lookahead
from diffrl.objectives.place import Place

__all__ = [
    "DEFAULT_LOOKAHEAD",
    "bootstrap_of",
    "chosen_bootstrap",
    "chosen_lmbda",
    "lmbda_of_chain",
    "target_label",
]

DEFAULT_LOOKAHEAD = 0.125  # with a target network it hurt on no ground of results/grounds at equal steps

Lmbda = float | LambdaSchedule | Lookahead


def chosen_lmbda(
    lmbda: float | LambdaSchedule | None, n_steps: float | None, lookahead: float | None
) -> Lmbda | None:
    """What makes λ, by default a look-ahead; None with `n_steps`.

    Raises:
        InputError: more than one of them is given.
    """
    options = {"lmbda": lmbda, "n_steps": n_steps, "lookahead": lookahead}
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) > 1:
        raise InputError(
            f"{' and '.join(f'{name} is {value}' for name, value in given.items())}: give one of {', '.join(options)}, "
            "since each of them chooses the target; in a configuration set the others to null"
        )
    if not given:
        return Lookahead(DEFAULT_LOOKAHEAD)
    return lmbda if lookahead is None else Lookahead(lookahead)


def chosen_bootstrap(options: Mapping[str, Any]) -> str:
    """What the target's values come from where an option says so; of `td` those who choose λ or n choose their own."""
    if options.get("bootstrap") is not None:
        return str(options["bootstrap"])
    anneal = options.get("anneal")
    annealed = anneal if isinstance(anneal, Mapping) else {}  # another one is refused later, by its name
    chosen = {name for name in ("lmbda", "n_steps") if options.get(name) is not None}
    return "own" if chosen or {"lmbda", "n_steps"} & annealed.keys() else "target"


def bootstrap_of(place: Place | None, options: Mapping[str, Any]) -> str:
    """Whose predictions are in an objective's target, as `Bootstrap` calls them: its options say so, or its place.

    Args:
        place: where the objective stands; None tells nothing.
        options: all of its options.
    """
    annealed = options.get("anneal") or {}
    if options.get("lmbda") == 1 or (
        options.get("bootstrap_share") == 0 and "bootstrap_share" not in annealed
    ):
        return "nothing"
    if "bootstrap" in options:
        return chosen_bootstrap(options)
    return "nothing" if place is None else place.bootstrap


def lmbda_of_chain(options: Mapping[str, Any], num_steps: int) -> float:
    """λ of chains of so many steps, for the options of an objective that chooses no `n_steps`."""
    lmbda = chosen_lmbda(options["lmbda"], None, options["lookahead"])
    return lmbda.lmbda(num_steps) if isinstance(lmbda, Lookahead) else float(cast(float, lmbda))


def target_label(options: Mapping[str, Any]) -> str:
    """What the target of those options is called in reports."""
    options = {**options, **(options.get("anneal") or {})}
    n, lmbda, h = options["n_steps"], options["lmbda"], options["lookahead"]
    share = options.get("bootstrap_share", 1.0)
    of_share = "" if share == 1 else f", bootstrap share {written(share)}"
    if n == 1 or (n is None and lmbda == 0):
        return f"TD(0){of_share}"
    if n is not None:
        return f"{written(n)}-step TD{of_share}"
    if lmbda is not None:
        return f"TD(λ={written(lmbda)}){of_share}"
    return f"TD(lookahead={DEFAULT_LOOKAHEAD if h is None else h:g}){of_share}"
