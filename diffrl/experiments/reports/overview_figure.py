"""One picture of a study on all of its cases: the score of each scheme over the baseline's, as a heat map."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.experiments.reports.style import (
    INK,
    draw_ratios,
    drawing,
    ink_on,
    save_figure,
    write_note,
    write_title,
)
from diffrl.experiments.study_findings import HELD_OUT, SCORE, Panel, Quantity

__all__ = ["draw_overview", "draw_table", "table_row"]

MOST = 2.0  # log2 at the ends of the scale: a quarter and four times


def draw_overview(panels: Sequence[Panel], folder: Path) -> tuple[str, Path] | None:
    """Draw the panels of one study side by side: a row for each case, a column for each scheme.

    A case of real data has a second row, of the error on held-out data: its value error rewards what knows the training
    rows by heart.

    Args:
        panels: of one study, on different cases.
        folder: for the files; made if missing.

    Returns:
        Title and path of the PNG; None if there are fewer than two cases with a score, or nothing but the baseline.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    scored = [panel for panel in panels if panel.compared and SCORE in panel.quantities]
    study = panels[0].study
    schemes = [s for s in study.schemes if s != study.baseline and any(s in p.compared for p in scored)]
    if len(scored) < 2 or not schemes:
        return None
    asked = f"{study.title[:1].upper()}{study.title[1:] or study.name}"
    title = f"{asked}{'' if asked.endswith('?') else ':'} value error over {study.baseline}'s"
    shown = {panel.case: (panel, SCORE) for panel in scored}
    shown |= {f"{p.case}, held out": (p, HELD_OUT) for p in scored if HELD_OUT in p.quantities}
    rows = [{**table_row(p, s, what), "case": case} for case, (p, what) in shown.items() for s in schemes]
    with drawing(figsize=(2.2 + 0.95 * len(schemes), 1.7 + 0.42 * len(shown))) as figure:
        names = [scheme.replace(", ", ",\n") for scheme in schemes]
        draw_table(figure.subplots(), list(shown), names, rows)
        write_title(figure, title)
        sigmas = ", ".join(scored[0].score_sigmas)
        seeds = {
            len(panel.seeds(scheme)) for panel in scored for scheme in schemes if scheme in panel.compared
        }
        note = (
            f"Mean over σ = {sigmas}; less is better; interquartile mean over {min(seeds)}"
            f"{f' to {max(seeds)}' if len(seeds) > 1 else ''} seeds, small: 95 % interval. Matched: "
            f"{study.matched.replace('_', ' ')}. Bold: the interval lies below 1."
            f"{' Held out: denoising error on data that no training saw.' * (len(shown) > len(scored))}"
        )
        write_note(figure, note)
        path = save_figure(figure, folder / f"{study.name}_overview.png", rows=rows)
    return title, path


def table_row(panel: Panel, scheme: str, quantity: Quantity = SCORE) -> dict[str, Any]:
    """The numbers of one field, for the CSV; NaN where a scheme did not run, or diverged."""
    estimate = panel.estimates.get((scheme, quantity))
    where = {"case": panel.case, "scheme": scheme}
    if estimate is None:
        return {**where, "seeds": 0, "iqm": math.nan, "low": None, "high": None}
    return {**where, "seeds": len(estimate.seeds), **estimate.ratio._asdict()}


def draw_table(
    axes: Any, cases: Sequence[str], schemes: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """The heat map, with the ratio and its interval in each field; `rows` of `table_row`, case by case."""
    table = np.array([row["iqm"] for row in rows]).reshape(len(cases), len(schemes))
    draw_ratios(axes, table, MOST, cases, schemes)
    axes.xaxis.tick_top()
    for label in axes.get_xticklabels():
        label.set(rotation=40, ha="left")
    for ((i, j), ratio), row in zip(np.ndenumerate(table), rows, strict=True):
        if math.isnan(ratio):
            axes.text(j, i, "—", ha="center", va="center", color=INK)
            continue
        low, high = row["low"], row["high"]
        style = {"ha": "center", "va": "center", "color": ink_on(ratio, MOST)}
        weight, up = ("bold" if high is not None and high < 1 else "normal"), (0.0 if high is None else 0.12)
        axes.text(j, i - up, f"{ratio:.2f}", fontsize=9, weight=weight, **style)
        if high is not None:
            axes.text(j, i + 0.27, f"{low:.2f} to {high:.2f}", fontsize=5.5, **style)
