"""Cost of a fine-tuning iteration over the network evaluations that it consists of."""

from functools import partial

import torch
from report import Row
from timing import Ratio, interleave
from torch import Tensor

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.unet import UNet
from diffrl.diffusion.samplers.ddim import Ancestral
from diffrl.diffusion.schedules.edm import EDM
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.updates.steps import Updates

__all__ = ["finetune_cost"]

COMPARED = ("ddpo_sf", "ddpo_is", "sdpo")
NUM_STEPS, TRAJECTORIES, STATES, EVENT_SHAPE = 8, 32, 64, (1, 16, 16)


def brightness(x0: Tensor, cond: Tensor | None) -> Tensor:
    """A reward that costs nothing."""
    return x0.mean((1, 2, 3))


def finetune_cost(*, rounds: int) -> list[Row]:
    """Time of one iteration of each method with a UNet over its bare evaluations, in the same batches."""
    return [_cost(name, rounds) for name in COMPARED]


def _cost(name: str, rounds: int) -> Row:
    torch.manual_seed(0)
    denoiser = Denoiser(UNet(EVENT_SHAPE), EDM())
    options = {"num_steps": NUM_STEPS, "reduction": "mean", "std_floor": 0.1}
    policy = DenoisingPolicy(denoiser, Ancestral(), **options)  # type: ignore[arg-type]
    recipe = recipe_of(name)
    tuner = Finetuner(
        policy, brightness, recipe, event_shape=EVENT_SHAPE, length=Iterations(iterations=10**9)
    )
    steps = tuner.steps()
    bare = partial(_bare, denoiser, TRAJECTORIES if name == "sdpo" else STATES)
    seconds = interleave({"diffrl": lambda: next(steps), "bare": bare}, rounds=rounds, warm_up=1)
    ratios = {"bare evaluations": Ratio.of(seconds, "diffrl", "bare")}
    promise = "≤ 1.10" if name != "sdpo" else ""
    return Row(name, Row.milliseconds_of(seconds["diffrl"]), ratios, promise)


def recipe_of(name: str) -> Recipe:
    """One update a rollout, and a pass by steps for SDPO, so that all evaluate alike."""
    plan = Rollouts(TRAJECTORIES, pairs=name == "sdpo")
    order = "step" if name == "sdpo" else "trajectory"
    updates = Updates(order, minibatches=1, micro_batch=STATES)  # type: ignore[arg-type]
    recipe: Recipe = METHODS[name](rollouts=plan, updates=updates)
    return recipe


def _bare(denoiser: Denoiser, states: int) -> None:
    """K forwards of B states without gradients, then B K states forward and backward, `states` at once."""
    x, t = torch.randn(TRAJECTORIES, *EVENT_SHAPE), torch.full((TRAJECTORIES,), 1.0)
    with torch.no_grad():
        for _ in range(NUM_STEPS):
            denoiser(x, t, None)
    x, t = torch.randn(states, *EVENT_SHAPE), torch.full((states,), 1.0)
    for _ in range(NUM_STEPS * TRAJECTORIES // states):
        denoiser(x, t, None).square().mean().backward()
    denoiser.zero_grad()
