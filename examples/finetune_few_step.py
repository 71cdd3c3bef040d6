"""A generator of four steps, distilled by TDM, is tuned for a yes or no: TDM-R1 against DDPO, SDPO, AWM and NFT.

python examples/finetune_few_step.py                      # five seeds, two processes
python examples/finetune_few_step.py --seeds 1 --out runs/few_step_of_one

For each seed a small denoiser of digits is trained and distilled into four deterministic steps; then every method tunes
that student for the hard decision of a classifier, 1 or 0, with the same number of reward calls. Every stage is a run
folder under --work; what is finished there is taken as it is, and the same command continues.
"""

import argparse
import csv
import json
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor, nn

import diffrl
from diffrl.configs.cli import settings
from diffrl.configs.groups import register
from diffrl.data.files import digits
from diffrl.errors import InputError
from diffrl.experiments.finetune import load_tuned, run_finetuning
from diffrl.experiments.reports.style import GREY, INK, PALETTE, draw_band, drawing, show_images
from diffrl.experiments.train import run_experiment
from diffrl.extras import require_installed
from diffrl.finetuning.evaluation import diversity
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.metrics.distances import sample_distance
from diffrl.metrics.intervals import Interval, interval
from diffrl.rewards.class_decision import ClassDecision
from diffrl.rewards.class_neighbours import ClassNeighbours
from diffrl.shell_words import override
from diffrl.text_files import write_atomically
from diffrl.text_tables import text_table
from diffrl.training.provenance import versions
from diffrl.training.runs import RunFolder
from diffrl.workers import Failure, run_tasks

NOTE = (
    "Learning rates, TDM-R1's anchor and the noise were chosen on seed 100 with class 3, which are not reported. DDPO "
    "and SDPO put the noise of ancestral sampling (DDIM, eta=1) on the three inner steps of the deterministic student; "
    "what that costs by itself is the line 'student with noise'. SDPO asks 2.5 times about each of 58 trajectories."
)
SHAPE = (1, 8, 8)
MANY = 20  # steps of the base, where it is sampled in many
TRAJECTORIES = 144  # a rollout, one reward call each
PAIRED = 58  # SDPO's, 2½ calls each: it asks about three estimates, and a pair shares its first

BASE = (
    "data=digits", "process=flow", "objective=denoising",
    "network=mlp", "network.hidden=512", "network.depth=3", "network.x_features=0",
    "trainer.batch_size=128", "eval.samples=256", "compare=false",
)  # fmt: skip
FEW = ("sampler=ddim", "policy.num_steps=4", "policy.std_floor=0")
NOISY = ("sampler=ddim", "sampler.eta=1", "policy.num_steps=4", "policy.std_floor=0")
"""The kernel that DDPO and SDPO put on the deterministic student: it keeps the marginals of a many-step denoiser."""
STUDENT = (
    "recipe=tdm", *FEW, "rollouts.trajectories=128", "updates.passes=3",
    "surrogate.fake_target=x0", "surrogate.fake_updates=3", "surrogate.fake_lr=3e-4", "surrogate.betas=[0.9,0.99]",
    "optim.lr=1e-4", "optim.betas=[0.9,0.99]",
)  # fmt: skip
TUNED = (
    "reward=class_decision", "heldout_reward=digit", "evaluation.samples=512", "loop.eval_every=10",
)  # fmt: skip
GROUPS = (f"rollouts.trajectories={TRAJECTORIES}", "rollouts.group_size=16")
LEARNT = (
    "recipe=tdm_r1", *FEW, *GROUPS,
    "updates.draws=1", "updates.passes=4", "updates.preference_t_min=0", "updates.reward_t_min=0",
    "surrogate.beta=50", "surrogate.anchor_coef=0.2", "surrogate.clip_range=1e-2", "surrogate.runaway=null",
    "surrogate.reward_weight=1", "surrogate.fake_target=x0", "surrogate.fake_anchor_coef=0",
    "surrogate.surrogate_lr=3e-5", "surrogate.fake_lr=1.2e-4", "optim.lr=3e-5", "optim.betas=[0,0.999]",
)  # fmt: skip


class Method(NamedTuple):
    """A way to tune: its words, what it tunes, and whether its steps have noise that can be taken away afterwards."""

    words: tuple[str, ...]
    of: str = "student"
    noisy: bool = False
    ablation: bool = False


