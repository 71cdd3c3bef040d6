"""Figures of training studies: maps of a grid, intervals, learning curves, sample distance by evaluations."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.experiments.grids import grid_scheme
from diffrl.experiments.reports.rates import at_what
from diffrl.experiments.reports.run_table import count_label, data_label, distance_label
from diffrl.experiments.reports.style import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    PALETTE,
    Array,
    draw_band,
    draw_ratios,
    drawing,
    ink_on,
    legend_beside,
    plain_ticks,
    save_figure,
    write_note,
    write_title,
)
from diffrl.experiments.study_findings import HELD_OUT, MEANS, SCORE, Panel, Quantity
from diffrl.extras import require
from diffrl.metrics.intervals import Interval, interval

__all__ = ["draw_figures"]

Rows = list[dict[str, Any]]
Styles = Mapping[str, Mapping[str, Any]]
"""How the line of each scheme is drawn."""

AXES = {"grad_steps": "gradient steps", "network_evaluations": "network evaluations", "seconds": "seconds"}
TITLES = {SCORE: "Value error", HELD_OUT: "Held-out denoising error"}
EFFORTS = {"grad_steps": (-0.13, ""), "network_evaluations": (0.13, "white")}
"""How each cost is drawn: the shift of its mark, and what fills it, the scheme's colour if nothing else."""
NOTES = {"intervals": " Grey: the interval holds 1, or there is one seed. †: not matched."}


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
    if not panel.compared:
        return []
    question = panel.study.title or "schemes against the baseline"
    kinds: list[tuple[str, str, Callable[[Any, Panel], Rows]]] = []
    if len(panel.study.axes) == 2:
        kinds.append(("map", question, _draw_map))
    elif len(panel.compared) > 1:
        kinds.append(("intervals", question, _draw_intervals))
    if SCORE in panel.quantities:
        kinds.append(("learning", f"{question}: learning curves and effort", _draw_learning))
    if any(quantity.kind == "sample_distance" for quantity in panel.quantities):
        kinds.append(("nfe", f"{question}: sample distance by network evaluations", _draw_nfe))
    drawn = []
    for kind, words, draw in kinds:
        title = f"{words[0].upper()}{words[1:]} ({data_label(panel.config)})"
        with drawing() as figure:
            rows = draw(figure, panel)
            write_title(figure, title)
            write_note(figure, _footer(panel) + NOTES.get(kind, ""))
            path = folder / f"{panel.study.name}_{panel.case}_{kind}.png"
            drawn.append((title, save_figure(figure, path, rows=rows)))
    return drawn


def _shown(panel: Panel) -> list[Quantity]:
    """The means over σ and the sample distances."""
    return [q for q in panel.quantities if q in MEANS or q.kind == "sample_distance"]


def _title(quantity: Quantity) -> str:
    return TITLES[quantity] if quantity in MEANS else f"Samples, NFE {quantity.at}"


def _footer(panel: Panel) -> str:
    """What is matched, the other costs, and what the figures are."""
    costs = [panel.costs(scheme) for scheme in panel.compared]

    def spread(axis: str) -> str:
        low, high = (f"{f(cost[axis] for cost in costs):,.{int(axis == 'seconds')}f}" for f in (min, max))
        return f"{AXES[axis]} {low}" if low == high else f"{AXES[axis]} {low} to {high}"

    others = ", ".join(spread(axis) for axis in AXES if axis != panel.study.matched)
    parts = [f"× {panel.study.baseline}, less is better; interquartile mean over seeds, 95 % interval."]
    few, most = (f(len(panel.seeds(scheme)) for scheme in panel.compared) for f in (min, max))
    seeds = f"{most}" if few == most else f"{few} to {most}"
    parts.append(f"Matched: {spread(panel.study.matched)}. Others: {others}; {seeds} seeds.")
    parts.append(f"Samples: {distance_label(panel.metric)} of {count_label(panel.metric)}.")
    if SCORE in panel.quantities:
        errors = "Errors" if HELD_OUT in panel.quantities else "Value error"
        parts.append(f"{errors}: mean over σ = {', '.join(panel.score_sigmas)}.")
    return " ".join([*parts, at_what(panel)]).rstrip()


def _ratio_row(panel: Panel, scheme: str, quantity: Quantity) -> dict[str, Any]:
    """The ratio of a figure to the baseline's, as a row for the CSV; NaN where it is not finite."""
    estimate = panel.estimates[scheme, quantity]
    row = {"scheme": scheme, "figure": quantity.kind, "at": quantity.at}
    ratio, probability = Interval(math.nan, None, None), None
    if estimate is not None:
        ratio, probability = estimate.ratio, estimate.probability
    return {**row, "seeds": len(panel.seeds(scheme)), **ratio._asdict(), "probability": probability}


