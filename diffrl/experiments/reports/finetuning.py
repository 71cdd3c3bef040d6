"""The report of a fine-tuning comparison: rewards over trajectories, queries and updates, by seed, with intervals.

out/
  report.md       tables and figures, for people
  summary.json    every number of it
  figures/        PNG and PDF
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.experiments.findings import Interval, interval
from diffrl.experiments.reports.finetuning_figures import draw_curves, draw_pictures
from diffrl.experiments.tuning_findings import AXES, Tuning
from diffrl.training.runs import RunFolderError, write_atomically
from diffrl.training.table import aligned, markdown_table

__all__ = ["tuning_table", "write_tuning_report"]

EARLY = 10


def write_tuning_report(out: Path) -> Path:
    """Write the report anew from the runs that are finished; the others are listed.

    Args:
        out: folder of the comparison.

    Returns:
        Path of report.md.

    Raises:
        RunFolderError: there is no comparison in the folder, or none of its runs is finished.
        MissingExtra: matplotlib is not installed.
    """
    tuning = Tuning(out)
    if not tuning.methods:
        raise RunFolderError(f"{out}: no run is finished; the same command continues")
    write_atomically(out / "summary.json", json.dumps(_summary(tuning), indent=1, ensure_ascii=False))
    figures = [*draw_curves(tuning, out / "figures"), draw_pictures(tuning, out / "figures")]
    config, method = tuning.config, tuning.methods[0]
    policy = config["policy"]
    lines = [
        "# Fine-tuning methods compared\n",
        f"Reward: {_options(config['reward'])}. Held-out reward, never trained on: "
        f"{_options(config['heldout_reward'])}. Policy: {config['sampler']['name']}, {policy['num_steps']} steps, "
        f"std_floor {policy['std_floor']:g}. Seeds {', '.join(map(str, method.seeds))}.\n",
        markdown_table([["command", "started", "wall time"], *map(_command, tuning.commands)]),
        "Figures are interquartile means over seeds with 95 % bootstrap intervals, on noise that no training saw; "
        "*rises* is the share of seeds whose reward ends above the base's. Of distance and KL less is nearer "
        "to the base; docs/metrics.md defines every name.\n",
        "## At the end\n",
        markdown_table(_end_rows(tuning)),
        "## Reward where one cost is the same for all\n",
        markdown_table(_matched_rows(tuning)),
        "## Variance of the advantages, before they are scaled\n",
        "In units of the reward squared; where steps are paid for estimates, of their sum.\n",
        markdown_table(_spread_rows(tuning)),
        "## What a run spent\n",
        markdown_table(_cost_rows(tuning)),
        *(f"![{title}](figures/{path.name})\n" for title, path in figures),
    ]
    if tuning.unfinished:
        lines += [
            "## Runs without a result\n",
            markdown_table([["run", "why"], *map(list, tuning.unfinished)]),
        ]
    write_atomically(out / "report.md", "\n".join(lines))
    return out / "report.md"


def tuning_table(out: Path) -> str:
    """The report's main tables for a terminal."""
    tuning = Tuning(out)
    end, matched = _end_rows(tuning), _matched_rows(tuning)
    return f"{aligned([end[0], [], *end[1:]])}\n\n{aligned([matched[0], [], *matched[1:]])}"


def _end_rows(tuning: Tuning) -> list[list[str]]:
    names = tuning.figures
    rows = [["method", *names.values(), "rises"]]
    first = tuning.methods[0]
    rows.append(["base", *(f"{interval(first.first(name)).iqm:.3g}" for name in names), ""])
    for m in tuning.methods:
        rises = float((m.last("eval_reward") > m.first("eval_reward")).mean())
        rows.append([m.name, *(_text(interval(m.last(name))) for name in names), f"{rises:.2f}"])
    return rows


def _matched_rows(tuning: Tuning) -> list[list[str]]:
    places = {axis: tuning.common(axis) for axis in AXES}
    rows = [["method", *(f"{x:,.0f} {AXES[axis]}" for axis, x in places.items())]]
    for m in tuning.methods:
        rows.append([m.name, *(_text(interval(m.at("eval_reward", a, x))) for a, x in places.items())])
    return rows


def _spread_rows(tuning: Tuning) -> list[list[str]]:
    """Early, where all policies are near the base, and over the whole run."""
    rows = [["method", f"first {EARLY} iterations", "all iterations"]]
    for m in tuning.methods:
        squares = [np.square(spread) for spread in m.spread]
        means = [[float(s[:EARLY].mean()) for s in squares], [float(s.mean()) for s in squares]]
        rows.append([m.name, *(_text(interval(mean)) for mean in means)])
    return rows


def _cost_rows(tuning: Tuning) -> list[list[str]]:
    names = [*AXES, "network_evaluations", "seconds"]
    rows = [["method", *(name.replace("_", " ") for name in names)]]
    for m in tuning.methods:
        rows.append([m.name, *(f"{np.mean([c[name] for c in m.costs]):,.0f}" for name in names)])
    return rows


def _summary(tuning: Tuning) -> dict[str, Any]:
    """Every number of the report."""
    methods = {}
    for m in tuning.methods:
        curves = {}
        for axis in AXES:
            for name in tuning.figures:
                x, y = m.curve(name, axis)
                curves[f"{name} by {axis}"] = {"x": x.tolist(), "seeds": y.tolist()}
        methods[m.name] = {
            "seeds": list(m.seeds),
            "base": {name: m.first(name).tolist() for name in tuning.figures},
            "final": {name: m.last(name).tolist() for name in tuning.figures},
            "final_interval": {name: interval(m.last(name))._asdict() for name in tuning.figures},
            "reward_at_common": {
                axis: {
                    "at": tuning.common(axis),
                    **interval(m.at("eval_reward", axis, tuning.common(axis)))._asdict(),
                }
                for axis in AXES
            },
            "costs": [{k: c[k] for k in (*AXES, "network_evaluations", "seconds")} for c in m.costs],
            "advantage_std": [list(spread) for spread in m.spread],
            "stopped_early": [c["stopped_early"] for c in m.costs],
            "curves": curves,
        }
    return {"commands": tuning.commands, "config": tuning.config, "methods": methods}


def _options(config: Mapping[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in config.items() if k != "name" and v is not None)
    return f"{config['name']}({options})"


def _command(command: Mapping[str, Any]) -> list[str]:
    seconds = command.get("seconds")
    took = "stopped" if seconds is None else f"{seconds / 60:.1f} min"
    return [f"`{command['command']}`", command["started"], took]


def _text(found: Interval) -> str:
    if found.low is None or found.high is None:
        return f"{found.iqm:.3g}"
    return f"{found.iqm:.3g} [{found.low:.3g}, {found.high:.3g}]"
