"""The phase diagram of bootstrapping, from the runs of `compare plan=phase`.

    python examples/phase_diagram.py runs/compare_phase

Where TD(0) is ahead of Monte Carlo and where behind, one factor at a time, with the range over seeds; and the ratio
of the two over x = 10³ η (1+β)/(2(1-β)), the coordinate in which a first study saw rates η and momenta β line up.
Writes phase.png, rate.png and the numbers of each as CSV into OUT/figures; of a comparison that is not finished what
is there already.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffrl.errors import DiffrlError
from diffrl.experiments.reports.style import (
    GREY,
    PALETTE,
    drawing,
    plain_ticks,
    save_figure,
    write_note,
    write_title,
)
from diffrl.experiments.study_findings import SCORE, Panel, StudyFindings
from diffrl.training.runs import RunFolder, RunFolderError

Ratios = Mapping[int, float]
"""Value error over another's, by seed."""


class Factor(NamedTuple):
    """A panel of the diagram: cases in order, and what each is called on the axis."""

    title: str
    cases: Mapping[str, str]


FACTORS = (
    Factor("dimension", {"d8": "8", "d16": "16", "d32": "32", "d64": "64"}),
    Factor(
        "32-D and 64-D: scale\nof the data / σ_data",
        {
            "d32_norm": ".35/.5",
            "d32": ".5/.5",
            "d32_spread1": "1/.5",
            "d32_norm_right": ".35/.35",
            "d32_spread1_right": "1/1",
            "d64": "64-D\n.5/.5",
            "d64_norm": "64-D\n.25/.5",
            "d64_norm_right": "64-D\n.25/.25",
        },
    ),
    Factor("width", {"d32_w64": "64", "d32": "128", "d32_w512": "512"}),
    Factor("chains in a step", {"d32_b8": "8", "d32": "32", "d32_b128": "128"}),
    Factor(
        "gradient steps", {"d32_n500": "500", "d32": "2,000", "d32_n8000": "8,000", "d32_n20000": "20,000"}
    ),
    Factor("process", {"d16": "EDM", "ddpm": "DDPM 100", "flow": "flow"}),
)
KINDS = (("td", "TD(0)", "-", None), ("monte_carlo", "Monte Carlo", "--", "white"))
"""Of a rate: what its rows call a scheme, its name, its line, and what fills its marks."""
SHOWN = ("TD(0)", "TD(0), β1=0.5", "target 0.99", "λ=0.5", "λ=0.9")


def ratios_of(panels: Sequence[Panel], case: str, scheme: str) -> Ratios:
    """Value error over Monte Carlo's at each seed, from whichever study holds it; empty if none does."""
    for panel in panels:
        if panel.case == case and panel.study.name != "rate" and scheme in panel.compared:
            return by_seed(panel, scheme)
    return {}


def by_seed(panel: Panel, scheme: str) -> Ratios:
    """Value error over the baseline's, at each seed at which both are finished."""
    return dict(zip(panel.seeds(scheme), panel.ratios(scheme, SCORE).tolist(), strict=True))


def spread(ratios: Ratios) -> dict[str, float]:
    """How many seeds there are, their middle, and the ends of what they span."""
    values = [*ratios.values()]
    return {
        **{"seeds": len(values), "median": float(np.median(values))},
        **{"least": float(np.min(values)), "largest": float(np.max(values))},
    }


def draw_factors(panels: Sequence[Panel], folder: Path) -> list[Path]:
    """One panel a factor, a line a scheme, a bar from the least seed to the largest; nothing if there is nothing."""
    rows: list[dict[str, Any]] = []
    with drawing(figsize=(11, 7)) as figure:
        for axes, factor in zip(figure.subplots(2, 3).flat, FACTORS, strict=True):
            for i, scheme in enumerate(SHOWN):
                found = {case: ratios_of(panels, case, scheme) for case in factor.cases}
                mine = [
                    {
                        **{"factor": factor.title.replace("\n", " "), "case": case, "scheme": scheme},
                        **spread(ratios),
                    }
                    for case, ratios in found.items()
                    if ratios
                ]
                rows += mine
                draw_scheme(axes, factor, mine, i)
            axes.axhline(1, color=GREY, linewidth=0.8)
            axes.set(yscale="log", title=factor.title, xlim=(-0.5, len(factor.cases) - 0.5))
            small = 8 if len(factor.cases) < 6 else 6.5
            axes.set_xticks(range(len(factor.cases)), list(factor.cases.values()), fontsize=small)
            plain_ticks(axes.yaxis)
        if not rows:
            return []
        figure.axes[0].set_ylabel("value error / Monte Carlo's")
        figure.axes[3].set_ylabel("value error / Monte Carlo's")
        named = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        shown = [scheme for scheme in SHOWN if scheme in named]
        handles = [named[scheme] for scheme in shown]
        figure.legend(handles, shown, loc="outside right center", fontsize=8)
        write_title(figure, "When TD(0) is ahead of Monte Carlo: one factor at a time")
        note = (
            f"{mixtures(panels)}, learning rate 2e-3 for all; the middle seed, from least to largest; mean over σ = "
            f"{', '.join(panels[0].score_sigmas)}; less is better. Matched: gradient steps."
        )
        write_note(figure, note)
        return [save_figure(figure, folder / "phase.png", rows=rows)]


