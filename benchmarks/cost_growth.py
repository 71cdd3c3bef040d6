"""How the cost of a training step grows: with the batch, the length of chains, the dimension, and the processes.

python benchmarks/cost_growth.py    # some 40 s of processor time; writes cost_growth.csv and .png beside it
python benchmarks/cost_growth.py --redraw    # the picture anew, from the table beside it

Steps of the trainer with an MLP of 3 layers of 128 on Gaussian data: TD(λ) with own predictions on chains, and EDM
on as many single states. All sizes of an axis run in turn in every round, and what counts is processor time, which
other jobs on the machine disturb less. Of the largest four sizes two slopes are taken in logarithms, with 95 %
bootstrap intervals over rounds: p of the time of a step, and q of what that time is beyond the step of the smallest
size, so time ~ time_0 + c size^q. Processes are one and two of torchrun on gloo, which share one batch.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RL_WARNINGS", "0")

import numpy as np
import torch
from numpy.typing import NDArray
from timing import interleave
from trainer_step import trainer_step

from diffrl.data.dataset import Data
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.experiments.reports.style import GREY, PALETTE, drawing, plain_ticks, write_note
from diffrl.metrics.seeds import bootstrap_interval
from diffrl.objectives import ValueLoss
from diffrl.objectives.denoising import sample_log_normal_states
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.scheme import Objective
from diffrl.text_files import write_csv
from diffrl.training import joined
from diffrl.training.distributed import ALONE, Ranks

OUT = Path(__file__).with_name("cost_growth")
SCHEMES, PROCESS = ("TD(λ), own", "EDM"), EDM()
SHARED = {"batch": 256, "num_steps": 16, "dim": 2}
FITTED, ROUNDS, RESAMPLES = 4, 11, 1000
ENDS = ("", "_low", "_high")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """What grows while the rest stays: `key` of batch (chains), num_steps and dim takes these sizes."""

    name: str
    key: str
    sizes: tuple[int, ...]
    rest: Mapping[str, int]


AXES = (
    Axis("chains of 16 steps, in 2-D", "batch", tuple(2**i for i in range(9)), {"num_steps": 16, "dim": 2}),
    Axis("steps of 4 chains, in 2-D", "num_steps", tuple(2**i for i in range(2, 10)), {"batch": 4, "dim": 2}),
    Axis(
        "dimension of 8 chains of 16 steps",
        "dim",
        (2, 8, 32, 128, 512, 1024, 2048, 4096),
        {"batch": 8, "num_steps": 16},
    ),
)
PROCESSES = "processes that share 256 chains"
TITLES = ("a  Batch", "b  Length of chains", "c  Dimension", "d  Processes: each one's time")


def step_of(scheme: str, sizes: Mapping[str, int], ranks: Ranks = ALONE) -> Callable[[], object]:
    """A step of the trainer on batch · num_steps states."""
    batch, num_steps, dim = (sizes[key] for key in ("batch", "num_steps", "dim"))
    torch.manual_seed(0)
    denoiser = Denoiser(MLP((dim,)), PROCESS)
    if scheme == "EDM":
        loss, draw, rows = (
            monte_carlo_loss(denoiser),
            partial(sample_log_normal_states, PROCESS),
            batch * num_steps,
        )
    else:
        loss, rows = ValueLoss(denoiser, lmbda=0.5), batch
        draw = ChainSampler(Chain(PROCESS, num_steps, "markov"), jitter=False)  # type: ignore[assignment]
    x = torch.randn(4096, dim)
    return trainer_step(Objective(scheme, loss, draw), Data("noise", test=x[:64], train=x / 2), rows, ranks)


def grown(axis: Axis) -> dict[tuple[str, int], Array]:
    """Processor seconds of a step in each round, by scheme and size."""
    steps = {
        f"{scheme} {size}": step_of(scheme, {axis.key: size, **axis.rest})
        for scheme in SCHEMES
        for size in axis.sizes
    }
    seconds = interleave(steps, rounds=ROUNDS, repeats=2, warm_up=2)
    return {(scheme, size): seconds[f"{scheme} {size}"] for scheme in SCHEMES for size in axis.sizes}


def exponent(sizes: Sequence[int], seconds: Array, floor: Array) -> tuple[float, float, float]:
    """The slope of log (time - floor) over log size, and the ends of its interval.

    Args:
        sizes: n of them.
        seconds: in R rounds, shape [n, R].
        floor: what is taken off in each round, shape [R].
    """

    def slope(rounds: NDArray[np.int64]) -> float:
        times = np.median(seconds[:, rounds], 1) - np.median(floor[rounds])
        return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])

    R = len(floor)
    slopes = [slope(rounds) for rounds in np.random.default_rng(0).integers(R, size=(RESAMPLES, R))]
    low, high = np.quantile(slopes, (0.025, 0.975))
    return slope(np.arange(R)), float(low), float(high)


def rows_of(
    name: str, sizes: Sequence[int], seconds: Mapping[tuple[str, int], Array]
) -> list[dict[str, Any]]:
    """What the table holds of an axis; two sizes have no q."""
    rows, last = [], sizes[-FITTED:]
    for scheme in dict.fromkeys(scheme for scheme, _ in seconds):
        largest, smallest = np.array([seconds[scheme, n] for n in last]), seconds[scheme, sizes[0]]
        slopes = {"p": exponent(last, largest, 0 * smallest)}
        if sizes[0] not in last:
            slopes["q"] = exponent(last, largest, smallest)
        for size in sizes:
            times = 1e3 * seconds[scheme, size]
            found = {
                "ms": (float(np.median(times)), *bootstrap_interval(times, statistic=np.median)),
                **slopes,
            }
            told = {
                f"{k}{end}": float(f"{v:.4g}")
                for k, x in found.items()
                for end, v in zip(ENDS, x, strict=True)
            }
            rows.append({"axis": name, "scheme": scheme, "size": size, "fitted": size in last, **told})
    return rows


def share_a_batch(folder: Path) -> None:
    """What each process that torchrun starts does: times its own part of steps, and writes it to the folder."""
    torch.set_num_threads(1)
    with joined("cpu", timeout=300) as ranks:
        steps = {scheme: step_of(scheme, SHARED, ranks) for scheme in SCHEMES}
        seconds = interleave(steps, rounds=2 * ROUNDS, repeats=2)
        told = {scheme: times.tolist() for scheme, times in seconds.items()}
        (folder / f"{ranks.size}_{ranks.rank}.json").write_text(json.dumps(told), encoding="utf-8")


def shared() -> dict[tuple[str, int], Array]:
    """Processor seconds of a step by scheme and number of processes: those of one of them, the mean of all."""
    found: dict[tuple[str, int], Array] = {}
    with tempfile.TemporaryDirectory() as place:
        for size in (1, 2):
            torchrun = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={size}",
            ]
            subprocess.run(
                [*torchrun, __file__, "--share", place], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            parts = [
                json.loads(path.read_text(encoding="utf-8")) for path in Path(place).glob(f"{size}_*.json")
            ]
            for scheme in SCHEMES:
                found[scheme, size] = np.mean([part[scheme] for part in parts], 0)
    return found


def kept(table: Path) -> list[dict[str, Any]]:
    """The rows of the table that was written, numbers as numbers; what a row lacks is left out."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    words = ("axis", "scheme", "fitted")
    return [
        {k: v == "True" if k == "fitted" else v if k in words else float(v) for k, v in row.items()}
        for row in rows
    ]


