"""The report of fine-tuning methods, from the folder alone: rewards over each cost, with intervals over seeds.

out/
  report.md       tables and figures, for people
  summary.json    every number of it
  figures/        PNG and PDF
"""

from pathlib import Path
from typing import Any

import numpy as np

from diffrl.experiments.method_findings import AXES, MethodFindings
from diffrl.experiments.reports.finetuning_figures import draw_curves, draw_pictures
from diffrl.experiments.reports.parts import commands_table, reward_label, write_summary
from diffrl.experiments.reports.run_table import judged_label
from diffrl.metrics.intervals import interval
from diffrl.text_files import write_atomically
from diffrl.text_tables import markdown_table, text_table
from diffrl.training.runs import RunFolderError

__all__ = ["methods_table", "write_methods_report"]

EARLY = 10


def write_methods_report(out: Path) -> Path:
    """Write the report anew from the runs that are finished; the others are listed.

    Args:
        out: folder of the comparison.

    Returns:
        Path of report.md.

    Raises:
        RunFolderError: there is no comparison in the folder, or none of its runs is finished.
        MissingExtra: matplotlib is not installed.
    """
    found = MethodFindings(out)
    if not found.methods:
        raise RunFolderError(f"{out}: no run is finished; the same command continues")
    write_summary(out, _summary(found))
    figures = [*draw_curves(found, out / "figures"), draw_pictures(found, out / "figures")]
    config, method = found.config, found.methods[0]
    policy = config["policy"]
    lines = [
        "# Fine-tuning methods compared\n",
        f"Reward: {reward_label(config['reward'])}. Held-out reward, never trained on: "
        f"{reward_label(config['heldout_reward'])}. Policy: {config['sampler']['name']}, {policy['num_steps']} steps, "
        f"std_floor {policy['std_floor']:g}. Seeds {', '.join(map(str, method.seeds))}.\n",
        commands_table(found.commands),
        "Figures are interquartile means over seeds with 95 % bootstrap intervals, on noise that no training saw; "
        "*rises* is the share of seeds whose reward ends above the base's. Of distance and KL less is nearer "
        "to the base; docs/metrics.md defines every name.\n",
        "## At the end\n",
        markdown_table(_end_rows(found)),
        *(f"{line}\n" for line in _untaught(found)),
        "## Reward where one cost is the same for all\n",
        markdown_table(_matched_rows(found)),
        "## Variance of the advantages, before they are scaled\n",
        "In units of the reward squared; where steps are paid for estimates, of their sum.\n",
        markdown_table(_spread_rows(found)),
        "## What a run spent\n",
        markdown_table(_cost_rows(found)),
        *(f"![{title}](figures/{path.name})\n" for title, path in figures),
    ]
    if unfinished := found.unfinished():
        rows = [[cell.path.name, cell.error or "not finished"] for cell in unfinished]
        lines += ["## Runs without a result\n", markdown_table([["run", "why"], *rows])]
    write_atomically(out / "report.md", "\n".join(lines))
    return out / "report.md"


def methods_table(out: Path) -> str:
    """The two main tables of the report, for a terminal."""
    found = MethodFindings(out)
    end, matched = _end_rows(found), _matched_rows(found)
    return "\n\n".join([text_table(end), *_untaught(found), text_table(matched)])


def _untaught(found: MethodFindings) -> list[str]:
    """A line for each run that learned nothing from its reward."""
    runs = ((m.name, seed, cost) for m in found.methods for seed, cost in zip(m.seeds, m.costs, strict=True))
    return [f"{name}, seed {seed}: {cost['untaught']}" for name, seed, cost in runs if cost.get("untaught")]


def _end_rows(found: MethodFindings) -> list[list[str]]:
    names = found.figures
    rows = [["method", *map(judged_label, names, names.values()), "rises"]]
    first = found.methods[0]
    rows.append(["base", *(f"{interval(first.first(name)).iqm:.3g}" for name in names), ""])
    for m in found.methods:
        rises = float((m.last("eval_reward") > m.first("eval_reward")).mean())
        rows.append([m.name, *(f"{interval(m.last(name)):.3g}" for name in names), f"{rises:.2f}"])
    return rows


def _matched_rows(found: MethodFindings) -> list[list[str]]:
    places = {axis: found.common(axis) for axis in AXES}
    rows = [["method", *(f"{x:,.0f} {AXES[axis]}" for axis, x in places.items())]]
    for m in found.methods:
        rows.append([m.name, *(f"{interval(m.at('eval_reward', a, x)):.3g}" for a, x in places.items())])
    return rows


def _spread_rows(found: MethodFindings) -> list[list[str]]:
    """Early, where all policies are near the base, and over the whole run."""
    rows = [["method", f"first {EARLY} iterations", "all iterations"]]
    for m in found.methods:
        squares = [np.square(spread) for spread in m.spread]
        means = [[float(s[:EARLY].mean()) for s in squares], [float(s.mean()) for s in squares]]
        rows.append([m.name, *(f"{interval(mean):.3g}" for mean in means)])
    return rows


def _cost_rows(found: MethodFindings) -> list[list[str]]:
    names = [*AXES, "network_evaluations", "seconds"]
    rows = [["method", *(name.replace("_", " ") for name in names)]]
    for m in found.methods:
        rows.append([m.name, *(f"{np.mean([c[name] for c in m.costs]):,.0f}" for name in names)])
    return rows


def _summary(found: MethodFindings) -> dict[str, Any]:
    """Every number of the report."""
    methods = {}
    for m in found.methods:
        curves = {}
        for axis in AXES:
            for name in found.figures:
                x, y = m.curve(name, axis)
                curves[f"{name} by {axis}"] = {"x": x.tolist(), "seeds": y.tolist()}
        methods[m.name] = {
            "seeds": list(m.seeds),
            "base": {name: m.first(name).tolist() for name in found.figures},
            "final": {name: m.last(name).tolist() for name in found.figures},
            "final_interval": {name: interval(m.last(name))._asdict() for name in found.figures},
            "reward_at_common": {
                axis: {
                    "at": found.common(axis),
                    **interval(m.at("eval_reward", axis, found.common(axis)))._asdict(),
                }
                for axis in AXES
            },
            "costs": [{k: c[k] for k in (*AXES, "network_evaluations", "seconds")} for c in m.costs],
            "advantage_std": [list(spread) for spread in m.spread],
            "stopped_early": [c["stopped_early"] for c in m.costs],
            "curves": curves,
        }
    return {"commands": found.commands, "config": found.config, "methods": methods}
