"""Figures, drawn from a run's result files alone: results.json, metrics.csv and the samples kept."""

import csv
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffrl.experiments.reports.run_table import distance_label, mean_value_error, objective_label, title
from diffrl.extras import require
from diffrl.training.runs import RunFolder

__all__ = ["draw_samples", "draw_summary", "show_images", "show_points"]

Array = NDArray[Any]
Figures = list[dict[str, Any]]  # a row for each figure: panel, objective, sigma, x, y

# Okabe and Ito's palette, which the colour-blind can tell apart; shapes of markers say the same
STYLES = [("#0072B2", "o"), ("#D55E00", "s")]
WIDTHS = [3.0, 1.5]  # so that both are seen where they coincide
INK, FAINT, REAL = "#222222", "#8A8A8A", "#555555"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}
STRIP = 32  # images in a row


def draw_summary(folder: str | Path) -> Path:
    """The figure of a run: learning curves, value error by σ, sample distance by evaluations, samples.

    Writes plots/summary.png and .pdf, and the numbers shown in plots/summary.csv.

    Args:
        folder: a run folder in which at least one objective is done.

    Returns:
        The png's path.

    Raises:
        MissingExtra: matplotlib is not installed.
        RunFolderError: there is no run in the folder.
    """
    matplotlib = require("matplotlib", "plot")
    run = RunFolder.open(Path(folder))
    results, samples = run.results(), run.samples()
    names = {name: objective_label(name, results["config"]) for name in results["objectives"]}
    figures = _figures(run.path / "metrics.csv", results)
    out = run.path / "plots"
    out.mkdir(exist_ok=True)
    with (out / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["panel", "objective", "sigma", "x", "y"])
        writer.writeheader()
        writer.writerows(figures)

    images = len(next(iter(samples["data"].values())).shape) == 4
    height = 0.72 * (1 + len(_low_and_high(samples, names))) if images else 3.0
    with matplotlib.rc_context(STYLE):
        make = require("matplotlib.figure", "plot").Figure
        figure = make(figsize=(12, 3.9 + height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
        curves, pictures = figure.subfigures(2, 1, height_ratios=(3.1, height))
        _draw_curves(curves, figures, names, results)
        letter = "d" if any(row["panel"] == "value_error" for row in figures) else "c"
        (_draw_strips if images else _draw_clouds)(pictures, letter, samples, names)
        figure.suptitle(title(results), x=0.01, ha="left", fontsize=12, fontweight="bold")
        command = run.path / "command.txt"
        if command.exists():
            text = textwrap.fill(command.read_text().strip(), 190)
            figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color=FAINT, family="monospace")
        figure.savefig(out / "summary.png", dpi=150)
        figure.set_layout_engine("none")  # it is laid out by now
        figure.savefig(out / "summary.pdf", dpi=150)
    return out / "summary.png"


def draw_samples(
    x: Tensor, path: str | Path, *, title: str, columns: int = 8, data: Tensor | None = None
) -> Path:
    """Samples as a grid of images, or as points in the plane.

    Args:
        x: samples [n, *E]; images are (1 or 3, H, W) in [-1, 1].
        path: the picture to write.
        title: what to write above.
        columns: images in a row.
        data: real samples, drawn beneath points; they fix the plane in which vectors are seen.

    Returns:
        The path.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "plot")
    with matplotlib.rc_context(STYLE):
        figure = require("matplotlib.figure", "plot").Figure(figsize=(6, 6.3), layout="constrained")
        axes = figure.subplots()
        if x.ndim == 4:
            show_images(axes, x, columns=columns)
        else:
            real = (x if data is None else data).numpy()
            plane, labels = _plane(real)
            _scatter(axes, plane(x.numpy()), None if data is None else plane(real), STYLES[0][0], plane(real))
            axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.set_title(title)
        figure.savefig(path, dpi=150)
    return Path(path)


def _figures(metrics: Path, results: Mapping[str, Any]) -> Figures:
    """Every number that the curves show."""
    found: Figures = []
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def add(panel: str, objective: str, sigma: str, x: float, y: float) -> None:
        found.append({"panel": panel, "objective": objective, "sigma": sigma, "x": x, "y": y})

    for name, result in results["objectives"].items():
        for row in rows:
            if row["objective"] != name:
                continue
            step = int(row["grad_steps"])
            errors = {s: float(v) for s in result["value_error"] if (v := row.get(f"value_error_{s}"))}
            for sigma, error in errors.items():
                add("learning_curve", name, sigma, step, error)
            if errors:
                add("learning_curve", name, "mean", step, mean_value_error(errors))
            if not result["value_error"] and row["loss_value"]:
                add("loss", name, "", step, float(row["loss_value"]))
        for sigma, error in result["value_error"].items():
            add("value_error", name, sigma, float(sigma), error)
        for nfe, distance in result["sample_distance"]["by_nfe"].items():
            add("sample_distance", name, "", int(nfe), distance)
    return found


def _line(
    figures: Figures, panel: str, objective: str, sigma: str | None = None
) -> tuple[list[float], list[float]]:
    rows = [
        row
        for row in figures
        if (row["panel"], row["objective"]) == (panel, objective) and sigma in (None, row["sigma"])
    ]
    return [row["x"] for row in rows], [row["y"] for row in rows]


def _draw_curves(part: Any, figures: Figures, names: Mapping[str, str], results: Mapping[str, Any]) -> None:
    first = next(iter(results["objectives"].values()))
    known = bool(first["value_error"])
    panels = part.subplots(1, 3, width_ratios=(1.3, 1, 1)) if known else part.subplots(1, 2)
    for (name, label), (colour, marker), width in zip(names.items(), STYLES, WIDTHS, strict=False):
        mark = {
            "color": colour,
            "marker": marker,
            "markersize": 3 + width,
            "linewidth": width,
            "label": label,
        }
        if known:
            for sigma in first["value_error"]:
                x, y = _line(figures, "learning_curve", name, sigma)
                panels[0].plot(x, y, color=colour, linewidth=0.8, alpha=0.5)
            mean = {**mark, "markersize": 1 + width}
            panels[0].plot(*_line(figures, "learning_curve", name, "mean"), **mean)
            panels[1].plot(*_line(figures, "value_error", name), **mark)
        else:
            panels[0].plot(*_line(figures, "loss", name), color=colour, linewidth=1.2)
        panels[-1].plot(*_line(figures, "sample_distance", name), **mark)

    if known:
        panels[0].set(title="a  Learning curves", ylabel="value error  $\\|D-D^*\\|^2/c_{\\mathrm{out}}^2$")
        panels[1].set(title="b  Value error by noise level", xscale="log")
        panels[1].set(xlabel="noise level σ (units of the data)", ylabel="value error at the end")
        _name_ticks(panels[1], list(first["value_error"]))
    else:
        panels[0].set(title="a  Training loss: each its own, no comparison", ylabel="loss")
    metric, _, count = first["sample_distance"]["metric"].partition("@")
    panels[0].set_xlabel("gradient steps")
    panels[-1].set(title=f"{'c' if known else 'b'}  Sample quality", xscale="log")
    panels[-1].set_xlabel("network evaluations per sample (NFE)")
    panels[-1].set_ylabel(f"{distance_label(metric)}\n{int(count):,} samples")
    _name_ticks(panels[-1], list(first["sample_distance"]["by_nfe"]))
    for axes in panels:
        _log_scale(axes)
    if known:
        _name_lines(panels[0], figures, names, list(first["value_error"]))
        _write_ratios(panels[1], figures, "value_error", names)
    _write_ratios(panels[-1], figures, "sample_distance", names)
    handles, labels = panels[-1].get_legend_handles_labels()
    if len(names) == 2:
        handles.append(require("matplotlib.lines", "plot").Line2D([], [], linestyle=""))
        labels.append(f"×: {' over '.join(labels)}")
    part.legend(handles, labels, loc="outside upper left", ncols=len(handles), borderpad=0, borderaxespad=1)


def _name_ticks(axes: Any, values: Sequence[str]) -> None:
    axes.set_xticks([float(value) for value in values], values, minor=False)
    axes.set_xticks([], minor=True)
    axes.margins(x=0.1)


def _name_lines(axes: Any, figures: Figures, names: Mapping[str, str], sigmas: Sequence[str]) -> None:
    """At the right end of each pair of thin lines its σ, and "mean" at the thick ones, kept apart."""
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
            lines[key], (1, below), (4, 0), va="center", fontsize=8, color=REAL, weight=weight, **place
        )
    axes.set_xlim(0, max(x[-1] for end in ends.values() for x, _ in end))


def _write_ratios(axes: Any, figures: Figures, panel: str, names: Mapping[str, str]) -> None:
    """A row with the first objective's figures over the second's, above the points."""
    if len(names) != 2:
        return
    (xs, first), (_, second) = (_line(figures, panel, name) for name in names)
    low, high = axes.get_ylim()
    axes.set_ylim(
        low, high * (high / low) ** 0.13 if axes.get_yscale() == "log" else high + 0.13 * (high - low)
    )
    for x, a, b in zip(xs, first, second, strict=True):
        if b != 0:
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "top", "fontsize": 8}
            axes.annotate(f"×{a / b:.2f}", (x, 0.985), color=STYLES[0][0], **place)


def _log_scale(axes: Any) -> None:
    """A logarithmic y axis where numbers are far apart: 0.1 instead of 10⁻¹, and more where decades are few."""
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
    """(objective, evaluations), objectives side by side: with few evaluations, and with the most.

    The fewest of all may be too few to see anything: of more than two numbers, few is the second.
    """
    nfes = sorted(samples[next(iter(names))], key=int)
    few = nfes[1] if len(nfes) > 2 else nfes[0]
    return [(name, nfe) for nfe in dict.fromkeys((few, nfes[-1])) for name in names]


def _draw_strips(
    part: Any, letter: str, samples: Mapping[str, Mapping[str, Tensor]], names: Mapping[str, str]
) -> None:
    """Strips of images, one under the other."""
    shown = _low_and_high(samples, names)
    strips = [("data", next(iter(samples["data"].values())), REAL)]
    colours = {name: style[0] for name, style in zip(names, STYLES, strict=False)}
    strips += [(f"{names[name]}\nNFE {nfe}", samples[name][nfe], colours[name]) for name, nfe in shown]
    grid = part.subplots(len(strips), 1)
    for axes, (label, x, colour) in zip(grid, strips, strict=True):
        _show(axes, _tile(x[: 2 * STRIP].numpy(), STRIP))
        axes.set_ylabel(label, rotation=0, ha="right", va="center", color=colour, weight="bold")
    grid[0].set_title(f"{letter}  Samples: in each place the same noise to start from")


def _draw_clouds(
    part: Any, letter: str, samples: Mapping[str, Mapping[str, Tensor]], names: Mapping[str, str]
) -> None:
    """Samples over data in a plane, one panel for each objective and number of evaluations."""
    real = next(iter(samples["data"].values())).numpy()
    plane, labels = _plane(real)
    shown = _low_and_high(samples, names)
    colours = {name: style[0] for name, style in zip(names, STYLES, strict=False)}
    grid = part.subplots(1, 1 + len(shown), sharex=True, sharey=True)
    _scatter(grid[0], plane(real), None, REAL, plane(real))
    grid[0].set_title(f"{letter}  Data (grey in the others)", color=REAL)
    grid[0].set(xlabel=labels[0], ylabel=labels[1])
    for axes, (name, nfe) in zip(grid[1:], shown, strict=True):
        _scatter(axes, plane(samples[name][nfe].numpy()), plane(real), colours[name], plane(real))
        axes.set_title(f"{names[name]}, NFE {nfe}", color=colours[name])
        axes.set_xlabel(labels[0])


def _plane(real: Array) -> tuple[Callable[[Array], Array], tuple[str, str]]:
    """Projection of points [n, *E] to the plane [n, 2], and the names of its axes."""
    flat = real.reshape(len(real), -1)
    if flat.shape[1] == 2:
        return lambda x: x.reshape(len(x), -1), ("x₁", "x₂")
    if flat.shape[1] == 1:
        return lambda x: np.hstack([x.reshape(len(x), 1), np.linspace(0, 1, len(x))[:, None]]), ("x", "rank")
    centre = flat.mean(0)
    axes = np.linalg.svd(flat - centre, full_matrices=False)[2][:2]
    axes = (
        axes * np.sign(axes[np.arange(2), np.abs(axes).argmax(1)])[:, None]
    )  # the sign is arbitrary: fix it
    return lambda x: (x.reshape(len(x), -1) - centre) @ axes.T, (
        "first principal axis",
        "second principal axis",
    )


def _scatter(axes: Any, points: Array, beneath: Array | None, colour: str, frame: Array) -> None:
    """Points in the frame of the data, with a fifth of its size around it."""
    if beneath is not None:
        axes.scatter(*beneath.T, s=3, color="#C8C8C8", linewidths=0, rasterized=True)
    axes.scatter(*points.T, s=4, color=colour, alpha=0.55, linewidths=0, rasterized=True)
    low, high = frame.min(0), frame.max(0)
    middle, half = (low + high) / 2, 0.6 * float((high - low).max())
    axes.set(
        xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half), aspect="equal"
    )
    axes.grid(False)


def show_points(axes: Any, x: Tensor, beneath: Tensor, colour: str) -> None:
    """Samples [n, *E] as points over others, which fix the plane; the frame holds both."""
    plane, _ = _plane(beneath.numpy())
    points, under = plane(x.numpy()), plane(beneath.numpy())
    _scatter(axes, points, under, colour, np.concatenate([points, under]))


def show_images(axes: Any, x: Tensor, *, columns: int) -> None:
    """Images [n, 1 or 3, H, W] in [-1, 1] as one sheet."""
    _show(axes, _tile(x.numpy(), columns))


def _tile(x: Array, columns: int) -> Array:
    """Images [n, C, H, W] in [-1, 1] as one [rows H, columns W, C] in [0, 1], white between them."""
    n, C, H, W = x.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    gap = max(1, H // 16)
    sheet = np.ones((rows * (H + gap) - gap, columns * (W + gap) - gap, C))
    for i, image in enumerate(np.clip((x + 1) / 2, 0, 1)):
        top, left = i // columns * (H + gap), i % columns * (W + gap)
        sheet[top : top + H, left : left + W] = image.transpose(1, 2, 0)
    return sheet


def _show(axes: Any, sheet: Array) -> None:
    axes.imshow(
        sheet if sheet.shape[2] == 3 else sheet[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
