"""The tables of the study, from the finished runs."""

from dataclasses import replace
from statistics import mean
from typing import Any

from diffrl.text_tables import markdown_table
from stall.ground import Run
from stall.runs import MC, PARTS, Kept, name

TITLES = {
    "baseline": "The stall",
    "momentum": "Momentum corrected for stale gradients",
    "sgd": "Gradient descent without Adam's step",
    "rates": "Other learning rates and momenta",
    "switch": "β1 changed after 400 steps",
    "levels": "One network for each level",
    "lag": "A target that lags",
    "step": "The second moment of another run",
    "noise": "Less noise",
    "processes": "Flow and DDPM",
}


SEEDS = (1, 21, 22, 23)
"""Mixtures; the first one was run on the flow alone."""


def measure(run: Run) -> Run:
    """What a run is a multiple of: Monte Carlo as it is usually run, on the same process, mixture and batch."""
    same = ("seed", "batch", "steps", "process", "dim", "width")
    return replace(MC, **{key: getattr(run, key) for key in same})


def ratios(kept: Kept, run: Run) -> list[float]:
    """Error over that of Monte Carlo, of all seeds of a run that are there; not finite where it diverged."""
    found = []
    for seed in SEEDS:
        mine, other = (kept.look(r) for r in (replace(run, seed=seed), measure(replace(run, seed=seed))))
        if mine is not None and other is not None:
            found.append(mine["error"] / other["error"])
    return found


def rows(kept: Kept, part: str) -> list[list[str]]:
    """Of one part: run, errors by seed, mean ratio."""
    table = [["run", "error, a seed each", "× Monte Carlo"]]
    done = set()
    for run in PARTS[part]:
        if name(run) in done:
            continue
        done.add(name(run))
        of_seed = [kept.look(replace(run, seed=seed)) for seed in SEEDS]
        errors = [_short(row["error"]) for row in of_seed if row is not None]
        found = ratios(kept, run)
        if errors:
            table.append([name(run), ", ".join(errors), _short(mean(found)) if found else ""])
    return table


def _short(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 1e4 else "diverged" if x == x else "diverged"


def report(kept: Kept) -> str:
    """The page of results/stall."""
    parts: list[Any] = [
        "# Why TD(0) stalls: all runs\n",
        "Made by `python examples/why_td_stalls.py`; what they mean is in "
        "[the page](../../docs/why_td_stalls.md). A run is named by what differs from own predictions, Adam "
        "at 2e-3 with β1 = .9, batch 32, 2,000 steps, width 128, 32 dimensions. Errors are at the end, mean of the "
        "levels nearest to σ = .1, .3, 1. Seeds are mixtures 1 (on the flow alone), 21, 22 and 23, in this order, as "
        "far as they ran; what was foretold and not run is at the end of that page.\n",
    ]
    for part, title in TITLES.items():
        table = rows(kept, part)
        if len(table) > 1:
            parts += [f"## {title}\n", markdown_table(table) + "\n"]
    return "\n".join(parts)
