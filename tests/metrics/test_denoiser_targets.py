"""Bias and variance of what denoisers are pulled to, against closed forms of N(0, 1) and sums over two points."""

import math
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.data.mixtures import Mixture
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.metrics.diagnostics import target_errors
from diffrl.metrics.map_targets import map_target_errors
from diffrl.metrics.scheme_targets import scheme_target_errors
from diffrl.objectives.cdm import ShortRollouts, cdm_loss
from diffrl.objectives.continuous_ct import ContinuousConsistencyLoss, sample_trigflow_states
from diffrl.objectives.ect import ECTLoss
from diffrl.objectives.ect_pairs import sample_ect_pairs
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.scheduled_sampling import RollbackStates
from diffrl.objectives.scheme import Objective
from diffrl.objectives.stand_ins import StandIn, StandInChains
from diffrl.objectives.td_edm import sample_td_edm_pairs, td_edm_loss
from diffrl.objectives.transitions import Transition
from diffrl.objectives.value import ValueLoss
from tests.kit.normal_solutions import Smooth, linear
from tests.kit.oracles import generator

PROCESS = EDM(0.5, 2.0)
a = -0.5
"""D(x, t) = -x/2: wrong at every level, so that no bias is 0 by chance."""
PARTS = ("bias_sq", "variance", "total")
POINTS = Mixture(torch.tensor([[1.0], [-1.0]]), torch.zeros(2), torch.tensor([0.7, 0.3]))
NORMAL = Mixture(torch.zeros(1, 1), torch.ones(1), torch.ones(1))


def denoiser() -> Denoiser:
    return linear(PROCESS, lambda t, r=0.0: a, torch.ones(1))


def found(loss: Any, draw: Any, law: Mixture = NORMAL, S: int = 3000, **options: Any) -> dict[str, float]:
    oracle = MixtureDenoiser(PROCESS, law.means, law.stds, law.weights)
    x0 = law.sample(S, generator(5))
    return scheme_target_errors(Objective("x", loss, draw), oracle, x0, **options)


def expected(*terms: tuple[float, float, float, float]) -> dict[str, float]:
    """Of targets y = α x0 + β x + γ z at σ = s, in units of c_out², on average over levels."""
    bias_sq = variance = 0.0
    for s, α, β, γ in terms:
        v, unit = 1 + s**2, s**2 / (1 + s**2)  # which is Var(x0 | x) too
        bias_sq += ((α - 1) / v + β) ** 2 * v / unit / len(terms)
        variance += (α**2 * unit + γ**2) / unit / len(terms)
    return {"bias_sq": bias_sq, "variance": variance, "total": bias_sq + variance}


def assert_like(found: dict[str, float], wanted: dict[str, float], rel: float = 0.1) -> None:
    assert wanted["bias_sq"] > 0.01
    assert found == pytest.approx(wanted, rel=rel)


def bootstrapped(t: Tensor, s: Tensor, R: float, eta: float) -> tuple[float, float, float]:
    """α, β and γ of x0 - R (x0 - D(x_s)), with x_s given x_t and x0."""
    A, kappa, std = (float(c) for c in posterior(PROCESS, t, s, eta))
    return 1 - R + R * a * A, R * a * kappa, R * a * std


CHAIN = Chain(PROCESS, num_steps=3, coupling="markov")


def ahead(n: int) -> dict[str, float]:
    """Of TD by n steps on three levels, where a chain of fewer steps ends at the datum."""
    t, A = CHAIN.t, CHAIN.value_coefficients[0]
    levels = [bootstrapped(t[k], t[k + n], float(A[k + n] / A[k]), 1.0) for k in range(3 - n)]
    return expected(*zip(t[:3].tolist(), *zip(*levels, *[(1.0, 0.0, 0.0)] * n, strict=True), strict=True))


def test_of_n_steps() -> None:
    assert_like(found(ValueLoss(denoiser(), n_steps=2), ChainSampler(CHAIN)), ahead(2))


