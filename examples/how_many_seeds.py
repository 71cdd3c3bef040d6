"""How many seeds a comparison of fine-tuning methods needs: five methods, one small task, 30 seeds each.

python examples/how_many_seeds.py               # continues where it was stopped; a run takes a few seconds
python examples/how_many_seeds.py --tune        # the learning rates, on seeds that are not reported

The task: a generator of four steps in the plane, distilled once, is tuned for a decision (0 or 1: the sample lies on
mode 1) with the same number of reward calls by each method. Then: what would one have concluded from 1, 3, 5 or 10 of
the seeds, and how often against what all of them say? Writes how_many_seeds.json and .png.
"""

import argparse
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffrl
from diffrl import recipes
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.predictions import Scalings, scalings
from diffrl.experiments.reports.style import GREY, PALETTE, drawing
from diffrl.extras import require_installed
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.awm import AdvantageWeightedMatching
from diffrl.finetuning.methods.diffusion_nft import DiffusionNFT
from diffrl.finetuning.methods.tdm import TrajectoryMatching
from diffrl.finetuning.methods.tdm_r1 import LearntReward
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.updates.boundaries import BoundaryUpdates
from diffrl.finetuning.updates.preferences import PreferenceUpdates
from diffrl.finetuning.updates.samples import SampleUpdates
from diffrl.metrics.intervals import interval
from diffrl.metrics.seeds import bootstrap_interval, conclusions, iqm, seeds_needed
from diffrl.text_files import write_atomically
from diffrl.text_tables import text_table
from diffrl.training.optim import NonFiniteLoss, Optim
from diffrl.training.provenance import versions
from diffrl.workers import Failure, run_tasks

STD, STEPS, MODE, ITERATIONS = 0.1, 4, 1, 40
LAW = diffrl.data.rings(modes=8, radius=0.8, std=STD).mixture
assert LAW is not None
MEANS = LAW.means.float()
CALLS, GROUP = 40, 8  # of the reward, an iteration; trajectories that are compared with each other
KERNEL = {"std_floor": 0.1, "noise_steps": [0, 1, 2]}  # of DDPO and SDPO: the last step has no noise
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TUNED_ON = (1000, 1001, 1002)
LEARNING_RATES = {"DDPO": 1e-2, "SDPO": 1e-2, "AWM": 3e-2, "NFT": 1e-2, "TDM-R1": 3e-4}
"""The best of the grid by the median of `TUNED_ON`, and by their mean."""
NS = (1, 3, 5, 10)
CLOSE = 0.2  # a difference of rewards that is shown on its own
RULES: dict[Any, str] = {
    "mean": "the higher mean", "bootstrap": "bootstrap interval", "welch": "Welch's interval",
}  # fmt: skip