# fmt: off
METHODS: dict[str, Method] = {
    "TDM-R1": Method(LEARNT),
    "DDPO": Method(
        (
            "recipe=ddpo_is", *NOISY, f"rollouts.trajectories={TRAJECTORIES}", "updates.order=step",
            "optim.lr=1e-4",
        ),
        noisy=True,
    ),
    "SDPO": Method(("recipe=sdpo", *NOISY, f"rollouts.trajectories={PAIRED}", "optim.lr=1e-4"), noisy=True),
    "AWM": Method(("recipe=awm", *FEW, *GROUPS, "updates.micro_batch=1024", "optim.lr=1e-4")),
    "DiffusionNFT": Method(("recipe=diffusion_nft", *FEW, *GROUPS, "optim.lr=3e-5")),
    "DDPO, many steps": Method(
        (
            "recipe=ddpo_is", "sampler=ancestral", f"policy.num_steps={MANY}", "policy.std_floor=0",
            f"rollouts.trajectories={TRAJECTORIES}", "updates.order=step", "optim.lr=1e-4",
        ),
        of="base",
    ),
    "TDM-R1, frozen reference": Method((*LEARNT, "surrogate.reference=frozen"), ablation=True),
    "TDM-R1, student's interval": Method((*LEARNT, "updates.interval=trajectory"), ablation=True),
    "TDM-R1, no KL": Method((*LEARNT, "surrogate.kl_weight=0"), ablation=True),
    "group loss on the student": Method(
        (
            "recipe=dgpo", *FEW, *GROUPS, *(word for word in LEARNT if word.startswith("updates.")),
            "updates.compared=all", "surrogate.reference=ema", "surrogate.beta=50", "surrogate.anchor_coef=0.2",
            "surrogate.clip_range=1e-2", "optim.lr=3e-5",
        ),
        ablation=True,
    ),
}
# fmt: on


# Stages


@dataclass(frozen=True)
class Plan:
    """What all seeds share."""

    work: Path
    target: int
    grad_steps: int
    distil: int
    iterations: int

    def folder(self, seed: int, stage: str) -> Path:
        """Of a stage's run."""
        return self.work / f"seed{seed}" / stage.lower().replace(",", "").replace(" ", "_")


def prepare(task: tuple[Plan, int]) -> None:
    """Train the base of a seed and distil its student."""
    plan, seed = task
    every = (f"trainer.{key}={plan.grad_steps}" for key in ("grad_steps", "eval_every", "checkpoint_every"))
    stage("train", plan.folder(seed, "base"), *BASE, *every, f"seed={seed}")
    every = (f"loop.{key}={plan.distil}" for key in ("iterations", "eval_every", "checkpoint_every"))
    words = *STUDENT, "reward=class_decision", f"reward.target={plan.target}", *every, f"seed={seed}"
    stage("finetune", plan.folder(seed, "student"), *words, override("model.path", plan.folder(seed, "base")))


def tune(task: tuple[Plan, int, str]) -> None:
    """Tune by one method."""
    plan, seed, name = task
    method = METHODS[name]
    path = override("model.path", plan.folder(seed, method.of))
    model = (path,) if method.of == "base" else ("model=tuned", path)
    length = f"loop.iterations={plan.iterations}", f"loop.checkpoint_every={plan.iterations}", f"seed={seed}"
    words = *method.words, *TUNED, f"reward.target={plan.target}", *model, *length
    stage("finetune", plan.folder(seed, name), *words)


def stage(command: str, folder: Path, *words: str) -> None:
    """Make a run in its folder, or go on with it; a finished one is taken as it is."""
    run: Callable[..., Any] = run_experiment if command == "train" else run_finetuning
    config = composed(command, *words, override("run_dir", folder))
    if (folder / "config.yaml").exists():
        kept = RunFolder.open(folder).config()
        if changed := [
            key for key in config if key not in ("run_dir", "resume") and kept.get(key) != config[key]
        ]:
            raise InputError(f"{folder} holds a run with another {', '.join(changed)}: give another --work")
        if (folder / "results.json").exists():
            return
        config = composed(command, override("resume", folder))
    run(config, progress=False)


