"""One fine-tuning run from a configuration: check, tune, evaluate, keep the figures; and loading what was tuned."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.samplers.registry import SAMPLERS, samplers_with_law
from diffrl.errors import FileError, InputError
from diffrl.experiments.resuming import continued
from diffrl.experiments.run import (
    AUTOCAST,
    Job,
    check_settings,
    interruptible,
    made_of,
    processes,
    shown,
    started_folder,
)
from diffrl.finetuning.build import build_recipe
from diffrl.finetuning.checks import UNTAUGHT
from diffrl.finetuning.evaluation import EVAL_SEED, TO_BASE, EarlyStop, Judge, TuningEvaluation
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.models.base import Tunable
from diffrl.finetuning.models.registry import build_model
from diffrl.finetuning.models.tuned import latest_tuned
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.reference import load_policy_weights
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.finetuning.run_checks import check_tuner
from diffrl.registry import Config
from diffrl.rewards.calls import Reward
from diffrl.rewards.registry import REWARDS
from diffrl.rewards.weighted_sum import as_reward
from diffrl.training.checkpoints import load_weights
from diffrl.training.distributed import ALONE, Ranks
from diffrl.training.identity import require_kind
from diffrl.training.optim import Optim
from diffrl.training.provenance import versions
from diffrl.training.runs import RunFolder
from diffrl.training.table import Table

__all__ = ["TunedRun", "load_tuned", "run_finetuning"]

OWN = "own: "  # before the name of a reward that is no shipped one
WATCHED = (
    *("reward", "reward_std", "reward_best", "advantage_std", "raw_advantage_std"),
    *("loss_policy", "loss_kl", "kl", "ratio", "clip_fraction", "approx_kl", "grad_norm"),
)
JUDGED = (
    *("eval_reward", "eval_reward_std", "eval_reward_best", "heldout_reward"),
    *("kl_to_base", TO_BASE, "diversity"),
)


def opened(config: Config) -> "_Job":
    """A run in no folder, to try its pace."""
    return _Job(config, None, None)


class _Job(Job):
    """A fine-tuning run: its tuner, and how it is judged."""

    count: ClassVar[str] = "iteration"

    def __init__(
        self, config: Config, reward: Reward | None, heldout: Reward | None, ranks: Ranks = ALONE
    ) -> None:
        check_settings(config)
        if config["dtype"] not in ("float32", "bfloat16"):
            raise InputError(
                f"dtype is {config['dtype']!r}, but policies act in float32, and their losses are not scaled: give "
                "float32 or bfloat16"
            )
        model = _model(config)
        self.model, self.policy = model, _policy(config, model)
        if reward is None:
            reward = _shipped(config["reward"])
        if heldout is None and config["heldout_reward"]["name"] != "none":
            heldout = _shipped(config["heldout_reward"])
        box = made_of("reward_calls", partial(as_reward, model.wrap_reward(reward)), config)
        self.tuner = Finetuner(
            self.policy,
            box,
            build_recipe(config),
            event_shape=model.event_shape,
            conditions=model.conditions,
            seed=config["seed"],
            length=made_of("loop", Iterations, config),
            optim=made_of("optim", Optim, config),
            teacher=model.teacher,
            twins=model.twins,
            device=config["device"],
            autocast=AUTOCAST[config["dtype"]],
            ranks=ranks,
        )
        super().__init__(config, "policy", self.tuner)
        if heldout is not None:
            heldout = made_of("reward_calls", partial(as_reward, model.wrap_reward(heldout)), config)
        self.judge = Judge(
            made_of("evaluation", TuningEvaluation, config),
            self.tuner.base,
            box,
            heldout=heldout,
            event_shape=model.event_shape,
            conditions=model.conditions,
            device=config["device"],
            precision=self.tuner.precision,
        )
        self.stop = made_of("stop", EarlyStop, config)
        self.judged: list[dict[str, float]] = []
        """Rows with an evaluation."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Counts, figures of the rollouts and of the losses, evaluations."""
        own = (key for role in self.tuner.roles.values() for key in role.loss.out_keys)
        others = (
            f"{name}/{key}"
            for name, role in self.tuner.roles.items()
            if name != "policy"
            for key in (*role.loss.out_keys, "grad_norm")
        )
        return tuple(dict.fromkeys((*self.tuner.figures, *WATCHED, *own, *others, *self._judged())))

    def _judged(self) -> list[str]:
        """The columns of an evaluation."""
        return [self.former.get(name, name) for name in JUDGED]

    @property
    def former(self) -> dict[str, str]:
        """The distance had no measure, number and seed in its name."""
        return {TO_BASE: self.judge.evaluation.to_base}

    def evaluate(self) -> dict[str, float]:
        """Figures of the policy on held-out noise."""
        return self.judge(self.policy)

    def finished(self, row: dict[str, float]) -> str | None:
        """Ask the early stop."""
        self.judged.append(row)
        return self.stop.reason(self.judged)

    def run(self, folder: RunFolder, interrupted: Callable[[], bool], progress: bool) -> dict[str, Any]:
        """Tune to the end, or raise `Interrupted`; the figures for results.json, which one process makes."""
        ranks = self.tuner.ranks
        self.resume(folder)
        self.judged = ranks.from_first(lambda: _judged(self.table(folder)), "the table so far")
        if not self.judged or self.stop.reason(self.judged) is None:
            self.run_loop(folder, interrupted, progress)
        return ranks.from_first(lambda: self._results(folder), "the results")

    def _results(self, folder: RunFolder) -> dict[str, Any]:
        table = self.table(folder)
        tuned = self.judge.draw(self.policy)[0]
        nfe = str(self.policy.num_steps)
        for name, x in (("base", self.judge.base_samples), ("tuned", tuned)):
            pictures = self.model.pictures(shown(x))
            folder.write_samples(name, {nfe: pictures})
            self.log(folder).sheet(name, pictures, nfe=nfe, seed=EVAL_SEED, step=self.tuner.step)
            self.model.show(pictures, self.judge.cond, folder.path / "pictures", name)
        self.model.export(folder.path)
        rows = _judged(table)
        if not rows:
            raise FileError(
                f"{table.path} holds no evaluation to report: restore it from a copy, or tune anew"
            )
        names = self._judged()
        first, last = ({k: v for k, v in rows[i].items() if k in names} for i in (0, -1))
        ends = {"stopped_early": self.stop.reason(rows), "untaught": self._untaught(table)}
        return {**self.tuner.figures, "final": last, "base": first, **ends}

    def _untaught(self, table: Table) -> str | None:
        """Why the reward has taught nothing, if it was paid and no iteration had an advantage."""
        spread = [float(row["advantage_std"]) for row in table.rows() if row.get("advantage_std")]
        paid = self.tuner.recipe.placement.queries(self.policy.num_steps) > 0
        return (
            f"in each of {len(spread)} iterations {UNTAUGHT}" if paid and spread and not any(spread) else None
        )


