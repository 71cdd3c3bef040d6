"""Drawing whole chains at once against stepping the environment through them."""

import torch
from report import Row
from timing import Ratio, interleave
from torch import Generator

from diffrl.diffusion.chains import Chain
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import draw_chain
from diffrl.envs import DiffusionMRP

__all__ = ["chain_drawing"]

NUM_STEPS = 18


def chain_drawing(batch: int, *, rounds: int) -> Row:
    """Time of `DiffusionMRP.rollout` over that of `draw_chain` on a batch of fresh data, in 2-D."""
    points, generator = torch.randn(4096, 2), Generator().manual_seed(0)
    chain = Chain(EDM(), num_steps=NUM_STEPS, coupling="markov")
    env = DiffusionMRP(EDM(), points, num_steps=NUM_STEPS, batch_size=[batch], seed=0)

    def draw() -> None:
        draw_chain(
            chain, points[torch.randint(len(points), (batch,), generator=generator)], generator=generator
        )

    seconds = interleave({"draw": draw, "step": lambda: env.rollout(NUM_STEPS)}, rounds=rounds)
    ratios = {"env.rollout": Ratio.of(seconds, "step", "draw")}
    return Row(f"{NUM_STEPS} steps, B={batch}", Row.milliseconds_of(seconds["draw"]), ratios, "≥ 15")