def _draw_map(figure: Any, panel: Panel) -> Rows:
    """A heat map for each figure: its ratio to the baseline's, on a scale that is symmetric about 1."""
    (_, row_values), (_, column_values) = panel.study.axes.items()
    quantities = _shown(panel)
    across = min(3, len(quantities))
    down = math.ceil(len(quantities) / across)
    size = (0.62 * len(column_values) + 0.9, 0.36 * len(row_values) + 0.9)
    figure.set_size_inches(max(across * size[0] + 0.9, 7), max(down * size[1] + 0.5, 3))
    grid = figure.subplots(down, across, squeeze=False).ravel()
    rows: Rows = []
    tables = []
    for quantity in quantities:
        found, table = _map_table(panel, quantity)
        rows += found
        tables.append(table)
    logs = np.abs(np.log2(np.concatenate([table[np.isfinite(table)] for table in tables])))
    most = float(np.clip(logs.max(initial=0), 0.15, 2))
    for axes, quantity, table in zip(grid, quantities, tables, strict=False):
        image = _draw_heat_map(axes, panel, quantity, table, most)
    for axes in grid[len(quantities) :]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=list(grid), shrink=0.8, aspect=30)
    ticks = [t for t in (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4) if abs(math.log2(t)) <= most]
    bar.set_ticks([math.log2(t) for t in ticks], labels=[f"{t:g}" for t in ticks])
    bar.set_label(f"× {panel.study.baseline}\nless is better; framed: best")
    bar.outline.set_visible(False)
    return rows


def _map_table(panel: Panel, quantity: Quantity) -> tuple[Rows, Array]:
    """The ratios of a figure over a grid, as rows for the CSV and as a table; NaN where there is none."""
    (row_label, row_values), (column_label, column_values) = panel.study.axes.items()
    rows, table = [], np.full((len(row_values), len(column_values)), math.nan)
    for (i, row_value), (j, column_value) in itertools.product(
        enumerate(row_values), enumerate(column_values)
    ):
        point = {row_label: row_value, column_label: column_value}
        if (scheme := grid_scheme(point)) in panel.compared:
            row = _ratio_row(panel, scheme, quantity)
            rows.append({**point, **row})
            table[i, j] = row["iqm"]
    return rows, table


def _draw_heat_map(axes: Any, panel: Panel, quantity: Quantity, table: Array, most: float) -> Any:
    """One heat map, with its numbers and a frame around the best; `most` is log2 at the ends of the scale."""
    (row_label, row_values), (column_label, column_values) = panel.study.axes.items()
    image = draw_ratios(axes, table, most, [*map(_tick, row_values)], [*map(_tick, column_values)])
    axes.set(xlabel=column_label, ylabel=row_label, title=_title(quantity))
    best = np.unravel_index(np.argmin(np.nan_to_num(table, nan=math.inf)), table.shape)
    for (i, j), ratio in np.ndenumerate(table):
        if not math.isnan(ratio):
            weight = "bold" if (i, j) == best else "normal"
            style = {"fontsize": 8, "color": ink_on(ratio, most), "weight": weight}
            axes.text(j, i, f"{ratio:.2f}", ha="center", va="center", **style)
    frame = require("matplotlib.patches", "plot").Rectangle(
        (best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.8, clip_on=False
    )
    axes.add_patch(frame)
    return image


def _tick(value: str) -> str:
    """A value of an axis for people: 0.50 as 0.5, and what is no number as it is written."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return value


def _draw_intervals(figure: Any, panel: Panel) -> Rows:
    """Ratios to the baseline's with their intervals: a row for each scheme, a panel for each figure."""
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
            colour = BLUE if high < 1 else ORANGE if low > 1 else FAINT
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


def _selected(panel: Panel, quantities: Sequence[Quantity]) -> Styles:
    """The baseline and the best schemes, in the study's order, each with its style."""

    def rank(scheme: str) -> float:
        found = [panel.estimates[scheme, quantity] for quantity in quantities]
        return math.inf if None in found else float(np.mean([e.ratio.iqm for e in found if e is not None]))

    others = sorted((s for s in panel.compared if s != panel.study.baseline), key=rank)[: len(PALETTE)]
    styles = dict(zip((s for s in panel.compared if s in others), PALETTE, strict=False))
    chosen: dict[str, Mapping[str, Any]] = {}
    for scheme in panel.compared:
        if scheme == panel.study.baseline:
            chosen[scheme] = {"color": INK, "marker": "x", "linestyle": "--", "label": scheme}
        elif scheme in styles:
            chosen[scheme] = {"color": styles[scheme][0], "marker": styles[scheme][1], "label": scheme}
    return chosen


def _how_many(chosen: Styles, panel: Panel) -> str:
    hidden = len(panel.compared) - len(chosen)
    return f"the {len(chosen) - 1} best of {len(panel.compared) - 1} schemes" if hidden else "all schemes"


def _draw_learning(figure: Any, panel: Panel) -> Rows:
    """The errors while training, a panel each; right the share of the baseline's effort until its last score."""
    chosen = {s: style for s, style in _selected(panel, [SCORE]).items() if panel.has(s, SCORE)}
    means = [mean for mean in MEANS if mean in panel.quantities]
    figure.set_size_inches(7.5 + 5 * len(means), max(3.8, 1.4 + 0.3 * len(chosen)))
    *grid, right = figure.subplots(1, len(means) + 1, width_ratios=(*[1.5] * len(means), 1))
    rows: Rows = []
    for axes, mean in zip(grid, means, strict=True):
        curves = [row for scheme in chosen for row in _curve_rows(panel, scheme, mean)]
        _draw_curves(axes, curves, panel.study.baseline, chosen, TITLES[mean])
        rows += curves
    efforts = [row for scheme in chosen for row in _effort_rows(panel, scheme)]
    _draw_efforts(right, efforts, panel.study.baseline, chosen)
    legend_beside(figure, grid[0], _how_many(chosen, panel))
    return [*rows, *efforts]


def _curve_rows(panel: Panel, scheme: str, mean: Quantity) -> Rows:
    """A mean of a scheme's errors at each evaluation that all seeds have."""
    runs = [panel.curve(scheme, seed, mean) for seed in panel.seeds(scheme)]
    rows = []
    for i in range(min(len(run.score) for run in runs)):
        steps, evaluations = float(runs[0].grad_steps[i]), float(runs[0].network_evaluations[i])
        row = {
            "panel": "curve" if mean == SCORE else "curve_held_out",
            "scheme": scheme,
            "grad_steps": steps,
            "network_evaluations": evaluations,
        }
        rows.append({**row, **interval([run.score[i] for run in runs])._asdict()})
    return rows


def _effort_rows(panel: Panel, scheme: str) -> Rows:
    """What a scheme spends until it is as good as the baseline, in each cost."""
    effort, rows = panel.effort(scheme), []
    for cost in EFFORTS:
        row = {"panel": f"effort_{cost}", "scheme": scheme, "grad_steps": "", "network_evaluations": ""}
        missed = f"not reached at {effort.seeds - effort.reached} of {effort.seeds} seeds"
        found: Interval | None = getattr(effort, cost)
        rows.append({**row, **(found._asdict() if found else {"iqm": missed, "low": None, "high": None})})
    return rows


def _draw_curves(axes: Any, rows: Rows, baseline: str, styles: Styles, error: str) -> None:
    """A mean of errors while training, a line for each scheme."""
    for scheme, style in styles.items():
        own = [row for row in rows if row["scheme"] == scheme]
        points = [Interval(row["iqm"], row["low"], row["high"]) for row in own]
        draw_band(axes, [row["grad_steps"] for row in own], points, linewidth=1.8, markersize=4, **style)
    axes.axhline(1, color=INK, linewidth=0.8)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "top"}
    axes.annotate(f"{baseline}'s last", (0.01, 1), (0, -3), fontsize=8, color=INK, **place)
    axes.set(xlabel="gradient steps", ylabel=f"{error.lower()}, × {baseline}'s last", title="Learning curves")
    _ratio_scale(axes, "y", least=0.75)  # leaves room for the words under the line