def _model(config: Config) -> Tunable:
    return build_model(config["model"], device=config["device"], seed=config["seed"])


def _policy(config: Config, model: Tunable) -> DenoisingPolicy:
    sampler = SAMPLERS.build(config["sampler"])
    if not isinstance(sampler, GaussianSampler):
        known = ", ".join(samplers_with_law())
        raise InputError(f"sampler {config['sampler']['name']} has steps without a law: give {known}")
    policy = made_of("policy", DenoisingPolicy, config, denoiser=model.denoiser, sampler=sampler)
    return policy.to(config["device"])


def _shipped(config: Config) -> Reward:
    """Build the reward that a configuration names."""
    if config["name"].startswith(OWN):
        name = config["name"].removeprefix(OWN)
        raise InputError(
            f"this run was tuned for a reward of your own, {name}: give it to run_finetuning again"
        )
    reward: Reward = REWARDS.build(config)
    return reward


def _judged(table: Table) -> list[dict[str, float]]:
    """The rows with an evaluation."""
    rows = ({key: float(value) for key, value in row.items() if value} for row in table.rows())
    return [row for row in rows if "eval_reward" in row]


def run_finetuning(
    config: Config,
    *,
    reward: Reward | None = None,
    heldout: Reward | None = None,
    method: str | None = None,
    progress: bool = True,
) -> RunFolder:
    """Tune what a configuration says, continuing whatever a resumed folder holds already.

    The self-checks run first, on the untuned policy; a failed one stops the run before it makes a folder.

    Several processes that torchrun started share the run: ``rollouts.trajectories`` of all of them in an iteration,
    whatever their number, the first one writes and evaluates, and all return its folder. See docs/many_processes.md.

    Args:
        config: what `diffrl.configs` composes for `finetune`.
        reward: a callable of your own in place of ``config["reward"]``, a `WeightedSum` too; give it again to resume.
            Of a pipeline it is asked about decoded images in [-1, 1] and their prompts.
        heldout: the same for ``config["heldout_reward"]``.
        method: what a folder that was not chosen is named by, between model and reward; None: the surrogate.
        progress: whether to show a bar.

    Returns:
        The run's folder, with all its results.

    Raises:
        ValueError, MissingExtra, RunFolderError, CheckpointError, FileError: something cannot be as it was asked.
        RunChanged: the run that is resumed was another one.
        CheckFailed: a self-check failed.
        RewardError, NonFiniteLoss: see `BlackBox` and `Finetuner`.
        Interrupted: the run is saved, and can be resumed.
        RankLost: another of several processes has ended.
    """
    for group, own in (("reward", reward), ("heldout_reward", heldout)):
        if own is not None:  # so that nothing else is taken for it when the run is resumed without it
            config = {**config, group: {"name": f"{OWN}{as_reward(own).name}"}}
    config = continued(config, "loop", "iterations")
    with processes(config) as ranks:
        job = _Job({**config, "device": ranks.device(config["device"])}, reward, heldout, ranks)
        job.compare()
        report = check_tuner(job.tuner)
        label = f"{job.model.name}_{method or config['surrogate']['name']}_{config['reward']['name']}"
        with started_folder(config, ranks, label) as folder, interruptible() as interrupted:
            if progress and ranks.first:
                print(f"{job.tuner.recipe}\n\n{report}\n")
            known = ranks.from_first(lambda: folder.results().get("finetuning", {}), "the results so far")
            if known.get("iteration") == job.tuner.length.total or known.get("stopped_early"):
                job.tidy(folder)
                return folder
            found = job.run(folder, interrupted, progress)
            if ranks.first:
                head = {"config": folder.config(), "seed": config["seed"], "versions": versions()}
                folder.write_results({**head, "finetuning": found})
    return folder


