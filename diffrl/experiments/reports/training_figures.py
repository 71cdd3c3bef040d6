"""Figures of a comparison: maps of a grid, intervals, learning curves, sample distance by evaluations."""

import csv
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.experiments.comparison import grid_scheme
from diffrl.experiments.findings import SCORE, Panel, Quantity, interval
from diffrl.experiments.reports.run_figure import FAINT, INK, REAL, STYLE
from diffrl.experiments.reports.run_table import distance_label
from diffrl.extras import require

__all__ = ["draw_figures", "plain_ticks"]

Rows = list[dict[str, Any]]

# Okabe and Ito's palette; shapes of markers say the same. The baseline is ink.
STYLES = [
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
]
AXES = {"grad_steps": "gradient steps", "network_evaluations": "network evaluations", "seconds": "seconds"}
LEGEND = {"fontsize": 8, "title_fontsize": 8, "frameon": True, "framealpha": 0.8, "edgecolor": "none"}
NOTES = {"intervals": " Grey: the interval holds 1, or there is one seed. †: not matched."}
BETTER, WORSE = "#0072B2", "#D55E00"


def draw_figures(panel: Panel, folder: Path) -> list[tuple[str, Path]]:
    """Draw what there is to see of a study on a case, each figure as PNG and PDF, with its numbers as CSV.

    Args:
        panel: the study on the case.
        folder: for the files; made if missing.

    Returns:
        Title and PNG of each figure.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "plot")
    if not panel.compared:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    title = panel.study.title or "schemes against the baseline"
    kinds: list[tuple[str, str, Callable[[Any, Panel], Rows]]] = []
    if len(panel.study.axes) == 2:
        kinds.append(("map", title, _draw_map))
    elif len(panel.compared) > 1:
        kinds.append(("intervals", title, _draw_intervals))
    if SCORE in panel.quantities:
        kinds.append(
            ("learning", "learning curves, and the effort to reach the baseline's last error", _draw_learning)
        )
    if any(quantity.kind == "sample_distance" for quantity in panel.quantities):
        kinds.append(("nfe", "sample distance by network evaluations", _draw_nfe))
    drawn = []
    for kind, title, draw in kinds:
        path = folder / f"{panel.study.name}_{panel.case}_{kind}.png"
        with matplotlib.rc_context(STYLE):
            figure = require("matplotlib.figure", "plot").Figure(layout="constrained")
            rows = draw(figure, panel)
            heading = f"{panel.study.name}, {panel.case}: {title}"
            figure.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold")
            footer = textwrap.fill(_footer(panel) + NOTES.get(kind, ""), int(17 * figure.get_figwidth()))
            figure.supxlabel(footer, x=0.01, ha="left", fontsize=7.5, color=REAL)
            figure.savefig(path, dpi=150)
            figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        drawn.append((title, path))
    return drawn


def _shown(panel: Panel) -> list[Quantity]:
    """The score and the sample distances."""
    return [quantity for quantity in panel.quantities if quantity.kind != "value_error"]


def _title(quantity: Quantity) -> str:
    return "Value error" if quantity == SCORE else f"Samples, NFE {quantity.at}"


def _footer(panel: Panel) -> str:
    """What is matched, the other costs, and what the figures are."""
    costs = [panel.costs(scheme) for scheme in panel.compared]

    def spread(axis: str) -> str:
        low, high = (f"{f(cost[axis] for cost in costs):,.{int(axis == 'seconds')}f}" for f in (min, max))
        return f"{AXES[axis]} {low}" if low == high else f"{AXES[axis]} {low} to {high}"

    others = ", ".join(spread(axis) for axis in AXES if axis != panel.study.matched)
    name, _, count = panel.metric.partition("@")
    parts = [f"× {panel.study.baseline}, less is better; interquartile mean over seeds, 95 % interval."]
    few, most = (f(len(panel.seeds(scheme)) for scheme in panel.compared) for f in (min, max))
    seeds = f"{most}" if few == most else f"{few} to {most}"
    parts.append(f"Matched: {spread(panel.study.matched)}. Others: {others}; {seeds} seeds.")
    parts.append(f"Samples: {distance_label(name)} of {int(count):,}.")
    if SCORE in panel.quantities:
        parts.append(f"Value error: mean over σ = {', '.join(panel.score_sigmas)}.")
    return " ".join(parts)


def _ratio_row(panel: Panel, scheme: str, quantity: Quantity) -> dict[str, Any]:
    estimate = panel.estimates[scheme, quantity]
    row = {"scheme": scheme, "figure": quantity.kind, "at": quantity.at}
    if estimate is None:
        return {
            **row,
            "seeds": len(panel.seeds(scheme)),
            "iqm": math.nan,
            "low": None,
            "high": None,
            "probability": None,
        }
    return {
        **row,
        "seeds": len(estimate.seeds),
        **estimate.ratio._asdict(),
        "probability": estimate.probability,
    }


def _draw_map(figure: Any, panel: Panel) -> Rows:
    """A heat map for each figure: its ratio to the baseline's, on a scale that is symmetric about 1."""
    (row_label, row_values), (column_label, column_values) = panel.study.axes.items()
    quantities = _shown(panel)
    across = min(3, len(quantities))
    down = math.ceil(len(quantities) / across)
    size = (0.62 * len(column_values) + 0.9, 0.36 * len(row_values) + 0.9)
    figure.set_size_inches(max(across * size[0] + 0.9, 7), down * size[1] + 0.5)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    rows, tables = [], []
    for quantity in quantities:
        table = np.full((len(row_values), len(column_values)), math.nan)
        for i, row_value in enumerate(row_values):
            for j, column_value in enumerate(column_values):
                scheme = grid_scheme({row_label: row_value, column_label: column_value})
                if scheme in panel.compared:
                    row = _ratio_row(panel, scheme, quantity)
                    rows.append({row_label: row_value, column_label: column_value, **row})
                    table[i, j] = row["iqm"]
        tables.append(table)
    logs = np.abs(np.log2(np.concatenate([table[np.isfinite(table)] for table in tables])))
    most = float(np.clip(logs.max(initial=0), 0.15, 2))
    for axes, quantity, table in zip(grid, quantities, tables, strict=False):
        image = axes.imshow(np.log2(table), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        axes.set_xticks(range(len(column_values)), [f"{float(v):g}" for v in column_values])
        axes.set_yticks(range(len(row_values)), [f"{float(v):g}" for v in row_values])
        axes.set(xlabel=column_label, ylabel=row_label, title=_title(quantity))
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        best = np.unravel_index(np.argmin(np.nan_to_num(table, nan=math.inf)), table.shape)
        for (i, j), ratio in np.ndenumerate(table):
            if math.isnan(ratio):
                continue
            weight = "bold" if (i, j) == best else "normal"
            colour = "white" if abs(math.log2(ratio)) > 0.65 * most else INK
            axes.text(j, i, f"{ratio:.2f}", ha="center", va="center", fontsize=8, color=colour, weight=weight)
        frame = require("matplotlib.patches", "plot").Rectangle(
            (best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.8, clip_on=False
        )
        axes.add_patch(frame)
    for axes in grid[len(quantities) :]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=list(grid), shrink=0.8, aspect=30)
    ticks = [t for t in (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4) if abs(math.log2(t)) <= most]
    bar.set_ticks([math.log2(t) for t in ticks], labels=[f"{t:g}" for t in ticks])
    bar.set_label(f"× {panel.study.baseline}   (less is better; framed: best)")
    bar.outline.set_visible(False)
    return rows


def _draw_intervals(figure: Any, panel: Panel) -> Rows:
    """One row a scheme, one column a figure: ratio to the baseline's with its interval."""
    schemes = [scheme for scheme in panel.compared if scheme != panel.study.baseline]
    quantities = _shown(panel)
    figure.set_size_inches(2.0 + 1.9 * len(quantities), 1.2 + 0.27 * len(schemes))
    grid = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    rows = []
    for axes, quantity in zip(grid, quantities, strict=True):
        axes.axvline(1, color=INK, linewidth=1)
        for y, scheme in enumerate(schemes):
            row = _ratio_row(panel, scheme, quantity)
            rows.append(row)
            low, high = (row["iqm"] if row[end] is None else row[end] for end in ("low", "high"))
            colour = BETTER if high < 1 else WORSE if low > 1 else FAINT
            if row["low"] is None:  # one seed says nothing about better or worse
                colour = FAINT
            axes.plot([low, high], [y, y], color=colour, linewidth=2.4, solid_capstyle="butt")
            axes.plot(row["iqm"], y, "o", color=colour, markersize=5)
        axes.set_title(_title(quantity))
        axes.grid(False, axis="y")
        _ratio_scale(axes, "x", most=4)
    marks = ["" if panel.is_matched(scheme) else " †" for scheme in schemes]
    grid[0].set_yticks(range(len(schemes)), [s + mark for s, mark in zip(schemes, marks, strict=True)])
    grid[0].set_ylim(len(schemes) - 0.5, -0.5)
    return rows


def _selected(panel: Panel, quantities: Sequence[Quantity]) -> dict[str, Mapping[str, Any]]:
    """The baseline and the best schemes, in the study's order, each with its style."""

    def rank(scheme: str) -> float:
        found = [panel.estimates[scheme, quantity] for quantity in quantities]
        return math.inf if None in found else float(np.mean([e.ratio.iqm for e in found if e is not None]))

    others = sorted((s for s in panel.compared if s != panel.study.baseline), key=rank)[: len(STYLES)]
    styles = dict(zip((s for s in panel.compared if s in others), STYLES, strict=False))
    chosen: dict[str, Mapping[str, Any]] = {}
    for scheme in panel.compared:
        if scheme == panel.study.baseline:
            chosen[scheme] = {"color": INK, "marker": "x", "linestyle": "--", "label": scheme}
        elif scheme in styles:
            chosen[scheme] = {"color": styles[scheme][0], "marker": styles[scheme][1], "label": scheme}
    return chosen


def _how_many(chosen: Mapping[str, Any], panel: Panel) -> str:
    hidden = len(panel.compared) - len(chosen)
    return f"the {len(chosen) - 1} best of {len(panel.compared) - 1} schemes" if hidden else "all schemes"


def _draw_learning(figure: Any, panel: Panel) -> Rows:
    """Left the score while training; right the share of the baseline's effort until its last score."""
    chosen = _selected(panel, [SCORE])
    figure.set_size_inches(11, max(3.8, 1.4 + 0.3 * len(chosen)))
    curves, shares = figure.subplots(1, 2, width_ratios=(1.6, 1))
    rows: Rows = []
    for scheme, style in chosen.items():
        runs = [panel.curve(scheme, seed) for seed in panel.seeds(scheme)]
        length = min(len(run.score) for run in runs)
        points = [interval([run.score[i] for run in runs]) for i in range(length)]
        for i, point in enumerate(points):
            steps, evaluations = float(runs[0].grad_steps[i]), float(runs[0].network_evaluations[i])
            row = {
                "panel": "curve",
                "scheme": scheme,
                "grad_steps": steps,
                "network_evaluations": evaluations,
            }
            rows.append({**row, **point._asdict()})
        x = runs[0].grad_steps[:length]
        curves.plot(x, [p.iqm for p in points], linewidth=1.8, markersize=4, **style)
        if points and points[0].low is not None:
            low, high = [p.low for p in points], [p.high for p in points]
            curves.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    curves.axhline(1, color=INK, linewidth=0.8)
    curves.annotate(
        f"{panel.study.baseline}'s last",
        (0.01, 1),
        (0, -3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=INK,
    )
    curves.set(
        xlabel="gradient steps",
        ylabel=f"value error, × {panel.study.baseline}'s last",
        title="Learning curves",
    )
    _ratio_scale(curves, "y", least=0.75)  # leaves room for the words under the line
    curves.legend(title=_how_many(chosen, panel), **LEGEND)

    for y, (scheme, style) in enumerate(chosen.items()):
        effort = panel.effort(scheme)
        for name, found, shift in (
            ("grad_steps", effort.grad_steps, -0.13),
            ("network_evaluations", effort.network_evaluations, 0.13),
        ):
            row = {"panel": f"effort_{name}", "scheme": scheme, "grad_steps": "", "network_evaluations": ""}
            if found is None:
                missed = f"not reached at {effort.seeds - effort.reached} of {effort.seeds} seeds"
                rows.append({**row, "iqm": missed, "low": None, "high": None})
                if shift < 0:
                    shares.text(0.02, y, missed, va="center", fontsize=8, color=FAINT)
                continue
            rows.append({**row, **found._asdict()})
            ends = [found.iqm if end is None else end for end in (found.low, found.high)]
            shares.plot(ends, [y + shift] * 2, color=style["color"], linewidth=2.2, solid_capstyle="butt")
            fill = {"markerfacecolor": "white"} if shift > 0 else {}
            shares.plot(found.iqm, y + shift, "o", color=style["color"], markersize=5.5, **fill)
    shares.axvline(1, color=INK, linewidth=0.8)
    shares.set_yticks(range(len(chosen)), list(chosen))
    shares.set_ylim(len(chosen) - 0.5, -0.5)
    shares.set_xlim(0, max(1.1, shares.get_xlim()[1]))
    shares.grid(False, axis="y")
    shares.set_xlabel(
        "● gradient steps   ○ network evaluations\nas a share of what the baseline spends in all"
    )
    shares.set_title(f"Effort to reach {panel.study.baseline}'s last error")
    return rows


def _draw_nfe(figure: Any, panel: Panel) -> Rows:
    """Left the distance itself, right as a multiple of the baseline's."""
    quantities = [quantity for quantity in panel.quantities if quantity.kind == "sample_distance"]
    chosen = _selected(panel, quantities)
    figure.set_size_inches(10, 3.9)
    absolute, relative = figure.subplots(1, 2)
    rows: Rows = []
    for scheme, style in chosen.items():
        found = {q.at: e for q in quantities if (e := panel.estimates[scheme, q]) is not None}
        x = [int(nfe) for nfe in found]
        for axes, kind in ((absolute, "value"), (relative, "ratio")):
            points = [getattr(estimate, kind) for estimate in found.values()]
            rows += [
                {"panel": kind, "scheme": scheme, "nfe": n, **p._asdict()}
                for n, p in zip(x, points, strict=True)
            ]
            axes.plot(x, [p.iqm for p in points], linewidth=1.8, markersize=5, **style)
            if points and points[0].low is not None:
                low, high = [p.low for p in points], [p.high for p in points]
                axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    name, _, count = panel.metric.partition("@")
    absolute.set(title="Distance", ylabel=f"{distance_label(name)}, {int(count):,} samples", yscale="log")
    relative.set(title=f"× {panel.study.baseline}", ylabel="ratio at the same seed")
    _ratio_scale(relative, "y")
    for axes in (absolute, relative):
        axes.set_xscale("log")
        axes.set_xticks([int(q.at) for q in quantities], [q.at for q in quantities], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("network evaluations per sample (NFE)")
    absolute.legend(title=_how_many(chosen, panel), **LEGEND)
    plain_ticks(absolute.yaxis)
    return rows


def _ratio_scale(axes: Any, which: str, most: int = 9, least: float = 0.96) -> None:
    """A logarithmic axis that goes from `least` or below past 1, with plain numbers."""
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    getattr(axes, f"set_{which}lim")(min(low, least), max(high, 1.04))
    plain_ticks(getattr(axes, f"{which}axis"), most)


def plain_ticks(axis: Any, most: int = 9) -> None:
    """Round ticks on a logarithmic axis, as many as fit: evenly spaced within a decade, else 1, 2, 5."""
    low, high = axis.get_view_interval()
    if high < 10 * low:
        base = 10.0 ** math.floor(math.log10(high - low))
        for step in (base / 20, base / 10, base / 5, base / 2, base, 2 * base, 5 * base):
            ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
            if len(ticks) <= most:
                break
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        sets = [(1, (1, 2, 5)), (1, (1, 3)), *((every, (1,)) for every in range(1, len(decades) + 1))]
        for every, mantissas in sets:
            ticks = [m * 10.0**d for d in decades if d % every == 0 for m in mantissas]
            ticks = [tick for tick in ticks if low <= tick <= high]
            if len(ticks) <= most:
                break
    axis.set_ticks(ticks, [f"{tick:.4g}" for tick in ticks])
    axis.set_ticks([], minor=True)
