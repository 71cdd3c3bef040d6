"""Why TD(0) from own predictions stalls: interventions, each predicted in docs/why_td_stalls.md beforehand.

python examples/why_td_stalls.py                          # all parts: 163 runs, most of 6 to 15 s
python examples/why_td_stalls.py --part momentum lag      # some of them
python examples/why_td_stalls.py --part baseline --seeds 21

Parts: baseline, momentum (corrected), sgd, rates, levels (a network each), lag (of a target), step (the same v), noise,
processes, kernel (eigenvalues on the way), tangent (the linearised network), oscillation. Finished runs are kept in
OUT/runs.jsonl and OUT/linear.jsonl. Writes the tables to OUT/README.md and figures beside it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stall.figures import draw_all
from stall.runs import FLOW, MC, OWN, PARTS, Kept, kept_rows, name
from stall.state import states
from stall.tables import report
from stall.tangent import mode_in_time, spectra, tangent_runs

from diffrl.errors import DiffrlError, InputError
from diffrl.text_files import write_atomically

HALF = replace(OWN, beta1=0.5)
LINEAR: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "kernel": (spectra, [OWN, HALF, MC, replace(HALF, **FLOW)]),
    "tangent": (tangent_runs, [OWN, HALF]),
    "state": (states, [OWN, HALF, MC]),
    "oscillation": (mode_in_time, [OWN, HALF]),
}


def linear(part: str, path: Path, seeds: Sequence[int] = ()) -> None:
    """Run what is missing of a part of the linear theory, at these seeds; at all if there are none."""
    done = {(row["part"], row["name"], row["seed"]) for row in kept_rows(path)}
    make, runs = LINEAR[part]
    for run in runs:
        row = {"part": part, "name": name(run), "seed": run.seed}
        if tuple(row.values()) in done or (seeds and run.seed not in seeds):
            continue
        row |= {"run": asdict(run), "found": make(run)}
        print(f"{part}: {row['name']}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main(arguments: argparse.Namespace) -> None:
    """Run the parts that are asked for, and report all that is there."""
    out: Path = arguments.out
    runs = [run for part in arguments.part for run in (LINEAR[part][1] if part in LINEAR else PARTS[part])]
    seeds = {run.seed for run in runs}
    if arguments.seeds and seeds.isdisjoint(arguments.seeds):
        known = ", ".join(map(str, sorted(seeds)))
        raise InputError(f"--seeds: no run of these parts has one of them: give some of {known}")
    kept = Kept(out / "runs.jsonl")
    for part in arguments.part:
        if part in LINEAR:
            linear(part, out / "linear.jsonl", arguments.seeds)
            continue
        for run in PARTS[part]:
            if not arguments.seeds or run.seed in arguments.seeds:
                kept.get(run)
    write_atomically(out / "README.md", report(kept))
    draw_all(kept, out)


def parser() -> argparse.ArgumentParser:
    """Of the words on the command line."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*PARTS, *LINEAR]
    words.add_argument(
        "--part", nargs="+", choices=every, default=every, metavar="PART", help=", ".join(every)
    )
    words.add_argument("--seeds", type=int, nargs="+", default=(), help="only these")
    words.add_argument("--out", type=Path, default=Path("results/stall"))
    return words


if __name__ == "__main__":
    try:
        main(parser().parse_args())
    except DiffrlError as error:
        sys.exit(f"error: {error}")