def _draw_efforts(axes: Any, rows: Rows, baseline: str, styles: Styles) -> None:
    """What each scheme spends until it is as good as the baseline, in gradient steps and in evaluations."""
    places = {scheme: y for y, scheme in enumerate(styles)}
    for row in rows:
        y, colour = places[row["scheme"]], styles[row["scheme"]]["color"]
        shift, fill = EFFORTS[row["panel"].removeprefix("effort_")]
        if isinstance(row["iqm"], str):
            axes.text(0.02, y, row["iqm"], va="center", fontsize=8, color=FAINT)
            continue
        ends = [row["iqm"] if end is None else end for end in (row["low"], row["high"])]
        axes.plot(ends, [y + shift] * 2, color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot(row["iqm"], y + shift, "o", color=colour, markersize=5.5, markerfacecolor=fill or colour)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(places)), list(places))
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_xlim(0, max(1.1, axes.get_xlim()[1]))
    axes.grid(False, axis="y")
    axes.set_xlabel("● gradient steps   ○ network evaluations\nas a share of what the baseline spends in all")
    axes.set_title(f"Effort to reach {baseline}'s last error")


def _draw_nfe(figure: Any, panel: Panel) -> Rows:
    """Left the distance itself, right as a multiple of the baseline's."""
    quantities = [quantity for quantity in panel.quantities if quantity.kind == "sample_distance"]
    chosen = _selected(panel, quantities)
    figure.set_size_inches(12, 3.9)
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
            draw_band(axes, x, points, linewidth=1.8, markersize=5, **style)
    label = f"{distance_label(panel.metric)}, {count_label(panel.metric)}"
    absolute.set(title="Distance", ylabel=label, yscale="log")
    relative.set(title=f"× {panel.study.baseline}", ylabel="ratio at the same seed")
    _ratio_scale(relative, "y")
    for axes in (absolute, relative):
        axes.set_xscale("log")
        axes.set_xticks([int(q.at) for q in quantities], [q.at for q in quantities], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("network evaluations per sample (NFE)")
    legend_beside(figure, absolute, _how_many(chosen, panel))
    plain_ticks(absolute.yaxis)
    return rows


def _ratio_scale(axes: Any, which: str, most: int = 9, least: float = 0.96) -> None:
    """A logarithmic axis that goes from `least` or below past 1, with plain numbers."""
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    getattr(axes, f"set_{which}lim")(min(low, least), max(high, 1.04))
    plain_ticks(getattr(axes, f"{which}axis"), most)
