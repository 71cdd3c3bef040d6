"""Each scheme of maps, trained from random weights, draws better samples in one step than the best denoiser can."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.data.synthetic import gmm
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.flow_maps import flow_map
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.flow import Flow
from diffrl.metrics.distances import sample_distance
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.scheme import build_objective
from diffrl.objectives.soft_update import SoftUpdate

IN_CI = ("mean_flow", "lagrangian_map")
"""One with a derivative along the path, one that bootstraps on its own velocity; the others are soaks."""

STEPS, BATCH = 400, 256
DATA = gmm(dim=2, components=4, std=0.05, spread=0.5)
SCHEMES: dict[str, dict[str, Any]] = {
    "mean_flow": {},
    "shortcut": {},
    "improved_mean_flow": {},
    "alpha_flow": {},
    "lagrangian_map": {},
    "progressive_map": {},
    "eulerian_map": {},
    "inductive_moments": {},
    "td_map": {},
}
CHAIN = {"num_steps": 16, "coupling": "shared"}


def one_step_samples(name: str) -> Tensor:
    torch.manual_seed(0)
    denoiser = Denoiser(MLP((2,), hidden=64, depth=2, second_time=True), Flow(), 0.5, "velocity")
    options = {"name": name, **SCHEMES[name]}
    objective = build_objective(
        {"objective": options, "chain": CHAIN, "starts": {"name": "uniform"}}, denoiser, data=DATA
    )
    updater = SoftUpdate(objective.loss, eps=0.98) if objective.loss.bootstrap == "target" else None
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        objective.set_progress(step, STEPS)
        x0, _ = DATA.batch(BATCH, generator)
        loss = objective.loss(objective.draw(x0, cond=None, generator=generator))["loss_value"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if updater is not None:
            updater.step()
    x = torch.randn(2000, 2, generator=generator)
    with torch.no_grad():
        return flow_map(denoiser, x, torch.ones(2000), torch.zeros(2000))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.soak) for name in SCHEMES],
)
def test_one_step_samples_are_nearer_to_the_data_than_those_of_the_exact_denoiser(name: str) -> None:
    """What Monte Carlo learns: at pure noise the exact denoiser says the mean of the data, whatever the noise."""
    assert name in OBJECTIVES
    samples = one_step_samples(name)
    reference = DATA.test[:2000]
    baseline = sample_distance("sliced_w2", DATA.test.mean(0).expand_as(samples), reference)
    found = sample_distance("sliced_w2", samples, reference)
    print(f"{name}: {found:.4f}, exact denoiser {baseline:.4f}")
    assert found < 0.8 * baseline