class ExactAndMore(nn.Module):
    """D = D_exact + c_out F, with a small network F that is 0 at first: the teacher, and what may be learnt of it."""

    def __init__(self) -> None:
        super().__init__()
        assert LAW is not None
        self.process, self.sigma_data = diffrl.Flow(), LAW.sigma_data
        self.exact = MixtureDenoiser(self.process, LAW.means, LAW.stds, LAW.weights)
        self.network = diffrl.networks.MLP((2,), hidden=96, depth=2, x_features=0)

    def scalings(self, t: Tensor) -> Scalings:
        """c_skip, c_out and c_in at times [N]."""
        return scalings(self.process, t, "velocity", self.sigma_data)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Clean estimates of states [N, 2]."""
        _, c_out, c_in = (c[:, None].to(x_t) for c in self.scalings(t))
        return self.exact(x_t, t) + c_out * self.network(c_in * x_t, self.process.c_noise(t).to(x_t))


def policy_of(denoiser: nn.Module, **kernel: Any) -> DenoisingPolicy:
    """The generator of four deterministic steps; with a kernel, noise is added."""
    return DenoisingPolicy(denoiser, diffrl.DDIM(), num_steps=STEPS, reduction="mean", **kernel)


def distances(x0: Tensor) -> Tensor:
    """Distances of samples [N, 2] to the centres of the modes, in their standard deviations, [N, 4]."""
    return torch.cdist(x0.float(), MEANS) / STD


def decision(x0: Tensor, cond: Any = None) -> list[float]:
    """The reward: 1 where mode 1 is the nearest and within three standard deviations, else 0."""
    d = distances(x0)
    return ((d.argmin(1) == MODE) & (d.amin(1) < 3)).float().tolist()


@dataclass(frozen=True)
class Method:
    """A recipe at the size of this task; `numbers` says which of its numbers are not the published ones."""

    recipe: Callable[[], Recipe]
    numbers: str
    stochastic: bool = False
    betas: tuple[float, float] = (0.9, 0.999)

    def optim(self, lr: float) -> Optim:
        """AdamW of the student."""
        return Optim(lr, betas=self.betas, warmup_steps=0, decay="none")


GROUPS = {"rollouts": recipes.Rollouts(CALLS, group_size=GROUP)}
METHODS = {
    "DDPO": Method(
        partial(recipes.ddpo_is, rollouts=recipes.Rollouts(CALLS)), "40 trajectories a rollout", stochastic=True
    ),
    "SDPO": Method(
        partial(recipes.sdpo, rollouts=recipes.Rollouts(CALLS * 2 // 5, pairs=True)),
        "8 pairs a rollout, at five reward calls each: two members have their first step in common",
        stochastic=True,
    ),
    "AWM": Method(
        partial(
            recipes.awm,
            **GROUPS,
            updates=SampleUpdates(draws=4, minibatches=2),
            surrogate=AdvantageWeightedMatching(clip_range=0.1),
        ),
        "5 groups of 8, 4 draws, 2 minibatches, clip range 0.1",
    ),
    "NFT": Method(
        partial(
            recipes.diffusion_nft,
            **GROUPS,
            updates=SampleUpdates(draws=4, minibatches=2),
            surrogate=DiffusionNFT(),
            regulariser=Regulariser(decay=0.5, decay_ramp=0.05),
        ),
        "5 groups of 8, 4 draws, 2 minibatches, decay of the old network min(0.05 n, 0.5)",
    ),
    "TDM-R1": Method(
        partial(
            recipes.tdm_r1,
            **GROUPS,
            updates=PreferenceUpdates(
                interval="trajectory", draws=1, passes=4, preference_t_min=0.0, reward_t_min=0.0
            ),
            surrogate=LearntReward(
                beta=50.0, clip_range=1e-2, anchor_coef=0.3, runaway=None, surrogate_lr=5e-4,
                fake_lr=2e-3, fake_anchor_coef=0.0, reward_weight=1.0,
            ),
        ),
        "5 groups of 8, 4 passes of one boundary, noise of KL and fake score on the interval the student was "
        "distilled on ('trajectory'; released: 'reverse'), all times, beta 50, clip range 0.01, anchor 0.3 and 0 "
        "(fake score), no guard, reward weight 1, learning rates 5e-4 (surrogate) and 2e-3 (fake score)",
        betas=(0.0, 0.999),
    ),
}  # fmt: skip


def student(path: Path, iterations: int = 600) -> Path:
    """Distil the exact denoiser into four steps by TDM, once; keep the student and its fake score."""
    if not path.exists():
        torch.manual_seed(0)
        matching = TrajectoryMatching(fake_target="x0", fake_updates=3, fake_lr=2e-3, betas=(0.9, 0.99))
        tuner = Finetuner(
            policy_of(ExactAndMore()),
            decision,
            recipes.tdm(updates=BoundaryUpdates(passes=3), surrogate=matching),
            event_shape=(2,),
            length=Iterations(iterations),
            optim=Optim(1e-3, betas=(0.9, 0.99), warmup_steps=0, decay="none"),
        )
        for _ in tuner.steps():
            pass
        made = {"student": tuner.policy.denoiser, "fake": tuner.references.twin("fake").denoiser}
        weights = {f"{n}.{k}": v for n, d in made.items() for k, v in d.network.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, path)
    return path


def with_weights(path: Path, name: str) -> ExactAndMore:
    """The kept student or fake score."""
    denoiser = ExactAndMore()
    weights = {k.removeprefix(f"{name}."): v for k, v in load_file(path).items() if k.startswith(f"{name}.")}
    denoiser.network.load_state_dict(weights)
    return denoiser


@torch.no_grad()
def figures(denoiser: nn.Module, n: int = 2000) -> dict[str, float]:
    """Reward, share within 3 std of a mode, and root mean square distance to the nearest, of n held-out noises.

    All methods are judged as the generator without noise that they all began as.
    """
    policy = policy_of(denoiser)
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    x = x * policy.process.sigma(policy.grid[0]).float()
    for k in range(STEPS):
        x = policy.law(x, torch.full((n,), k)).mean
    near = distances(x).amin(1)
    return {
        "reward": sum(decision(x)) / n,
        "near": float((near < 3).float().mean()),
        "distance": float(near.square().mean().sqrt()),
    }


def digest(data: bytes) -> str:
    """Short name of what was read."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def settings(name: str, iterations: int, path: Path) -> dict[str, Any]:
    """All that a method's runs depend on, but learning rate and seed."""
    method = METHODS[name]
    return {
        "recipe": str(method.recipe()).splitlines(),
        "unpublished": method.numbers,
        "kernel": KERNEL if method.stochastic else {},
        "optim": str(method.optim(1.0)).replace("lr=1.0", "lr"),
        "iterations": iterations,
        "mode": MODE,
        "modes": f"{len(MEANS)} of std {STD}",
        "student": digest(path.read_bytes()),
    }


