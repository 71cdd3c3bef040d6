"""One fine-tuning run from a configuration: check, tune, evaluate, keep the figures; and loading what was tuned."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.samplers.loop import SAMPLERS, STOCHASTIC_SAMPLERS, GaussianSampler
from diffrl.experiments.train import (
    AUTOCAST,
    SHOWN,
    Interrupted,
    as_tuples,
    check_settings,
    interruptible,
    open_logger,
)
from diffrl.finetuning.credit.standardised import CREDITS
from diffrl.finetuning.evaluation import EarlyStop, Judge, TuningEvaluation
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.models import MODELS, Tunable
from diffrl.finetuning.placement.terminal import PLACEMENTS
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipes import Recipe, Rollouts
from diffrl.finetuning.reference import load_policy_weights
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.finetuning.run_checks import check_tuner
from diffrl.finetuning.surrogate import SURROGATES, Regulariser
from diffrl.finetuning.updates import Updates
from diffrl.rewards.black_box import BlackBox, Reward, WeightedSum, as_reward
from diffrl.rewards.shipped import REWARDS
from diffrl.training.build import accepted, named
from diffrl.training.checkpoints import CheckpointError, latest_checkpoint, load_checkpoint
from diffrl.training.optim import Optim
from diffrl.training.runs import RunFolder, versions
from diffrl.training.table import Table

__all__ = ["RewardCalls", "TunedRun", "build_recipe", "load_tuned", "run_finetuning"]

OWN = "own: "  # before the name of a reward that is no shipped one
COUNTS = ("iteration", "trajectories", "queries", "failures", "updates", "network_evaluations", "seconds")
WATCHED = (
    *("reward", "reward_std", "reward_best", "advantage_std", "raw_advantage_std"),
    *("loss_policy", "loss_kl", "kl", "ratio", "clip_fraction", "approx_kl", "grad_norm"),
)
JUDGED = (
    *("eval_reward", "eval_reward_std", "eval_reward_best", "heldout_reward"),
    *("kl_to_base", "distance_to_base", "diversity"),
)

Config = Mapping[str, Any]


@dataclass(frozen=True)
class RewardCalls:
    """How the reward is called; see `diffrl.rewards.black_box.BlackBox`.

    Args:
        batch_size: most samples in one call; None: all.
        workers: threads or processes; 0 calls it here.
        backend: "thread" or "process".
        timeout: seconds that one batch may take; needs workers.
        retries: further attempts at what failed.
        on_failure: "raise", "worst" or "mean".
        cache: whether to remember rewards.
    """

    batch_size: int | None = None
    workers: int = 0
    backend: str = "thread"
    timeout: float | None = None
    retries: int = 0
    on_failure: str = "raise"
    cache: bool = True


def build_recipe(config: Config) -> Recipe:
    """The recipe that a configuration's groups make.

    Raises:
        ValueError: pieces that do not go together.
    """
    return Recipe(
        rollouts=Rollouts(**config["rollouts"]),
        placement=named(PLACEMENTS, config["placement"]),
        credit=named(CREDITS, config["credit"]),
        updates=Updates(**config["updates"]),
        surrogate=named(SURROGATES, config["surrogate"]),
        regulariser=Regulariser(**config["regulariser"]),
    )


class _Job:
    """Everything of a run but its folder."""

    def __init__(self, config: Config, reward: Reward | None, heldout: Reward | None) -> None:
        check_settings(config)
        if config["dtype"] == "float64":
            raise ValueError("dtype is 'float64', but policies act in float32: give float32 or bfloat16")
        model = _model(config)
        self.config, self.model = config, model
        self.policy = _policy(config, model)
        if reward is None:
            reward = _shipped(config["reward"])
        if heldout is None and config["heldout_reward"]["name"] != "none":
            heldout = _shipped(config["heldout_reward"])
        calls = RewardCalls(**config["reward_calls"])
        box = _called(model.wrap_reward(reward), calls)
        self.tuner = Finetuner(
            self.policy,
            box,
            build_recipe(config),
            event_shape=model.event_shape,
            conditions=model.conditions,
            seed=config["seed"],
            length=Iterations(**config["loop"]),
            optim=Optim(**as_tuples(config["optim"])),
            device=config["device"],
            autocast=AUTOCAST[config["dtype"]],
        )
        self.judge = Judge(
            TuningEvaluation(**config["evaluation"]),
            self.tuner.base,
            box,
            heldout=None if heldout is None else _called(model.wrap_reward(heldout), calls),
            event_shape=model.event_shape,
            conditions=model.conditions,
            device=config["device"],
            precision=self.tuner.precision,
        )
        self.stop = EarlyStop(**config["stop"])

    def run(self, folder: RunFolder, interrupted: Callable[[], bool], progress: bool) -> dict[str, Any]:
        """Tune to the end, or raise `Interrupted`; the figures for results.json."""
        tuner, name = self.tuner, self.config["surrogate"]["name"]
        tuner.folder = folder.checkpoints("policy")
        tuner.resume()
        table = Table(folder.path / "metrics.csv", (*COUNTS, *WATCHED, *JUDGED))
        done = range(tuner.iteration + 1 if tuner.iteration > 0 else 0)
        table.keep(lambda row: int(row["iteration"]) in done)
        judged = [_numbers(row) for row in table.rows() if row["eval_reward"]]
        logger = open_logger(self.config["logger"], str(folder.path), name)

        def report(row: dict[str, float]) -> None:
            table.append(row)
            if logger is not None:
                for key, value in row.items():
                    logger.log_scalar(key, value, step=int(row["iteration"]))

        def evaluate(tuner: Finetuner) -> dict[str, float]:
            return self.judge(tuner.policy)

        def finished(row: dict[str, float]) -> str | None:
            judged.append(row)
            return self.stop.reason(judged)

        stopped_before = bool(judged) and self.stop.reason(judged) is not None
        if not stopped_before and not tuner.fit(
            report=report, evaluate=evaluate, stop=interrupted, finished=finished, progress=progress
        ):
            raise Interrupted(
                f"stopped after iteration {tuner.iteration}, and saved; continue with resume={folder.path}"
            )
        tuned = self.judge.draw(self.policy)[0]
        nfe = str(self.policy.num_steps)
        kept = SHOWN["images" if len(self.model.event_shape) == 3 else "points"]
        folder.write_samples("base", {nfe: self.judge.base_samples[:kept].float()})
        folder.write_samples("tuned", {nfe: tuned[:kept].float()})
        rows = [_numbers(row) for row in table.rows() if row["eval_reward"]]
        last = {k: v for k, v in rows[-1].items() if k in JUDGED}
        first = {k: v for k, v in rows[0].items() if k in JUDGED}
        stopped = self.stop.reason(rows)
        return {**tuner.figures, "final": last, "base": first, "stopped_early": stopped}


def _model(config: Config) -> Tunable:
    options, run = as_tuples(config["model"]), {"device": config["device"], "seed": config["seed"]}
    model: Tunable = named(MODELS, options, **accepted(MODELS[options["name"]], run))
    return model


def _policy(config: Config, model: Tunable) -> DenoisingPolicy:
    sampler = named(SAMPLERS, config["sampler"])
    if not isinstance(sampler, GaussianSampler):
        known = ", ".join(STOCHASTIC_SAMPLERS)
        raise ValueError(f"sampler {config['sampler']['name']} has steps without a law: give {known}")
    return DenoisingPolicy(model.denoiser, sampler, **config["policy"]).to(config["device"])


def _shipped(config: Config) -> Reward:
    """The reward of a configuration."""
    if config["name"].startswith(OWN):
        name = config["name"].removeprefix(OWN)
        raise ValueError(
            f"this run was tuned for a reward of your own, {name}: give it to run_finetuning again"
        )
    reward: Reward = named(REWARDS, config)
    return reward


def _called(reward: Reward, calls: RewardCalls) -> BlackBox | WeightedSum:
    """The reward, called as the configuration says; what is checked and counted already says so itself."""
    if isinstance(reward, BlackBox | WeightedSum):
        return reward
    return BlackBox(reward, **vars(calls))


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if value}


def run_finetuning(
    config: Config, *, reward: Reward | None = None, heldout: Reward | None = None, progress: bool = True
) -> RunFolder:
    """Tune what a configuration says, continuing whatever a resumed folder holds already.

    The self-checks run first, on the untuned policy; a failed one stops the run before it makes a folder.

    Args:
        config: what `diffrl.configs` composes for `finetune`.
        reward: a callable of your own in place of ``config["reward"]``, a `WeightedSum` too; give it again to resume.
            Of a pipeline it is asked about decoded images in [-1, 1] and their prompts.
        heldout: the same for ``config["heldout_reward"]``.
        progress: whether to show a bar.

    Returns:
        The run's folder, with all its results.

    Raises:
        ValueError, MissingExtra, RunFolderError, CheckpointError: something in the configuration cannot be.
        CheckFailed: a self-check failed.
        RewardError, NonFiniteLoss: see `BlackBox` and `Finetuner`.
        Interrupted: the run is saved, and can be resumed.
    """
    job = _Job(config, reward, heldout)
    report = check_tuner(job.tuner)
    for group, own in (("reward", reward), ("heldout_reward", heldout)):
        if own is not None:  # so that nothing else is taken for it when the run is resumed without it
            config = {**config, group: {"name": f"{OWN}{as_reward(own).name}"}}
    label = f"{job.model.name}_{config['surrogate']['name']}_{config['reward']['name']}"
    folder = RunFolder.start(config, label)
    if progress:
        print(f"{job.tuner.recipe}\n\n{report}\n")
    results = folder.results()
    if results:
        return folder
    with interruptible() as interrupted:
        found = job.run(folder, interrupted, progress)
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
    folder = RunFolder.open(Path(path))
    config = folder.config()
    model = _model({**config, "device": "cpu"})
    policy = _policy({**config, "device": "cpu"}, model)
    newest = latest_checkpoint(folder.checkpoints("policy"))
    if newest is None:
        raise CheckpointError(f"{folder.checkpoints('policy')} holds no checkpoint: has the run begun?")
    load_policy_weights(policy, load_checkpoint(newest).weights["policy"], newest)
    return TunedRun(policy.eval(), config, folder.results(), model)