def test_of_a_window() -> None:
    """Of one step λ matters nothing."""
    assert_like(found(ValueLoss(denoiser(), lmbda=0.5), ChainSampler(CHAIN, window=1)), ahead(1))


def test_of_lambda_returns() -> None:
    """As `target_errors` has them, which goes through chains by itself."""
    x0, oracle = (
        NORMAL.sample(1000, generator(5)),
        MixtureDenoiser(PROCESS, NORMAL.means, NORMAL.stds, NORMAL.weights),
    )
    options = {"lmbdas": (0.5,), "n_steps": (), "sigma_data": 1.0, "draws": 16, "generator": generator()}
    levels = target_errors(denoiser(), oracle, x0, PROCESS, num_steps=3, **options)["levels"]
    wanted = {part: sum(level["targets"]["lmbda=0.5"][part] for level in levels) / 3 for part in PARTS}
    assert_like(found(ValueLoss(denoiser(), lmbda=0.5), ChainSampler(CHAIN)), wanted)


@pytest.mark.parametrize(("coupling", "eta"), [("markov", 1.0), ("shared", 0.0)])
def test_of_td_edm(coupling: str, eta: float) -> None:
    """Two squares of equal units, one of the pair and half of one of the datum; above σ_max there is the datum only."""
    law: dict[str, Any] = {"coupling": coupling, "span": 1.0, "stride": 0.5, "num_steps": 4, "P_std": 0.0}
    loss = td_edm_loss(denoiser())
    loss.bootstrap_network.module.denoiser = loss.denoiser
    draw: Any = partial(sample_td_edm_pairs, PROCESS, **law, P_mean=math.log(1.5))
    pair = draw(torch.zeros(1, 1, dtype=torch.float64))
    t, s, A, A_next = (pair[key].view(()) for key in ("t", ("next", "t"), "A", ("next", "A")))
    α, β, γ = bootstrapped(t, s, float(A_next / A), eta)
    assert_like(found(loss, draw), expected((1.5, (α + 0.5) / 1.5, β / 1.5, γ / 1.5)))
    above = found(loss, partial(sample_td_edm_pairs, PROCESS, **law, P_mean=1.0))
    assert above["variance"] == pytest.approx(1, rel=0.05) and abs(above["bias_sq"]) < 0.05


def test_of_cdm() -> None:
    """Euler's steps in numbers: the datum and the mean of two ends, with weights q = 1/c_out² and p = 2."""
    draw = ShortRollouts(PROCESS, denoiser=denoiser(), P_mean=math.log(1.5), P_std=0.0, gap=1e9, floor=0.5)
    h, var = 1.0, 0.0
    for k in range(5):
        t, s = ((1.5 ** (1 / 7) + j / 5 * (0.5 ** (1 / 7) - 1.5 ** (1 / 7))) ** 7 for j in (k, k + 1))
        step = 1 + 2 * (s - t) / t * (1 - a)
        h, var = h * step, var * step**2 + 2 * t * (t - s)
    p, q = 2, (1 + 1.5**2) / 1.5**2
    terms = (1.5, q / (p + q), p / (p + q) * a * h, p / (p + q) * a * (var / 2) ** 0.5)
    assert_like(found(cdm_loss(denoiser()), draw), expected(terms))


def of_field(s: float, rows: int) -> float:
    """E Var(S | x_t)/c_out² of two points, by a sum over all batches and an integral over x_t."""
    x = torch.linspace(-1 - 8 * s, 1 + 8 * s, 2001, dtype=torch.float64)
    point, share = torch.tensor([1.0, -1.0], dtype=torch.float64), POINTS.weights
    joint = share[:, None] * (-((x - point[:, None]) ** 2) / (2 * s**2)).exp()
    first = second = torch.zeros_like(x)
    for batch in product((0, 1), repeat=rows):
        r = point[list(batch)][:, None]
        S = ((-((x - r) ** 2) / (2 * s**2)).softmax(0) * r).sum(0)
        weight = joint[batch[0]] / joint.sum(0) * share[list(batch[1:])].prod()
        first, second = first + weight * S, second + weight * S**2
    density = joint.sum(0) / joint.sum()
    return float((density * (second - first**2)).sum() / (s**2 / (1 + s**2)))


