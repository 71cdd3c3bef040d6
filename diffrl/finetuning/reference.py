"""The policies that a tuned one is held against, and its weights as files keep them."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from diffrl.diffusion.pipelines.lora import has_lora
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.training.checkpoints import CheckpointError

__all__ = ["frozen_copy", "load_policy_weights", "move_average", "policy_weights", "shares_weights"]


def frozen_copy(policy: DenoisingPolicy) -> DenoisingPolicy:
    """The policy as it is now, for a reference: nothing that is done to the policy changes it.

    A denoiser with adapters brings its base by a method `reference`; another is copied.
    """
    own: Callable[[], nn.Module] | None = getattr(policy.denoiser, "reference", None)
    other = copy.deepcopy(policy.denoiser).eval().requires_grad_(False) if own is None else own()
    return DenoisingPolicy(
        other,
        policy.sampler,
        num_steps=policy.num_steps,
        reduction=policy.reduction,
        std_floor=policy.std_floor,
        process=policy.process,
    )


def shares_weights(policy: DenoisingPolicy) -> bool:
    """Whether a `frozen_copy` holds the policy's own weights, under adapters that are switched off."""
    network = getattr(policy.denoiser, "network", None)
    return isinstance(network, nn.Module) and has_lora(network)


@torch.no_grad()
def move_average(average: DenoisingPolicy, policy: DenoisingPolicy, decay: float) -> None:
    """θ_avg ← decay θ_avg + (1 - decay) θ, in place."""
    pairs = zip(average.denoiser.parameters(), policy.denoiser.parameters(), strict=True)
    for theta_avg, theta in pairs:
        theta_avg.lerp_(theta, 1 - decay)


def policy_weights(policy: DenoisingPolicy) -> dict[str, Tensor]:
    """What is to be saved: of a denoiser with adapters those, by its method `trainable_state`, else all weights."""
    own: Callable[[], dict[str, Tensor]] | None = getattr(policy.denoiser, "trainable_state", None)
    return policy.denoiser.state_dict() if own is None else own()


def load_policy_weights(policy: DenoisingPolicy, weights: dict[str, Tensor], path: Path) -> None:
    """Take the weights that `policy_weights` gave.

    Raises:
        CheckpointError: they are another network's.
    """
    denoiser = policy.denoiser
    load = getattr(denoiser, "load_trainable_state", denoiser.load_state_dict)
    try:
        load(weights)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} is of another network: {reason}") from error
