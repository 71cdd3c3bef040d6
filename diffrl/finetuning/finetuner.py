"""The fine-tuning loop: collect, pay, credit, update."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from diffrl import keys
from diffrl.errors import InputError, InputTypeError
from diffrl.finetuning.credit.base import Credit
from diffrl.finetuning.identity import policy_facts, recipe_facts, reward_identity, weights_identity
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.reference import References, load_policy_weights, policy_weights
from diffrl.finetuning.role_step import role_step
from diffrl.finetuning.rollouts.chains import require_sound
from diffrl.finetuning.shares import Shares
from diffrl.finetuning.surrogate import Role
from diffrl.ranges import require_int
from diffrl.rewards.calls import Reward
from diffrl.rewards.weighted_sum import as_reward
from diffrl.training.checkpoints import Checkpoint, CheckpointError
from diffrl.training.distributed import ALONE, Ranks
from diffrl.training.identity import fingerprint, flat
from diffrl.training.loop import Loop, step_generator
from diffrl.training.optim import FinetuningOptim, Optim, Optimiser

__all__ = ["Finetuner", "Iterations"]


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

    report_every: ClassVar[int] = 1
    iterations: int = 100
    eval_every: int = 10
    checkpoint_every: int = 20
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require_int(f"loop.{name}", value)

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.iterations


class Finetuner(Loop):
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
        optim: the optimiser; its warm-up and decay count updates.
        teacher: the denoiser that a method of distillation learns from; None: the policy's, as it is now.
        twins: denoisers that trained copies begin as, by name, such as {"fake": the fake score of a distillation};
            others begin as the teacher.
        device: where to tune.
        autocast: dtype for the denoiser's arithmetic; log-probabilities stay in float32.
        ranks: the processes that share the run, see `diffrl.finetuning.shares`.

    Raises:
        TypeError: a teacher or a twin that is no denoiser.
        ValueError: no parameter to train, a policy that a piece of the recipe cannot tune, a teacher or twin of another
            process, or a twin by a name that the recipe does not train; see `Shares`.
        NonFiniteLoss: from `steps`, where loss or gradient are not finite; no such update is made.
    """

    unit: ClassVar[str] = "iteration"
    total_key: ClassVar[str] = "loop.iterations"
    step_name: ClassVar[str] = "iteration"
    length: Iterations

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
        optim: Optim | None = None,
        teacher: torch.nn.Module | None = None,
        twins: Mapping[str, torch.nn.Module] | None = None,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        _require_kinds(policy, recipe, event_shape, conditions)
        length = length or Iterations()
        super().__init__(length, folder=folder, seed=seed, device=device, autocast=autocast, ranks=ranks)
        self.policy, self.recipe, self.reward = policy.to(device).eval(), recipe, as_reward(reward)
        self.shares = Shares(ranks, recipe, self.reward)
        self.event_shape = tuple(require_int("event_shape", size) for size in event_shape)
        self.conditions = conditions
        self.references = References(policy, teacher, twins)
        self._begin = {name: weights_identity(d) for name, d in (twins or {}).items()}
        if not any(p.requires_grad for p in policy.denoiser.parameters()):
            raise InputError("no parameter of the policy's denoiser requires a gradient: nothing to tune")
        if recipe.rollouts.overlap and getattr(reward, "normalise", "none") != "none":
            raise InputError(
                "a running sum of rewards depends on how they are asked: set rollouts.overlap=false"
            )
        for piece in recipe.pieces:
            if reason := piece.refuses(policy):
                raise InputError(reason)
        self.num_trainable = len(policy.stochastic_steps)
        setting = self._setting(optim or FinetuningOptim())
        recipe.rollouts.prepare(setting)
        self._belongs_to = self._facts(setting.optim)
        recipe.credit.prepare(setting)
        self.roles = recipe.surrogate.roles(setting)
        """Networks that are trained, by name."""
        self.references.require_used()
        self.actor = recipe.surrogate.actor(setting)
        """What draws the rollouts."""
        self.optimisers = {name: self._optimiser(role, setting.optim) for name, role in self.roles.items()}
        self.best = -torch.inf

    def _facts(self, optim: Optim) -> dict[str, Any]:
        """Taken before the first update: the base is part of them."""
        return {
            **policy_facts(self.policy),
            **recipe_facts(self.recipe),
            "teacher": weights_identity(self.references.teacher.denoiser),
            **flat({"twins": self._begin}),
            **flat({"optim": vars(optim)}),
            "reward": reward_identity(self.reward),
            "event_shape": list(self.event_shape),
            "conditions": None if self.conditions is None else fingerprint([self.conditions]),
            "dtype": str(self.autocast),
        }

    @property
    def facts(self) -> dict[str, Any]:
        """Base, policy, reward, pieces of the recipe, optimiser, conditions."""
        return {**super().facts, **self._belongs_to}

    def _setting(self, optim: Optim) -> Setting:
        kl = self.recipe.regulariser
        return Setting(
            policy=self.policy,
            event_shape=self.event_shape,
            conditions=self.conditions,
            optim=optim,
            kl_coef=kl.kl_coef,
            kl_reference=self.references(kl.reference) if kl.kl_coef > 0 else None,
            kl_by_time=kl.by_time,
            reference=self.references,
            twin=self.references.twin,
            seed=self.seed,
            device=self.device,
        )

    def _optimiser(self, role: Role, optim: Optim) -> Optimiser:
        updates = self.length.iterations * self.recipe.updates.count(self.num_trainable)
        parameters = [p for p in role.module.parameters() if p.requires_grad]
        return Optimiser(parameters, role.optim or optim, updates * role.repeats // role.every)

    @property
    def base(self) -> DenoisingPolicy:
        """The policy before tuning."""
        return self.references.frozen

    @property
    def loss(self) -> torch.nn.Module:
        """The policy's."""
        return self.roles["policy"].loss

    @property
    def updates(self) -> int:
        """Optimiser updates of the policy so far."""
        return self.optimisers["policy"].steps

    @property
    def name(self) -> str:
        """Of the bar."""
        return "fine-tuning"

    @property
    def figures(self) -> dict[str, float]:
        """Counts so far."""
        return {
            "iteration": self.step,
            "trajectories": self.step * self.recipe.rollouts.trajectories,
            "queries": self.reward.queries,
            "failures": self.reward.failures,
            "updates": self.updates,
            "network_evaluations": self.policy.nfe + self.references.nfe,
            "seconds": round(self.seconds, 3),
        }

    def _set_mode(self) -> None:
        self.policy.eval()

    def _caption(self, row: dict[str, float], evaluated: dict[str, float]) -> str:
        if not row["queries"]:
            return f"loss {row['loss_policy']:.3g}" if "loss_policy" in row else ""
        held_out = f"held-out {evaluated['eval_reward']:.3g}, " if "eval_reward" in evaluated else ""
        clipped = f"clipped {row['clip_fraction']:.0%}, " if "clip_fraction" in row else ""
        return f"reward {row['reward']:.3g}, {held_out}{clipped}{row['queries']:,} queries"

    def collect(
        self, generator: Generator, *, trajectories: int | None = None, credit: Credit | None = None
    ) -> TensorDict:
        """A rollout [B, K] with rewards and advantages; credit and reward remember it.

        Args:
            generator: of first latents, noise and conditions.
            trajectories: B; the recipe's if None.
            credit: in place of the recipe's.

        Raises:
            NonFiniteLoss: see `require_sound`; so it is after too large an update.
        """
        plan, n = self.recipe.rollouts, trajectories or self.recipe.rollouts.trajectories
        cond = None
        if self.conditions is not None:
            groups = n // plan.rows_of_a_group
            rows = torch.randint(len(self.conditions), (groups,), generator=_cpu(generator))
            cond = self.conditions[rows.to(self.conditions.device)]
        rollout, r = self._paid(n, cond, generator)
        rollout.set((keys.NEXT, keys.REWARD), r)
        rollout.set(keys.ADVANTAGE, (credit or self.recipe.credit)(rollout, r).float())
        return rollout

    def _paid(self, n: int, cond: Tensor | None, generator: Generator) -> tuple[TensorDict, Tensor]:
        """A rollout [n, K] and its rewards [n, K, 1], which one thread asks for part by part where they overlap."""
        plan, place, asked = self.recipe.rollouts, self.recipe.placement, []
        with ThreadPoolExecutor(1) as thread, self.precision(), self.shares.acting(self.actor):
            overlap = {"each": lambda part: asked.append(thread.submit(place, part, self.reward))}
            rollout = plan.collect(
                self.actor,
                self.event_shape,
                trajectories=n,
                cond=cond,
                generator=generator,
                device=self.device,
                **(overlap if plan.overlap else {}),
            )
            require_sound(rollout)
            if asked:
                return rollout, torch.cat([part.result() for part in asked])
        return rollout, place(rollout, self.shares.asked(self.reward, n))

    def _advance(self) -> dict[str, float]:
        K = self.policy.num_steps
        self._take(self.recipe.rollouts.num_steps(self.policy, step_generator(self.seed, 2**33 + self.step)))
        try:
            return self._iteration()
        finally:
            self._take(K)

    def _take(self, K: int) -> None:
        """Give the policy and its copies grids of K steps."""
        if self.policy.num_steps != K:
            self.policy.num_steps = self.references.num_steps = K

    def _iteration(self) -> dict[str, float]:
        rollout = self.collect(step_generator(self.seed, self.step, self.device))
        rewards = rollout.get((keys.NEXT, keys.REWARD))[:, -1, 0]
        self.best = max(self.best, float(rewards.max()))
        self.references.before_updates()
        minibatches = self.recipe.updates(
            rollout,
            policy=self.policy,
            group_size=self.recipe.rows_together,
            generator=step_generator(self.seed, 2**32 + self.step),
            entries=dict.fromkeys(key for role in self.roles.values() for key in role.loss.in_keys),
        )
        with self.shares.counting((self.policy, *self.references.asked)):
            found = [self._update(minibatch, j) for j, minibatch in enumerate(minibatches)]
        self.references.after_updates(self.recipe.regulariser.decay_after(self.step))
        figures = {}
        for name in dict.fromkeys(name for f in found for name in f):
            values = [f[name] for f in found if name in f]
            figures[name] = sum(values) / len(values)
        adv = rollout.get(keys.ADVANTAGE)
        return figures | {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(correction=0)),
            "reward_best": self.best,
            "advantage_std": float(adv.std(correction=0)),
            "raw_advantage_std": self.recipe.credit.raw_std,
        }

    def _update(self, minibatch: TensorDict, j: int) -> dict[str, float]:
        """The optimiser steps of every role on the j-th minibatch [n, k]; others than the policy name theirs."""
        figures: dict[str, float] = {}
        for name, role in self.roles.items():
            if (j + 1) % role.every:
                continue
            for _ in range(role.repeats):
                found = role_step(
                    role,
                    self.optimisers[name],
                    minibatch,
                    plan=self.recipe.updates,
                    shares=self.shares,
                    precision=self.precision,
                )
                role.after_step(self.optimisers[name].steps)
            figures |= found if name == "policy" else {f"{name}/{key}": value for key, value in found.items()}
        return figures

    def _state(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        weights: dict[str, Mapping[str, Tensor]] = {
            "policy": policy_weights(self.policy),
            **self.references.weights(),
        }
        own = [n for n in self.roles if n != "policy" and n not in self.references.twins]
        weights |= {f"role_{n}": self.roles[n].module.state_dict() for n in own}
        training = {
            "recipe": str(self.recipe),
            "optimisers": {
                n: {"steps": o.steps, "state": o.state_dict()} for n, o in self.optimisers.items()
            },
            "credit": self.recipe.credit.state_dict(),
            "reward": self.reward.state_dict(),
            "evaluations": {"policy": self.policy.nfe, **self.references.counts()},
            "best": self.best,
        }
        return weights, training

    def _restore(self, checkpoint: Checkpoint, path: Path) -> None:
        weights, training = checkpoint.weights, checkpoint.training
        if "optimisers" not in training:
            raise CheckpointError(
                f"checkpoint {path} was written by diffrl 0.1: load it with diffrl.load_tuned; to go on, tune anew"
            )
        load_policy_weights(self.policy.denoiser, weights["policy"], path)
        for name, role in self.roles.items():
            if name != "policy" and name not in self.references.twins:
                role.module.load_state_dict(weights[f"role_{name}"])
            state = training["optimisers"][name]
            self.optimisers[name].load_state_dict(state["state"], state["steps"])
        self.references.restore(weights, training["evaluations"])
        self.policy.nfe = training["evaluations"]["policy"]
        self.recipe.credit.load_state_dict(training["credit"])
        self.reward.load_state_dict(training["reward"])
        self.best = training["best"]


def _require_kinds(policy: Any, recipe: Any, event_shape: Any, conditions: Any) -> None:
    if not isinstance(policy, DenoisingPolicy):
        raise InputTypeError(
            f"policy is a {type(policy).__name__}: give a diffrl.DenoisingPolicy(denoiser, sampler, num_steps=...)"
        )
    if not isinstance(recipe, Recipe):
        raise InputTypeError(f"recipe is {recipe!r}: give one made by diffrl.recipes, e.g. recipes.ddpo_is()")
    if not isinstance(event_shape, Sequence):
        raise InputTypeError(f"event_shape is {event_shape!r}: give the shape of one sample, e.g. (2,)")
    if conditions is not None and not isinstance(conditions, Tensor):
        raise InputTypeError(f"conditions are a {type(conditions).__name__}: give a tensor [M, ...]")
    if conditions is not None and (conditions.ndim == 0 or len(conditions) == 0):
        raise InputError(f"conditions have shape {list(conditions.shape)}: give [M, ...], at least one")


def _cpu(generator: Generator) -> Generator:
    """A generator of the CPU, as the one given or seeded by it."""
    if generator.device.type == "cpu":
        return generator
    return Generator().manual_seed(generator.initial_seed())
