"""The report of any comparison anew: what kind of comparison a folder holds, its index tells."""

from collections.abc import Callable
from pathlib import Path

from diffrl.experiments.reports.finetuning import write_methods_report
from diffrl.experiments.reports.seeds import write_seeds_report
from diffrl.experiments.reports.training import write_report
from diffrl.text_files import read_json
from diffrl.training.runs import RunFolderError

__all__ = ["report_anew"]

KINDS: dict[str, Callable[[Path], Path]] = {
    "study": write_report,
    "method": write_methods_report,
    "seed": write_seeds_report,
}
"""What writes the report, by what places a cell in that kind of comparison and in none of those below."""


def report_anew(out: Path) -> Path:
    """Write the report of a comparison of schemes, of methods of tuning or of seeds anew; returns its path.

    Args:
        out: folder of the comparison.

    Raises:
        RunFolderError: there is no comparison in the folder, or none of its runs is finished.
        FileError: its index is damaged.
        MissingExtra: matplotlib is not installed.
    """
    if not (out / "index.json").is_file():
        raise RunFolderError(f"{out} holds no comparison: there is no index.json in it")
    cells = read_json(out / "index.json").get("cells")
    listed = cells if isinstance(cells, list) else []
    places = {key for cell in listed if isinstance(cell, dict) for key in cell}
    for key, write in KINDS.items():
        if key in places:
            return write(out)
    raise RunFolderError(f"{out / 'index.json'} lists no cells: the comparison's own command writes it anew")
