"""The page of the map, made from the registry: every objective by its coordinates, as a table and as a picture.

python docs/map_page.py                             # print the page
python docs/map_page.py --import my_module          # with objectives of your own
python docs/map_page.py --picture docs/images/map.png
"""

import argparse
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # run as a script, this file knows its own folder only

from diffrl.objectives.place import Place  # noqa: E402
from diffrl.registry import import_named  # noqa: E402
from docs.docstrings import markdown, write_folder  # noqa: E402
from docs.fixed_points import fixed_points_page  # noqa: E402
from docs.map_picture import draw_map  # noqa: E402
from docs.map_places import WORDS, placed, unplaced  # noqa: E402

__all__ = ["map_page", "write_map"]

INTRO = """# The map

Every way to train that is registered stands here by six coordinates, which are written where it is registered:

* **What is learned**: the denoiser D(x, t) = E\\[x0 | x_t\\]; or a map of the probability-flow ODE, to the next level
  of a grid, to clean data (a consistency function), or to any less noisy level r.
* **States**: of one datum a network is asked about a whole chain, about a pair of states, or about a single one.
* **Coupling**: whether successive states have fresh noise at each step (Markov), or share their noise or lie on one
  path of an ODE. "Any" is what `chain.coupling` says.
* **How far the target looks** before a network is asked again. A target that looks to the end asks none: Monte Carlo.
* **What it bootstraps from**: whose prediction is in the target.
* **Where the next state comes from.**

They are those of the default options; others may move a scheme, as `objective.lmbda` and `objective.bootstrap` do.
"""

ALONE = "These give no coordinates (`place=Place(...)` where they are registered)"


TOC = "```{toctree}\n:hidden:\n\nfixed_points\n```"


def map_page(picture: str = "map.png") -> str:
    """The page, in Markdown, for the folder `map` beside that of the methods.

    Args:
        picture: path of the picture from the page.
    """
    head = ["objective", "learned", "states", "coupling", "target looks", "bootstraps from", "next state", ""]
    rows = [f"| {' | '.join(_row(name, place))} |" for name, place in placed().items()]
    table = "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])
    parts = [INTRO.strip(), f"![Every objective in its place]({picture})", _caption(), table, TOC]
    if alone := unplaced():
        parts += ["## Without coordinates", f"{ALONE}: {', '.join(map(_link, alone))}."]
    return "\n\n".join(parts) + "\n"


def _caption() -> str:
    return (
        "An arrow leads from where a training begins to where it ends, of those whose target changes along it. Method "
        "pages have the formulas; [fixed points](fixed_points.md), what each learns of data from N(0, 1) in numbers."
    )


def _link(name: str) -> str:
    return f"[`{name}`](../methods/objective/{name}.md)"


def _row(name: str, place: Place) -> list[str]:
    said = {key: words[getattr(place, key)] for key, words in WORDS.items()}
    if place.begins is not None:
        said["look"] = f"at first {WORDS['look'][place.begins]}, then {said['look']}"
    return [_link(name), *said.values(), markdown(place.note)]


# The site


def write_map(folder: Path) -> None:
    """Write the page, its picture and the page of fixed points into a folder."""
    write_folder(folder, {"index.md": map_page(), "fixed_points.md": fixed_points_page()})
    draw_map(folder / "map.png")


def main() -> None:
    """Print the page, or draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", type=Path, help="draw it there, and print nothing")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own")
    given = parser.parse_args()
    try:
        import_named(*given.modules)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if given.picture is not None:
        draw_map(given.picture)
    else:
        print(map_page(), end="")


if __name__ == "__main__":
    main()
