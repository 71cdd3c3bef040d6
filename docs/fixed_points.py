"""The page of fixed points: what each objective learns of data from N(0, 1), computed when the site is built.

python docs/fixed_points.py                         # print the page
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # run as a script, this file knows its own folder only

from docs.map_places import placed, unplaced  # noqa: E402
from docs.normal_bent import physics_residual, scheduled_sampling, shortdf  # noqa: E402
from docs.normal_levels import default, denoiser, edm_through, flow_map, flow_through  # noqa: E402
from docs.normal_maps import inductive_moments, progressive, shortcut  # noqa: E402
from docs.normal_solutions import (  # noqa: E402
    cdm,
    consistency,
    distillation,
    ect,
    td,
    td_edm,
    td_schedule,
)

__all__ = ["GROUPS", "KS", "RATIOS", "SOLUTIONS", "Row", "Verdict", "fixed_points_page", "verdict"]

Group = Literal["denoiser", "map", "neither"]
GROUPS: dict[Group, str] = {"denoiser": "Denoisers", "map": "Flow maps", "neither": "Neither"}

RATIOS = (0.3, 1.0, 3.0)
KS = (18, 72)
FINE = 288  # levels, to see what a scheme tends to
EXACT = 1e-6  # relative error that is rounding, and what `ect` leaves out
CLOSE = 0.02
START = 1152  # steps of the first teacher, which 18 and 72 divide by powers of 2


@dataclass(frozen=True)
class Row:
    """What an objective learns with some options.

    Args:
        of: a of each level by process and K where there is a grid, see `through`; else a by s and K.
        words: options that are not the default ones and matter here, as on a command line.
        through: a grid of K levels on which s is one, and its index; None where there is no grid.
        goal: by s and K, a of the exact map that is meant, where that is neither D* nor X.
        bent: whether the solution is not linear, so that a is that of the best linear function.
        note: what the numbers do not say, without a full stop.
    """

    of: Callable[..., Any]
    words: str = ""
    through: Callable[[float, int], tuple[Any, int]] | None = None
    goal: Callable[[float, int], float] | None = None
    bent: bool = False
    note: str = ""

    def at(self, s: float, K: int) -> float:
        """The coefficient a at the ratio s, with K levels."""
        return _coefficient(self, s, K)


@cache
def _coefficient(row: Row, s: float, K: int) -> float:
    if row.through is None:
        return float(row.of(s, K))
    process, i = row.through(s, K)
    return float(row.of(process, K)[i])


def _to_next(s: float, K: int) -> float:
    """Of the map X_{t→s} to the next of K levels of `flow`."""
    process, i = flow_through(s, K)
    t = process.time_grid(K)[i + 1]
    return flow_map(s, r=float(process.sigma(t) / process.alpha(t)))


SHARED = "chain.coupling=shared"
_grid = partial(Row, through=edm_through)
_D, _X = (Row(denoiser),), (Row(flow_map),)

SOLUTIONS: dict[str, tuple[Row, ...]] = {
    **dict.fromkeys(("denoising", "edm", "hybrid", "monte_carlo", "priorgrad"), _D),
    "td": (
        _grid(partial(td, eta=1.0)),
        _grid(partial(td, eta=0.0), SHARED),
        _grid(partial(td, eta=1.0, lmbda=0.0), "objective.lmbda=0"),
        _grid(partial(td, eta=0.5, lmbda=0.0), "objective.lmbda=0 chain.coupling=0.5"),
        _grid(partial(td, eta=0.0, lmbda=0.0), f"objective.lmbda=0 {SHARED}"),
        _grid(
            partial(td, eta=0.0, lmbda=0.0, value="clean"),
            f"objective.lmbda=0 chain.value=clean {SHARED}",
            note="consistency training",
        ),
    ),
    "td_adaptive": (
        _grid(partial(td, eta=1.0, lmbda=min(default("td_adaptive", "candidates")))),
        _grid(
            partial(td, eta=0.0, lmbda=min(default("td_adaptive", "candidates"))),
            SHARED,
            note="where trials chose the least λ",
        ),
    ),
    "td_lambda_schedule": (
        _grid(partial(td_schedule, eta=1.0)),
        _grid(partial(td_schedule, eta=0.0), SHARED),
    ),
    "td_edm": (
        Row(partial(td_edm, coupling="markov")),
        Row(partial(td_edm, coupling="shared"), "objective.coupling=shared"),
    ),
    "double_sampling": (
        _grid(partial(td, eta=1.0, lmbda=0.0)),
        _grid(
            partial(td, eta=0.0, lmbda=0.0), SHARED, note="every expected residual is 0 there, as for TD(0)"
        ),
    ),
    "cdm": (Row(cdm, note=r"a is the mean of its target at D\*, which Euler's steps miss"),),
    "ct": (_grid(partial(consistency, b=0.0, c=1.0)),),
    "td_ct": (
        _grid(partial(consistency, b=1.0, c=default("td_ct", "consistency_coef")), "objective.metric=l2"),
    ),
    "cd": (_grid(distillation, "objective.teacher=exact", note="Heun's steps pass it"),),
    "ect": (Row(ect, note="at the last stage"),),
    "stable_ct": (Row(ect, note="at the last stage; the mean of its step is that of `ect`"),),
    "progressive": (
        Row(
            partial(progressive, start=START),
            f"process=flow objective.start={START} objective.end=K",
            flow_through,
            goal=_to_next,
            note="which is D* for short steps",
        ),
    ),
    "shortcut": (Row(shortcut, note="a jump from σ_max = σ; its finest halves are Euler's steps"),),
    "td_map": (
        _grid(partial(td, eta=1.0, lmbda=default("td_map", "lmbda"), value="clean"), note="E[x0 given x_t]"),
        _grid(partial(td, eta=0.0, lmbda=default("td_map", "lmbda"), value="clean"), SHARED),
    ),
    "alpha_flow": (Row(flow_map, note="at the end, where α is 0"),),
    "inductive_moments": (
        Row(inductive_moments, bent=True, note="pairs of one datum pull, as groups are small"),
    ),
    **dict.fromkeys(
        (
            "continuous_ct",
            "eulerian_map",
            "improved_mean_flow",
            "lagrangian_map",
            "mean_flow",
            "progressive_map",
        ),
        _X,
    ),
    "scheduled_sampling": (
        _grid(scheduled_sampling, bent=True, note="E[x0 given x_t] of the states that the model makes"),
    ),
    "physics_residual": (
        _grid(physics_residual, bent=True, note="the data do not fulfil its equation, that of a circle"),
    ),
    "shortdf": (_grid(shortdf, "objective.margin=0", bent=True, note="drawn towards a second look"),),
}
"""By name of an objective; those of others do not stand here, and are listed apart."""

INTRO = """# Fixed points