def draw(rows: Sequence[Mapping[str, Any]]) -> None:
    """The figure: a panel for each axis, time over size, with what the slopes say."""
    names = list(dict.fromkeys(row["axis"] for row in rows))
    with drawing(figsize=(3.1 * len(names), 3.6)) as figure:
        for axes, name, title in zip(figure.subplots(1, len(names)), names, TITLES, strict=True):
            for scheme, (colour, marker) in zip(SCHEMES, PALETTE, strict=False):
                line = [row for row in rows if (row["axis"], row["scheme"]) == (name, scheme)]
                x, y, low, high = (
                    np.array([row[c] for row in line]) for c in ("size", "ms", "ms_low", "ms_high")
                )
                label = f"{scheme}: " + ",  ".join(
                    f"{k} = {line[0][k]:.2f}" for k in ("p", "q") if k in line[0]
                )
                axes.errorbar(
                    x, y, np.abs([y - low, high - y]), color=colour, fmt=marker, ms=4, lw=1, label=label
                )
                axes.plot(x, _curve(x, y, line[0]), color=colour, lw=1)
            axes.set(
                xscale="log",
                yscale="log",
                xlabel=name,
                title=title,
            )
            axes.set_ylabel("milliseconds a step" if name == names[0] else "", color=GREY)
            bottom, top = axes.get_ylim()
            axes.set_ylim(bottom, top * (top / bottom) ** 0.25)  # room for the legend
            plain_ticks(axes.xaxis, most=5)
            plain_ticks(axes.yaxis, most=6)
            axes.legend(loc="upper left", fontsize=7, frameon=False)
        write_note(
            figure,
            "Processor time of a training step of an MLP: medians of interleaved rounds with 95 % intervals, on a "
            "machine that other jobs used too. In the largest four sizes time grows as size^p, and what is beyond the "
            "smallest size as size^q: the lines. Intervals of p and q are in the table beside this file.",
        )
        figure.savefig(OUT.with_suffix(".png"), dpi=150)


def _curve(x: Array, y: Array, row: Mapping[str, Any]) -> Array:
    """Time as the slopes have it: that of the smallest size, and c size^q; without q it is c size^p."""
    floor, slope, fitted = (
        (y[0], row["q"], slice(-FITTED, None)) if "q" in row else (0.0, row["p"], slice(None))
    )
    log_c = np.mean(np.log(y[fitted] - floor) - slope * np.log(x[fitted]))
    curve: Array = floor + np.exp(log_c) * x**slope
    return curve


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--share", type=Path, help="what torchrun calls: a folder for the times of this process"
    )
    parser.add_argument("--redraw", action="store_true", help="measure nothing, draw the table that is there")
    words = parser.parse_args()
    if words.share is not None:
        return share_a_batch(words.share)
    if words.redraw:
        return draw(kept(OUT.with_suffix(".csv")))
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for axis in AXES:
        rows += rows_of(axis.name, axis.sizes, grown(axis))
    rows += rows_of(PROCESSES, (1, 2), shared())
    for row in rows:
        if row["size"] == max(r["size"] for r in rows if r["axis"] == row["axis"]):
            slopes = [
                f"{k} = {row[k]:.2f} [{row[k + '_low']:.2f}, {row[k + '_high']:.2f}]"
                for k in "pq"
                if k in row
            ]
            print(f"{row['axis']}, {row['scheme']}: {row['ms']:.3g} ms at {row['size']}, {', '.join(slopes)}")
    write_csv(OUT.with_suffix(".csv"), list(rows[0]), rows)
    draw(rows)


if __name__ == "__main__":
    main()
