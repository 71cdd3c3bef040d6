"""Policies of small pipelines, and rollouts of them."""

from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.diffusion.pipelines.denoiser import PipelineDenoiser
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.samplers.ddim import Ancestral
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import collect_rollout
from tests.kit.oracles import generator
from tests.kit.pipelines import PROMPTS, stable_diffusion

P = len(PROMPTS)
SHAPE = (4, 8, 8)
EACH = torch.arange(P)

same = partial(torch.testing.assert_close, rtol=0, atol=0)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def denoiser_of(pipe: Any = None, *, w: float = 1.0, **options: Any) -> PipelineDenoiser:
    pipe = stable_diffusion() if pipe is None else pipe
    return PipelineDenoiser.from_pipeline(pipe, PROMPTS, guidance_scale=w, **options)


def policy_of(denoiser: nn.Module, sampler: GaussianSampler | None = None, K: int = 4) -> DenoisingPolicy:
    return DenoisingPolicy(denoiser, sampler or Ancestral(), num_steps=K, reduction="mean")


def states(t: float = 500.0) -> tuple[Tensor, Tensor, Tensor]:
    """A state for each prompt, a time for all, and the prompts' numbers."""
    return torch.randn(P, *SHAPE, generator=generator()), torch.full((P,), t), EACH


def rollout(policy: DenoisingPolicy, **options: Any) -> TensorDict:
    given = {"batch_size": P, "cond": EACH, "generator": generator(0)} | options
    return collect_rollout(policy, SHAPE, **given)


def differ(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().abs().max()) > 1e-2