def composed(command: str, *words: str) -> dict[str, Any]:
    """A configuration, as the command line would compose it."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_module("diffrl.configs", version_base="1.3"):
        return settings(compose(command, overrides=[*words]), [*words])


def every_task(work: Callable[[Any], None], tasks: list[Any], workers: int) -> None:
    """Do all tasks; say which fail, and stop then."""
    failed = []
    for index, found in run_tasks(work, tasks, workers=min(workers, len(tasks))):
        name = " ".join(map(str, tasks[index][1:]))
        wrong = isinstance(found, Failure)
        print(f"{work.__name__} {name}: {'failed, ' + found.message if wrong else 'done'}", flush=True)
        failed += [name] * wrong
    if failed:
        raise SystemExit(
            f"error: {len(failed)} runs failed: {'; '.join(failed)}; the same command runs them again"
        )


# Figures


COLUMNS = {
    "evaluations": "NFE",
    "reward": "reward",
    "heldout": "held-out judge",
    "nearest": "to nearest digit",
    "to_class": "to real class",
    "to_data": "to real digits",
    "features": "features' FD",
    "diversity": "diversity",
    "within": "of accepted",
    "seconds": "seconds",
}


class Meter:
    """Measures samples of one seed's models, all from the same noise."""

    def __init__(self, target: int, samples: int) -> None:
        data = digits(conditional=True)
        assert data.train is not None and data.train_labels is not None and data.test_labels is not None
        self.train, self.test = data.train, data.test
        self.test_of_class = data.test[data.test_labels == target]
        self.of_class = torch.cat([data.train[data.train_labels == target], self.test_of_class])
        self.reward, self.heldout, self.samples = ClassDecision(target), ClassNeighbours(target), samples

    def draw(self, denoiser: nn.Module, num_steps: int, eta: float = 0.0) -> Tensor:
        """Samples [samples, 1, 8, 8], number j from a generator of its own."""
        policy = DenoisingPolicy(denoiser, diffrl.DDIM(eta), num_steps=num_steps, reduction="mean").eval()
        generators = [torch.Generator().manual_seed(10**6 + j) for j in range(self.samples)]
        rollout = collect_rollout(policy, SHAPE, batch_size=self.samples, generator=generators)
        return rollout.get(("next", "x_t"))[:, -1].clone()

    def __call__(self, x: Tensor) -> dict[str, float | None]:
        """Figures of samples [n, 1, 8, 8] in [-1, 1]; ``within`` is the diversity of those that get the reward."""
        reward = self.reward(x)
        nearest = torch.cdist(x.flatten(1), self.train.flatten(1)).min(1).values.mean() / 8
        return {
            "reward": float(reward.mean()),
            "heldout": float(self.heldout(x).mean()),
            "nearest": float(nearest),
            "to_class": sample_distance("sliced_w2", x, self.of_class),
            "to_data": sample_distance("sliced_w2", x, self.test),
            "features": sample_distance("fd_digits_cnn", x, self.test),
            "diversity": diversity(x),
            "within": diversity(x[reward == 1]) if reward.sum() > 1 else None,
        }


