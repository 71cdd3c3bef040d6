"""A surrogate makes the loss that an update descends, and names the networks that it trains."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from diffrl import keys
from diffrl.diffusion.laws import Gaussian
from diffrl.errors import InputError
from diffrl.finetuning.piece import Piece, Setting
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.registry import Registry
from diffrl.training.optim import Optim

if TYPE_CHECKING:
    from diffrl.finetuning.recipe import Recipe

__all__ = [
    "SURROGATES",
    "Role",
    "Surrogate",
    "policy_figures",
    "reference_kl",
    "reference_log_prob",
    "scaled_clip_range",
    "step_lengths",
    "trainable_law",
]

SURROGATES = Registry("surrogate", "diffrl.finetuning.methods")


@dataclass(frozen=True)
class Role:
    """A network that is trained beside others, or the only one: its loss and its optimiser.

    Args:
        module: whose parameters are trained, as far as they require a gradient.
        loss: takes steps or samples, and gives a TensorDict: entries named ``loss_...`` are summed and descended,
            the others are figures. Its ``in_keys`` are what it reads.
        optim: learning rate, schedule and clipping; None: those of the run.
        repeats: optimiser steps on each minibatch.
        every: it is trained on each so many-th minibatch.
        prepare: called with each minibatch, and with how many states may be forwarded at once, before it is parted.
        after_step: called after each step, with their number so far, such as to move an average.
    """

    module: nn.Module
    loss: LossModule
    optim: Optim | None = None
    repeats: int = 1
    every: int = 1
    prepare: Callable[[TensorDictBase, int], None] = lambda minibatch, at_once: None
    after_step: Callable[[int], None] = lambda steps: None


class Surrogate(Piece, ABC):
    """Makes the loss of a policy; a method that trains several networks gives `roles` instead.

    A subclass sets the class variables that differ for it.
    """

    on_policy: ClassVar[bool] = False
    """Whether only the first update of a rollout is valid."""
    needs_pairs: ClassVar[bool] = False
    """Whether it compares trajectories that share their first latent."""
    whole_groups: ClassVar[bool] = False
    """Whether it compares the trajectories of a group, so that an update must hold all of them."""
    takes_kl: ClassVar[bool] = False
    """Whether it has a KL term."""
    reads: ClassVar[Literal["steps", "samples", "boundaries", "preferences"]] = "steps"
    """What its loss is fed with: steps of trajectories, their clean samples at fresh times and noise, or boundaries."""

    @property
    def takes_samples(self) -> bool:
        """Whether clean samples are all that it needs, whoever drew them."""
        return self.reads == "samples"

    @abstractmethod
    def loss(self, setting: Setting) -> LossModule:
        """The loss of the policy."""

    def actor(self, setting: Setting) -> DenoisingPolicy:
        """What draws the rollouts."""
        return setting.policy

    def roles(self, setting: Setting) -> dict[str, Role]:
        """All networks that are trained, in the order of their updates; "policy" is the one that is tuned."""
        return {"policy": Role(setting.policy.denoiser, self.loss(setting))}

    def conflict(self, recipe: "Recipe") -> str | None:
        """Refuse rollouts without pairs, several updates of an on-policy loss, a missing KL term, the wrong updates."""
        name, u = type(self).__name__, recipe.updates
        if self.needs_pairs and not recipe.rollouts.pairs:
            return f"{name} compares the two trajectories of a pair: set rollouts.pairs=true"
        if self.reads != u.unit:
            return f"{name} reads {self.reads}, but these updates give {u.unit}: set updates={self.reads}"
        if self.on_policy and not u.single:
            return (
                f"{name} is on-policy, one update a rollout: set updates.minibatches=1, updates.passes=1 and "
                "updates.order=trajectory, or take ppo_clip"
            )
        if recipe.regulariser.kl_coef > 0 and not self.takes_kl:
            return f"{name} has no KL term: set regulariser.kl_coef=0, or take ppo_clip"
        return None


def scaled_clip_range(dim: int, reduction: Literal["mean", "sum"]) -> float:
    """The published clip range ε = 1e-4 (mean, 16,384 dims) carried over to latents of another size.

        ε_mean = 0.0128/√dim,    ε_sum = 0.0128 √dim

    A shift of the mean by δ standard deviations moves the mean log-ratio by about δ/√dim, so that this keeps the
    δ at which clipping sets in, 1.3 %.

    Source: the numbers of Training Diffusion Models with Reinforcement Learning (Black et al., 2024) and its code,
    https://arxiv.org/abs/2305.13301; the scaling is ours.

    Args:
        dim: numbers of a latent.
        reduction: the policy's.
    """
    return 0.0128 * (dim**0.5 if reduction == "sum" else dim**-0.5)


def trainable_law(policy: DenoisingPolicy, steps: TensorDictBase) -> tuple[Gaussian, Tensor, Tensor]:
    """The policy's law at the steps [N] that have a log-probability, log π of the actions taken, and their mask.

    Deterministic steps are not forwarded at all.

    Raises:
        ValueError: no step is stochastic.
    """
    mask = steps.get(keys.TRAINABLE).squeeze(-1)
    if not bool(mask.any()):
        raise InputError(
            "no step of this batch is stochastic, so none has a log-probability: leave such batches out"
        )
    law = _law_at(policy, steps, mask)
    return law, policy.log_prob(law, steps.get(keys.ACTION)[mask]), mask


def reference_kl(reference: DenoisingPolicy, law: Gaussian, steps: TensorDictBase, mask: Tensor) -> Tensor:
    """KL(π ‖ π_ref) of the n steps under the mask, shape [n]; the reference gets no gradient.

    Args:
        reference: π_ref.
        law: π at the steps under the mask.
        steps: of a rollout.
        mask: bool [N].
    """
    with torch.no_grad():
        other = _law_at(reference, steps, mask)
    return law.kl(other, reference.reduction)


def reference_log_prob(reference: DenoisingPolicy, steps: TensorDictBase, mask: Tensor) -> Tensor:
    """Log π_ref of the actions taken at the n steps under the mask, shape [n]; the reference gets no gradient."""
    with torch.no_grad():
        return reference.log_prob(_law_at(reference, steps, mask), steps.get(keys.ACTION)[mask])


def step_lengths(policy: DenoisingPolicy, steps: TensorDictBase, mask: Tensor) -> Tensor:
    """Δt = t_i - t_{i+1} of the steps under the mask, in the process's time, shape [n]."""
    i = steps.get(keys.INDEX).squeeze(-1)[mask].cpu()
    return (policy.grid[i] - policy.grid[i + 1]).to(mask.device, torch.float32)


def _law_at(policy: DenoisingPolicy, steps: TensorDictBase, mask: Tensor) -> Gaussian:
    cond = steps.get(keys.COND, None)
    return policy.law(
        steps.get(keys.X_T)[mask],
        steps.get(keys.INDEX).squeeze(-1)[mask],
        None if cond is None else cond[mask],
    )


def policy_figures(log_ratio: Tensor, clipped: Tensor) -> dict[str, Tensor]:
    """What to watch of an update: mean ratio, share of what the clip acts on, ½ mean (log ratio)².

    Args:
        log_ratio: log π/π_old of steps, shape [n].
        clipped: bool, any shape.
    """
    return {
        "ratio": log_ratio.detach().exp().mean(),
        "clip_fraction": clipped.to(log_ratio).mean(),
        "approx_kl": 0.5 * log_ratio.detach().square().mean(),
    }
