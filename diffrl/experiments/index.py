"""The index of a comparison: its cells and their folders, the commands that were run, the seconds that cells took."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrl.text_files import read_json, write_atomically
from diffrl.training.runs import RunFolderError

__all__ = ["past_index", "read_index", "write_index"]

LATER = {"rate": "fixed", "point": ""}
"""What places a cell today but did not yet in diffrl 0.3, and what it was there."""


def read_index(out: Path, keys: Sequence[str], about: Sequence[str] = ()) -> dict[str, Any]:
    """The index of a comparison.

    Args:
        out: folder of the comparison.
        keys: what places a cell in this kind of comparison, such as study, case, scheme and seed.
        about: what else the index must tell.

    Raises:
        RunFolderError: there is no comparison in the folder, or one of another kind, or the index is damaged.
    """
    file = out / "index.json"
    if not file.is_file():
        raise RunFolderError(f"{out} holds no comparison: there is no {file.name} in it")
    index: dict[str, Any] = read_json(file)
    cells = index.get("cells")
    listed = isinstance(index.get("commands"), list) and isinstance(index.get("seconds", {}), dict)
    if not listed or not isinstance(cells, list) or not all(map(_is_entry, cells)):
        raise RunFolderError(
            f"{file} is damaged: it lists no cells: remove it, and the comparison's own command writes it anew"
        )
    index["cells"] = cells = [_of_today(cell, keys) for cell in cells]
    for cell in cells:
        if set(cell) != {*keys, "folder"}:
            found, wanted = ", ".join(key for key in cell if key != "folder"), ", ".join(keys)
            raise RunFolderError(
                f"{out} holds another kind of comparison, with one run for each {found} and not for each {wanted}: "
                "choose another out"
            )
    if lacking := [key for key in about if key not in index]:
        raise RunFolderError(
            f"{file} is damaged: it lacks {', '.join(lacking)}: the comparison's own command writes it anew"
        )
    return index


def past_index(out: Path, places: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The index of a comparison as it was run before; empty if it was not.

    Args:
        out: folder of the comparison.
        places: of its cells now.

    Raises:
        RunFolderError: there is something else in the folder, or the index is damaged.
    """
    if (out / "config.yaml").exists():
        raise RunFolderError(f"{out} holds a run, and not a comparison: choose another folder")
    if not places or not (out / "index.json").exists():
        return {}
    return read_index(out, tuple(places[0]))


def write_index(index: Mapping[str, Any], out: Path) -> None:
    """Write the index anew.

    Raises:
        FileError: it cannot be written.
    """
    write_atomically(out / "index.json", json.dumps(index, indent=1, ensure_ascii=False))


def _is_entry(cell: Any) -> bool:
    """Whether it can be the place of a cell in an index."""
    return isinstance(cell, dict) and isinstance(cell.get("folder"), str)


def _of_today(cell: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A cell's entry with what entries of older versions lack."""
    lacking = {key: value for key, value in LATER.items() if key in keys and key not in cell}
    if not lacking or set(cell) | lacking.keys() != {*keys, "folder"}:
        return cell
    return {key: {**cell, **lacking}[key] for key in (*keys, "folder")}
