"""Flow SDE and coefficient-preserving sampling: their coefficients, their limits, the laws they draw from."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.laws import Gaussian
from diffrl.diffusion.samplers.base import GaussianSampler, Model, Noise
from diffrl.diffusion.samplers.ddim import DDIM
from diffrl.diffusion.samplers.loop import sample
from diffrl.diffusion.samplers.ode import Euler
from diffrl.diffusion.samplers.sde import CPS, FlowSDE
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.training.build import build_sampler
from tests.kit.configs import small
from tests.kit.oracles import CONTINUOUS, Estimate, assert_within, every_process, generator, randn

EXACT = {"rtol": 0.0, "atol": 1e-14}


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def on_x0_and_noise(
    sampler: GaussianSampler, process: Schedule, t: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a step makes of x_t = α x0 + σ ε where D = x0: its coefficients of x0 and ε, and its std."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    one, zero = torch.ones(len(t), 1).double(), torch.zeros(len(t), 1).double()
    of_x0 = sampler.law(process, alpha[:, None], one, t, s)
    of_noise = sampler.law(process, sigma[:, None], zero, t, s)
    return of_x0.mean[:, 0], of_noise.mean[:, 0], of_x0.std


def steps(process: Schedule, N: int = 12) -> tuple[Tensor, Tensor]:
    grid = process.time_grid(N)
    return grid[:-1], grid[1:]


# CPS


@every_process
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_cps_keeps_the_coefficients_of_the_marginal(process: Schedule, eta: float) -> None:
    """Of x0 it is α_s, and old and new noise together are σ_s: for rectified flow (1-s, s)."""
    t, s = steps(process)
    on_x0, on_noise, std = on_x0_and_noise(CPS(eta), process, t, s)
    torch.testing.assert_close(on_x0, process.alpha(s), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((on_noise**2 + std**2).sqrt(), process.sigma(s), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std, process.sigma(s) * math.sin(math.pi / 2 * eta), rtol=1e-12, atol=0)
    if isinstance(process, Flow):
        torch.testing.assert_close(on_x0, 1 - s, **EXACT)


@every_process
def test_cps_without_noise_is_ddim(process: Schedule) -> None:
    t, s = steps(process)
    x, D_x = randn(12, 3), randn(12, 3, seed=1)
    ours, theirs = (sampler.law(process, x, D_x, t, s) for sampler in (CPS(0.0), DDIM(0.0)))
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-11, atol=1e-11)
    assert not ours.std.any()


def test_cps_of_full_noise_forgets_the_state() -> None:
    """η = 1 draws all noise afresh: the step of consistency models."""
    t, s = steps(Flow())
    D_x = randn(12, 3)
    a, b = (CPS(1.0).law(Flow(), x, D_x, t, s) for x in (randn(12, 3, seed=1), randn(12, 3, seed=2)))
    torch.testing.assert_close(a.mean, b.mean, **EXACT)
    torch.testing.assert_close(a.mean, (1 - s)[:, None] * D_x, **EXACT)
    torch.testing.assert_close(a.std, s, **EXACT)


# Flow SDE


@pytest.mark.parametrize("a", [0.0, 0.3, 0.7, 1.4])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_flow_sde_is_exact_in_the_data(a: float, shift: float) -> None:
    t, s = steps(Flow(shift))
    on_x0, _, _ = on_x0_and_noise(FlowSDE(a), Flow(shift), t, s)
    torch.testing.assert_close(on_x0, 1 - s, rtol=1e-12, atol=1e-12)


def test_flow_sde_leaves_too_much_noise() -> None:
    """At every step; the published example is 0.728 where 0.7 is due."""
    for N, a in itertools.product((4, 10, 28, 40), (0.3, 0.7, 1.0)):
        t, s = steps(Flow(), N)
        _, on_noise, std = on_x0_and_noise(FlowSDE(a), Flow(), t, s)
        excess = (on_noise**2 + std**2).sqrt() - s
        assert 1e-4 < float(excess.min()) < float(excess.max()) < 0.6
    _, on_noise, std = on_x0_and_noise(FlowSDE(0.7), Flow(), float64(0.8), float64(0.7))
    assert float((on_noise**2 + std**2).sqrt()) == pytest.approx(0.728, abs=5e-4)


def test_flow_sde_without_noise_is_euler() -> None:
    t, s = steps(Flow())
    x, D_x = randn(12, 3), randn(12, 3, seed=1)
    ours, theirs = (sampler.law(Flow(), x, D_x, t, s) for sampler in (FlowSDE(0.0), Euler()))
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-12, atol=1e-12)
    assert not ours.std.any()


@pytest.mark.parametrize("N", [1, 2, 10])
def test_flow_sde_is_the_published_step(N: int) -> None:
    """In plain Python from the published formula, whose only guard is in the denominator at pure noise."""
    a, x, D = 0.7, 1.3, -0.4
    for i in range(N):
        t, s = 1 - i / N, 1 - (i + 1) / N
        sd = a * math.sqrt(t / (1 - (s if i == 0 else t)))
        v, dt = (x - D) / t, s - t
        mean = x * (1 + sd**2 / (2 * t) * dt) + v * (1 + sd**2 * (1 - t) / (2 * t)) * dt
        law = FlowSDE(a).law(Flow(), float64(x)[None], float64(D)[None], *map(torch.tensor, (t, s)))
        assert float(law.mean) == pytest.approx(mean, rel=1e-6)
        assert float(law.std) == pytest.approx(sd * math.sqrt(-dt), rel=1e-6)


@pytest.mark.parametrize("shift", [0.3, 0.37, 1.0, 1.7, 3.0, 5.1])
def test_flow_sde_starts_with_finite_noise(shift: float) -> None:
    """However the shift is rounded; and its last step, onto clean data, is a draw too."""
    t, s = steps(Flow(shift), 8)
    std = FlowSDE(0.6).law(Flow(shift), torch.zeros(8, 1), torch.zeros(8, 1), t, s).std
    assert float(std[0]) == pytest.approx(0.6)
    assert bool((std > 0).all()) and bool((std < 1).all())


# Both


CASES = [
    *((CONTINUOUS[name], CPS(0.7)) for name in ("edm", "vp_cosine", "flow")),
    (Flow(), FlowSDE(0.7)),
    (Flow(3.0), FlowSDE(0.3)),
]


@pytest.mark.parametrize(("process", "sampler"), CASES, ids=str)
def test_states_at_times_of_their_own(process: Schedule, sampler: GaussianSampler) -> None:
    """As in a minibatch; as many states as coordinates, where a wrong broadcast would pass."""
    grid, x, D_x = process.time_grid(5), randn(5, 5), randn(5, 5, seed=1)
    t, s = grid[torch.tensor([0, 3, 4, 1, 1])], grid[torch.tensor([1, 4, 5, 2, 3])]
    together = sampler.law(process, x, D_x, t, s)
    assert together.std.shape == (5,)
    for n in range(5):
        alone: Gaussian = sampler.law(process, x[n : n + 1], D_x[n : n + 1], t[n], s[n])
        torch.testing.assert_close(together.mean[n], alone.mean[0], **EXACT)
        torch.testing.assert_close(together.std[n], alone.std, **EXACT)


def draws(process: Schedule, sampler: GaussianSampler, N: int, M: int = 8000) -> Tensor:
    exact = GaussianDenoiser(process, float64(0.5, -1.0), torch.diag(float64(0.64, 0.25)))
    noise = Noise(generator(1))
    return sample(exact, (M, 2), sampler=sampler, num_steps=N, noise=noise, dtype=torch.float64)


@pytest.mark.parametrize(
    ("process", "sampler", "N"),
    [
        *((CONTINUOUS[name], CPS(0.1), 150) for name in ("edm", "vp_cosine", "flow")),
        (Flow(), FlowSDE(0.7), 400),
    ],
    ids=str,
)
def test_mean_and_variance_are_recovered(process: Schedule, sampler: GaussianSampler, N: int) -> None:
    """With the exact denoiser and small steps; the flow SDE by more of them, for its surplus of noise."""
    x = draws(process, sampler, N)
    for values, expected in ((x, float64(0.5, -1.0)), ((x - x.mean(0)) ** 2, float64(0.64, 0.25))):
        error = values.std(0) / len(x) ** 0.5 + 0.02 / 4  # steps are approximate: allow 2 % of the scale
        assert_within(Estimate(values.mean(0), error), expected, errors=4.0)


def test_cps_narrows_samples() -> None:
    """In many steps too: the fresh noise of a step does not become less when the step gets shorter."""
    lost = [1 - float(draws(Flow(), CPS(eta), 150).var(0)[0]) / 0.64 for eta in (0.1, 0.3, 0.7, 1.0)]
    assert lost == sorted(lost)
    assert lost[2] == pytest.approx(0.28, abs=0.03)


@pytest.mark.parametrize(("process", "sampler"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_evaluations(process: Schedule, sampler: GaussianSampler, dtype: torch.dtype) -> None:
    model = Model(GaussianDenoiser(process, torch.zeros(2), torch.eye(2)), process, 6)
    x = sample(model.denoiser, (3, 2), sampler=sampler, num_steps=6, process=process, seed=0, dtype=dtype)
    assert x.dtype == dtype and bool(torch.isfinite(x).all())
    grid = sampler.grid(process, 6)
    sampler.step(model, x, grid[1], grid[2], Noise(generator()))
    assert model.nfe == 1


@pytest.mark.parametrize(("process", "sampler"), CASES, ids=str)
def test_laws_live_on_the_device_of_the_states(process: Schedule, sampler: GaussianSampler) -> None:
    x, (t, s) = torch.empty(12, 2, device="meta"), steps(process)
    assert sampler.law(process, x, x, t, s).sample(Noise(None)).device.type == "meta"


@pytest.mark.parametrize(
    ("words", "expected"), [(["sampler=cps", "sampler.eta=0.4"], CPS(0.4)), (["sampler=flow_sde"], FlowSDE())]
)
def test_configurations_choose_them_by_name(words: list[str], expected: GaussianSampler) -> None:
    assert build_sampler(small("process=flow", *words)) == expected


def test_arguments_that_are_refused() -> None:
    with pytest.raises(ValueError, match="on the Flow process, not on EDM: use DDIM"):
        FlowSDE().law(EDM(), torch.zeros(1, 1), torch.zeros(1, 1), float64(2.0), float64(1.0))
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="a is"):
            FlowSDE(bad)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="eta is"):
            CPS(bad)