def data_of(law: Mixture) -> Data:
    return Data("points", law.sample(64, generator()).float(), mixture=law)


def test_of_a_reference_batch() -> None:
    """The field of three rows scatters less than the datum, the exact mean not at all."""
    sampler, loss = ChainSampler(Chain(PROCESS, 2, "markov")), monte_carlo_loss(denoiser())
    three, exact = (StandInChains(sampler, StandIn(how), data_of(POINTS)) for how in ("reference", "exact"))
    of_three = found(loss, three, POINTS, S=600, batch_size=3, draws=6)
    wanted = (of_field(2.0, 3) + of_field(0.5, 3)) / 2
    assert of_three["variance"] == pytest.approx(wanted, rel=0.1)
    assert abs(of_three["bias_sq"]) < 0.1 * wanted
    assert 0.1 < wanted < 0.7 * (of_field(2.0, 1) + of_field(0.5, 1)) / 2
    of_exact = found(loss, exact, POINTS, S=20, draws=2)
    assert max(map(abs, of_exact.values())) < 1e-12


@pytest.mark.parametrize("how", ["reference", "redrawn"])
def test_a_batch_of_one_row_is_the_datum(how: str) -> None:
    """TD(0), with rewards of a field or with steps of their own, is plain TD(0)."""
    draw = StandInChains(ChainSampler(CHAIN), StandIn(how, reference=1), data_of(NORMAL))
    assert_like(found(ValueLoss(denoiser(), lmbda=0.0), draw, S=900, draws=6), ahead(1))


def test_of_a_step_along_a_reference_batch() -> None:
    """y = a x_r with x_r = x + (r - t)(x - S)/t."""
    oracle = MixtureDenoiser(PROCESS, POINTS.means, POINTS.stds, POINTS.weights)
    sigma = torch.full((300,), 2.0, dtype=torch.float64)
    pairs = sample_ect_pairs(
        PROCESS, POINTS.sample(300, generator(5)), stage=3, sigma=sigma, generator=generator()
    )
    r = float(pairs["next", "t"][0])
    loss, transition = ECTLoss(denoiser()), Transition(PROCESS, transition="reference")
    errors = map_target_errors(
        loss, pairs, oracle, transition=transition, draws=6, batch_size=3, generator=generator()
    )
    wanted = (a * (2 - r) / 2) ** 2 * of_field(2.0, 3)
    assert errors["variance"] == pytest.approx(wanted, rel=0.1)


def test_of_continuous_consistency() -> None:
    """Of the exact map g has no mean, and the variance cos² t = 1/(1+σ²); of D* the mean -cos t sin t x."""
    draw = partial(sample_trigflow_states, PROCESS, P_mean=math.log(0.5), P_std=0.0)
    plain = found(ContinuousConsistencyLoss(Smooth(True), normalise=False), draw, S=1000)
    assert plain["variance"] == pytest.approx(1 / (1 + 0.5**2), rel=0.05)
    assert abs(plain["bias_sq"]) < 0.01 * plain["variance"] and plain["own"] < 1e-10
    t = math.atan(0.5)
    wrong = found(ContinuousConsistencyLoss(Smooth(False), normalise=False), draw, S=1000)
    assert wrong["bias_sq"] == pytest.approx((math.cos(t) * math.sin(t) - math.tan(t / 2)) ** 2, rel=0.25)
    short = found(ContinuousConsistencyLoss(Smooth(True), c=1.0), draw, S=300)
    assert 0.1 < short["variance"] < 0.7 * plain["variance"]


def test_nothing_is_told_of_states_whose_datum_has_an_unknown_law() -> None:
    rolled = RollbackStates(PROCESS, denoiser=denoiser())
    assert found(monte_carlo_loss(denoiser()), rolled, S=4) == {}
    assert found(ValueLoss(denoiser()), lambda x0, cond, generator: None, S=4) == {}