Of data from N(0, 1) a denoiser is one number a at each noise level, D(x_t, t) = a x_t/α_t, and what a scheme learns can
be computed level by level. With σ for σ_t/α_t there are two numbers to compare with,

    D*: a = 1/(1+σ²),     the posterior mean E[x0 | x_t]
    X:  a = 1/√(1+σ²),    where the probability-flow ODE leads, X_{t→0}"""

READING = """The tables have a at σ = 0.3, 1 and 3: one number where the length of the grid does not matter, else with
18 and with 72 noise levels. The grid is that of `edm`, its σ_max moved a little so that σ is a level; on `flow` D* and
X are the same. Numbers are computed when this page is made, with the defaults of all options but those named, at the
end of a training and in the limit of a perfect fit. Of maps it is the jump to clean data, r = 0; at r = t each of them
has D*, but `inductive_moments`, which is not trained there.

* "Off by" is the greatest relative distance at these σ.
* "Of the way" is ln(a/D*)/ln(X/D*) with 72 levels: 0 at the denoiser, 1 at the map.
* X_{t→s} is the map to the next level, where that is meant.
* "Tends to" was looked at with 288 levels, too.
* "Best linear": the solution is not linear, and a is that of the linear function at which the mean product of gradient
  and x_t is 0.

Metrics and weights that depend on the error itself (`pseudo_huber`, the power p of `mean_flow`, the normalisation of
`continuous_ct`) move nothing here: for errors that are linear in data and noise E[ρ'(δ) x] = E[ρ''(δ)] E[δ x]. Only
where terms of different metrics are added do they matter, which is why `td_ct` is shown with l2."""

ALONE = "What these learn is not worked out here"


# What a row amounts to


def off(row: Row, exact: Callable[[float, int], float], K: int) -> float:
    """Greatest relative distance of a row from a number that is known."""
    return max(abs(row.at(s, K) / exact(s, K) - 1) for s in RATIOS)


class Verdict(NamedTuple):
    """Where a row belongs, and in words how near it is."""

    group: Group
    words: str


def verdict(row: Row) -> Verdict:
    """Which of D* and X a row is, tends to or is near; or where it lies."""
    known: dict[Group, tuple[str, Callable[..., float]]] = {
        "denoiser": (r"**D\***", denoiser),
        "map": ("**X**", flow_map),
    }
    if row.goal:
        known = {"map": ("**X_{t→s}**", row.goal)}
    for group, (name, exact) in known.items():
        if all(off(row, exact, K) < EXACT for K in KS):
            return Verdict(group, name)
    for group, (name, exact) in known.items():
        coarse, fine = (off(row, exact, K) for K in KS)
        if fine < coarse / 2 and fine < 0.1 and off(row, exact, FINE) < fine / 2:
            return Verdict(
                group, f"tends to {name} as levels are added: off by {coarse:.1%}, then {fine:.1%}"
            )
    distance, group = min((off(row, exact, KS[-1]), group) for group, (_, exact) in known.items())
    if distance < CLOSE:
        return Verdict(group, f"{known[group][0]}, off by {distance:.2%}")
    shares = sorted(
        math.log(row.at(s, KS[-1]) / denoiser(s)) / math.log(flow_map(s) / denoiser(s)) for s in RATIOS
    )
    return Verdict("neither", f"{shares[0]:.2f} to {shares[-1]:.2f} of the way".replace("-", "−"))


# The page


def fixed_points_page() -> str:
    """The page, in Markdown, for the folder `map` beside that of the methods."""
    names = [*placed(), *unplaced()]
    found = {name: [(row, verdict(row)) for row in SOLUTIONS.get(name, ())] for name in names}
    glance = [f"* **{title}**: {_of(found, group)}" for group, title in GROUPS.items()]
    parts = [INTRO, "Each objective by the first of its rows below:", "\n".join(glance), READING]
    for group, title in GROUPS.items():
        parts += [f"## {title}", "\n".join(_table(found, group))]
    if alone := [_link(name) for name in names if not found[name]]:
        parts.append(f"{ALONE}: {', '.join(alone)}.")
    return "\n\n".join(parts) + "\n"


_Found = dict[str, list[tuple[Row, Verdict]]]


def _of(found: _Found, group: Group) -> str:
    """Names of the objectives whose first row lies in a group."""
    return ", ".join(f"`{name}`" for name, rows in found.items() if rows and rows[0][1].group == group)


def _table(found: _Found, group: Group) -> Iterator[str]:
    exact = {"D*": denoiser, "X": flow_map}
    known = {"denoiser": ["D*"], "map": ["X"], "neither": ["D*", "X"]}[group]
    lines = [["", name, *_numbers(Row(exact[name])), ""] for name in known]
    for name, rows in found.items():
        here = [(row, said.words) for row, said in rows if said.group == group]
        lines += [_line(row, words, _link(name) if k == 0 else "") for k, (row, words) in enumerate(here)]
    head = ["objective", "options", *(f"σ = {s:g}" for s in RATIOS), "what it is"]
    return (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def _line(row: Row, words: str, link: str) -> list[str]:
    said = [words, *(["best linear"] if row.bent else []), *([row.note] if row.note else [])]
    return [link, f"`{row.words}`" if row.words else "", *_numbers(row), "; ".join(said)]


def _link(name: str) -> str:
    return f"[`{name}`](../methods/objective/{name}.md)"


def _numbers(row: Row) -> list[str]:
    found = []
    for s in RATIOS:
        coarse, fine = (f"{row.at(s, K):.4f}" for K in KS)
        found.append(coarse if coarse == fine else f"{coarse}, {fine}")
    return found


if __name__ == "__main__":
    print(fixed_points_page(), end="")
