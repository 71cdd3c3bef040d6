"""The fine-tuning loop: collect, pay, credit, update; figures and checkpoints."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Generator, Tensor
from tqdm import tqdm

from diffrl import keys
from diffrl.finetuning.credit.critic import LearnedCritic
from diffrl.finetuning.credit.standardised import Credit
from diffrl.finetuning.placement.terminal import Dense
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipes import Recipe
from diffrl.finetuning.reference import (
    frozen_copy,
    load_policy_weights,
    move_average,
    policy_weights,
    shares_weights,
)
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.finetuning.updates import micro_batches
from diffrl.rewards.black_box import Reward, as_reward
from diffrl.training.checkpoints import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from diffrl.training.loop import step_generator
from diffrl.training.optim import NonFiniteLoss, Optim

__all__ = ["PUBLISHED_OPTIM", "Finetuner", "Iterations"]

PUBLISHED_OPTIM = Optim(lr=3e-4, weight_decay=1e-4, warmup_steps=0, decay="none", clip_norm=1.0)


@dataclass(frozen=True)
class Iterations:
    """How long to tune, and how often to look and to save.

    Args:
        iterations: rollouts in all.
        eval_every: iterations between evaluations.
        checkpoint_every: iterations between checkpoints.
        keep_checkpoints: how many of them stay.

    Raises:
        ValueError: a number below 1.
    """

    iterations: int = 100
    eval_every: int = 10
    checkpoint_every: int = 20
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"loop.{name} is {value}: it must be at least 1")


class Finetuner:
    """Tunes a policy for a reward by a recipe: `steps` yields after each iteration, `fit` runs to the end.

    An iteration collects a rollout, pays and credits it, and takes the recipe's updates on it. The policy stays in
    eval mode throughout: dropout would make every ratio noise. All randomness of iteration i is a function of
    (seed, i), so that a run that was stopped ends as one that was not.

    Args:
        policy: what is tuned, in place: the parameters of its denoiser that require a gradient.
        reward: R, see `diffrl.rewards`; what is no `BlackBox` is made one.
        recipe: the method; its credit remembers, so give each run its own.
        event_shape: *E of a latent.
        conditions: what each group's condition is drawn from, [M, ...]; None: no condition.
        seed: of first latents, noise, conditions and shuffling.
        folder: for checkpoints; None keeps none.
        length: how long.
        optim: AdamW; its warm-up and decay count updates.
        device: where to tune.
        autocast: dtype for the denoiser's arithmetic; log-probabilities stay in float32.

    Raises:
        ValueError: no parameter to train, no stochastic step, or an EMA reference of a denoiser with adapters.
        NonFiniteLoss: from `steps`, where loss or gradient are not finite; no such update is made.
    """

    def __init__(
        self,
        policy: DenoisingPolicy,
        reward: Reward,
        recipe: Recipe,
        *,
        event_shape: tuple[int, ...],
        conditions: Tensor | None = None,
        seed: int = 0,
        folder: Path | None = None,
        length: Iterations | None = None,
        optim: Optim = PUBLISHED_OPTIM,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.policy, self.recipe, self.reward = policy.to(device).eval(), recipe, as_reward(reward)
        self.event_shape, self.conditions, self.seed = tuple(event_shape), conditions, seed
        self.folder, self.length, self.optim = folder, length or Iterations(), optim
        self.device, self.autocast = torch.device(device), autocast
        self.base = frozen_copy(policy)
        """The policy before tuning."""
        self.parameters = [p for p in policy.denoiser.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter of the policy's denoiser requires a gradient: nothing to tune")
        self.num_trainable = self._num_trainable()
        """Stochastic steps of the policy."""
        if self.num_trainable == 0:
            raise ValueError(
                "no step of the policy is stochastic, so none has a log-probability: give a sampler with noise, "
                "more steps, or policy.std_floor"
            )
        if isinstance(recipe.placement, Dense) and (recipe.placement.timing, policy.num_steps) == (
            "state",
            1,
        ):
            raise ValueError(
                "with one step, a reward of the state it starts from says nothing of the step: give "
                "placement.timing=next, or placement terminal"
            )
        self.reference, kl_coef = self._reference(), recipe.regulariser.kl_coef
        self.loss = recipe.surrogate.loss(policy, math.prod(event_shape), self.reference, kl_coef)
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )
        if isinstance(recipe.credit, LearnedCritic):
            recipe.credit.prepare(
                self.event_shape,
                policy.process,
                num_labels=self._num_labels(),
                sigma_data=float(getattr(policy.denoiser, "sigma_data", 1.0)),
                seed=seed,
                device=device,
            )
        self.iteration, self.updates, self.seconds, self.best = 0, 0, 0.0, -math.inf

    def _reference(self) -> DenoisingPolicy | None:
        """π_ref of the KL term; None without one."""
        r = self.recipe.regulariser
        if r.kl_coef == 0:
            return None
        if r.reference == "frozen":
            return self.base
        if shares_weights(self.policy):
            raise ValueError("regulariser.reference is 'ema', but adapters share their base: take 'frozen'")
        return frozen_copy(self.policy)

    def _num_labels(self) -> int:
        c = self.conditions
        return 0 if c is None or c.ndim != 1 or c.is_floating_point() else int(c.max()) + 1

    def _num_trainable(self) -> int:
        """Stochastic steps of the policy."""
        x = torch.zeros(1, 1, dtype=torch.float64)
        grid = self.policy.grid
        stds = [
            float(self.policy.sampler.law(self.policy.process, x, x, t, s).std)
            for t, s in zip(grid[:-1], grid[1:], strict=True)
        ]
        return sum(max(std, self.policy.std_floor) > 0 for std in stds)

    @property
    def figures(self) -> dict[str, float]:
        """Counts so far."""
        return {
            "iteration": self.iteration,
            "trajectories": self.iteration * self.recipe.rollouts.trajectories,
            "queries": self.reward.queries,
            "failures": self.reward.failures,
            "updates": self.updates,
            "network_evaluations": self.policy.nfe + (0 if self.reference is None else self.reference.nfe),
            "seconds": round(self.seconds, 3),
        }

    def collect(
        self, generator: Generator, *, trajectories: int | None = None, credit: Credit | None = None
    ) -> TensorDict:
        """A rollout [B, K] with rewards and advantages; credit and reward remember it.

        Args:
            generator: of first latents, noise and conditions.
            trajectories: B; the recipe's if None.
            credit: in place of the recipe's.
        """
        plan, n = self.recipe.rollouts, trajectories or self.recipe.rollouts.trajectories
        cond = None
        if self.conditions is not None:
            groups = n // plan.rows_of_a_group
            rows = torch.randint(len(self.conditions), (groups,), generator=_cpu(generator))
            cond = self.conditions[rows.to(self.conditions.device)]
        with self.precision():
            rollout = collect_rollout(
                self.policy,
                self.event_shape,
                batch_size=n,
                group_size=plan.group_size,
                pairs=plan.pairs,
                cond=cond,
                generator=generator,
                device=self.device,
                at_once=plan.at_once,
            )
        r = self.recipe.placement(rollout, self.reward)
        rollout.set((keys.NEXT, keys.REWARD), r)
        rollout.set(keys.ADVANTAGE, (credit or self.recipe.credit)(rollout, r).float())
        return rollout

    def steps(self) -> Iterator[dict[str, float]]:
        """One iteration at a time, from where the run stands; yields its figures.

        A checkpoint is due only when the next iteration is asked for, as in `diffrl.training.trainer.Trainer.steps`.
        """
        while self.iteration < self.length.iterations:
            yield self._iterate()
            last = self.iteration == self.length.iterations
            if self.folder is not None and (last or self.iteration % self.length.checkpoint_every == 0):
                self.save()

    def _iterate(self) -> dict[str, float]:
        start = time.perf_counter()
        rollout = self.collect(step_generator(self.seed, self.iteration, self.device))
        rewards = rollout.get((keys.NEXT, keys.REWARD))[:, -1, 0]
        self.best = max(self.best, float(rewards.max()))
        read = [*self.loss.in_keys, keys.COND]
        trained = rollout.select(*read, strict=False)
        shuffle = step_generator(self.seed, 2**32 + self.iteration)
        rows = self.recipe.rows_together
        found = [self._update(m) for m in self.recipe.updates(trained, group_size=rows, generator=shuffle)]
        if self.reference is not None and self.recipe.regulariser.reference == "ema":
            move_average(self.reference, self.policy, self.recipe.regulariser.decay)
        self.iteration += 1
        self.seconds += time.perf_counter() - start
        figures = {name: sum(f[name] for f in found) / len(found) for name in found[0]}
        A = rollout.get(keys.ADVANTAGE)
        return figures | {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(correction=0)),
            "reward_best": self.best,
            "advantage_std": float(A.std(correction=0)),
            "raw_advantage_std": self.recipe.credit.raw_std,
        }

    def _update(self, minibatch: TensorDict) -> dict[str, float]:
        """One optimiser update on steps [n, k]; its figures."""
        total: dict[str, Tensor] = {}
        size, rows = self.recipe.updates.micro_batch, self.recipe.rows_together
        for part in micro_batches(minibatch, size, group_size=rows):
            share = part.numel() / minibatch.numel()
            with self.precision():
                out = self.loss(part)
            loss = out["loss_policy"] + (out["loss_kl"] if "loss_kl" in out.keys() else 0)
            (share * loss).backward()
            for name, value in out.items():
                total[name] = total.get(name, 0) + share * value.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        figures = {name: float(value) for name, value in total.items()} | {"grad_norm": float(norm)}
        if not math.isfinite(figures["loss_policy"] + figures["grad_norm"]):
            self.optimiser.zero_grad()
            kept = None if self.folder is None else latest_checkpoint(self.folder)
            raise NonFiniteLoss(
                f"loss {figures['loss_policy']:g} with gradient norm {figures['grad_norm']:g} at iteration "
                f"{self.iteration}; last good checkpoint: {kept or 'none'}. Lower optim.lr, or look at the reward"
            )
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.optim.clip_norm, norm)
        for group in self.optimiser.param_groups:
            all_updates = self.length.iterations * self.recipe.updates.count(self.num_trainable)
            group["lr"] = self.optim.lr_at(self.updates, all_updates)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.updates += 1
        return figures

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast of the run."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def save(self) -> Path:
        """Write a checkpoint of this iteration."""
        if self.folder is None:
            raise ValueError("this run has no folder for checkpoints")
        weights = {"policy": policy_weights(self.policy)}
        if self.reference is not None and self.recipe.regulariser.reference == "ema":
            weights["reference"] = self.reference.denoiser.state_dict()
        training = {
            "recipe": str(self.recipe),
            "optimiser": self.optimiser.state_dict(),
            "credit": self.recipe.credit.state_dict(),
            "reward": self.reward.state_dict(),
            "counts": [self.updates, self.policy.nfe, 0 if self.reference is None else self.reference.nfe],
            "seconds": self.seconds,
            "best": self.best,
        }
        keep = self.length.keep_checkpoints
        return save_checkpoint(self.folder, self.iteration, weights=weights, training=training, keep=keep)

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none.

        Raises:
            CheckpointError: it is damaged, or of another network or recipe.
        """
        path = None if self.folder is None else latest_checkpoint(self.folder)
        if path is None:
            return False
        checkpoint = load_checkpoint(path)
        if checkpoint.training["recipe"] != str(self.recipe):
            raise CheckpointError(
                f"checkpoint {path} is of another recipe: resume it as it was started, or choose another folder; "
                f"it was\n{checkpoint.training['recipe']}"
            )
        load_policy_weights(self.policy, checkpoint.weights["policy"], path)
        if "reference" in checkpoint.weights and self.reference is not None:
            self.reference.denoiser.load_state_dict(checkpoint.weights["reference"])
        training = checkpoint.training
        self.optimiser.load_state_dict(training["optimiser"])
        self.recipe.credit.load_state_dict(training["credit"])
        self.reward.load_state_dict(training["reward"])
        self.updates, self.policy.nfe, reference_nfe = training["counts"]
        if self.reference is not None:
            self.reference.nfe = reference_nfe
        self.seconds, self.best, self.iteration = training["seconds"], training["best"], checkpoint.step
        return True

    def fit(
        self,
        *,
        report: Callable[[dict[str, float]], None] = lambda row: None,
        evaluate: Callable[["Finetuner"], dict[str, float]] = lambda tuner: {},
        stop: Callable[[], bool] = lambda: False,
        finished: Callable[[dict[str, float]], str | None] = lambda row: None,
        progress: bool = True,
    ) -> bool:
        """Tune to the end under a progress bar; the first report is of the untuned policy.

        Args:
            report: takes a row of figures.
            evaluate: figures of the policy, every `eval_every` iterations and at both ends.
            stop: asked after every iteration; if true, a checkpoint is written and tuning ends.
            finished: looks at every row with an evaluation; a reason ends tuning for good (early stop).
            progress: whether to show the bar.

        Returns:
            Whether tuning reached its end, early or not.
        """
        total, shown = self.length.iterations, ""
        if self.iteration == 0:
            row = {**self.figures, **evaluate(self)}
            report(row)
            finished(row)
        with tqdm(
            total=total,
            initial=self.iteration,
            desc="fine-tuning",
            unit="iteration",
            mininterval=0.2 if sys.stderr.isatty() else 20,
            disable=not progress,
        ) as bar:
            for figures in self.steps():
                row = {**self.figures, **figures}
                reason = None
                if self.iteration % self.length.eval_every == 0 or self.iteration == total:
                    row |= evaluate(self)
                    shown = f"held-out {row['eval_reward']:.3g}, " if "eval_reward" in row else ""
                    reason = finished(row)
                report(row)
                bar.set_postfix_str(
                    f"reward {row['reward']:.3g}, {shown}clipped {row['clip_fraction']:.0%}, "
                    f"{row['queries']:,} queries",
                    refresh=False,
                )
                bar.update()
                if reason is not None:
                    bar.write(f"stopped early after iteration {self.iteration}: {reason}")
                    if self.folder is not None:
                        self.save()
                    return True
                if stop() and self.iteration < total:
                    if self.folder is not None:
                        self.save()
                    return False
        return True


def _cpu(generator: Generator) -> Generator:
    """A generator of the CPU, as the one given or seeded by it."""
    if generator.device.type == "cpu":
        return generator
    return Generator().manual_seed(generator.initial_seed())
