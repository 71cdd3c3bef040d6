"""Few-step generators in the plane: TDM by number of steps and process, TDM-R1 against many steps tuned by DDPO.

python examples/few_step_plane.py --part steps --seeds 3 --distillation 300    # some 4 minutes of one core
python examples/few_step_plane.py --part claim --seeds 5                       # some 15 minutes of one core

All data are Gaussian mixtures and all teachers are exact. A cell is kept once it is there, so that a stopped study goes
on. Writes plane_tdm.json and .png (the first study), plane_tdm_r1.json and .png (the second).
"""

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import diffrl
from diffrl import recipes
from diffrl.data.mixtures import Mixture
from diffrl.diffusion.predictions import Scalings, scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.experiments.reports.style import GREY, PALETTE, drawing
from diffrl.extras import require_installed
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.ddpo import PPOClip
from diffrl.finetuning.methods.dgpo import GroupPreference
from diffrl.finetuning.methods.tdm import TrajectoryMatching
from diffrl.finetuning.methods.tdm_r1 import LearntReward
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.updates.boundaries import BoundaryUpdates
from diffrl.finetuning.updates.preferences import PreferenceUpdates
from diffrl.finetuning.updates.steps import Updates
from diffrl.metrics.intervals import Interval, interval
from diffrl.metrics.point_clouds import sliced_w2
from diffrl.text_files import write_atomically
from diffrl.text_tables import text_table
from diffrl.training.optim import Optim
from diffrl.training.provenance import versions

LEVELS = 1000  # of the grid that steps are spaced on
MANY = 50  # steps of the model that is distilled
SAMPLES = 4000  # of a policy and of the data
WITHIN = 3.0  # standard deviations, of a sample on its mode
PROCESSES: dict[str, Callable[[], Schedule]] = {"flow": diffrl.Flow, "VP": diffrl.VP, "EDM": diffrl.EDM}
KINDS: dict[type, Any] = {diffrl.Flow: "velocity", diffrl.VP: "v", diffrl.EDM: "edm"}
LEARNT: dict[str, Any] = {
    "beta": 50.0, "anchor_coef": 0.3, "clip_range": 1e-2, "runaway": None, "reward_weight": 1.0,
    "surrogate_lr": 5e-4, "fake_lr": 2e-3, "fake_anchor_coef": 0.0,
}  # fmt: skip
"""Of TDM-R1, chosen on the four modes."""


@dataclass(frozen=True)
class Way:
    """How a student is tuned: the surrogate, and where noise is added to a boundary for KL and fake score.

    "trajectory" is how the student was distilled; "reverse" is how the released code tunes.
    """

    surrogate: Any
    interval: Literal["trajectory", "reverse"] = "trajectory"


VARIANTS = {
    "TDM-R1": Way(LearntReward(**LEARNT)),
    "interval reversed": Way(LearntReward(**LEARNT), "reverse"),
    "reference frozen": Way(LearntReward(**LEARNT, reference="frozen")),
    "no KL": Way(LearntReward(**{**LEARNT, "kl_weight": 0.0})),
    "group loss on the student": Way(
        GroupPreference(reference="ema", beta=50.0, clip_range=1e-2, anchor_coef=0.3)
    ),
    "no reward": Way(LearntReward(**{**LEARNT, "reward_weight": 0.0})),
}
STUDENT_LR = 5e-4


