"""How well the reward of every denoising step is predicted from few queries: anchor, linear and last against all.

python examples/dense_rewards.py                    # trains a small denoiser of digits for each of five seeds
python examples/dense_rewards.py --runs runs/...    # takes trained denoisers of digits, one or more for each seed

Some four minutes on one core, with runs that are there already one. Writes dense_rewards.json and .png.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import diffrl
from diffrl.configs.cli import settings
from diffrl.configs.groups import register
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.experiments.reports.style import GREY, PALETTE, drawing
from diffrl.experiments.train import run_experiment
from diffrl.extras import require_installed
from diffrl.finetuning.placement.similarity import anchor_steps, dense_queries, predict_dense
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.metrics.seeds import bootstrap_interval, iqm
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.class_probability import ClassProbability
from diffrl.rewards.mode_distance import ModeDistance
from diffrl.rewards.pixels import Ink, Symmetry
from diffrl.shell_words import override
from diffrl.text_files import write_atomically
from diffrl.text_tables import text_table
from diffrl.training.provenance import versions

VARIANTS: dict[str, dict[str, Any]] = {
    "anchor": {"mode": "anchor"},
    "anchor, raw weights": {"mode": "anchor", "guarded": False},
    "anchor, as published": {"mode": "anchor", "guarded": False, "interior": False},
    "linear": {"mode": "linear"},
    "last": {"mode": "last"},
}
STEPS = (3, 4, 8, 20, 50)
TRAINING = (
    "data=digits",
    "objective=edm",
    "network=mlp",
    "network.hidden=256",
    "network.depth=4",
    "trainer.batch_size=128",
    "trainer.eval_every=4000",
    "trainer.checkpoint_every=4000",
    "eval.samples=256",
    "compare=false",
)


def trained(seed: int, folder: Path, *words: str) -> Path:
    """A run folder with a small denoiser of digits; one that is there already is taken as it is."""
    if not (folder / "results.json").exists():
        words = (*TRAINING, *words, f"seed={seed}", override("run_dir", folder))
        register()
        with initialize_config_module("diffrl.configs", version_base="1.3"):
            run_experiment(settings(compose("train", overrides=list(words)), list(words)))
    return folder


def errors(R_hat: Tensor, R: Tensor) -> dict[str, float]:
    """Of predictions [B, T] over the interior steps: NMSE = E (R̂ - R)²/Var R, and the mean correlation of a step.

    Steps at which all trajectories have about the same reward (a spread below 1 % of the whole) have no
    correlation to speak of and are left out of its mean; a constant prediction correlates with nothing.
    """
    R_hat, R = R_hat[:, 1:-1].double(), R[:, 1:-1].double()
    nmse = (R_hat - R).square().mean() / R.var(correction=0)
    centred, of_R = R_hat - R_hat.mean(0), R - R.mean(0)
    spread = of_R.square().mean(0).sqrt() * centred.square().mean(0).sqrt()
    correlation = torch.where(spread > 0, (centred * of_R).mean(0) / spread, 0.0)
    told = of_R.square().mean(0).sqrt() > 0.01 * R.std()
    return {"nmse": float(nmse), "correlation": float(correlation[told].mean())}


def weights(x0_hat: Tensor) -> dict[str, float]:
    """Why raw weights fail: how often one is negative on an interior step, and how often the anchor is an end."""
    k, T = anchor_steps(x0_hat, interior=False), x0_hat.shape[1]
    ends = (k == 0) | (k == T - 1)
    x, b = x0_hat.flatten(2), torch.arange(len(x0_hat))
    by_end = [cosine_similarity(x, x[b, j][:, None], dim=2) for j in (torch.zeros_like(k), k, k * 0 + T - 1)]
    negative = (torch.stack(by_end) < 0).any(0)[:, 1:-1]
    return {
        "negative_weight": float(negative.double().mean()),
        "anchor_at_an_end": float(ends.double().mean()),
    }


def measure(
    denoiser: nn.Module, event_shape: tuple[int, ...], rewards: dict[str, Any], trajectories: int, seed: int
) -> dict[str, Any]:
    """Reward → steps → variant → errors of one denoiser on held-out trajectories of its own sampler."""
    found: dict[str, Any] = {name: {} for name in rewards} | {"weights": {}}
    for T in STEPS:
        policy = diffrl.DenoisingPolicy(denoiser, diffrl.Ancestral(), num_steps=T, reduction="mean")
        generator = torch.Generator().manual_seed(1000 * seed + T)
        x0_hat = collect_rollout(policy, event_shape, batch_size=trajectories, generator=generator)["x0_hat"]
        found["weights"][str(T)] = weights(x0_hat)
        for name, reward in rewards.items():
            R = predict_dense(x0_hat, reward, mode="all")
            each = found[name][str(T)] = {}
            for variant, options in VARIANTS.items():
                box = BlackBox(reward, cache=False)
                each[variant] = errors(predict_dense(x0_hat, box, **options), R)
                each[variant]["queries"] = box.queries / trajectories
                assert box.queries == trajectories * dense_queries(options["mode"], T)
    return found


def summary(seeds: list[Any]) -> dict[str, Any]:
    """The same tree as that of each seed, with the interquartile mean, its interval and the values at the leaves."""
    first = seeds[0]
    if not isinstance(first, dict):
        interval = bootstrap_interval(seeds) if len(seeds) > 1 else None
        return {"iqm": float(iqm(seeds)), "interval": interval, "seeds": seeds}
    return {key: summary([seed[key] for seed in seeds]) for key in first}


def table(tasks: dict[str, Any], figure: str) -> str:
    """A row for each reward and variant, a column for each number of steps."""
    rows = [[figure, *(f"T = {T}" for T in STEPS)]]
    for task, by_steps in tasks.items():
        if len(rows) > 1:
            rows.append([])
        for variant in VARIANTS:
            values = (by_steps[str(T)][variant][figure]["iqm"] for T in STEPS)
            rows.append([f"{task}: {variant}", *(f"{v:.2f}" if v < 1000 else f"{v:.0e}" for v in values)])
    return text_table(rows)


LINES = {
    "anchor": (*PALETTE[0], "anchor, guarded (3 queries)"),
    "anchor, as published": (*PALETTE[1], "anchor, as published (3)"),
    "linear": (*PALETTE[2], "linear (2)"),
    "last": (GREY, "D", "last (1)"),
}
TOP = 3.5  # of the errors drawn
POWERS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw_line(axis: Any, j: int, cells: list[dict[str, Any]], colour: str, marker: str, label: str) -> None:
    """A variant: means with intervals, beside those of the others; what lies above the edge is written there."""
    y = np.array([cell["iqm"] for cell in cells])
    ends = np.array([cell["interval"] or (cell["iqm"], cell["iqm"]) for cell in cells]).T
    x = np.arange(len(y)) + 0.07 * (j - 1.5)
    axis.vlines(x, *np.minimum(ends, TOP), color=colour, linewidth=2)
    axis.plot(x, np.minimum(y, TOP), color=colour, marker=marker, markersize=4.5, linewidth=1.2, label=label)
    for at, value in zip(x, y, strict=True):
        if value > TOP:
            text = f"{value:.2g}" if value < 100 else f"10{f'{np.log10(value):.0f}'.translate(POWERS)}"
            where = {"xytext": (0, 5 + 4 * j), "textcoords": "offset points", "ha": "center"}
            axis.annotate(text, (at, TOP), color=colour, **where)


def draw(tasks: dict[str, Any], out: Path) -> None:
    """NMSE above, correlation below, a column for each reward."""
    with drawing(figsize=(2.9 * len(tasks), 5.2)) as figure:
        draw_panels(figure, tasks)
        figure.savefig(out, dpi=150)


def draw_panels(figure: Any, tasks: dict[str, Any]) -> None:
    """All panels and the legend above them."""
    axes = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False)
    for column, (task, by_steps) in zip(axes.T, tasks.items(), strict=True):
        column[0].set_title(task, fontsize=9)
        for axis, key in zip(column, ("nmse", "correlation"), strict=True):
            for j, (variant, style) in enumerate(LINES.items()):
                draw_line(axis, j, [by_steps[str(T)][variant][key] for T in STEPS], *style)
            axis.grid(False, axis="x")
        column[0].set_ylim(-0.1, TOP * 1.2)
        column[0].axhline(1, color="#BBBBBB", linewidth=0.8, linestyle=":", zorder=0)
        column[1].set_xticks(range(len(STEPS)), [str(T) for T in STEPS])
        column[1].set_xlabel("denoising steps T")
    axes[0, 0].set_ylabel("NMSE: E (R̂ - R)²/Var R\n(1: no better than the mean)")
    axes[1, 0].set_ylabel("correlation of R̂ and R\n(mean over interior steps)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(LINES))


def main(arguments: argparse.Namespace) -> None:
    """Train what is missing, measure, print the tables, write the files."""
    require_installed("matplotlib", "ot", "scipy", "sklearn", "torchmetrics", extra="demo")
    torch.set_num_threads(1)
    n = arguments.trajectories
    words = f"process={arguments.process}", f"trainer.grad_steps={arguments.grad_steps}"
    folders = [arguments.work / f"{arguments.process}_seed{seed}" for seed in range(arguments.seeds)]
    runs = arguments.runs or [trained(seed, folder, *words) for seed, folder in enumerate(folders)]
    rings = diffrl.data.rings()
    law = rings.mixture
    assert law is not None
    exact = diffrl.MixtureDenoiser(PROCESSES[arguments.process](), law.means, law.stds, law.weights)
    digits = {"class probability (7)": ClassProbability(target=7), "ink": Ink(), "symmetry": Symmetry()}
    plane: dict[str, Callable[..., Tensor]] = {"mode distance": ModeDistance(index=0, mixture=law)}
    by_data: dict[str, list[dict[str, Any]]] = {"digits": [], "rings": []}
    for seed in range(arguments.seeds):
        run = diffrl.load(runs[seed % len(runs)])
        by_data["digits"].append(measure(run.denoiser, run.data.event_shape, digits, n, seed))
        by_data["rings"].append(measure(exact, rings.event_shape, plane, n, seed))
    summaries = {data: summary(seeds) for data, seeds in by_data.items()}
    tasks = {
        f"{data}: {task}": values
        for data, of_data in summaries.items()
        for task, values in of_data.items()
        if task != "weights"
    }
    for figure in ("nmse", "correlation"):
        print(table(tasks, figure), end="\n\n")
    share = {data: of_data["weights"] for data, of_data in summaries.items()}
    rows = [["share of interior steps, of trajectories", *(f"T = {T}" for T in STEPS)]]
    for data, key in itertools.product(share, ("negative_weight", "anchor_at_an_end")):
        each = (f"{share[data][str(T)][key]['iqm']:.0%}" for T in STEPS)
        rows.append([f"{data}: {key.replace('_', ' ')}", *each])
    print(text_table(rows))
    arguments.out.mkdir(parents=True, exist_ok=True)
    head = {
        "what": "errors of predicted dense rewards against all queries, over interior steps; "
        "interquartile mean and 95 % bootstrap interval over seeds",
        "process": arguments.process,
        "trajectories": n,
        "training": [*TRAINING, *words],
        "versions": versions(),
    }
    text = json.dumps({**head, "tasks": tasks, "weights": share}, indent=1)
    write_atomically(arguments.out / "dense_rewards.json", text + "\n")
    draw(tasks, arguments.out / "dense_rewards.png")
    print(f"\nfigure  {arguments.out / 'dense_rewards.png'}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    words = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    words.add_argument("--runs", type=Path, nargs="*", default=[], help="run folders of denoisers of digits")
    words.add_argument(
        "--process", default="edm", help="of training and of the exact denoiser: edm, flow, vp"
    )
    words.add_argument("--seeds", type=int, default=5)
    words.add_argument("--trajectories", type=int, default=512)
    words.add_argument("--grad-steps", type=int, default=4000)
    words.add_argument("--work", type=Path, default=Path("runs/dense_rewards"), help="where to train")
    words.add_argument("--out", type=Path, default=Path("results/dense_rewards"))
    return words


if __name__ == "__main__":
    main(parser().parse_args())
