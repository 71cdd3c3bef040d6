"""Double sampling: the residual gradient without bias, and the two sources of independent next states."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.data.dataset import Data
from diffrl.data.synthetic import gmm
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.starts import LossAwareStarts
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError
from diffrl.metrics import value_error
from diffrl.objectives import (
    DoubleSamplingLoss,
    ExactLaw,
    TwinSteps,
    ValueLoss,
    reverse_rollout,
    single_transitions,
    twins_of_laws,
    twins_of_rollouts,
)
from tests.kit.oracles import Estimate, assert_within, generator, randn
from tests.kit.value_loss import PROCESS, data, denoiser, draw, number

DATA = gmm(dim=2, components=3, test_size=64)
UNKNOWN = Data("mine", test=DATA.test, draw=lambda n, generator: DATA.test[:n])
EVEN = EDM(sigma_min=0.1, sigma_max=10.0, rho=1.0)


def oracle(process: Schedule) -> MixtureDenoiser:
    m = DATA.mixture
    assert m is not None
    return MixtureDenoiser(process, m.means, m.stds, m.weights)


def products(twins: TensorDict, D: nn.Module) -> Tensor:
    """⟨r¹, r²⟩ by hand, [N]."""
    reached = twins["next"]
    noisy = ~reached["terminated"]
    t_next = torch.where(noisy, reached["t"], twins["t"])
    D_x, D_next = (
        D(x.flatten(0, 1), t.flatten()).view_as(x)
        for x, t in ((twins["x_t"], twins["t"]), (reached["x_t"], t_next))
    )
    r = twins["A"] * (twins["x0"] - D_x) - noisy * reached["A"] * (twins["x0"] - D_next)
    return (r[:, 0] * r[:, 1]).sum(-1)


@pytest.mark.parametrize("process", [EVEN, Flow(), DDPM()], ids=["edm", "flow", "ddpm"])
def test_the_oracle_has_no_expected_residual(process: Schedule) -> None:
    """E⟨r¹, r²⟩ = 0 with two draws of the posterior, at each level; not so where two next states share one x0."""
    M, exact = 20_000, oracle(process)
    x0, _ = DATA.batch(M, generator(1))
    chain = ChainSampler(Chain(process, 5, "markov"), jitter=False)(
        x0.double(), cond=None, generator=generator(2)
    )
    twins = twins_of_laws(chain, ExactLaw(exact), process, 1.0, generator(3))
    found = products(twins, exact).view(M, 5)
    assert_within(Estimate(found.mean(0), found.std(0) / M**0.5), 0.0)
    own = chain["x0"].flatten(0, 1)
    shared = torch.cat([single_transitions(chain, own, process, 1.0, generator(seed)) for seed in (4, 5)], 1)
    of_one = products(shared, exact).view(M, 5)
    assert bool((of_one.mean(0) > 5 * of_one.std(0) / M**0.5).all())


def test_the_loss_by_hand() -> None:
    model, chain = denoiser(), draw(x0=data(4))
    twins = twins_of_laws(chain, ExactLaw(oracle(PROCESS)), PROCESS, 1.0, generator(3))
    loss = DoubleSamplingLoss(model, weight="none", residual_coef=2.0, denoising_coef=0.5)
    D_x = model(twins["x_t"][:, 0], twins["t"][:, 0, 0])
    c_out = model.scalings(twins["t"][:, 0]).c_out
    L_den = ((D_x - twins["x0"][:, 0]).square().mean(-1, keepdim=True) / c_out**2).mean()
    wanted = 2 * products(twins, model).mean() / 2 + 0.5 * L_den
    torch.testing.assert_close(loss(twins)["loss_value"], wanted, rtol=1e-10, atol=0)
    noisy = 2 * int((~twins["next", "terminated"][:, 0]).sum())
    assert loss.network_evaluations == len(twins) + noisy
    assert twins["loss"].shape == (len(twins), 2, 1)


class Linear(nn.Module):
    """D(x, t) = b(t) x, one b for each of two levels."""

    def __init__(self, process: EDM, b: Tensor) -> None:
        super().__init__()
        self.process, self.b = process, nn.Parameter(b)
        self.levels = process.time_grid(2)[:2]

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        k = (t[:, None] - self.levels).abs().argmin(1)
        return self.b[k].view(-1, *[1] * (x_t.ndim - 1)) * x_t

    def scalings(self, t: Tensor) -> Any:
        return Denoiser(MLP((1,), hidden=4), self.process).scalings(t)


def test_its_gradient_is_that_of_the_squared_expected_residual() -> None:
    """x0 ~ N(0, 1), two levels: E[x0 | x] = x/(1 + σ²) and E[x' | x] in closed form, the rest by autograd."""
    process, M = EDM(sigma_min=0.5, sigma_max=2.0), 400_000
    b = torch.tensor([0.35, 0.6]).double()
    levels = process.time_grid(2)[:2]
    exact = GaussianDenoiser(process, torch.zeros(1), torch.eye(1))

    class Law:
        def mean(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            return exact(x_t, t)

        def draw(self, x_t: Tensor, t: Tensor, cond: Any = None, *, generator: Any = None) -> Tensor:
            return exact.sample_posterior(x_t, t, 1, generator)[:, 0]

    model = Linear(process, b.clone())
    chain = ChainSampler(Chain(process, 2, "markov"), jitter=False)(
        randn(M, 1), cond=None, generator=generator(6)
    )
    twins = twins_of_laws(chain, Law(), process, 1.0, generator(7))
    parts = []
    for part in twins.split(M // 20):
        loss = DoubleSamplingLoss(model, weight="none")
        parts.append(torch.autograd.grad(loss(part)["loss_value"], model.b)[0])
    found = torch.stack(parts)

    p = b.clone().requires_grad_()
    A, kappa = chain["A"][0, :, 0], chain["kappa"][0, :, 0]
    to_next = posterior(process, levels[0], levels[1], 1.0)
    v, d = 1 + levels**2, 1 / (1 + levels**2)  # x ~ N(0, v), E[x0 | x] = d x
    slope = to_next.A * d[0] + to_next.kappa  # E[x' | x] = slope x
    first = A[0] * (d[0] - p[0]) - A[1] * (d[0] - p[1] * slope)
    last = A[1] * (d[1] - p[1])
    (first**2 * v[0] + last**2 * v[1]).div(2).backward()
    assert p.grad is not None and kappa.shape == (2,)
    assert_within(Estimate(found.mean(0), found.std(0) / 20**0.5), p.grad)
    biased = ValueLoss(model, weight="none", lmbda=0.0, bootstrap="residual")
    of_one = torch.autograd.grad(biased(chain)["loss_value"], model.b)[0]
    assert float(((of_one - p.grad) / (found.std(0) / 20**0.5)).abs().max()) > 20


def test_training_with_it_lowers_the_value_error() -> None:
    torch.manual_seed(0)
    model, exact = Denoiser(MLP((2,), hidden=32, depth=1), EDM()), oracle(EDM())
    draws = TwinSteps(EDM(), sampler=ChainSampler(Chain(EDM(), 8, "markov", t_max=20.0)), data=DATA)
    loss, g = DoubleSamplingLoss(model), generator(8)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)

    def error() -> float:
        with torch.no_grad():
            return value_error(model, exact, DATA.test, EDM(), [1.0], sigma_data=0.5)["1"]

    before = error()
    for _ in range(150):
        x0, _labels = DATA.batch(32, g)
        optimiser.zero_grad()
        loss(draws(x0, cond=None, generator=g))["loss_value"].backward()
        optimiser.step()
    assert error() < 0.5 * before


# Rollouts


@pytest.mark.parametrize("process", [EVEN, Flow(), DDPM()], ids=["edm", "flow", "ddpm"])
@pytest.mark.parametrize("steps", [1, 3])
def test_twins_by_rollouts(process: Schedule, steps: int) -> None:
    """On the 'clean' value r = D(x') - D(x); where the model reached clean data it pays that."""
    model = Denoiser(MLP((2,), hidden=8), process).double()
    nn.init.normal_(model.network.last.weight)
    sampler = ChainSampler(Chain(process, 5, "markov", value="clean"), jitter=False)
    twins = TwinSteps(process, sampler=sampler, denoiser=model, source="rollouts", rollout_steps=steps)(
        DATA.test[:3].double(), cond=None, generator=generator(9)
    )
    assert twins.batch_size == (15, 2) and not twins["next", "x_t"].requires_grad
    last = twins["next", "terminated"]
    assert not torch.equal(*twins["next", "x_t"][~last[:, 0, 0]].unbind(1))
    loss = DoubleSamplingLoss(model, weight="none")
    reached = twins["next"]
    D = model(twins["x_t"].flatten(0, 1), twins["t"].flatten()).view_as(reached["x_t"])
    t_next = torch.where(last, twins["t"], reached["t"])
    D_next = model(reached["x_t"].flatten(0, 1), t_next.flatten()).view_as(D)
    r = torch.where(last, reached["x_t"], D_next) - D
    wanted = (r[:, 0] * r[:, 1]).mean()
    torch.testing.assert_close(loss(twins)["loss_value"], wanted, rtol=1e-9, atol=1e-14)
    spent = 15 + 2 * 12 + 30 * steps
    assert loss.network_evaluations == spent


def test_a_rollout_by_hand() -> None:
    model, x = denoiser(), randn(4, 2)
    times = torch.tensor([[2.0], [1.0], [0.5]]).double().expand(3, 4)
    found = reverse_rollout(model, PROCESS, x, times, 0.0)
    for t, s in ((2.0, 1.0), (1.0, 0.5)):
        x = s / t * x + (1 - s / t) * model(x, torch.full((4,), t).double()).detach()
    torch.testing.assert_close(found, x, rtol=1e-10, atol=0)


def test_rollouts_of_the_exact_denoiser_have_little_residual() -> None:
    """Short steps of its own denoiser follow the chain: E⟨r¹, r²⟩ tends to 0 as they get shorter."""
    M, exact = 4000, oracle(EVEN)
    x0, _ = DATA.batch(M, generator(1))
    chain = ChainSampler(Chain(EVEN, 3, "markov", value="clean"), jitter=False)(
        x0.double(), cond=None, generator=generator(2)
    )[:, 1:2]
    size = [
        float(products(twins_of_rollouts(chain, exact, EVEN, 1.0, m, generator(3)), exact).mean())
        for m in (1, 32)
    ]
    assert abs(size[1]) < 0.2 * abs(size[0]), size


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "model"}, "source is 'model': give 'posterior' or 'rollouts'"),
        ({"data": None}, "source=posterior needs the data"),
        ({"data": UNKNOWN}, "the law of mine is not known"),
        ({"source": "rollouts"}, "set chain.value=clean"),
        ({"rollout_steps": 0}, "rollout_steps is 0"),
    ],
)
def test_what_twins_refuse(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        TwinSteps(EDM(), **{"sampler": ChainSampler(Chain(EDM(), 5, "markov")), "data": DATA, **options})


def test_what_else_is_refused() -> None:
    clean = ChainSampler(Chain(EDM(), 5, "markov", value="clean"))
    with pytest.raises(InputError, match="needs the model"):
        TwinSteps(EDM(), sampler=clean, source="rollouts")
    learning = ChainSampler(Chain(EDM(), 5, "markov"), window=2, starts=LossAwareStarts())
    with pytest.raises(InputError, match=r"starts that learn need chain\.window=1"):
        TwinSteps(EDM(), sampler=learning, data=DATA)
    with pytest.raises(InputError, match="both 0"):
        DoubleSamplingLoss(denoiser(), residual_coef=0.0)
    with pytest.raises(InputError, match=r"batch size \[3, 7\]: double sampling takes pairs"):
        DoubleSamplingLoss(denoiser())(draw())
    with pytest.raises(KeyError, match=r"x0 missing.*TwinSteps"):
        DoubleSamplingLoss(denoiser())(draw(window=2).exclude("x0"))


def test_the_loss_is_a_number_of_all_it_is_given() -> None:
    """Importance weighs a pair, and a value of one batch does not depend on its order."""
    chain = draw(x0=data(4))
    twins = twins_of_laws(chain, ExactLaw(oracle(PROCESS)), PROCESS, 1.0, generator(3))
    loss = DoubleSamplingLoss(denoiser())
    whole = number(loss(twins)["loss_value"])
    assert number(loss(twins.flip(0))["loss_value"]) == pytest.approx(whole, rel=1e-12)
    twins["importance"] = torch.full_like(twins["t"], 3.0)
    assert number(loss(twins)["loss_value"]) == pytest.approx(3 * whole, rel=1e-12)
