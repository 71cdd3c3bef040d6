"""The figure of a training run, drawn from the files in its folder, and pictures of samples."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diffrl.experiments.image_sheets import square_columns
from diffrl.experiments.reports.run_table import (
    baseline_of,
    count_label,
    distance_label,
    mean_error,
    mean_ratio,
    objective_label,
    title,
)
from diffrl.experiments.reports.scheme_samples import draw_scheme_samples
from diffrl.experiments.reports.style import (
    BLUE,
    FAINT,
    GREY,
    PALETTE,
    draw_points,
    drawing,
    name_ticks,
    plane_of,
    save_figure,
    show_images,
    write_note,
    write_title,
)
from diffrl.extras import require
from diffrl.text_files import read_text
from diffrl.training.runs import RunFolder
from diffrl.training.table import Table

__all__ = ["draw_samples", "draw_summary"]

Figures = list[dict[str, Any]]  # a row for each figure: panel, objective, sigma, x, y

WIDTHS = [3.0, 1.5]  # so that both lines are seen where they coincide
STRIP = 32  # images in a row


def draw_summary(folder: str | Path) -> Path:
    """Draw the figure of a run: learning curves, value error by σ, sample distance by evaluations, samples.

    Writes plots/summary.png and .pdf, and the numbers shown in plots/summary.csv.

    Args:
        folder: a run folder in which at least one objective is done.

    Returns:
        The png's path.

    Raises:
        MissingExtra: matplotlib is not installed.
        RunFolderError: there is no run in the folder.
    """
    run = RunFolder.open(Path(folder))
    results, samples = run.results(), run.samples()
    names = {name: objective_label(name, results["config"]) for name in results["objectives"]}
    figures = _figures(run.path / "metrics.csv", results)
    images = len(next(iter(samples["data"].values())).shape) == 4
    several = len(names) > 2
    height = 0.72 * (1 + len(_low_and_high(samples, names))) if images else 3.0
    if several:
        height = (1.15 if images else 2.6) * len(names) + 0.3
    with drawing(figsize=(12, 3.9 + height)) as figure:
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
        curves, pictures = figure.subfigures(2, 1, height_ratios=(3.1, height))
        _draw_curves(curves, figures, names, results)
        letter = "d" if any(row["panel"] == "value_error" for row in figures) else "c"
        if several:
            colours = {name: colour for name, (colour, _, _) in _styles(names).items()}
            draw_scheme_samples(pictures, letter, samples, names, colours)
        else:
            (_draw_strips if images else _draw_clouds)(pictures, letter, samples, names)
        write_title(figure, title(results))
        command = run.path / "command.txt"
        if command.exists():
            write_note(figure, read_text(command).strip(), fontsize=7, color=FAINT, family="monospace")
        return save_figure(figure, run.path / "plots" / "summary.png", rows=figures)


def draw_samples(
    x: Tensor, path: str | Path, *, title: str, columns: int | None = None, data: Tensor | None = None
) -> Path:
    """Draw samples as a sheet of images, or as points in the plane.

    Args:
        x: samples [n, *E]; images are (1 or 3, H, W) in [-1, 1].
        path: the picture to write.
        title: what to write above.
        columns: images in a row; as many as make the sheet nearly square if None.
        data: real samples, drawn beneath the points; the plane is the one in which they are seen best.

    Returns:
        The path.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with drawing(figsize=(6, 6.3)) as figure:
        axes = figure.subplots()
        if x.ndim == 4:
            across = min(columns or square_columns(len(x)), len(x))
            show_images(axes, x, columns=across)
            rows, (height, width) = -(-len(x) // across), x.shape[-2:]
            figure.set_figheight(min(0.5 + 6 * (rows * height) / (across * width), 60))
        else:
            real = (x if data is None else data).numpy()
            plane, labels = plane_of(real)
            draw_points(axes, plane(x.numpy()), None if data is None else plane(real), BLUE, plane(real))
            axes.set(xlabel=labels[0], ylabel=labels[1])
        write_title(figure, title)
        figure.savefig(path, dpi=150)
    return Path(path)


def _styles(names: Iterable[str]) -> dict[str, tuple[str, str, float]]:
    """Colour, marker and width of each objective's lines; of several the baseline's is grey."""
    known = [*names]
    if len(known) < 3:
        return {n: (*look, width) for n, look, width in zip(known, PALETTE, WIDTHS, strict=False)}
    baseline = baseline_of(known)
    others = [name for name in known if name != baseline]
    looks = dict(zip(others, itertools.cycle(PALETTE), strict=False))
    return {name: (*looks.get(name, (GREY, "D")), 1.5) for name in known}


def _figures(metrics: Path, results: Mapping[str, Any]) -> Figures:
    """Every number that the curves show, a row each."""
    found: Figures = []
    baseline, known = _last_errors(results), _known(results)
    panels = ("value_error", *(["denoising_error"] if _held_out(results) else [])) if known else ()
    rows = Table(metrics, ()).rows()

    def add(panel: str, objective: str, sigma: str, x: float, y: float) -> None:
        found.append({"panel": panel, "objective": objective, "sigma": sigma, "x": x, "y": y})

    for name, result in results["objectives"].items():
        for row in rows:
            if row["objective"] != name:
                continue
            step = int(row["grad_steps"])
            sigmas = result["value_error"] if known else ()
            errors = {s: float(v) for s in sigmas if (v := row.get(f"value_error_{s}"))}
            for sigma, error in errors.items():
                add("learning_curve", name, sigma, step, error)
            if errors:
                add("learning_curve", name, "mean", step, mean_error(errors))
                if baseline:
                    add("learning_curve", name, "score", step, mean_ratio(errors, baseline))
            if not known and row["loss_value"]:
                add("loss", name, "", step, float(row["loss_value"]))
        for panel in panels:
            for sigma, error in result[panel].items():
                add(panel, name, sigma, float(sigma), error)
        for nfe, distance in result["sample_distance"]["by_nfe"].items():
            add("sample_distance", name, "", int(nfe), distance)
    return found


def _held_out(results: Mapping[str, Any]) -> bool:
    """Whether the error on data that no training saw belongs beside the value error, which then rewards memory."""
    measured = all(result.get("denoising_error") for result in results["objectives"].values())
    return "split" in results and measured


def _known(results: Mapping[str, Any]) -> bool:
    """Whether all have a value error, so that they can be drawn on one scale; a consistency function has none."""
    return all(result["value_error"] for result in results["objectives"].values())


def _last_errors(results: Mapping[str, Any]) -> Mapping[str, float]:
    """The baseline's value errors at the end, which the learning curves of several schemes are measured by."""
    objectives = results["objectives"]
    name = baseline_of(objectives) if len(objectives) > 2 else None
    return {} if name is None else objectives[name]["value_error"]


def _line(
    figures: Figures, panel: str, objective: str, sigma: str | None = None
) -> tuple[list[float], list[float]]:
    """The x and the y of one line of a panel."""
    rows = [
        row
        for row in figures
        if (row["panel"], row["objective"]) == (panel, objective) and sigma in (None, row["sigma"])
    ]
    return [row["x"] for row in rows], [row["y"] for row in rows]


def _draw_curves(part: Any, figures: Figures, names: Mapping[str, str], results: Mapping[str, Any]) -> None:
    """The upper row of panels: learning curves, value error by σ where it is known, sample distance."""
    first, known = next(iter(results["objectives"].values())), _known(results)
    held_out = any(row["panel"] == "denoising_error" for row in figures)
    panels = part.subplots(1, 3, width_ratios=(1.3, 1, 1)) if known else part.subplots(1, 2)
    for name, (colour, marker, width) in _styles(names).items():
        label = names[name]
        mark = {
            "color": colour,
            "marker": marker,
            "markersize": 3 + width,
            "linewidth": width,
            "label": label,
        }
        if known:
            for sigma in first["value_error"] if len(names) < 3 else ():
                x, y = _line(figures, "learning_curve", name, sigma)
                panels[0].plot(x, y, color=colour, linewidth=0.8, alpha=0.5)
            mean = {**mark, "markersize": 1 + width}
            kind = "score" if any(row["sigma"] == "score" for row in figures) else "mean"
            panels[0].plot(*_line(figures, "learning_curve", name, kind), **mean)
            panels[1].plot(*_line(figures, "value_error", name), **mark)
            if held_out:
                panels[1].plot(*_line(figures, "denoising_error", name), "--", color=colour, linewidth=width)
        else:
            panels[0].plot(*_line(figures, "loss", name), color=colour, linewidth=1.2)
        panels[-1].plot(*_line(figures, "sample_distance", name), **mark)

    _name_panels(panels, names, first, known=known, held_out=held_out)
    for axes in panels:
        _log_scale(axes)
    if known:
        if len(names) < 3:
            _name_lines(panels[0], figures, names, list(first["value_error"]))
        _write_ratios(panels[1], figures, "value_error", names)
    _write_ratios(panels[-1], figures, "sample_distance", names)
    handles, labels = panels[-1].get_legend_handles_labels()
    if (baseline := baseline_of(names)) is not None:
        handles.append(require("matplotlib.lines", "plot").Line2D([], [], linestyle=""))
        labels.append(f"×: {' over '.join(labels) if len(names) == 2 else f'over {names[baseline]}'}")
    part.legend(handles, labels, loc="outside upper left", ncols=len(handles), borderpad=0, borderaxespad=1)


def _name_panels(
    panels: Sequence[Any], names: Mapping[str, str], first: Mapping[str, Any], *, known: bool, held_out: bool
) -> None:
    """Titles, names of axes and ticks; `first` are the figures of one objective."""
    baseline = baseline_of(names)
    panels[0].set_xlabel("gradient steps")
    if known:
        panels[0].set(title="a  Learning curves", ylabel="value error  ‖D - D*‖²/c_out²")
        title, error = "b  Value error by noise level", "value error at the end"
        if held_out:
            title, error = "b  Error by noise level", "value error; dashed: on held-out data"
        panels[1].set(title=title, xscale="log", xlabel="noise level σ (units of the data)", ylabel=error)
        name_ticks(panels[1], list(first["value_error"]))
        if baseline is not None and len(names) > 2:
            panels[0].set(title="a  Distance to the exact denoiser, while training")
            panels[0].set_ylabel(f"value error over {names[baseline]}'s\nat the end, mean over noise levels")
    else:
        panels[0].set(title="a  Training loss: each its own, no comparison", ylabel="loss")
    metric = first["sample_distance"]["metric"]
    panels[-1].set(title=f"{'c' if known else 'b'}  Sample quality", xscale="log")
    panels[-1].set_xlabel("network evaluations per sample (NFE)")
    panels[-1].set_ylabel(f"{distance_label(metric)}\n{count_label(metric)}")
    name_ticks(panels[-1], list(first["sample_distance"]["by_nfe"]))


def _name_lines(axes: Any, figures: Figures, names: Mapping[str, str], sigmas: Sequence[str]) -> None:
    """Write σ at the right end of each pair of thin lines, and "mean" at the thick ones, so that no two overlap."""
    lines = {**{sigma: f"σ = {sigma}" for sigma in sigmas}, "mean": "mean"}
    ends = {key: [_line(figures, "learning_curve", name, key) for name in names] for key in lines}
    axes.autoscale_view()  # the limits are set from now on
    height = axes.transScale + axes.transLimits  # of a point, as a share of the axes' height
    at = {
        key: float(np.mean([height.transform((x[-1], y[-1]))[1] for x, y in end]))
        for key, end in ends.items()
    }
    below = -1.0
    for key in sorted(at, key=lambda key: at[key]):
        below = max(at[key], below + 0.055)
        weight = "bold" if key == "mean" else "normal"
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(
            lines[key], (1, below), (4, 0), va="center", fontsize=8, color=GREY, weight=weight, **place
        )
    axes.set_xlim(0, max(x[-1] for end in ends.values() for x, _ in end))


def _write_ratios(axes: Any, figures: Figures, panel: str, names: Mapping[str, str]) -> None:
    """Write above each point of the baseline how many times its figure those of the others are."""
    baseline = baseline_of(names)
    if baseline is None:
        return
    others = [name for name in names if name != baseline]
    low, high = axes.get_ylim()
    room = 0.13 if len(others) == 1 else 0.08 * (1 + len(others))
    axes.set_ylim(
        low, high * (high / low) ** room if axes.get_yscale() == "log" else high + room * (high - low)
    )
    styles, (xs, by) = _styles(names), _line(figures, panel, baseline)
    for line, name in enumerate(others):
        for x, a, b in zip(xs, _line(figures, panel, name)[1], by, strict=True):
            if b != 0:
                place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "top", "fontsize": 8}
                axes.annotate(f"×{a / b:.2f}", (x, 0.985 - 0.065 * line), color=styles[name][0], **place)