def circle(modes: int, radius: float, std: float, dims: int = 2) -> Mixture:
    """Equal Gaussians on a circle in the first two of so many dimensions."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    means = torch.zeros(modes, dims)
    means[:, 0], means[:, 1] = radius * angle.cos(), radius * angle.sin()
    return Mixture(means, torch.full((modes,), std), torch.full((modes,), 1 / modes))


def scattered(seed: int, modes: int = 5, dims: int = 3) -> Mixture:
    """Equal Gaussians at random places of a sphere of radius 1.5, at least 1.4 apart, of std 0.25."""
    g = torch.Generator().manual_seed(seed)
    while True:
        means = 1.5 * nn.functional.normalize(torch.randn(modes, dims, generator=g), dim=1)
        if float(nn.functional.pdist(means).min()) > 1.4:
            return Mixture(means, torch.full((modes,), 0.25), torch.full((modes,), 1 / modes))


def law_of(name: str, seed: int) -> Mixture:
    """The data: four modes, on which numbers were chosen, rings, modes of its own for each seed, a circle in 8-D."""
    if name == "rings":
        mixture = diffrl.data.rings().mixture
        assert mixture is not None
        return mixture
    if name == "scattered":
        return scattered(seed)
    return circle(4, 1.5, 0.25) if name == "four modes" else circle(8, 1.5, 0.2, dims=8)


class Corrected(nn.Module):
    """D = exact + c_out F, with a small network F that begins at 0."""

    def __init__(self, process: Schedule, law: Mixture, hidden: int = 96) -> None:
        super().__init__()
        self.process, self.sigma_data = process, law.sigma_data
        self.exact = diffrl.MixtureDenoiser(process, law.means, law.stds, law.weights)
        D = law.means.shape[1]
        layers = nn.Linear(D + 3, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        last = nn.Linear(hidden, D)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*layers, last)

    def scalings(self, t: Tensor) -> Scalings:
        """Of the network's parametrisation."""
        return scalings(self.process, t, KINDS[type(self.process)], self.sigma_data)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """D of states [N, D] at times [N]."""
        _, c_out, c_in = (c[:, None].to(x_t) for c in self.scalings(t))
        c = self.process.c_noise(t)[:, None].to(x_t)
        return self.exact(x_t, t) + c_out * self.network(
            torch.cat([c_in * x_t, c, (4 * c).sin(), (4 * c).cos()], 1)
        )


@dataclass(frozen=True)
class Whole(diffrl.DDIM):
    """DDIM whose K levels lie at 0, 1/K, ... of the way: the last step, too, has a way to go."""

    def grid(self, process: Schedule, num_steps: int) -> Tensor:
        """Times, the clean one last."""
        return process.time(torch.arange(num_steps + 1) * LEVELS / num_steps, LEVELS)


def policy_of(denoiser: nn.Module, K: int, *, eta: float = 0.0) -> diffrl.DenoisingPolicy:
    """K steps of a denoiser."""
    return diffrl.DenoisingPolicy(denoiser, Whole(eta), num_steps=K, reduction="mean")


def samples(policy: diffrl.DenoisingPolicy, dims: int, n: int, seed: int) -> Tensor:
    """Samples [n, D], from the same first noise for all policies."""
    g = torch.Generator().manual_seed(10_000 + seed)
    x = float(policy.process.sigma(policy.grid[0])) * torch.randn(n, dims, generator=g)
    with torch.no_grad():
        for k in range(policy.num_steps):
            x = policy.law(x, torch.full((n,), k)).sample(lambda like: torch.randn(like.shape, generator=g))
    return x


def on_mode(x: Tensor, law: Mixture) -> tuple[Tensor, Tensor]:
    """The nearest mode of each sample, and whether it lies within three standard deviations in each direction."""
    distance, mode = torch.cdist(x.double(), law.means).min(1)
    # the norm of noise grows with the dimension
    reach = WITHIN if x.shape[1] == 2 else math.sqrt(x.shape[1]) + 2
    return mode, distance < reach * law.stds[mode]


