"""Several processes started as one run: what torchrun says of them, and a refusal where there may be one only."""

import os

from diffrl.errors import InputError

__all__ = ["FIRST_TIMEOUT", "RANK_TIMEOUT", "own_rank", "ranks_started", "refuse_several_processes"]

RANK_TIMEOUT = 1800.0
"""Seconds that one waits for another, unless something else is said."""

FIRST_TIMEOUT = 21600.0
"""Seconds that the others wait for what the first one does alone, such as an evaluation: six hours."""


def ranks_started() -> int:
    """How many processes were started together, as torchrun tells each of them by WORLD_SIZE; without it 1.

    Raises:
        ValueError: WORLD_SIZE is no whole number ≥ 1.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdigit() or int(size) < 1:
        raise InputError(f"WORLD_SIZE is {size!r}: torchrun makes it a whole number >= 1; unset it otherwise")
    return int(size)


def own_rank() -> int:
    """Which of them this process is, counted from 0; the first one writes and speaks for all."""
    rank = os.environ.get("RANK") or "0"
    return int(rank) if ranks_started() > 1 and rank.isdigit() else 0


def refuse_several_processes(what: str) -> None:
    """Refuse what each of several processes would do as a whole, as often as there are processes.

    Args:
        what: it is, for the error.

    Raises:
        ValueError: there is more than one process.
    """
    if (size := ranks_started()) > 1:
        raise InputError(
            f"{what} takes one process, and WORLD_SIZE={size} asks for {size}: start it without torchrun; processes "
            "share one run of the commands train and finetune, and several runs go side by side by workers=N (seeds, "
            "comparisons) or by --multirun hydra/launcher=joblib"
        )
