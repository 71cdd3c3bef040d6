"""How the cost of a training step grows: with the batch, the length of chains, the dimension, and the processes.

python benchmarks/cost_growth.py    # a minute and a half of processor time; writes cost_growth.csv and .png beside it

Steps of the trainer with an MLP of 3 layers of 128 on Gaussian data: TD(λ) with own predictions on chains, and EDM
on as many single states. All sizes of an axis run in turn in every round, and what counts is processor time, which
other jobs on the machine disturb less. An exponent p, time ~ size^p, is the slope of the largest four sizes in the
logarithms of both, the median over rounds with its 95 % bootstrap interval. Processes are one and two of torchrun on
gloo, which share one batch.
"""

import argparse
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
from diffrl.training.optim import Optim
from diffrl.training.trainer import Average, Length, Target, Trainer

OUT = Path(__file__).with_name("cost_growth")
SCHEMES, PROCESS = ("TD(λ), own", "EDM"), EDM()
SHARED = {"batch": 64, "num_steps": 16, "dim": 2}
FITTED, ROUNDS = 4, 15
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """What grows while the rest stays: `key` of batch (chains), num_steps and dim takes these sizes."""

    name: str
    key: str
    sizes: tuple[int, ...]
    rest: Mapping[str, int]


AXES = (
    Axis("chains in a batch", "batch", tuple(2**i for i in range(9)), {"num_steps": 16, "dim": 2}),
    Axis("steps of a chain", "num_steps", tuple(2**i for i in range(2, 10)), {"batch": 4, "dim": 2}),
    Axis("dimension", "dim", (2, 8, 32, 128, 512, 1024, 2048, 4096), {"batch": 8, "num_steps": 16}),
)
PROCESSES = "processes"


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
    trainer = Trainer(
        Objective(scheme, loss, draw),
        Data("noise", test=x[:64], train=x / 2),
        seed=0,
        folder=None,
        length=Length(grad_steps=10**6, batch_size=rows),
        optim=Optim(lr=1e-4, warmup_steps=0, clip_norm=1.0),
        average=Average(2000.0, None),
        target=Target(),
        ranks=ranks,
    )
    return partial(next, trainer.steps())


def grown(axis: Axis) -> dict[tuple[str, int], Array]:
    """Processor seconds of a step in each round, by scheme and size."""
    steps = {
        f"{scheme} {size}": step_of(scheme, {axis.key: size, **axis.rest})
        for scheme in SCHEMES
        for size in axis.sizes
    }
    seconds = interleave(steps, rounds=ROUNDS, repeats=2, warm_up=2)
    return {(scheme, size): seconds[f"{scheme} {size}"] for scheme in SCHEMES for size in axis.sizes}


def exponent(sizes: Sequence[int], seconds: Sequence[Array]) -> tuple[float, float, float]:
    """The p of time ~ size^p: the slope in each round, their median and its interval; rounds are paired."""
    slopes = np.polyfit(np.log(sizes), np.log(np.array(seconds)), 1)[0]
    return float(np.median(slopes)), *bootstrap_interval(slopes, statistic=np.median)


def rows_of(
    name: str, sizes: Sequence[int], seconds: Mapping[tuple[str, int], Array]
) -> list[dict[str, Any]]:
    """What the table holds of an axis."""
    rows, last = [], sizes[-FITTED:]
    for scheme in dict.fromkeys(scheme for scheme, _ in seconds):
        p, low, high = exponent(last, [seconds[scheme, size] for size in last])
        for size in sizes:
            times = 1e3 * seconds[scheme, size]
            ends = bootstrap_interval(times, statistic=np.median)
            figures = (float(np.median(times)), *ends, p, low, high)
            columns = ("milliseconds", "low", "high", "exponent", "exponent_low", "exponent_high")
            told = {c: float(f"{v:.4g}") for c, v in zip(columns, figures, strict=True)}
            rows.append({"axis": name, "scheme": scheme, "size": size, "fitted": size in last, **told})
    return rows


def share_a_batch(folder: Path) -> None:
    """What each process that torchrun starts does: times its own part of steps, and writes it to the folder."""
    torch.set_num_threads(1)
    with joined("cpu", timeout=300) as ranks:
        steps = {scheme: step_of(scheme, SHARED, ranks) for scheme in SCHEMES}
        seconds = interleave(steps, rounds=4 * ROUNDS, repeats=4)
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
            parts = [json.loads(path.read_text("utf-8")) for path in Path(place).glob(f"{size}_*.json")]
            for scheme in SCHEMES:
                found[scheme, size] = np.mean([part[scheme] for part in parts], 0)
    return found


def draw(rows: Sequence[Mapping[str, Any]]) -> None:
    """The figure: a panel for each axis, time over size, with the fitted slopes."""
    names = list(dict.fromkeys(row["axis"] for row in rows))
    with drawing(figsize=(3.0 * len(names), 3.3)) as figure:
        for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
            for scheme, (colour, marker) in zip(SCHEMES, PALETTE, strict=False):
                line = [row for row in rows if (row["axis"], row["scheme"]) == (name, scheme)]
                x, y, low, high = (
                    np.array([r[c] for r in line]) for c in ("size", "milliseconds", "low", "high")
                )
                p = [line[0][key] for key in ("exponent", "exponent_low", "exponent_high")]
                label = f"{scheme}: p = {p[0]:.2f} [{p[1]:.2f}, {p[2]:.2f}]"
                errors = np.abs([y - low, high - y])
                axes.errorbar(
                    x, y, errors, color=colour, marker=marker, ms=4, lw=0, elinewidth=1, label=label
                )
                fitted = np.array([r["fitted"] for r in line])
                middle = np.exp(np.log(y[fitted]).mean() - p[0] * np.log(x[fitted]).mean())
                axes.plot(x[fitted], middle * x[fitted] ** p[0], color=colour, lw=1.2)
            axes.set(
                xscale="log",
                yscale="log",
                xlabel=name,
                title="one process" if name == PROCESSES else "a step",
            )
            axes.set_ylabel("milliseconds" if name == names[0] else "", color=GREY)
            plain_ticks(axes.xaxis, most=5)
            plain_ticks(axes.yaxis, most=6)
            axes.legend(loc="upper left" if name != PROCESSES else "upper right", fontsize=7, frameon=False)
        write_note(
            figure,
            "Processor time of a training step of an MLP, medians of interleaved rounds with 95 % intervals, on a "
            "machine that other jobs used too. Lines: slopes p of the largest four sizes. Processes: the time of one "
            "of them, for one batch of all.",
        )
        figure.savefig(OUT.with_suffix(".png"), dpi=150)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--share", type=Path, help="what torchrun calls: a folder for the times of this process"
    )
    words = parser.parse_args()
    if words.share is not None:
        return share_a_batch(words.share)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for axis in AXES:
        rows += rows_of(axis.name, axis.sizes, grown(axis))
    rows += rows_of(PROCESSES, (1, 2), shared())
    for row in rows:
        if row["size"] == max(r["size"] for r in rows if r["axis"] == row["axis"]):
            p = "{exponent:.2f} [{exponent_low:.2f}, {exponent_high:.2f}]".format(**row)
            print(
                f"{row['axis']:<18} {row['scheme']:<11} p = {p}, {row['milliseconds']:.3g} ms at {row['size']}"
            )
    write_csv(OUT.with_suffix(".csv"), list(rows[0]), rows)
    draw(rows)


if __name__ == "__main__":
    main()
