"""Each scheme of maps, trained from random weights, draws better samples in one step than the best denoiser can."""

import pytest
import torch

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.flow_maps import flow_map
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.flow import Flow
from tests.kit.maps import MAPS
from tests.kit.one_step import SAMPLES, distance, of_exact_denoiser, train

IN_CI = ("mean_flow", "lagrangian_map")
"""One with a derivative along the path, one that bootstraps on its own velocity; the others are soaks."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.soak) for name in MAPS],
)
def test_one_step_samples_are_nearer_to_the_data_than_those_of_the_exact_denoiser(name: str) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(MLP((2,), hidden=64, depth=2, second_time=True), Flow(), 0.5, "velocity")
    generator = train(denoiser, {"name": name}, steps=400)
    x = torch.randn(SAMPLES, 2, generator=generator)
    with torch.no_grad():
        found = distance(flow_map(denoiser, x, torch.ones(SAMPLES), torch.zeros(SAMPLES)))
    baseline = of_exact_denoiser()
    print(f"{name}: {found:.4f}, exact denoiser {baseline:.4f}")
    assert found < 0.8 * baseline
