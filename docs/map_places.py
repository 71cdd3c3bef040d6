"""Which objectives stand on the map, where, and how their coordinates are written."""

from typing import Any

from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES

__all__ = ["WORDS", "description", "placed", "unplaced"]

WORDS: dict[str, dict[str, str]] = {
    "learns": {
        "denoiser": "denoiser D",
        "to_next": "X_{t→s}, to the next level",
        "to_clean": "X_{t→0}, to clean data",
        "map": "X_{t→r}, to any level",
    },
    "states": {"chains": "chains", "pairs": "pairs", "states": "single"},
    "coupling": {"markov": "Markov", "shared": "shared noise", "any": "any", "none": "—"},
    "look": {
        "end": "to the end",
        "n_steps": "λ or n steps",
        "one_step": "one step",
        "instant": "infinitesimal",
    },
    "bootstrap": {
        "nothing": "nothing",
        "own": "own prediction",
        "residual": "own, with gradient",
        "target": "target network",
        "teacher": "teacher",
    },
    "next_state": {
        "none": "—",
        "forward": "forward process",
        "posterior": "exact posterior",
        "reference": "reference batch",
        "own": "the model's own step",
        "teacher": "a teacher's ODE step",
    },
}
"""How a coordinate is written: by field of `Place` and value, in the order of the table."""


def placed() -> dict[str, Place]:
    """Coordinates of the objectives that have them, by name, in the order of the table."""
    found = {entry.name: entry.place for entry in OBJECTIVES.entries() if isinstance(entry.place, Place)}
    keys = ("learns", "look", "bootstrap", "next_state")

    def rank(name: str) -> tuple[Any, ...]:
        return (*(list(WORDS[key]).index(getattr(found[name], key)) for key in keys), name)

    return {name: found[name] for name in sorted(found, key=rank)}


def unplaced() -> list[str]:
    """Names of the objectives without coordinates."""
    return [entry.name for entry in OBJECTIVES.entries() if not isinstance(entry.place, Place)]


def description() -> str:
    """Names and coordinates, a line each: what a picture of the map holds, to tell whether it is the present one."""
    return "\n".join(f"{name}: {place}" for name, place in placed().items())