def wanted(mode: Tensor, law: Mixture) -> Tensor:
    """Whether modes are rewarded: a quarter of all, neighbours, the first left out."""
    return (mode >= 1) & (mode <= len(law.means) // 4)


def hard(law: Mixture) -> Callable[..., list[float]]:
    """The reward: 1 on a mode that is wanted, else 0; as Python numbers, without a gradient."""

    def reward(x0: Tensor, cond: Any = None) -> list[float]:
        mode, on = on_mode(x0, law)
        return (wanted(mode, law) & on).double().tolist()

    return reward


def judged(x: Tensor, law: Mixture, seed: int) -> float:
    """Another judge than the reward: the share whose nearest of other data is of a wanted mode, as near as data are.

    As near as 99 % of other data are to their nearest.
    """
    g = torch.Generator().manual_seed(20_000 + seed)
    data, others = law.sample(SAMPLES, g), law.sample(SAMPLES, g)
    near = torch.cdist(others, data).min(1).values.quantile(0.99)
    distance, which = torch.cdist(x.double(), data).min(1)
    return float((wanted(on_mode(data[which], law)[0], law) & (distance <= near)).double().mean())


def figures(x: Tensor, law: Mixture, seed: int) -> dict[str, float]:
    """What is told of samples: share on a mode, distances, reward, judge, diversity.

    "shape distance": sliced W2 of all x - μ, μ the nearest mode, to the noise of the data, in its own std: it does not
    see which modes are taken. "spread": std of samples on a mode over that of data on one. "modes": exp of the
    entropy of the modes.
    """
    g = torch.Generator().manual_seed(30_000 + seed)
    data = law.sample(len(x), g)
    mode, on = on_mode(x, law)
    of_data, on_data = on_mode(data, law)
    rest = (x.double() - law.means[mode]) / law.stds[mode][:, None]
    rest_data = (data - law.means[of_data]) / law.stds[of_data][:, None]

    def spread(rest: Tensor, mode: Tensor, on: Tensor) -> float:
        most = mode[on].mode().values if bool(on.any()) else mode[0]  # of the mode with most samples
        return float(rest[on & (mode == most)].std(0, correction=0).mean()) if bool(on.any()) else 0.0

    share = torch.bincount(mode, minlength=len(law.means)).double() / len(mode)
    return {
        "on": float(on.double().mean()),
        "distance": sliced_w2(x, data, projections=100),
        "reward": sum(hard(law)(x)) / len(x),
        "judge": judged(x, law, seed),
        "shape distance": sliced_w2(rest, rest_data, projections=100),
        "spread": spread(rest, mode, on) / spread(rest_data, of_data, on_data),
        "modes": float(torch.special.entr(share).sum().exp()),
    }


def tuner(
    policy: diffrl.DenoisingPolicy, law: Mixture, recipe: Recipe, optim: Optim, n: int, **given: Any
) -> Finetuner:
    """A run of n iterations, to its end."""
    shape = (law.means.shape[1],)
    run = Finetuner(policy, hard(law), recipe, event_shape=shape, optim=optim, length=Iterations(n), **given)
    for _ in run.steps():
        pass
    return run


def steady(lr: float, betas: tuple[float, float]) -> Optim:
    """A constant learning rate."""
    return Optim(lr, betas=betas, warmup_steps=0, decay="none")


def distil(law: Mixture, process: Schedule, K: int, seed: int, n: int) -> Finetuner:
    """TDM: every update of the fake score has a third of a fresh rollout, every third is the student's, too."""
    torch.manual_seed(seed)
    matching = TrajectoryMatching(fake_updates=3, fake_lr=2e-3, betas=(0.9, 0.99))
    pieces = {
        "rollouts": recipes.Rollouts(768),
        "updates": BoundaryUpdates(minibatches=3),
        "surrogate": matching,
    }
    policy = policy_of(Corrected(process, law), K)
    return tuner(policy, law, recipes.tdm(**pieces), steady(1e-3, (0.9, 0.99)), n, seed=seed)


def tune(distilled: Finetuner, law: Mixture, seed: int, n: int, way: Way) -> dict[str, float]:
    """TDM-R1, or another surrogate on the same groups, from a distilled student; figures at the end."""
    times: dict[str, Any] = {"preference_t_min": 0.0, "reward_t_min": 0.0}
    plan = PreferenceUpdates(interval=way.interval, draws=1, passes=4, **times)
    recipe = recipes.tdm_r1(
        rollouts=recipes.Rollouts(192, group_size=16), updates=plan, surrogate=way.surrogate
    )
    policy = policy_of(copy.deepcopy(distilled.policy.denoiser), distilled.policy.num_steps)
    given: dict[str, Any] = {"seed": seed, "teacher": distilled.base.denoiser}
    if isinstance(way.surrogate, LearntReward):  # the fake score goes on from its distillation
        given["twins"] = {"fake": distilled.references.twin("fake").denoiser}
    run = tuner(policy, law, recipe, steady(STUDENT_LR, (0.0, 0.999)), n, **given)
    return told(policy, law, seed) | {"queries": float(run.figures["queries"])}


def many_steps(law: Mixture, process: Schedule, seed: int, n: int, lr: float = 1e-3) -> dict[str, float]:
    """The model of many stochastic steps, tuned by DDPO with as many queries; figures at the end."""
    torch.manual_seed(seed)
    policy = policy_of(Corrected(process, law), MANY, eta=1.0)
    recipe = recipes.ddpo_is(
        rollouts=recipes.Rollouts(192),
        updates=Updates(minibatches=4, fraction=0.2),
        surrogate=PPOClip(clip_range=0.1),
    )
    run = tuner(policy, law, recipe, steady(lr, (0.9, 0.999)), n, seed=seed)
    return told(policy, law, seed) | {"queries": float(run.figures["queries"])}


def told(policy: diffrl.DenoisingPolicy, law: Mixture, seed: int) -> dict[str, float]:
    """Figures of samples of a policy."""
    return figures(samples(policy, law.means.shape[1], SAMPLES, seed), law, seed)


def steps_cell(process: str, K: int, n: int, seed: int) -> dict[str, dict[str, float]]:
    """The first study: a student of K steps on four modes, and its teacher's own K steps."""
    law = law_of("four modes", seed)
    run = distil(law, PROCESSES[process](), K, seed, n)
    return {"teacher": told(run.base, law, seed), "student": told(run.policy, law, seed)}


def claim_cell(data: str, n: int, tuned: int, names: list[str], seed: int) -> dict[str, dict[str, float]]:
    """The second study: the base of many steps, its few, TDM, DDPO on many steps, and the named ways to tune few."""
    law, flow = law_of(data, seed), diffrl.Flow()
    run = distil(law, flow, 4, seed, n)
    found = {
        "data": figures(law.sample(SAMPLES, torch.Generator().manual_seed(40_000 + seed)), law, seed),
        f"base, {MANY} steps": told(policy_of(run.base.denoiser, MANY), law, seed),
        "base, 4 steps": told(run.base, law, seed),
        "TDM, 4 steps": told(run.policy, law, seed),
        f"DDPO, {MANY} steps": many_steps(law, flow, seed, tuned),
    }
    return found | {name: tune(run, law, seed, tuned, VARIANTS[name]) for name in names}


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds; it is made first where it is not there."""
    if not path.exists():
        start = time.perf_counter()
        found = make()
        write_atomically(
            path, json.dumps({"seconds": round(time.perf_counter() - start, 1), "found": found}) + "\n"
        )
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def cells_of(
    a: argparse.Namespace, seeds: range, name: str, make: Callable[[int], dict[str, Any]]
) -> tuple[list[dict[str, Any]], float]:
    """What a cell of this name has at each seed, and the seconds that it took at all of them."""
    each = [kept(a.work / f"{name}_seed{seed}.json", partial(make, seed)) for seed in seeds]
    return [cell["found"] for cell in each], sum(cell["seconds"] for cell in each)


def summary(seeds: list[Any]) -> dict[str, Any]:
    """The tree of each seed, with the interquartile mean, its interval and the values at the leaves."""
    if not isinstance(seeds[0], dict):
        middle, *ends = interval(seeds)
        return {"iqm": middle, "interval": ends if len(seeds) > 1 else None, "seeds": seeds}
    return {key: summary([seed[key] for seed in seeds]) for key in seeds[0]}


def shown(cell: dict[str, Any]) -> str:
    """The mean, and its interval in brackets."""
    return f"{Interval(cell['iqm'], *(cell['interval'] or (None, None))):.2f}"


def table(name: str, rows: dict[str, dict[str, Any]], columns: tuple[str, ...]) -> str:
    """A row for each variant, a column for each figure."""
    body = [[row, *(shown(of[c]) for c in columns)] for row, of in rows.items()]
    return text_table([[name, *columns], *body])


STEPS_COLUMNS = ("on", "distance", "shape distance", "spread")
CLAIM_COLUMNS = ("reward", "judge", "on", "shape distance", "spread", "modes", "distance")


def draw_steps(cells: dict[str, Any], out: Path) -> None:
    """A panel for each process, a line for teacher and student."""
    with drawing(figsize=(9, 2.9)) as figure:
        axes = figure.subplots(1, len(PROCESSES), sharey=True)
        for axis, process in zip(axes, PROCESSES, strict=True):
            for (colour, marker), who in zip((PALETTE[1], PALETTE[0]), ("teacher", "student"), strict=True):
                of = {K: cells[f"{process}, K = {K}"][who]["distance"] for K in (1, 2, 4)}
                for K, cell in of.items():
                    low, high = cell["interval"] or (cell["iqm"], cell["iqm"])
                    axis.vlines(K, low, high, color=colour, linewidth=2)
                line = [cell["iqm"] for cell in of.values()]
                axis.plot([1, 2, 4], line, color=colour, marker=marker, markersize=4.5, label=who)
            axis.set_title(process)
            axis.set_xscale("log", base=2)
            axis.set_xticks([1, 2, 4], ["1", "2", "4"])
            axis.set_xlabel("steps K")
            axis.set_ylim(0)
        axes[0].set_ylabel("sliced W2 distance to data")
        axes[-1].legend()
        figure.savefig(out, dpi=150)


def draw_claim(tasks: dict[str, Any], out: Path) -> None:
    """Reward against shape distance, a panel for each data set."""
    with drawing(figsize=(4.6 * len(tasks) + 2.2, 3.8)) as figure:
        axes = figure.subplots(1, len(tasks), squeeze=False)[0]
        names = list(dict.fromkeys(name for rows in tasks.values() for name in rows))
        for axis, (data, rows) in zip(axes, tasks.items(), strict=True):
            for name, of in rows.items():
                j = names.index(name)
                colour, marker = (GREY, "x") if name == "data" else PALETTE[j % len(PALETTE)]
                x, y = of["shape distance"]["seeds"], of["reward"]["seeds"]
                shape = marker if j <= len(PALETTE) else "*"
                axis.scatter(x, y, color=colour, marker=shape, s=22, label=name, alpha=0.8)
            axis.set_title(data)
            axis.set_xlabel("shape distance (0: modes as in the data)")
            axis.set_xlim(0)
        axes[0].set_ylabel("reward")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        figure.savefig(out, dpi=150)


def study_steps(a: argparse.Namespace, seeds: range) -> dict[str, Any]:
    """The first study: its cells, with their tables printed and its files written."""
    cells, seconds = {}, 0.0
    for process, K in itertools.product(PROCESSES, (1, 2, 4)):
        name, make = f"steps_{process}_{K}_{a.distillation}", partial(steps_cell, process, K, a.distillation)
        found, took = cells_of(a, seeds, name, make)
        cells[f"{process}, K = {K}"], seconds = summary(found), seconds + took
    for who in ("teacher", "student"):
        print(table(who, {name: cell[who] for name, cell in cells.items()}, STEPS_COLUMNS), end="\n\n")
    draw_steps(cells, a.out / "plane_tdm.png")
    return {"seconds": round(seconds), "cells": cells}


def study_claim(a: argparse.Namespace, seeds: range) -> dict[str, Any]:
    """The second study, likewise; of rows that all seeds have."""
    tasks, seconds = {}, 0.0
    for data in a.data:
        make = partial(claim_cell, data, a.distillation, a.tuning, a.variants)
        found, took = cells_of(a, seeds, f"claim_{data}_{a.distillation}_{a.tuning}", make)
        rows = [row for row in found[0] if all(row in cell for cell in found)]
        tasks[data] = summary(
            [{row: {c: cell[row][c] for c in CLAIM_COLUMNS} for row in rows} for cell in found]
        )
        seconds += took
        print(table(data, tasks[data], CLAIM_COLUMNS), end="\n\n")
    draw_claim(tasks, a.out / "plane_tdm_r1.png")
    return {"seconds": round(seconds), "cells": tasks}


def main(arguments: argparse.Namespace) -> None:
    """Make the cells that are missing, print the tables, write the files."""
    require_installed("matplotlib", extra="demo")
    torch.set_num_threads(1)
    a, seeds = arguments, range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    a.work.mkdir(parents=True, exist_ok=True)
    a.out.mkdir(parents=True, exist_ok=True)
    head: dict[str, Any] = {
        "what": "interquartile mean and 95 % bootstrap interval over seeds", "seeds": list(seeds),
        "distillation": a.distillation, "tuning": a.tuning, "versions": versions(),
    }  # fmt: skip
    for part, name, study in (("steps", "plane_tdm", study_steps), ("claim", "plane_tdm_r1", study_claim)):
        if a.part in ("all", part):
            text = json.dumps({**head, **study(a, seeds)}, indent=1)
            write_atomically(a.out / f"{name}.json", text + "\n")
    print(f"figures  {a.out}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--seeds", type=int, default=5)
    words.add_argument("--first-seed", type=int, default=10, help="numbers were chosen on others")
    words.add_argument("--part", choices=("all", "steps", "claim"), default="all")
    data = ["scattered", "8-D", "rings"]
    words.add_argument("--data", nargs="*", default=data, help="of the second study; or 'four modes'")
    words.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    words.add_argument("--distillation", type=int, default=600, help="iterations of TDM")
    words.add_argument("--tuning", type=int, default=100, help="iterations of TDM-R1, DDPO, of 192 samples")
    words.add_argument("--work", type=Path, default=Path("runs/few_step_plane"), help="where cells are kept")
    words.add_argument("--out", type=Path, default=Path("results/few_step"))
    return words


if __name__ == "__main__":
    main(parser().parse_args())
