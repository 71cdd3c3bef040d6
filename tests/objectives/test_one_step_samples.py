"""Samples in one step, against Monte Carlo's: of progressive distillation they are far better, of CDM they are not."""

import copy

import pytest
import torch

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from tests.kit.one_step import SAMPLES, distance, of_exact_denoiser, train

pytestmark = pytest.mark.soak


def of_one_step(denoiser: Denoiser, t: float) -> float:
    """From pure noise at the time t, where one step of DDIM leads to D."""
    x = t * torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return distance(denoiser(x, torch.full((SAMPLES,), t)))


def test_progressive_distillation_of_a_short_run() -> None:
    """16 steps of the teacher in one; Monte Carlo trains on for as many steps, and so does not lack any."""
    torch.manual_seed(0)
    student = Denoiser(MLP((2,), hidden=64, depth=2), Flow(), 0.5, "velocity")
    train(student, {"name": "edm"}, steps=400)
    monte_carlo, teacher = copy.deepcopy(student), of_one_step(student, 1.0)
    train(student, {"name": "progressive", "start": 16}, steps=600)
    train(monte_carlo, {"name": "edm"}, steps=600)
    found, plain, exact = of_one_step(student, 1.0), of_one_step(monte_carlo, 1.0), of_exact_denoiser()
    print(
        f"progressive: {found:.4f}, teacher {teacher:.4f}, trained on {plain:.4f}, exact denoiser {exact:.4f}"
    )
    assert found < 0.5 * min(teacher, plain) < 0.5 * exact


def test_one_step_of_cdm_is_that_of_a_denoiser() -> None:
    """Its fixed point is D*, which says the mean of the data at pure noise, as Monte Carlo's does."""
    found = {}
    for name in ("cdm", "edm"):
        torch.manual_seed(0)
        denoiser = Denoiser(MLP((2,), hidden=64, depth=2), EDM(sigma_max=20.0), 0.5)
        train(
            denoiser, {"name": name, "P_mean": 1.0, "P_std": 1.5}, steps=400
        )  # levels that reach pure noise
        found[name] = of_one_step(denoiser, 20.0)
    exact = of_exact_denoiser()
    print(f"cdm: {found['cdm']:.4f}, edm {found['edm']:.4f}, exact denoiser {exact:.4f}")
    assert found["cdm"] == pytest.approx(found["edm"], rel=0.05) and found["cdm"] > 0.9 * exact
