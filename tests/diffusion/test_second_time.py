"""A denoiser of two times: what its network is told, that the option changes nothing else, and its derivatives."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.guidance import GuidedDenoiser
from diffrl.diffusion.networks.automatic import auto
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.networks.unet import UNet
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.errors import InputError, InputTypeError
from tests.kit.oracles import continuous, every_process, noisy_times, randn

SHAPES = {"mlp": (3,), "unet": (1, 4, 4)}


def network(kind: str, *, second_time: bool = True, num_classes: int = 0) -> nn.Module:
    """A small network in float64 whose output is not 0."""
    torch.manual_seed(0)
    made: nn.Module
    if kind == "mlp":
        made = MLP(SHAPES[kind], num_classes, hidden=12, depth=2, second_time=second_time)
    else:
        made = UNet(SHAPES[kind], num_classes, channels=4, attention=True, second_time=second_time)
    torch.manual_seed(1)
    for p in made.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.3)
    return made.double().eval()


def states(process: Schedule, kind: str = "mlp") -> tuple[Tensor, Tensor, Tensor]:
    """x, t and r: r below t, r = t, and r clean, for every level t at which each prediction is defined."""
    t = noisy_times(process, 5)
    below = torch.cat([t[1:], torch.tensor([process.t_clean], dtype=torch.float64)])
    r = torch.cat([below, t, torch.full_like(t, process.t_clean)])
    t = t.repeat(3)
    scale = torch.hypot(process.alpha(t), process.sigma(t))
    return randn(len(t), *SHAPES[kind]) * scale.reshape(-1, *(1 for _ in SHAPES[kind])), t, r


# --- the networks


@pytest.mark.parametrize("kind", SHAPES)
def test_the_other_parameters_are_those_of_the_network_without_it(kind: str) -> None:
    without, told = (network(kind, second_time=on).state_dict() for on in (False, True))
    assert len(told) > len(without)
    assert all(torch.equal(told[name], tensor) for name, tensor in without.items())


@pytest.mark.parametrize("kind", SHAPES)
def test_the_network_looks_at_its_second_time_and_none_is_the_first(kind: str) -> None:
    told, x, c_noise = network(kind), randn(4, *SHAPES[kind]), randn(4, seed=1)
    at_t = told(x, c_noise)
    assert torch.equal(told(x, c_noise, None, c_noise), at_t)
    assert not torch.allclose(told(x, c_noise, None, c_noise + 0.5), at_t, atol=1e-3)


def test_auto_hands_it_on() -> None:
    for shape in SHAPES.values():
        made: Any = auto(shape, channels=4, second_time=True)
        assert made.second_time and not getattr(auto(shape, channels=4), "second_time", True)


@pytest.mark.parametrize("kind", SHAPES)
def test_networks_refuse_a_second_time_that_does_not_fit(kind: str) -> None:
    x, c_noise = randn(4, *SHAPES[kind]), randn(4)
    with pytest.raises(InputError, match="c_noise_r was given to a network without a second time"):
        network(kind, second_time=False)(x, c_noise, None, c_noise)
    with pytest.raises(InputError, match=r"c_noise_r must have shape \[4\], .* not \[2\]"):
        network(kind)(x, c_noise, None, c_noise[:2])


# --- the code of the second time


@every_process
def test_the_code_is_c_noise_and_finite_at_the_clean_end(process: Schedule) -> None:
    t = process.time_grid(20)
    codes = process.c_noise_end(t)
    torch.testing.assert_close(codes[:-1], process.c_noise(t[:-1]), rtol=1e-12, atol=0)
    assert (codes.diff() <= 1e-12).all()
    least = torch.tensor(process.t_least, dtype=torch.float64)
    assert codes.isfinite().all() and codes[-1] == process.c_noise(least)
    assert float(t[-2]) >= process.t_least - 1e-12


@continuous
def test_the_code_has_a_finite_derivative_at_the_clean_end(process: Schedule) -> None:
    clean = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    forward = torch.func.jvp(process.c_noise_end, (clean.detach(),), (torch.ones_like(clean),))[1]
    (backward,) = torch.autograd.grad(process.c_noise_end(clean).sum(), clean)
    assert forward.isfinite().all() and torch.equal(forward, backward)


def test_the_least_level_of_a_process_of_a_user_is_that_of_its_longest_grid() -> None:
    class Mine(VP):
        @property
        def t_least(self) -> float:
            return Schedule.t_least.fget(self)  # type: ignore[attr-defined]

    assert Mine(t_min=0.01).t_least == pytest.approx(0.01, rel=1e-12)
    assert VP("cosine", log_snr_max=10.0).t_least == pytest.approx(math.atan(math.exp(-5)) * 2 / math.pi)


# --- the denoiser


class Told(nn.Module):
    """Returns what it is told of r."""

    second_time = True

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None, c_noise_r: Tensor) -> Tensor:
        return c_noise_r[:, None].expand_as(x)


@every_process
def test_d_is_the_preconditioned_output_of_a_foreign_network(process: Schedule) -> None:
    x, t, r = states(process)
    denoiser = Denoiser(Told(), process)
    c_skip, c_out, _ = (c[:, None] for c in denoiser.scalings(t))
    torch.testing.assert_close(denoiser(x, t, None, r), c_skip * x + c_out * process.c_noise_end(r)[:, None])
    assert torch.equal(denoiser(x, t), denoiser(x, t, None, t)) and denoiser.second_time
    code = {"t": r, "c_noise_x1000": 1000 * process.c_noise_end(r)}
    for time_input in ("t", "c_noise_x1000"):
        found = Denoiser(Told(), process, prediction_type="x0", time_input=time_input)(x, t, None, r)
        torch.testing.assert_close(found, code[time_input][:, None].expand_as(x))


def test_a_denoiser_refuses_a_second_time_that_it_cannot_take() -> None:
    x, t = randn(4, 3), torch.ones(4).double()
    with pytest.raises(InputError, match="this Denoiser has no second time r: .*network.second_time=true"):
        Denoiser(network("mlp", second_time=False), EDM())(x, t, None, t)
    with pytest.raises(InputError, match=r"r has shape \(2,\), but there are 4 states"):
        Denoiser(network("mlp"), EDM())(x, t, None, t[:2])

    class Old(Told):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None) -> Tensor:  # type: ignore[override]
            return x

    with pytest.raises(InputTypeError, match=r"cannot be called as network\(x, c_noise, cond, c_noise_r\)"):
        Denoiser(Old(), EDM())


def test_guidance_is_of_both_averages() -> None:
    denoiser = Denoiser(network("mlp", num_classes=2), Flow())
    x, t, r = randn(4, 3), torch.full((4,), 0.7).double(), torch.full((4,), 0.2).double()
    cond, null = torch.tensor([0, 1, 0, 1]), torch.full((4,), 2)
    guided = GuidedDenoiser(denoiser, 2, 3.0)
    with_c, without = denoiser(x, t, cond, r), denoiser(x, t, null, r)
    torch.testing.assert_close(guided(x, t, cond, r), without + 3 * (with_c - without))
    assert guided.second_time and not torch.allclose(guided(x, t, cond), guided(x, t, cond, r))
    for scale, expected in ((1.0, with_c), (0.0, without)):
        assert torch.equal(GuidedDenoiser(denoiser, 2, scale)(x, t, cond, r), expected)


# --- derivatives


def difference(f: Any, at: tuple[Tensor, ...], along: tuple[Tensor, ...], h: float) -> Tensor:
    """Central differences of order 4."""

    def moved(n: int) -> Tensor:
        found: Tensor = f(*(a + n * h * b for a, b in zip(at, along, strict=True)))
        return found

    return (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * h)


@continuous
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("prediction", ["edm", "velocity"])
def test_jvps_in_x_t_and_r_are_finite_differences(process: Schedule, kind: str, prediction: Any) -> None:
    denoiser = Denoiser(network(kind), process, prediction_type=prediction).requires_grad_(False)
    x, t, r = states(process, kind)
    scale = t if isinstance(process, EDM) else t * (1 - t)  # over which the levels change
    tangents = (randn(*x.shape, seed=1), scale, torch.minimum(scale, r))

    def estimate(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return denoiser(x, t, None, r)

    for place in (0, 1, 2, None):
        along = tuple(v if place in (i, None) else torch.zeros_like(v) for i, v in enumerate(tangents))
        found = torch.func.jvp(estimate, (x, t, r), along)[1]
        expected = difference(estimate, (x, t, r), along, 1e-4)
        corner = (
            r - process.t_least
        ).abs() < 1e-9 * t  # of the code, but not of one that goes on to clean data
        inner = ~corner | (process.t_least == process.t_clean)
        torch.testing.assert_close(found[inner], expected[inner], rtol=1e-6, atol=1e-7)
        assert found.isfinite().all() and found[inner].abs().max() > 1e-3


def test_in_discrete_time_there_are_derivatives_in_x_alone() -> None:
    denoiser = Denoiser(network("mlp"), DDPM())
    x, t, r = states(DDPM())
    found = torch.func.jvp(lambda x: denoiser(x, t, None, r), (x,), (randn(*x.shape, seed=1),))[1]
    expected = difference(lambda x: denoiser(x, t, None, r), (x,), (randn(*x.shape, seed=1),), 1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_gradients_pass_through_a_jvp_to_the_weights() -> None:
    denoiser = Denoiser(network("mlp"), Flow(), prediction_type="velocity")
    x, t, r = randn(4, 3), torch.full((4,), 0.7).double(), torch.full((4,), 0.2).double()
    one = torch.ones_like(t)

    def slope() -> Tensor:
        found = torch.func.jvp(lambda t: denoiser(x, t, None, r), (t,), (one,))[1]
        return found.square().sum()

    (weight,) = [p for name, p in denoiser.named_parameters() if name == "network.second.weight"]
    (grad,) = torch.autograd.grad(slope(), weight)
    with torch.no_grad():
        before = weight[0, 0].item()
        values = []
        for h in (1e-5, -1e-5):
            weight[0, 0] = before + h
            values.append(float(slope()))
    assert float(grad[0, 0]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
