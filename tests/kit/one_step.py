"""Short trainings on a mixture in the plane, and how far samples of one evaluation are from the data."""

import torch
from torch import Tensor

from diffrl.data.synthetic import gmm
from diffrl.diffusion.denoisers import Denoiser
from diffrl.metrics.distances import sample_distance
from diffrl.objectives.scheme import build_objective
from diffrl.objectives.soft_update import SoftUpdate
from diffrl.registry import Config

DATA = gmm(dim=2, components=4, std=0.05, spread=0.5)
BATCH, SAMPLES = 256, 2000
CHAIN = {"num_steps": 16, "coupling": "shared"}


def train(denoiser: Denoiser, options: Config, *, steps: int, lr: float = 5e-3) -> torch.Generator:
    """Train by an objective of the library; the generator goes on where data and noise ended."""
    config = {"objective": options, "chain": CHAIN, "starts": {"name": "uniform"}}
    objective = build_objective(config, denoiser, data=DATA)
    updater = SoftUpdate(objective.loss, eps=0.98) if objective.loss.bootstrap == "target" else None
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        objective.set_progress(step, steps)
        x0, _ = DATA.batch(BATCH, generator)
        loss = objective.loss(objective.draw(x0, cond=None, generator=generator))["loss_value"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if updater is not None:
            if objective.target_decay is not None:
                updater.eps = objective.target_decay
            updater.step()
    return generator


def distance(samples: Tensor) -> float:
    """Sliced Wasserstein distance of samples from as many test data."""
    return sample_distance("sliced_w2", samples, DATA.test[:SAMPLES])


def of_exact_denoiser() -> float:
    """What Monte Carlo learns: at pure noise the exact denoiser says the mean of the data, whatever the noise."""
    return distance(DATA.test.mean(0).expand(SAMPLES, -1))
