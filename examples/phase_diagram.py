"""The phase diagram of bootstrapping, from the runs of `compare plan=phase`.

    python examples/phase_diagram.py runs/compare_phase

Where TD(0) is ahead of Monte Carlo and where behind, one factor at a time, with the range over seeds; and the ratio
of the two over x = 10³ η (1+β)/(2(1-β)), the coordinate in which a first study saw rates η and momenta β line up.
Writes phase.png, rate.png and the numbers of each as CSV beside the report.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffrl.experiments.reports.style import (
    GREY,
    PALETTE,
    drawing,
    legend_beside,
    plain_ticks,
    save_figure,
    write_note,
    write_title,
)
from diffrl.experiments.study_findings import SCORE, Panel, StudyFindings
from diffrl.training.runs import RunFolder


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
SHOWN = ("TD(0)", "TD(0), β1=0.5", "target 0.99", "λ=0.5", "λ=0.9")


def ratios_of(panels: Sequence[Panel], case: str, scheme: str) -> np.ndarray[Any, Any]:
    """Value error over Monte Carlo's at each seed, from whichever study holds it; empty if none does."""
    for panel in panels:
        if panel.case == case and panel.study.name != "rate" and scheme in panel.compared:
            return panel.ratios(scheme, SCORE)
    return np.array([])


def draw_factors(panels: Sequence[Panel], folder: Path) -> Path:
    """One panel a factor, a line a scheme, a bar from the least seed to the largest."""
    rows: list[dict[str, Any]] = []
    with drawing(figsize=(12, 7)) as figure:
        for axes, factor in zip(figure.subplots(2, 3).flat, FACTORS, strict=True):
            for i, scheme in enumerate(SHOWN):
                found = {case: ratios_of(panels, case, scheme) for case in factor.cases}
                places = [k for k, case in enumerate(factor.cases) if len(found[case])]
                values = [found[case] for case in factor.cases if len(found[case])]
                if not values:
                    continue
                middle = np.array([np.median(v) for v in values])
                ends = np.array([[m - v.min(), v.max() - m] for m, v in zip(middle, values, strict=True)]).T
                color, marker = PALETTE[i]
                axes.errorbar(
                    np.array(places) + 0.08 * (i - 2),
                    middle,
                    ends,
                    color=color,
                    marker=marker,
                    markersize=5,
                    linewidth=0 if factor.title.startswith(("32-D", "process")) else 1,
                    elinewidth=1,
                    label=scheme,
                )
                rows += [
                    {
                        "factor": factor.title.replace("\n", " "),
                        "case": case,
                        "scheme": scheme,
                        "seeds": len(v),
                        "median": float(np.median(v)),
                        "least": float(v.min()),
                        "largest": float(v.max()),
                    }
                    for case, v in found.items()
                    if len(v)
                ]
            axes.axhline(1, color=GREY, linewidth=0.8)
            axes.set(yscale="log", title=factor.title)
            axes.set_xticks(range(len(factor.cases)), list(factor.cases.values()), fontsize=8)
            plain_ticks(axes.yaxis)
        figure.axes[0].set_ylabel("value error / Monte Carlo's")
        figure.axes[3].set_ylabel("value error / Monte Carlo's")
        legend_beside(figure, figure.axes[0])
        write_title(figure, "When TD(0) is ahead of Monte Carlo: one factor at a time")
        note = (
            "Mixtures 11 to 13 in 32-D, of processes in 16-D; learning rate 2e-3 for all; the middle seed of three, "
            "from least to largest; mean over σ = 0.1, 0.3, 1; less is better. Matched: gradient steps."
        )
        write_note(figure, note)
        return save_figure(figure, folder / "phase.png", rows=rows)


def coordinate(rate: float, beta: float) -> float:
    """The first study's x = 10³ η (1+β)/(2(1-β))."""
    return 1e3 * rate * (1 + beta) / (2 * (1 - beta))


def draw_rates(panel: Panel, folder: Path) -> Path:
    """TD(0) over Monte Carlo at the same rate and momentum, over x; and both over the best of all Monte Carlo."""
    schemes = [scheme for scheme in panel.schemes if scheme.startswith("TD(0)")]
    rows = []
    for scheme in schemes:
        twin = scheme.replace("TD(0)", "Monte Carlo")
        if twin not in panel.schemes:
            continue
        optim = RunFolder(next(iter(panel.cells[scheme].values())).path).config()["optim"]
        rate, beta = float(optim["lr"]), float(optim["betas"][0])
        td, mc = (panel.ratios(s, SCORE) for s in (scheme, twin))
        found = {"td": np.median(td), "monte_carlo": np.median(mc), "ratio": np.median(td / mc)}
        ends = {"least": (td / mc).min(), "largest": (td / mc).max()}
        rows.append({"lr": rate, "beta1": beta, "x": coordinate(rate, beta), **found, **ends})
    rows.sort(key=lambda row: row["x"])
    with drawing(figsize=(12, 3.8)) as figure:
        over_x, over_rate, both = figure.subplots(1, 3)
        for i, beta in enumerate(sorted({row["beta1"] for row in rows})):
            mine = [row for row in rows if row["beta1"] == beta]
            color, marker = PALETTE[i]
            style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
            y = [row["ratio"] for row in mine]
            bars = [[abs(row[key] - row["ratio"]) for row in mine] for key in ("least", "largest")]
            for axes, key in ((over_x, "x"), (over_rate, "lr")):
                axes.errorbar([row[key] for row in mine], y, bars, linewidth=1, **style)
            rates = [row["lr"] for row in mine]
            for key, name, line in (("td", "TD(0)", "-"), ("monte_carlo", "Monte Carlo", ":")):
                both.plot(rates, [row[key] for row in mine], line, label=f"{name}, β1 = {beta:g}", **style)
        for axes in (over_x, over_rate):
            axes.axhline(1, color=GREY, linewidth=0.8)
            axes.set_title("TD(0) over Monte Carlo")
        both.set_title("each over Monte Carlo at 2e-3, 0.9")
        over_x.set_xlabel("x = 10³ η (1+β1)/(2(1-β1))")
        for axes in (over_rate, both):
            axes.set_xlabel("learning rate η")
        for axes in (over_x, over_rate, both):
            axes.set(xscale="log", yscale="log")
            plain_ticks(axes.yaxis)
            plain_ticks(axes.xaxis, most=5)
        over_x.set_ylabel("ratio of value errors")
        legend_beside(figure, both)
        write_note(
            figure,
            "32-D mixtures 11 to 13, 2,000 steps; the middle seed, left and middle from least to largest and at the "
            "same rate and β1. Less is better. Matched: gradient steps.",
        )
        return save_figure(figure, folder / "rate.png", rows=rows)


def main(out: Path) -> list[Path]:
    """Draw both pictures; returns their paths."""
    panels = [panel for panel in StudyFindings(out).panels() if panel.compared]
    drawn = [draw_factors(panels, out / "figures")]
    drawn += [draw_rates(panel, out / "figures") for panel in panels if panel.study.name == "rate"]
    return drawn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the comparison")
    for path in main(parser.parse_args().out):
        print(path)