def _log_scale(axes: Any) -> None:
    """Make the y axis logarithmic if its numbers are far apart, with plain ticks: 0.1 and not 10⁻¹."""
    y = np.concatenate([line.get_ydata() for line in axes.lines])
    if not (y > 0).all() or y.max() < 3 * y.min():
        return
    axes.set_yscale("log")
    ticker = require("matplotlib.ticker", "plot")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if y.max() / y.min() < 100 else (1,)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _low_and_high(
    samples: Mapping[str, Mapping[str, Tensor]], names: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Which samples to show, as (objective, evaluations): those of few evaluations first, then of the most.

    The fewest evaluations of all may be too few to see anything: of more than two numbers the second is taken.
    """
    nfes = sorted(samples[next(iter(names))], key=int)
    few = nfes[1] if len(nfes) > 2 else nfes[0]
    return [(name, nfe) for nfe in dict.fromkeys((few, nfes[-1])) for name in names]


def _draw_strips(
    part: Any, letter: str, samples: Mapping[str, Mapping[str, Tensor]], names: Mapping[str, str]
) -> None:
    """The lower part for images: a strip of the data, and one for each objective and number of evaluations."""
    shown = _low_and_high(samples, names)
    strips = [("data", next(iter(samples["data"].values())), GREY)]
    colours = {name: style[0] for name, style in _styles(names).items()}
    strips += [(f"{names[name]}\nNFE {nfe}", samples[name][nfe], colours[name]) for name, nfe in shown]
    grid = part.subplots(len(strips), 1)
    for axes, (label, x, colour) in zip(grid, strips, strict=True):
        show_images(axes, x[: 2 * STRIP], columns=STRIP)
        axes.set_ylabel(label, rotation=0, ha="right", va="center", color=colour, weight="bold")
    grid[0].set_title(f"{letter}  Samples: in each place the same noise to start from")


def _draw_clouds(
    part: Any, letter: str, samples: Mapping[str, Mapping[str, Tensor]], names: Mapping[str, str]
) -> None:
    """The lower part for points: samples over data, a panel for each objective and number of evaluations."""
    real = next(iter(samples["data"].values())).numpy()
    plane, labels = plane_of(real)
    shown = _low_and_high(samples, names)
    colours = {name: style[0] for name, style in _styles(names).items()}
    grid = part.subplots(1, 1 + len(shown), sharex=True, sharey=True)
    draw_points(grid[0], plane(real), None, GREY, plane(real))
    grid[0].set_title(f"{letter}  Data (grey in the others)", color=GREY)
    grid[0].set(xlabel=labels[0], ylabel=labels[1])
    for axes, (name, nfe) in zip(grid[1:], shown, strict=True):
        draw_points(axes, plane(samples[name][nfe].numpy()), plane(real), colours[name], plane(real))
        axes.set_title(f"{names[name]}, NFE {nfe}", color=colours[name])
        axes.set_xlabel(labels[0])
