"""Which training target helps, and where: one picture of the runs of `compare plan=grounds`.

    python examples/grounds_on_one_page.py runs/compare_grounds

Value error over that of Monte Carlo on chains, each method at its own learning rate; a field takes the study with the
most seeds. Writes grounds.png and its numbers as CSV into OUT/figures; of a comparison that is not finished what is
there already.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffrl.errors import DiffrlError
from diffrl.experiments.reports.overview_figure import draw_table, table_row
from diffrl.experiments.reports.style import drawing, save_figure, write_note, write_title
from diffrl.experiments.study_findings import HELD_OUT, SCORE, Panel, Quantity, StudyFindings
from diffrl.training.runs import RunFolder, RunFolderError

GROUNDS = {
    "d16": "mixture, 16-D",
    "d32": "mixture, 32-D",
    "d64": "mixture, 64-D",
    "d32_wide": "32-D, wide network",
    "ddpm": "DDPM, 16-D",
    "flow": "flow, 16-D",
    "rings": "rings, 2-D",
    "digits": "digits, 8×8",
}
SCHEMES = {
    "fresh states": "a datum of its own\nfor each state",
    "EDM": "the same with EDM's\nnoise levels (edm)",
    "STF 256": "averaged over\n256 data (STF)",
    "lookahead": "the default of TD:\nlook-ahead, target net",
    "target 0.97": "TD(0), target net 0.97",
    "target 0.99": "TD(0), target net 0.99",
    "λ=0.9": "λ = 0.9, own predictions",
    "λ=0.5": "λ = 0.5, own predictions",
    "TD(0), β1=0.5": "TD(0), own predictions,\nβ1 = 0.5",
}
"""What the plan calls them, and what the picture does. Those of the first three do not bootstrap."""


def field(panels: Sequence[Panel], case: str, scheme: str, quantity: Quantity) -> dict[str, Any]:
    """The numbers of one field, from the study that holds it at the most seeds; NaN if none does."""
    found = [
        table_row(panel, scheme, quantity)
        for panel in panels
        if panel.case == case and scheme in panel.compared
    ]
    nothing = {"case": case, "scheme": scheme, "seeds": 0, "iqm": math.nan, "low": None, "high": None}
    return max(found, key=lambda row: int(row["seeds"]), default=nothing)


def main(out: Path) -> Path:
    """Draw what there is; returns the path.

    Raises:
        RunFolderError: there is no comparison in the folder, or nothing to draw of it yet.
    """
    panels = [panel for panel in StudyFindings(out).panels() if panel.rate == "tuned" and panel.compared]
    rows = [field(panels, case, scheme, SCORE) for case in GROUNDS for scheme in SCHEMES]
    if not any(row["seeds"] for row in rows):
        raise RunFolderError(
            f"{out} has nothing to draw yet: no scheme and its Monte Carlo are finished at one seed of plan=grounds"
        )
    held_out = [
        {**field(panels, "digits", scheme, HELD_OUT), "case": "digits, held out"} for scheme in SCHEMES
    ]
    grounds = [*GROUNDS.values(), "digits, held-out error"]
    with drawing(figsize=(11.5, 5.8)) as figure:
        draw_table(figure.subplots(), grounds, list(SCHEMES.values()), rows + held_out)
        write_title(figure, "Error of the denoiser over that of Monte Carlo on chains")
        seeds = sorted({int(row["seeds"]) for row in rows if row["seeds"]})
        note = (
            f"Below 1 (blue) is better than Monte Carlo. Squared distance to the exact denoiser, mean over σ = "
            f"{', '.join(panels[0].score_sigmas)}; last row: denoising error on held-out images. Each method at its "
            f"own learning rate; equal gradient steps; interquartile mean over {' or '.join(map(str, seeds))} seeds, "
            "small: 95 % interval, bold where it lies below 1. Schemes with a target net spend 1.9 to 2 times the "
            f"network evaluations, those of the first two columns {times_the_data(panels)} times the data, and "
            "STF's averages look at 8 to 32 times as many."
        )
        write_note(figure, note)
        return save_figure(figure, out / "figures" / "grounds.png", rows=rows + held_out)


def times_the_data(panels: Sequence[Panel]) -> str:
    """How many times Monte Carlo's data those schemes see that give each state a datum of its own."""
    ratios = set()
    for panel in panels:
        for scheme in ("fresh states", "EDM"):
            if scheme in panel.compared:
                mine, baseline = (batch_size(panel, s) for s in (scheme, panel.study.baseline))
                ratios.add(round(mine / baseline, 1))
    return " to ".join(f"{ratio:g}" for ratio in sorted({min(ratios), max(ratios)})) if ratios else "many"


def batch_size(panel: Panel, scheme: str) -> int:
    """Data a step, from the configuration of a finished cell."""
    cell = next(iter(panel.cells[scheme].values()))
    return int(RunFolder(cell.path).config()["trainer"]["batch_size"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the comparison")
    try:
        print(main(parser.parse_args().out))
    except DiffrlError as error:
        sys.exit(f"error: {error}")
