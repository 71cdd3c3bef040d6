"""The report of training studies, from the folder alone: tables, figures, and every number in CSV and JSON.

out/
  report.md       tables and figures, for people
  summary.csv     a row for each cell of each study, with all its figures
  summary.json    the same, and every estimate that the report shows
  figures/        PNG and PDF, the numbers of each as CSV
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrl.experiments.findings import Finding
from diffrl.experiments.rates import has_diverged
from diffrl.experiments.reports.overview_figure import draw_overview
from diffrl.experiments.reports.parts import commands_table, folded, write_summary
from diffrl.experiments.reports.rates import at_what, rates
from diffrl.experiments.reports.run_table import count_label, distance_label
from diffrl.experiments.reports.sample_figure import draw_sheets
from diffrl.experiments.reports.target_table import targets
from diffrl.experiments.reports.training_figures import draw_figures
from diffrl.experiments.study_findings import (
    COSTS,
    MEANS,
    SCORE,
    STEP_COST,
    Estimate,
    Panel,
    Quantity,
    StudyFindings,
)
from diffrl.metrics.intervals import Interval
from diffrl.text_files import write_atomically, write_csv
from diffrl.text_tables import markdown_table

__all__ = ["write_report"]

NAMES = {"grad_steps": "gradient steps", "network_evaluations": "network evaluations", "seconds": "seconds"}
ERRORS = {"value_error": "Value error", "denoising_error": "Held-out denoising error"}
NONE = "–"
"""Where a figure is none of a scheme's: the value error of a network that is no denoiser."""
LEGEND = """\
Every figure is a distance or an error: **less is better**. `0.62 [0.58, 0.66] P 1.00` reads: interquartile
mean over seeds 0.62, its 95 % bootstrap interval, and the probability of improvement over the baseline.
Unless a table says otherwise, figures are multiples of the baseline's at the same seed (same data, noise
and first weights), and P is the share of seeds that improve; with fewer than some ten seeds the true
coverage of the intervals is lower. Bold: the least of a column. *Value error* is ‖D - D\\*‖²/c_out² against
the exact denoiser; its mean is over {sigmas}. Of a finite set that is the denoiser which knows
the training rows by heart: there *held-out denoising error* stands beside it, ‖D - x0‖²/c_out² on images
that no training saw. Part of that is noise which no denoiser removes, so its ratios lie near 1.
A consistency function is no denoiser and has no value error; of it and of other flow maps the *map error* is told.
Network evaluations are states forwarded in training, over all networks; NFE counts them for one sample.
Seconds are those of training on one thread, beside other cells. What a step costs in forward passes is timed against
passes of the same states beside it, so that it counts gradients and Jacobian-vector products too.
"""


def write_report(out: Path) -> Path:
    """Write everything anew, from the cells that are finished; the others are listed.

    Args:
        out: folder of the comparison.

    Returns:
        Path of report.md.

    Raises:
        RunFolderError: there is no comparison in the folder.
        MissingExtra: matplotlib is not installed.
    """
    findings = StudyFindings(out)
    panels = [panel for panel in findings.panels() if panel.schemes]
    beside = [findings.panel(p.study, p.case, "fixed") for p in panels if p.rate == "tuned"]
    fixed = {(panel.study.name, panel.case): panel for panel in beside if panel.schemes}
    every = [*panels, *fixed.values()]
    rows = [_flat(cell) for cell in findings.cells]
    _write_csv(out / "summary.csv", rows)
    summary = {
        "plan": findings.plan,
        "commands": findings.commands,
        "cells": rows,
        "estimates": [entry for panel in every for entry in _estimates(panel)],
        "efforts": [entry for panel in every for entry in _efforts(panel)],
        "tuning": [choice.plain for choice in findings.tuning],
    }
    write_summary(out, summary)

    parts = [_head(findings), _in_short(panels, fixed)]
    study = None
    for panel in panels:
        if panel.study != study:
            study = panel.study
            parts.append(f"## {study.name}{study.title and f': {study.title}'}\n")
            if drawn := draw_overview([p for p in panels if p.study == study], out / "figures"):
                parts.append(f"![{drawn[0]}](figures/{drawn[1].name})\n")
        figures = [*draw_figures(panel, out / "figures"), *draw_sheets(panel, out / "figures")]
        parts += [f"### {study.name}, {panel.case}\n", rates(findings, panel), _panel(panel)]
        if (study.name, panel.case) in fixed:
            parts.append(_beside(fixed[study.name, panel.case]))
        parts += [f"![{title}](figures/{path.name})\n" for title, path in figures]
    parts.append(_unfinished(findings))
    write_atomically(out / "report.md", "\n".join(part for part in parts if part))
    return out / "report.md"


