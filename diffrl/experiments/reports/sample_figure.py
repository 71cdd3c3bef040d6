"""Samples of a study's schemes by network evaluations, side by side: sheets of images to look at."""

from pathlib import Path

from torch import Tensor

from diffrl.experiments.reports.run_table import data_label
from diffrl.experiments.reports.style import drawing, save_figure, show_images, write_note, write_title
from diffrl.experiments.study_findings import Panel
from diffrl.training.runs import RunFolder

__all__ = ["draw_sheets"]

SHOWN, COLUMNS = 20, 5  # images of a sheet
SCHEMES = 12  # rows of the figure, at most


def draw_sheets(panel: Panel, folder: Path) -> list[tuple[str, Path]]:
    """Draw the first images of each scheme at each number of network evaluations, as PNG and PDF.

    All sheets start from the same noise, and are of the first seed that a scheme shares with the baseline.

    Args:
        panel: the study on a case.
        folder: for the files; made if missing.

    Returns:
        Title and PNG; nothing where samples are no images, or none were kept.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    found = {scheme: _samples(panel, scheme) for scheme in panel.compared[:SCHEMES]}
    found = {scheme: sheets for scheme, sheets in found.items() if sheets}
    if not found:
        return []
    nfes = sorted({nfe for sheets in found.values() for nfe in sheets if nfe != "data"}, key=int)
    columns = [*nfes, "data"]
    title = f"Samples ({data_label(panel.config)})"
    with drawing(figsize=(1.6 * len(columns) + 1, 1.28 * len(found) + 0.8)) as figure:
        grid = figure.subplots(len(found), len(columns), squeeze=False)
        for i, (scheme, sheets) in enumerate(found.items()):
            grid[i, 0].set_ylabel(scheme, rotation=0, ha="right", va="center")
            for axes, column in zip(grid[i], columns, strict=True):
                if column not in sheets or (column == "data" and i > 0):
                    axes.set_axis_off()
                    continue
                show_images(axes, sheets[column][:SHOWN], columns=COLUMNS)
                if i == 0:
                    axes.set_title("held-out data" if column == "data" else f"NFE {column}")
        write_title(figure, title)
        seeds = sorted({panel.seeds(scheme)[0] for scheme in found})
        write_note(
            figure,
            "The first images that were drawn: in each place the same noise to start from. Of seed "
            f"{' and '.join(map(str, seeds))}.",
        )
        path = folder / f"{panel.study.name}_{panel.case}_samples.png"
        return [(title, save_figure(figure, path, dpi=110))]


def _samples(panel: Panel, scheme: str) -> dict[str, Tensor]:
    """The images that the scheme's first run kept, by network evaluations, and real ones by the key "data"."""
    cell = panel.cells[scheme][panel.seeds(scheme)[0]]
    kept = RunFolder(cell.path).samples()
    sheets = [by_nfe for name, by_nfe in kept.items() if name != "data"]
    if not sheets or any(x.ndim != 4 for x in sheets[0].values()):
        return {}
    return {**sheets[0], **({"data": kept["data"]["0"]} if "data" in kept else {})}
