"""Decision processes to try: policies, environments and rewards whose chains are known."""

from typing import Any

from torch import Tensor

from diffrl.data.synthetic import rings
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.flow import Flow
from diffrl.envs import DiffusionMDP
from diffrl.finetuning.policy import DenoisingPolicy

ID = "DiffusionMDP-v0"


def exact(process: Schedule) -> MixtureDenoiser:
    m = rings().mixture
    assert m is not None
    return MixtureDenoiser(process, m.means, m.stds, m.weights)


def squares(x0: Tensor, cond: Any = None) -> Tensor:
    """A reward: -|x0|²."""
    return -x0.flatten(1).square().sum(1)


def labelled(x0: Tensor, cond: Tensor) -> Tensor:
    """A reward that depends on the label."""
    return cond.float() + 0.01 * x0.flatten(1).sum(1)


def policy_of(process: Schedule, sampler: GaussianSampler, K: int = 6, **options: Any) -> DenoisingPolicy:
    options = {"reduction": "mean", "denoiser": exact(process)} | options
    return DenoisingPolicy(options.pop("denoiser"), sampler, num_steps=K, **options)


def env_of(process: Schedule | None = None, reward: Any = squares, **options: Any) -> DiffusionMDP:
    options = {"event_shape": (2,), "num_steps": 6, "batch_size": [4], "seed": 0} | options
    return DiffusionMDP(process or Flow(), reward, **options)