def run(task: tuple[str, float, int, int, Path]) -> dict[str, Any]:
    """Tune the kept student by one method, and measure it; a run that diverges has reward 0."""
    name, lr, seed, iterations, path = task
    torch.manual_seed(seed)  # of the hidden layers of TDM-R1's surrogate
    method, start = METHODS[name], with_weights(path, "student")
    found: dict[str, float | None]
    reward = diffrl.rewards.BlackBox(decision)
    learns = name == "TDM-R1"
    began = time.process_time()
    tuner = Finetuner(
        policy_of(start, **(KERNEL if method.stochastic else {})),
        reward,
        method.recipe(),
        event_shape=(2,),
        seed=seed,
        length=Iterations(iterations),
        optim=method.optim(lr),
        teacher=ExactAndMore() if learns else None,
        twins={"fake": with_weights(path, "fake")} if learns else None,
    )
    try:
        for _ in tuner.steps():
            pass
        found = {key: round(value, 5) for key, value in figures(tuner.policy.denoiser).items()}
    except NonFiniteLoss:  # that, too, is a result of this seed
        found = {"reward": 0.0, "near": 0.0, "distance": None}
    cost = {"calls": reward.queries, "seconds": round(time.process_time() - began, 2)}
    return {"method": name, "lr": lr, "seed": seed, **found, **cost}


