"""Where an objective stands among the others: the coordinates of the map."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from diffrl.errors import InputError

__all__ = ["Bootstrap", "Coupling", "Look", "NextState", "Place", "Solution", "States"]

Solution = Literal["denoiser", "to_clean", "to_next", "map"]
"""D(x, t) = E[x0 | x_t];  X_{t→0}, a consistency function;  X_{t→s} for the next level s of a grid;  X_{t→r}."""

States = Literal["chains", "pairs", "states"]
"""What a network is asked about for one datum: all states of a chain; a state and one or two others; one state."""

Coupling = Literal["markov", "shared", "any", "none"]
"""Fresh noise at each step; one noise, or a step without any; what `chain.coupling` says; there is one state only."""

Look = Literal["end", "n_steps", "one_step", "instant"]
"""How far the target looks before a network is asked: to the clean datum, λ or n steps, one step, n → 0."""

Bootstrap = Literal["nothing", "own", "residual", "target", "teacher"]
"""Whose prediction is in the target: of no network, the network's own, without gradient or with it, that of a copy
that lags behind, or that of a teacher, which stands still."""

NextState = Literal["forward", "posterior", "own", "teacher", "reference", "none"]
"""What leads to a further state: the forward process; the exact law of x0 given x_t; a step of the model; a step of a
teacher's ODE; the mean velocity of a reference batch; nothing, as there is none."""


@dataclass(frozen=True)
class Place:
    """The coordinates of an objective, with the options that it has by default.

    Args:
        learns: what its network is at the fixed point, or is meant to be: a `Solution`.
        states: see `States`.
        coupling: of successive states, see `Coupling`.
        look: how far the target looks, see `Look`.
        bootstrap: see `Bootstrap`.
        next_state: where the further state comes from, see `NextState`.
        begins: another `Look`, of the beginning of the training, where it changes along it.
        note: what the coordinates do not say, one sentence without a full stop.

    Raises:
        ValueError: a coordinate that there is not, or two that contradict each other.
    """

    learns: Solution
    states: States
    coupling: Coupling
    look: Look
    bootstrap: Bootstrap
    next_state: NextState
    begins: Look | None = None
    note: str = ""

    def __post_init__(self) -> None:
        hints: dict[str, Any] = get_type_hints(type(self))
        for field in fields(self):
            value, known = getattr(self, field.name), hints[field.name]
            known = Look if field.name == "begins" else known
            if known is str or (field.name == "begins" and value is None):
                continue
            if value not in get_args(known):
                raise InputError(f"{field.name} is {value!r}: give one of {', '.join(get_args(known))}")
        if (self.look == "end") != (self.bootstrap == "nothing"):
            raise InputError(
                f"look is {self.look!r} and bootstrap {self.bootstrap!r}: a target that looks to the end bootstraps "
                "from nothing, and no other does"
            )