@dataclass(frozen=True)
class TunedRun:
    """A tuned policy loaded from its run folder.

    Args:
        policy: with the tuned weights, in eval mode.
        config: the run's configuration.
        results: what results.json holds.
        model: what was tuned.
    """

    policy: DenoisingPolicy
    config: dict[str, Any]
    results: dict[str, Any]
    model: Tunable

    def sample(self, samples: int, *, seed: int = 0) -> Tensor:
        """Samples [samples, *E] of the policy, sample j from a generator seeded by seed + j; conditions in turn."""
        c = self.model.conditions
        rollout = collect_rollout(
            self.policy,
            self.model.event_shape,
            batch_size=samples,
            cond=None if c is None else c[torch.arange(samples) % len(c)],
            generator=[torch.Generator().manual_seed(seed + j) for j in range(samples)],
        )
        return rollout.get((keys.NEXT, keys.X_T))[:, -1].clone()


def load_tuned(path: str | Path) -> TunedRun:
    """Load the policy that a fine-tuning run left in its folder.

    Args:
        path: the run folder.

    Raises:
        RunFolderError: the folder holds no fine-tuning run.
        CheckpointError: there is no checkpoint yet, or it is damaged.
    """
    folder = RunFolder.reopen(Path(path))
    config = folder.config()
    require_kind(folder.path, config, "finetune")
    model = _model({**config, "device": "cpu"})
    policy = _policy({**config, "device": "cpu"}, model)
    newest = latest_tuned(folder)
    load_policy_weights(model.denoiser, load_weights(newest, "policy"), newest)
    return TunedRun(policy.eval(), config, folder.results(), model)