def _head(findings: StudyFindings) -> str:
    cells = {(cell.path, cell.seed): cell for cell in findings.cells}.values()
    finished = sum(cell.status == "finished" for cell in cells)
    tuning = [cell for cell in cells if cell.where["rate"] == "tuning"]
    lines = [f"# Comparison: {findings.plan}\n", f"{finished} of {len(cells)} cells are finished.\n"]
    if tuning:
        diverged = sum(has_diverged(cell.error) for cell in tuning)
        lines.append(f"{len(tuning)} of them are runs of tuning, of which {diverged} diverged.\n")
    lines.append(commands_table(findings.commands))
    used = {json.dumps(command["versions"]): command["versions"] for command in findings.commands}
    for versions in used.values():
        lines.append(f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.\n")
    sigmas = "σ = " + ", ".join(findings.score_sigmas)
    return "\n".join([*lines, LEGEND.format(sigmas=sigmas)])


def _in_short(panels: Sequence[Panel], fixed: Mapping[tuple[str, str], Panel]) -> str:
    """The table of the best schemes: one for each figure of each study on each case, at own and at fixed rates."""
    rows = [["study", "case", "figure", "rate", "best scheme", "over the baseline"]]
    for panel in panels:
        beside = fixed.get((panel.study.name, panel.case))
        for quantity in panel.quantities:
            if quantity.kind not in MEANS.values() or quantity in MEANS:
                rows += [_best(each, quantity) for each in (panel, beside) if each is not None]
    rows = [row for row in rows if row]
    if not fixed:
        rows = [[*row[:3], *row[4:]] for row in rows]
    return f"## Best schemes\n\n{markdown_table(rows)}" if len(rows) > 1 else ""


def _best(panel: Panel, quantity: Quantity) -> list[str]:
    """A row of the table of the best schemes; empty if there is nothing to compare."""
    if len(panel.compared) < 2 or quantity not in panel.quantities:
        return []
    estimates = {s: e for s in panel.compared if (e := panel.estimates[s, quantity]) is not None}
    if not estimates:
        return []
    best = min(estimates, key=lambda s: estimates[s].ratio.iqm)
    what = _cell(estimates[best]) if best != panel.study.baseline else "1 (the baseline)"
    return [panel.study.name, panel.case, _label(quantity, panel), panel.rate, best, what]


def _panel(panel: Panel) -> str:
    """The tables of a study on a case."""
    study = panel.study
    if not panel.compared:
        return f"No seed of the baseline, {study.baseline}, is finished: nothing to compare with.\n"
    spent = panel.costs(study.baseline)[study.matched]
    seeds = ", ".join(str(seed) for seed in study.seeds)
    head = f"Baseline: {study.baseline}. Matched: {NAMES[study.matched]}, {spent:,.0f}. Seeds: {seeds}."
    lines = [f"{head} {at_what(panel)}".rstrip() + "\n", *_figure_tables(panel)]
    if panel.map_keys:
        lines.append(folded("Map error: ‖X - X\\*‖²/(α_r² dim) from t to r, absolute", _map_rows(panel)))
    if SCORE in panel.quantities:
        lines.append(folded("Effort to reach the baseline's last value error", _effort_rows(panel)))
    lines += [part for part in (targets(panel),) if part]
    lines.append(folded("Cost of a run", _cost_rows(panel)))
    return "\n".join(lines)


def _beside(panel: Panel) -> str:
    """The tables of a study on a case where nothing is tuned."""
    head = f"#### {panel.study.name}, {panel.case}, at a fixed rate\n"
    if not panel.compared:
        return f"{head}\nNo seed of the baseline, {panel.study.baseline}, is finished at it.\n"
    return "\n".join([head, f"{at_what(panel)}\n", *_figure_tables(panel)])


def _figure_tables(panel: Panel) -> list[str]:
    """Value errors and sample distances: over the baseline's, and folded away the figures themselves."""
    tables: dict[str, list[Quantity]] = {}
    for quantity in panel.quantities:
        tables.setdefault("value_error" if quantity == SCORE else quantity.kind, []).append(quantity)
    name = f"{distance_label(panel.metric)}, {count_label(panel.metric)}"
    titles = {**ERRORS, "sample_distance": f"Sample distance: {name}"}
    lines = []
    for kind, quantities in tables.items():
        lines.append(folded(f"{titles[kind]}, × baseline", _ratio_rows(panel, quantities)))
        lines.append(folded(f"{titles[kind]}, absolute", _value_rows(panel, quantities), fold=True))
    return lines


def _ratio_rows(panel: Panel, quantities: Sequence[Quantity]) -> list[list[str]]:
    """Figures as multiples of the baseline's: a row for each scheme, a column for each figure."""
    columns = [
        {s: panel.estimates[s, quantity] for s in panel.compared if panel.has(s, quantity)}
        for quantity in quantities
    ]
    least = [min((e.ratio.iqm for e in column.values() if e is not None), default=0.0) for column in columns]
    rows = [["scheme", *(_label(quantity, panel) for quantity in quantities)]]
    for scheme in panel.compared:
        found = [column.get(scheme) for column in columns]
        baseline = scheme == panel.study.baseline
        cells = ["1.00" if baseline and e is not None else _cell(e) for e in found]
        cells = [cell if scheme in column else NONE for cell, column in zip(cells, columns, strict=True)]
        bold = [e is not None and e.ratio.iqm == best for e, best in zip(found, least, strict=True)]
        rows.append(
            [_seeded(scheme, panel), *(f"**{c}**" if b else c for c, b in zip(cells, bold, strict=True))]
        )
    return rows


def _value_rows(panel: Panel, quantities: Sequence[Quantity]) -> list[list[str]]:
    """Figures themselves: a row for each scheme, a column for each figure but means, which are of ratios."""
    quantities = [quantity for quantity in quantities if quantity not in MEANS]
    rows = [["scheme", *(_label(quantity, panel) for quantity in quantities)]]
    for scheme in panel.compared:
        estimates = [panel.estimates[scheme, quantity] for quantity in quantities]
        cells = ["not finite" if e is None or e.value is None else f"{e.value:#.3g}" for e in estimates]
        cells = [cell if panel.has(scheme, q) else NONE for cell, q in zip(cells, quantities, strict=True)]
        rows.append([_seeded(scheme, panel), *cells])
    return rows


def _effort_rows(panel: Panel) -> list[list[str]]:
    """What each scheme spends until it is as good as the baseline: shares of what that spends in all."""
    rows = [["scheme", "gradient steps", "network evaluations"]]
    for scheme in (scheme for scheme in panel.compared if panel.has(scheme, SCORE)):
        effort = panel.effort(scheme)
        shares = (effort.grad_steps, effort.network_evaluations)
        missed = f"not reached at {effort.seeds - effort.reached} of {effort.seeds} seeds"
        rows.append([scheme, *(missed if share is None else f"{share:.2f}" for share in shares)])
    return rows


def _cost_rows(panel: Panel) -> list[list[str]]:
    """What a run of each scheme spends, and whether that is what the study says."""
    rows = [["scheme", "gradient steps", "data", "network evaluations", "seconds", "matched"]]
    rows[0] += ["a step, in forward passes", "a step, × baseline"]
    for scheme in panel.compared:
        cost = panel.costs(scheme)
        counts = [f"{cost[name]:,.0f}" for name in ("grad_steps", "samples", "network_evaluations")]
        matched = "yes" if panel.is_matched(scheme) else "**no**"
        rows.append([scheme, *counts, f"{cost['seconds']:.1f}", matched, *_step_costs(panel, scheme)])
    return rows


def _unfinished(findings: StudyFindings) -> str:
    """Schemes with cells that have no result, and why."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for c in findings.unfinished():
        if c.where["rate"] == "tuning" and has_diverged(c.error):
            continue  # the table of what is tuned tells it
        where = f"`cells/{c.path.name}`" if c.status in ("failed", "stopped") else ""
        error = c.error or ""
        study, case, scheme, rate, point = (c.where[k] for k in ("study", "case", "scheme", "rate", "point"))
        at = "" if rate == "fixed" else f", {rate} at {point}" if point else f", {rate}"
        place = (study, case, f"{scheme}{at}")
        groups.setdefault((*place, c.status, where, error), []).append(str(c.seed))
    if not groups:
        return ""
    rows = [["study", "case", "scheme", "seeds", "state", "folder", "error"]]
    rows += [[*key[:3], ", ".join(seeds), *key[3:]] for key, seeds in groups.items()]
    table = folded("What has not been run, or did not end", rows)
    return f"## Cells without a result\n\nThe same command runs them again.\n\n{table}"


def _estimates(panel: Panel) -> Iterable[dict[str, Any]]:
    """Every estimate, for summary.json."""
    for scheme in panel.compared:
        for quantity in (quantity for quantity in panel.quantities if panel.has(scheme, quantity)):
            estimate = panel.estimates[scheme, quantity]
            where = {**_place(panel, scheme), **quantity._asdict()}
            yield {**where, **({} if estimate is None else _plain(estimate))}
        for key in panel.map_keys:
            if (error := panel.map_error(scheme, key)) is not None:
                yield {**_place(panel, scheme), "kind": "map_error", "at": key, "value": error._asdict()}


def _efforts(panel: Panel) -> Iterable[dict[str, Any]]:
    """Every effort, for summary.json."""
    if SCORE in panel.quantities:
        for scheme in (scheme for scheme in panel.compared if panel.has(scheme, SCORE)):
            yield {**_place(panel, scheme), **_plain(panel.effort(scheme))}


def _place(panel: Panel, scheme: str) -> dict[str, str]:
    """Where an estimate stands, for summary.json."""
    return {"study": panel.study.name, "case": panel.case, "scheme": scheme, "rate": panel.rate}


def _flat(cell: Finding) -> dict[str, Any]:
    """A cell and all its figures, by names that can be columns of a table."""
    figures = cell.figures
    distance = figures.get("sample_distance", {"by_nfe": {}})
    return {
        **cell.where,
        "status": cell.status,
        **{cost: figures.get(cost) for cost in (*COSTS, STEP_COST)},
        **{
            f"{kind}_{sigma}": error
            for kind in (*ERRORS, "map_error")
            for sigma, error in figures.get(kind, {}).items()
        },
        **{f"sample_distance_nfe_{nfe}": found for nfe, found in distance["by_nfe"].items()},
        **{
            f"{name}_nfe{nfe}": found
            for name, by_nfe in figures.get("quality", {}).items()
            for nfe, found in by_nfe.items()
        },
        **{f"target_{part}": error for part, error in figures.get("target_error", {}).items()},
        "metric": distance.get("metric"),
        "folder": cell.path.name,
        "error": cell.error,
    }


def _plain(found: Any) -> dict[str, Any]:
    return {k: v._asdict() if isinstance(v, Interval) else v for k, v in vars(found).items()}


def _label(quantity: Quantity, panel: Panel) -> str:
    if quantity in MEANS:
        return f"{ERRORS[MEANS[quantity]].lower()}, mean"
    return f"NFE {quantity.at}" if quantity.kind == "sample_distance" else f"σ = {quantity.at}"


def _seeded(scheme: str, panel: Panel) -> str:
    """The scheme, and how many seeds it has if some are missing."""
    n, whole = len(panel.seeds(scheme)), len(panel.study.seeds)
    return scheme if n == whole else f"{scheme} ({n} of {whole} seeds)"


def _cell(estimate: Estimate | None) -> str:
    return "not finite" if estimate is None else f"{estimate.ratio:.2f} P {estimate.probability:.2f}"


def _step_costs(panel: Panel, scheme: str) -> list[str]:
    """What a step costs in forward passes, and over the baseline's; empty where it was not timed."""
    cost, base = panel.step_cost(scheme), panel.step_cost(panel.study.baseline)
    return [
        "" if cost is None else f"{cost:.1f}",
        "" if cost is None or base is None else f"{cost / base:.2f}",
    ]


def _map_rows(panel: Panel) -> list[list[str]]:
    """Map errors: a row for each scheme that has some, a column for each pair of times."""
    rows = [["scheme", *(key.replace("->", " → ") for key in panel.map_keys)]]
    for scheme in panel.compared:
        found = [panel.map_error(scheme, key) for key in panel.map_keys]
        if any(found):
            rows.append([_seeded(scheme, panel), *("" if e is None else f"{e:#.3g}" for e in found)])
    return rows


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Columns in the order in which they first come up."""
    columns = dict.fromkeys(key for row in rows for key in row)
    for last in ("metric", "folder", "error"):
        columns[last] = columns.pop(last)
    write_csv(path, list(columns), rows)