def collect(tasks: list[tuple[str, float, int]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The finished runs of these (method, learning rate, seed), in order; what is kept already is not run again."""
    work, iterations, workers = arguments.work, arguments.iterations, arguments.workers
    path, kept = student(work / "student.safetensors"), work / "runs.jsonl"
    made = {name: settings(name, iterations, path) for name in METHODS}
    marks = {n: digest(json.dumps({**s, "unpublished": None}).encode()) for n, s in made.items()}
    text = kept.read_text(encoding="utf-8") if kept.exists() else ""
    done = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a run that was killed may leave half a line
            continue
        done[row["settings"], row["method"], row["lr"], row["seed"]] = row
    missing = [task for task in tasks if (marks[task[0]], *task) not in done]
    jobs = [(*task, iterations, path) for task in missing]
    with kept.open("a", encoding="utf-8") as file:
        if text and not text.endswith("\n"):
            file.write("\n")
        for i, found in run_tasks(run, jobs, workers=workers if workers > 1 else 0):
            if isinstance(found, Failure):
                raise SystemExit(f"error: {missing[i]}: {found.message}\n{found.details}")
            row = {"settings": marks[found["method"]], **found}
            done[(row["settings"], *missing[i])] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    return [done[(marks[task[0]], *task)] for task in tasks]


def tuning(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rewards at the seeds that are not reported, by method and learning rate.

    Where their mean would have chosen another rate than their median, that rate is run at the reported seeds too.
    """
    tasks = [(name, lr, seed) for name in METHODS for lr in GRID for seed in TUNED_ON]
    of: dict[str, dict[float, list[float]]] = {name: {lr: [] for lr in GRID} for name in METHODS}
    for row in collect(tasks, arguments):
        of[row["method"]][row["lr"]].append(row["reward"])
    others = {}
    for name, by_lr in of.items():
        lr = max(by_lr, key=lambda lr: np.mean(by_lr[lr]))
        if lr != LEARNING_RATES[name]:
            rows = collect([(name, lr, seed) for seed in range(arguments.seeds)], arguments)
            others[name] = {"lr": lr, "reward": [row["reward"] for row in rows]}
    return {"seeds": list(TUNED_ON), "rewards": of, "by_the_mean": others}


def tuning_table(found: dict[str, Any]) -> str:
    """Medians, by learning rate, and what other choices would have had."""
    rows = [["median reward, by learning rate", *(f"{lr:g}" for lr in GRID)]]
    rows += [[name, *(f"{np.median(x):.3f}" for x in of.values())] for name, of in found["rewards"].items()]
    also = [
        f"{name}: the mean would choose {other['lr']:g}, with a reward of {interval(other['reward']):.3f}"
        for name, other in found["by_the_mean"].items()
    ]
    return "\n".join([text_table(rows), *also])


def best(scores: dict[str, list[float]], n: int, draws: int = 10_000) -> dict[str, float]:
    """How often each method has the highest mean of all, of n seeds each."""
    rng = np.random.default_rng(0)
    x = np.array(list(scores.values()))
    chosen = rng.random((draws, *x.shape)).argsort(-1)[..., :n]
    first = np.take_along_axis(x[None], chosen, axis=-1).mean(-1).argmax(1)
    return {name: float((first == j).mean()) for j, name in enumerate(scores)}


def compared(scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    """For each pair what all seeds say, and what n of them say by each rule, of other or of the same seeds."""
    found = []
    for a, b in itertools.combinations(scores, 2):
        x, y = scores[a], scores[b]
        S = len(x)
        low, high = bootstrap_interval(x, y, statistic=lambda x, y: x.mean() - y.mean())
        order = int(low > 0) - int(high < 0)
        middle = bootstrap_interval(x, y, statistic=lambda x, y: iqm(x) - iqm(y))
        pair: dict[str, Any] = {
            "pair": [a, b],
            "difference": float(np.mean(x) - np.mean(y)),
            "interval": [low, high],
            "higher": [None, a, b][order],
            "interval_of_iqm_difference": list(middle),
            "correlation": float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) * np.ptp(y) > 0 else None,
            "by_n": [],
        }
        for n, rule, paired in itertools.product(NS, RULES, (False, True)):
            if n < S and (n > 1 or rule == "mean"):
                c = conclusions(x, y, n, rule=rule, paired=paired)
                verdict = {"a": c.a, "b": c.b, "undecided": c.undecided}
                pair["by_n"].append({"n": n, "rule": rule, "paired": paired, **verdict})
        pair["seeds_for_90_percent"] = {rule: needed(x, y, order, rule) for rule in RULES} if order else None
        found.append(pair)
    return found


def needed(x: list[float], y: list[float], order: int, rule: Any) -> dict[str, float]:
    """The fewest seeds of which 90 % of comparisons are right: counted up to half of them all, and by normal law."""
    level = None if rule == "mean" else 0.95
    found = {"normal": seeds_needed(x, y, level=level)}
    for n in range(1 if rule == "mean" else 2, len(x) // 2 + 1):
        c = conclusions(x, y, n, rule=rule, comparisons=2000)
        if (c.a if order > 0 else c.b) >= 0.9:
            return {"counted": n, **found}
    return found


def rates(pairs: list[dict[str, Any]], n: int, rule: str, paired: bool = False) -> dict[str, float]:
    """Mean shares over the settled pairs that are right, wrong, undecided, and over the others that claim any order."""
    shares: dict[str, list[float]] = {"right": [], "wrong": [], "undecided": [], "claimed": []}
    for pair in pairs:
        ahead, behind = ("a", "b") if pair["higher"] == pair["pair"][0] else ("b", "a")
        for cell in pair["by_n"]:
            if (cell["n"], cell["rule"], cell["paired"]) != (n, rule, paired):
                continue
            if pair["higher"] is None:
                shares["claimed"].append(cell["a"] + cell["b"])
            else:
                for name, key in (("right", ahead), ("wrong", behind), ("undecided", "undecided")):
                    shares[name].append(cell[key])
    return {name: float(np.mean(values)) for name, values in shares.items() if values}


def seeds_text(found: dict[str, float]) -> str:
    """What was counted, or about what the normal law says."""
    return f"{found['counted']:.0f}" if "counted" in found else f"≈ {math.ceil(found['normal'])}"


COLUMNS = [(1, "mean"), *((n, rule) for n in (3, 5) for rule in RULES)]


def methods_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each method."""
    table = [["method", "lr", "reward, IQM", "mean", "std", "near a mode, IQM"]]
    for name, rows in runs.items():
        x, near = ([row[key] for row in rows] for key in ("reward", "near"))
        spread = f"{np.std(x, ddof=1):.3f}" if len(x) > 1 else "-"
        ends = f"{interval(x):.3f}", f"{np.mean(x):.3f}", spread, f"{interval(near):.3f}"
        table.append([name, f"{rows[0]['lr']:g}", *ends])
    return text_table(table)


def pairs_table(pairs: list[dict[str, Any]]) -> str:
    """A row for each pair: shares that find the first higher, the second, and neither."""
    shares = [f"{rule}, n = {n}" for n, rule in COLUMNS]
    table = [["pair", "difference of means", "higher", *shares, "seeds for 90 %"]]
    for pair in pairs:
        cells = {(c["n"], c["rule"]): c for c in pair["by_n"] if not c["paired"]}
        found = [cells.get(column) for column in COLUMNS]
        low, high = pair["interval"]
        needs = pair["seeds_for_90_percent"]
        table.append(
            [
                " - ".join(pair["pair"]),
                f"{pair['difference']:.3f} [{low:.3f}, {high:.3f}]",
                pair["higher"] or "not settled",
                *(f"{c['a']:.2f} {c['b']:.2f} {c['undecided']:.2f}" if c else "-" for c in found),
                ", ".join(seeds_text(needs[rule]) for rule in RULES) if needs else "-",
            ]
        )
    return text_table(table)


def rates_table(pairs: list[dict[str, Any]]) -> str:
    """A row for each rule, kind of seeds and n: means over pairs."""
    of_close = f"right, of less than {CLOSE:g}", "wrong"
    table = [["rule", "seeds", "n", "right", "wrong", "undecided", *of_close, "claimed of the unsettled"]]
    close = [pair for pair in pairs if abs(pair["difference"]) < CLOSE]
    for rule, paired, n in itertools.product(RULES, (False, True), NS):
        found, near = (rates(some, n, rule, paired) for some in (pairs, close))
        shares = [found.get(key) for key in ("right", "wrong", "undecided")]
        shares += [near.get("right"), near.get("wrong"), found.get("claimed")]
        if found:
            shown = ["-" if share is None else f"{share:.3f}" for share in shares]
            table.append([RULES[rule], "the same" if paired else "others", str(n), *shown])
    return text_table(table)


def draw(runs: dict[str, list[dict[str, Any]]], pairs: list[dict[str, Any]], out: Path) -> None:
    """Above the runs, below what few of them say."""
    with drawing(figsize=(9, 6.4)) as figure:
        axes = figure.subplots(2, 2)
        draw_runs(axes[0, 0], runs, "reward", "final reward (share on mode 1)")
        draw_runs(axes[0, 1], runs, "near", "share within 3 std of any mode")
        settled = f"\n({sum(bool(pair['higher']) for pair in pairs)} settled pairs)"
        draw_rates(axes[1, 0], pairs, "wrong", f"wrong: against the order of all seeds{settled}")
        draw_rates(axes[1, 1], pairs, "right", f"right: the order of all seeds{settled}")
        axes[1, 1].legend(fontsize=8, loc="lower right")
        figure.savefig(out, dpi=150)


def draw_runs(axis: Any, runs: dict[str, list[dict[str, Any]]], key: str, label: str) -> None:
    """A point for each seed, and the interquartile mean with its interval."""
    for j, (rows, (colour, marker)) in enumerate(zip(runs.values(), PALETTE, strict=False)):
        x = [row[key] for row in rows]
        spread = 0.28 * (np.random.default_rng(0).random(len(x)) - 0.5)
        axis.scatter(j - 0.12 + spread, x, s=14, color=colour, marker=marker, alpha=0.55, linewidth=0)
        point = interval(x)
        axis.plot([j + 0.25], [point.iqm], color=colour, marker=marker, markersize=6)
        if point.low is not None:
            axis.vlines(j + 0.25, point.low, point.high, color=colour, linewidth=2)
    axis.set_xticks(range(len(runs)), list(runs))
    axis.set_title(label, fontsize=9)
    axis.set_ylim(-0.03, 1.05)
    axis.grid(False, axis="x")


def draw_rates(axis: Any, pairs: list[dict[str, Any]], key: str, label: str) -> None:
    """By n: the mean over settled pairs, a line for each rule, and each pair faintly for the first."""

    def line(of: list[dict[str, Any]], rule: str, **style: Any) -> None:
        found = {n: rates(of, n, rule).get(key) for n in NS}
        known = {n: share for n, share in found.items() if share is not None}
        axis.plot(list(known), list(known.values()), **style)

    for pair in pairs:
        label_once = "a pair, by the higher mean" if pair is pairs[0] else None
        line([pair], "mean", color=GREY, linewidth=0.7, alpha=0.6, label=label_once)
    for rule, (colour, marker) in zip(RULES, PALETTE, strict=False):
        line(pairs, rule, color=colour, marker=marker, label=RULES[rule])
    axis.set_title(label, fontsize=9)
    axis.set_xscale("log")
    axis.set_xticks(NS, [str(n) for n in NS])
    axis.minorticks_off()
    axis.set_xlabel("seeds of each method")
    axis.set_ylim(bottom=0)


def readable(found: dict[str, Any]) -> str:
    """JSON with a line for each entry, and for each run or pair."""

    def lines(value: Any) -> str:
        if not isinstance(value, list):
            return json.dumps(value, ensure_ascii=False)
        return "[\n  " + ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value) + "\n ]"

    entries = (f"{json.dumps(key)}: {lines(value)}" for key, value in found.items())
    return "{\n " + ",\n ".join(entries) + "\n}\n"


def main(arguments: argparse.Namespace) -> None:
    """Run what is missing, compare, print the tables, write the files."""
    require_installed("matplotlib", "scipy", extra="demo")
    torch.set_num_threads(1)
    work, iterations = arguments.work, arguments.iterations
    tuned = tuning(arguments) if arguments.tune else None
    if tuned:
        print(tuning_table(tuned), end="\n\n")
    tasks = [(name, LEARNING_RATES[name], seed) for seed in range(arguments.seeds) for name in METHODS]
    rows = collect(tasks, arguments)
    runs = {name: [row for row in rows if row["method"] == name] for name in METHODS}
    scores = {name: [row["reward"] for row in of] for name, of in runs.items()}
    pairs = compared(scores)
    highest = {str(n): best(scores, n) for n in NS if n <= arguments.seeds}
    print(methods_table(runs), pairs_table(pairs), rates_table(pairs), sep="\n\n")
    ranked = [["highest mean of all", *METHODS]]
    ranked += [[f"n = {n}", *(f"{share:.3f}" for share in of.values())] for n, of in highest.items()]
    print(f"\n{text_table(ranked)}")
    path = work / "student.safetensors"
    start = {"student": figures(with_weights(path, "student")), "exact denoiser": figures(ExactAndMore())}
    head = {
        "command": "python examples/how_many_seeds.py" + (" --tune" if tuned else ""),
        "what": "reward after tuning, by seed; what n of the seeds would have led one to conclude, as shares of "
        "comparisons, against the interval of all seeds",
        "start": start,
        "settings": {name: settings(name, iterations, path) for name in METHODS},
        "learning_rates": LEARNING_RATES,
        "tuning": tuned,
        "versions": versions(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {**head, "runs": rows, "pairs": pairs, "highest_mean": highest}
    write_atomically(arguments.out / "how_many_seeds.json", readable(found))
    draw(runs, pairs, arguments.out / "how_many_seeds.png")
    print(f"\nfigure  {arguments.out / 'how_many_seeds.png'}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    words = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    words.add_argument("--seeds", type=int, default=30)
    words.add_argument("--iterations", type=int, default=ITERATIONS, help="of 40 reward calls each")
    words.add_argument("--tune", action="store_true", help="try the grid of learning rates too")
    words.add_argument("--workers", type=int, default=1, help="processes, one core each")
    words.add_argument("--work", type=Path, default=Path("runs/how_many_seeds"), help="of finished runs")
    words.add_argument("--out", type=Path, default=Path("results/seeds"))
    return words


if __name__ == "__main__":
    main(parser().parse_args())
