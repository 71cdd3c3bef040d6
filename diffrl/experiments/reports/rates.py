"""The part of a training report on tuned rates: what each scheme took, on what it was chosen, and what it cost."""

from collections.abc import Iterable, Sequence

from diffrl.experiments.findings import Finding
from diffrl.experiments.rates import Choice, Tuning, has_diverged
from diffrl.experiments.reports.parts import folded
from diffrl.experiments.reports.run_table import data_label
from diffrl.experiments.study_findings import Panel, StudyFindings
from diffrl.training.identity import flat
from diffrl.training.runs import RunFolder

__all__ = ["at_what", "rates"]

MEASURES = {
    "value_error": "value error",
    "map_error": "map error",
    "denoising_error": "denoising error on held-out data",
    "sample_distance": "sample distance",
}


def rates(findings: StudyFindings, panel: Panel) -> str:
    """What each scheme of a study took on a case; empty if nothing is tuned."""
    tuning = panel.study.tuning
    if tuning is None:
        return ""
    choices, runs = findings.choices(panel.study, panel.case), findings.tuning_runs(panel.study, panel.case)
    if not choices:
        return "No scheme is tuned yet: its runs are not finished. The same command continues.\n"
    title = f"What each scheme takes of {_settings(tuning)}, and the error at each candidate, × its least"
    return "\n".join([_how(tuning, choices, runs, panel), folded(title, _rows(tuning, choices, runs))])


def at_what(panel: Panel) -> str:
    """At which values the schemes of a panel are, in a sentence; empty if nothing is tuned."""
    tuning = panel.study.tuning
    if tuning is None:
        return ""
    if panel.rate == "tuned":
        return f"Each scheme at its own {_settings(tuning)}, chosen at seeds {_list(tuning.seeds)}."
    config = flat(panel.config)
    return f"All schemes at {_list(f'{key} = {config.get(key)}' for key in tuning.grid.keys.values())}."


def _how(tuning: Tuning, choices: Sequence[Choice], runs: Sequence[Finding], panel: Panel) -> str:
    """On what the rates were chosen, and what that cost."""
    measures = list(dict.fromkeys(choice.measure for choice in choices))
    over = dict.fromkeys("NFE" if measure == "sample_distance" else "σ" for measure in measures)
    least = ", of others the ".join(MEASURES[measure] for measure in measures)
    finished = [run for run in runs if run.status == "finished"]
    spent = {cost: sum(run.figures[cost] for run in finished) for cost in ("grad_steps", "seconds")}
    ends = [
        f"{c.scheme} ({_list(tuning.grid.ends(c.point))})"
        for c in choices
        if c.point and tuning.grid.ends(c.point)
    ]
    lines = [
        f"Tuned at seeds {_list(tuning.seeds)}, of which none is reported, {_on_what(finished, panel)}. The least "
        f"{least} decides, as the geometric mean over seeds and {' or '.join(over)}; a run that diverges counts as "
        f"worst. It took {len(runs)} runs on top of what the tables count: {spent['grad_steps']:,.0f} gradient steps, "
        f"{spent['seconds']:,.0f} seconds of one thread."
    ]
    if ends:
        lines.append(f"**At an end of the grid, so that a better value may lie beyond: {'; '.join(ends)}.**")
    return "\n".join(lines) + "\n"


def _on_what(finished: Sequence[Finding], panel: Panel) -> str:
    """Whether tuning saw the data that the report is about."""
    if not finished or not panel.schemes:
        return "on the same case"
    config, reported = RunFolder(finished[0].path).config(), panel.config
    differ = {k for k in config["data"] if config["data"][k] != reported["data"].get(k)}
    if differ:
        return f"on other data than is reported ({_list(f'data.{key}' for key in sorted(differ))} differs)"
    return f"on the same data, {data_label(config)}: only weights, batches and noise are others"


def _rows(tuning: Tuning, choices: Sequence[Choice], runs: Sequence[Finding]) -> list[list[str]]:
    """A row for each scheme, a column for each candidate."""
    points = list(tuning.grid.points)
    rows = [["scheme", *tuning.grid.axes, *points]]
    for choice in choices:
        at = tuning.grid.points.get(choice.point or "", {})
        least = min((s for s in choice.scores.values() if s is not None), default=1.0)
        cells = []
        for point in points:
            score = choice.scores.get(point)
            text = _why_not(choice, point, runs) if score is None else f"{score / least:.2f}"
            cells.append(f"**{text}**" if point == choice.point else text)
        rows.append([choice.scheme, *(at.get(label, "none") for label in tuning.grid.axes), *cells])
    return rows


def _why_not(choice: Choice, point: str, runs: Sequence[Finding]) -> str:
    """What became of a candidate without a score."""
    place = {"scheme": choice.scheme, "point": point}
    ended = [run for run in runs if place.items() <= run.where.items() and run.status != "finished"]
    return "failed" if ended and not any(has_diverged(run.error) for run in ended) else "diverged"


def _settings(tuning: Tuning) -> str:
    return _list(tuning.grid.keys.values())


def _list(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)