def draw_scheme(axes: Any, factor: Factor, rows: Sequence[Mapping[str, Any]], place: int) -> None:
    """A scheme on the cases of a factor, beside the other schemes."""
    if not rows:
        return
    color, marker = PALETTE[place]
    cases = [*factor.cases]
    below, above = ([abs(row[key] - row["median"]) for row in rows] for key in ("least", "largest"))
    axes.errorbar(
        [cases.index(row["case"]) + 0.08 * (place - 2) for row in rows],
        [row["median"] for row in rows],
        [below, above],
        color=color,
        marker=marker,
        markersize=5,
        linewidth=0 if factor.title.startswith(("32-D", "process")) else 1,
        elinewidth=1,
        label=rows[0]["scheme"],
    )


def mixtures(panels: Sequence[Panel]) -> str:
    """The seeds of the studies, which are those of their mixtures."""
    seeds = sorted({seed for panel in panels for seed in panel.study.seeds})
    return f"mixtures {seeds[0]} to {seeds[-1]}"


def coordinate(rate: float, beta: float) -> float:
    """The first study's x = 10³ η (1+β)/(2(1-β))."""
    return 1e3 * rate * (1 + beta) / (2 * (1 - beta))


def rate_rows(panel: Panel) -> list[dict[str, float]]:
    """TD(0) and Monte Carlo at each rate and momentum, at the seeds at which both are finished, by x."""
    rows = []
    for scheme in (scheme for scheme in panel.compared if scheme.startswith("TD(0)")):
        twin = scheme.replace("TD(0)", "Monte Carlo")
        if twin not in panel.compared:
            continue
        td, mc = by_seed(panel, scheme), by_seed(panel, twin)
        ratios = {seed: td[seed] / mc[seed] for seed in td if seed in mc}
        if not ratios:
            continue
        optim = RunFolder(next(iter(panel.cells[scheme].values())).path).config()["optim"]
        rate, beta = float(optim["lr"]), float(optim["betas"][0])
        middle = {
            name: float(np.median([found[seed] for seed in ratios]))
            for name, found in (("td", td), ("monte_carlo", mc))
        }
        place = {"lr": rate, "beta1": beta, "x": coordinate(rate, beta)}
        of_both = spread(ratios)
        rows.append({**place, **middle, "ratio": of_both.pop("median"), **of_both})
    return sorted(rows, key=lambda row: row["x"])


def draw_rates(panel: Panel, folder: Path) -> list[Path]:
    """TD(0) over Monte Carlo at the same rate and momentum, over x; and both over the baseline, by rate."""
    rows = rate_rows(panel)
    if not rows:
        return []
    with drawing(figsize=(9, 3.6)) as figure:
        left, right = figure.subplots(1, 2)
        for i, beta in enumerate(sorted({row["beta1"] for row in rows})):
            mine = [row for row in rows if row["beta1"] == beta]
            color, marker = PALETTE[i]
            x, y = ([row[key] for row in mine] for key in ("x", "ratio"))
            below, above = ([abs(row[key] - row["ratio"]) for row in mine] for key in ("least", "largest"))
            left.errorbar(
                x, y, [below, above], color=color, marker=marker, linewidth=1, label=f"β1 = {beta:g}"
            )
            rates = [row["lr"] for row in mine]
            for key, name, style, fill in KINDS:
                errors, label = [row[key] for row in mine], f"{name}, β1 = {beta:g}"
                right.plot(rates, errors, style, color=color, marker=marker, mfc=fill, label=label)
        left.axhline(1, color=GREY, linewidth=0.8)
        left.set(xlabel="x = 10³ η (1+β)/(2(1-β))", title="TD(0) over Monte Carlo")
        right.set(xlabel="learning rate η", title=f"Both, over {panel.study.baseline}")
        left.legend()
        right.legend(fontsize=7)
        for axes in (left, right):
            axes.set(xscale="log", yscale="log")
            plain_ticks(axes.xaxis, most=6)
            plain_ticks(axes.yaxis)
        note = f"32-D, {mixtures([panel])}, 2,000 steps; the middle seed, on the left from least to largest."
        write_note(figure, note)
        return [save_figure(figure, folder / "rate.png", rows=rows)]


def main(out: Path) -> list[Path]:
    """Draw what there is of both pictures; returns their paths.

    Raises:
        RunFolderError: there is no comparison in the folder, or nothing to draw of it yet.
    """
    panels = [panel for panel in StudyFindings(out).panels() if panel.compared]
    drawn = draw_factors(panels, out / "figures")
    for panel in panels:
        drawn += draw_rates(panel, out / "figures") if panel.study.name == "rate" else []
    if not drawn:
        raise RunFolderError(
            f"{out} has nothing to draw yet: no scheme and its Monte Carlo are finished at one seed of plan=phase"
        )
    return drawn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the comparison")
    try:
        for path in main(parser.parse_args().out):
            print(path)
    except DiffrlError as error:
        sys.exit(f"error: {error}")