def measured(
    plan: Plan, seed: int, methods: list[str], meter: Meter
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures and samples of everything that a seed made, by row."""
    base = diffrl.load(plan.folder(seed, "base")).denoiser.eval()
    student = load_tuned(plan.folder(seed, "student"))
    drawn: dict[str, tuple[int, Tensor, float | None]] = {
        f"base, {MANY} Euler steps": (MANY, meter.draw(base, MANY), None),
        f"base, {MANY} steps with noise": (MANY, meter.draw(base, MANY, 1.0), None),
        "base, 4 Euler steps": (4, meter.draw(base, 4), None),
        "student": (4, meter.draw(student.policy.denoiser, 4), student.results["finetuning"]["seconds"]),
        "student with noise": (4, meter.draw(student.policy.denoiser, 4, 1.0), None),
    }
    for name in methods:
        tuned = load_tuned(plan.folder(seed, name))
        policy, seconds = tuned.policy, tuned.results["finetuning"]["seconds"]
        assert isinstance(policy.sampler, diffrl.DDIM)
        eta = policy.sampler.eta
        drawn[name] = policy.num_steps, meter.draw(policy.denoiser, policy.num_steps, eta), seconds
        if METHODS[name].noisy:
            drawn[f"{name}, noise taken away"] = 4, meter.draw(policy.denoiser, 4), None
    rows = {
        name: {"evaluations": nfe, **meter(x), "seconds": seconds}
        for name, (nfe, x, seconds) in drawn.items()
    }
    real = {"evaluations": None, **meter(meter.test_of_class), "seconds": None}
    return {"real digits of the class": real, **rows}, {name: x for name, (_, x, _) in drawn.items()}


def curve(folder: Path) -> dict[str, list[float]]:
    """Evaluations along a run."""
    columns = ("queries", "eval_reward", "heldout_reward", "diversity")
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["eval_reward"]]
    return {name: [float(row[name]) for row in rows] for name in columns}


def cell(values: list[float | None], form: str = ".2f") -> str:
    """A figure over seeds."""
    known = [value for value in values if value is not None]
    return format(interval(known), form) if known else ""


def table(rows: dict[str, dict[str, list[float | None]]]) -> str:
    """A line for each model, a column for each figure."""
    forms = {"evaluations": ".0f", "seconds": ".0f", "features": ".1f", "to_data": ".3f"}
    lines = [["", *COLUMNS.values()]]
    for name, row in rows.items():
        cells = [cell(row[key], forms.get(key, ".2f")) for key in COLUMNS]
        lines.append([name, row["evaluations"][0] and f"{row['evaluations'][0]:.0f}" or "", *cells[1:]])
    return text_table(lines)


# Pictures


def style_of(name: str) -> tuple[str, str]:
    """Colour and marker of a method."""
    kind = [other for other in METHODS if METHODS[other].ablation == METHODS[name].ablation]
    return PALETTE[(kind.index(name) + METHODS[name].ablation) % len(PALETTE)]


def draw_curves(found: dict[str, Any], methods: list[str], out: Path) -> None:
    """Reward by reward calls, of methods and of ablations; what it cost on the way, and where all end."""
    with drawing(figsize=(10.5, 8.4)) as figure:
        (left, right), (path, end) = figure.subplots(2, 2)
        for name in methods:
            colour, marker = style_of(name)
            style = {"color": colour, "label": name, "marker": marker, "markersize": 3.5}
            runs, ablation = found["curves"][name], METHODS[name].ablation
            reward, spread = (over_seeds(runs, key) for key in ("eval_reward", "diversity"))
            for axes in [right] if ablation else [left, right] if name == "TDM-R1" else [left]:
                draw_band(axes, runs[0]["queries"], reward, **style)
            if not ablation:
                path.plot([x.iqm for x in reward], [y.iqm for y in spread], **style)
        base = interval(found["rows"][f"base, {MANY} Euler steps"]["reward"])
        for axes, title in ((left, "The same reward calls"), (right, "What TDM-R1 is made of")):
            axes.axhline(base.iqm, color=GREY, linewidth=0.8, linestyle=":")
            axes.set(
                title=title, xlabel="reward calls", ylabel="reward of held-out noise", ylim=(-0.02, 1.02)
            )
        real = interval(found["rows"]["real digits of the class"]["diversity"]).iqm
        path.axhline(real, color=GREY, linewidth=0.8, linestyle=":")
        path.set(
            title="What it costs on the way",
            xlabel="reward",
            ylabel="diversity (dots: real digits of the class)",
        )
        draw_trade(end, found["rows"], methods)
        for axes in (left, right, path, end):
            axes.legend(fontsize=7)
        figure.savefig(out, dpi=130)


def over_seeds(runs: list[dict[str, list[float]]], key: str) -> list[Interval]:
    """A figure at each evaluation."""
    return [interval(values) for values in zip(*(run[key] for run in runs), strict=True)]


def draw_trade(axes: Any, rows: dict[str, dict[str, list[float]]], methods: list[str]) -> None:
    """Every model's reward against its distance to real digits of the class."""
    marks = {name: style_of(name) for name in methods if not METHODS[name].ablation}
    marks |= {f"base, {MANY} Euler steps": (INK, "x"), "student": (INK, "+")}
    for name, (colour, marker) in marks.items():
        if name in rows:
            x, y = interval(rows[name]["to_class"]), interval(rows[name]["reward"])
            for ends, middle, line in ((x, y, axes.hlines), (y, x, axes.vlines)):
                if ends.low is not None:
                    line(middle.iqm, ends.low, ends.high, color=colour, linewidth=1)
            axes.plot(x.iqm, y.iqm, marker, color=colour, label=name)
    axes.set(
        title="Where they end",
        xlabel="distance to real digits of the class",
        ylabel="reward",
        ylim=(-0.02, 1.02),
    )
    axes.legend(fontsize=7)


def draw_grids(samples: dict[str, Tensor], out: Path) -> None:
    """Samples of each model from the same noise."""
    with drawing(figsize=(12, 1.75 * -(-len(samples) // 4))) as figure:
        panels = figure.subplots(-(-len(samples) // 4), 4, squeeze=False).flatten()
        for axes in panels:
            axes.set_axis_off()
        for axes, (name, x) in zip(panels, samples.items(), strict=False):
            axes.set_axis_on()
            show_images(axes, x[:32], columns=8)
            axes.set_title(name, fontsize=8)
        figure.savefig(out, dpi=130)


# The whole


def main(arguments: argparse.Namespace) -> None:
    """Make what is missing, measure, print the table, write the files."""
    require_installed("matplotlib", "sklearn", extra="demo")
    torch.set_num_threads(1)
    plan = Plan(
        arguments.work, arguments.target, arguments.grad_steps, arguments.distil, arguments.iterations
    )
    seeds, methods = arguments.seeds, arguments.methods
    every_task(prepare, [(plan, seed) for seed in seeds], arguments.workers)
    every_task(tune, [(plan, seed, name) for name in methods for seed in seeds], arguments.workers)

    meter, by_seed, shown = Meter(plan.target, arguments.samples), [], dict[str, Tensor]()
    for seed in seeds:
        figures, samples = measured(plan, seed, methods, meter)
        by_seed.append(figures)
        shown = shown or samples
    rows = {name: {key: [of[name][key] for of in by_seed] for key in COLUMNS} for name in by_seed[0]}
    curves = {name: [curve(plan.folder(seed, name)) for seed in seeds] for name in methods}
    print(f"\n{table(rows)}\n\n{textwrap.fill(NOTE, 120)}")

    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    found = {"rows": rows, "curves": curves}
    draw_curves(found, methods, out / "digits_curves.png")
    draw_grids(shown, out / "digits_grids.png")
    text = json.dumps({**head(plan, arguments), **with_intervals(found)}, indent=1)
    write_atomically(out / "digits.json", text + "\n")
    print(f"\nfiles  {out / 'digits.json'}, {out / 'digits_curves.png'}, {out / 'digits_grids.png'}")


def head(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """What was run."""
    return {
        "what": "few-step generators tuned for a hard decision; of each figure the values by seed, their interquartile "
        "mean and its 95 % bootstrap interval",
        "note": NOTE,
        "command": shlex.join(["python", *sys.argv]),
        "target": plan.target,
        "seeds": arguments.seeds,
        "samples": arguments.samples,
        "reward_calls": TRAJECTORIES * plan.iterations,
        "words": {"base": BASE, "student": STUDENT}
        | {name: METHODS[name].words for name in arguments.methods},
        "versions": versions(),
    }


def with_intervals(found: dict[str, Any]) -> dict[str, Any]:
    """Each figure with its interquartile mean and interval."""

    def whole(values: list[float | None]) -> dict[str, Any]:
        known = [value for value in values if value is not None]
        middle = interval(known) if known else Interval(float("nan"), None, None)
        return {"iqm": middle.iqm if known else None, "interval": middle[1:], "seeds": values}

    rows = {name: {key: whole(values) for key, values in row.items()} for name, row in found["rows"].items()}
    return {"figures": rows, "curves": found["curves"]}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    words.add_argument("--target", type=int, default=7, help="the class that samples are to become")
    words.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    words.add_argument("--grad-steps", type=int, default=4000, help="of the base")
    words.add_argument("--distil", type=int, default=300, help="iterations of TDM")
    words.add_argument("--iterations", type=int, default=60, help="rollouts of each method")
    words.add_argument("--samples", type=int, default=1024, help="of each model, for the last figures")
    words.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0: this one")
    words.add_argument("--work", type=Path, default=Path("runs/few_step"), help="folder of the runs")
    words.add_argument("--out", type=Path, default=Path("results/few_step"))
    return words


if __name__ == "__main__":
    main(parser().parse_args())
