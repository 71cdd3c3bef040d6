"""Fixed points on N(0, 1), of chains and pairs: at each number of the page the library's own loss stands still."""

import math
from typing import Any, cast

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl.diffusion.chains import Chain
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import sample_chain
from diffrl.objectives.cdm import ShortRollouts
from diffrl.objectives.consistency_pairs import sample_consistency_pairs
from diffrl.objectives.denoising import sample_log_normal_states, sample_uniform_states
from diffrl.objectives.ect_pairs import sample_ect_pairs
from diffrl.objectives.stand_ins import single_transitions
from diffrl.objectives.td_edm import sample_td_edm_pairs
from diffrl.objectives.transitions import Transition
from docs.fixed_points import KS, RATIOS, SOLUTIONS, Row
from docs.normal_levels import default, denoiser, exact, flow_map
from docs.normal_solutions import ect
from tests.kit.normal_solutions import (
    Coefficient,
    Smooth,
    assert_stands_still,
    basis,
    given,
    linear,
    made,
    moved,
    of_draws,
    others,
    rows,
    table,
)
from tests.kit.oracles import Estimate, assert_within, generator

N = 7  # levels of the grids that losses are looked at on
CHAINS = ("monte_carlo", "hybrid", "td", "td_adaptive", "td_lambda_schedule", "double_sampling", "td_map")
SINGLE = ("denoising", "edm", "priorgrad")
PAIRS = ("ct", "td_ct", "cd")
# Chains


@pytest.mark.parametrize(("name", "row"), rows(*CHAINS))
def test_of_chains(name: str, row: Row) -> None:
    process = EDM()
    levels = process.time_grid(N)[:-1]
    a = row.of(process, N) if row.through else [row.of(float(t), N) for t in levels]
    of_chain = {"coupling": 1.0, "value": "posterior_mean", **given(row.words, "chain")}
    z = basis(N + 1)
    chain = sample_chain(process, z[:, :1], num_steps=N, noise=z[:, 1:].unsqueeze(-1), **of_chain)
    if name == "td_map":
        chain["r"] = torch.zeros_like(chain["t"])
    if name == "double_sampling":
        chain = expected_twins(chain, Chain(process, N, of_chain["coupling"]).eta)

    def pulls(coefficient: Coefficient) -> Tensor:
        D = linear(process, coefficient, levels)
        cast(Any, D.network).predicts_variance = name == "hybrid"
        return moved(made(name, D, **given(row.words, "objective")), chain)

    assert_stands_still(pulls, table(levels, a), *others(row))


def expected_twins(chain: TensorDict, eta: float) -> TensorDict:
    """Twin steps whose residuals are E[r given x_t]: the mean product of independent ones is the product of means."""
    process, x, t = EDM(), chain["x_t"].flatten(0, 1), chain["t"].flatten()
    mean = exact(process)(x, t)
    step = single_transitions(chain, mean, process, eta)
    A, kappa, _ = posterior(process, step["t"], step["next", "t"], eta)
    step["next", "x_t"] = A * step["x0"] + kappa * step["x_t"]
    return torch.cat([step, step], 1)


# Single states and pairs


@pytest.mark.parametrize("s", RATIOS)
@pytest.mark.parametrize(("name", "row"), rows(*SINGLE))
def test_of_single_states(name: str, row: Row, s: float) -> None:
    process, z = EDM(sigma_max=s), basis(2)
    if name == "denoising":
        states = sample_uniform_states(process, z[:, :1], num_steps=1, noise=z[:, 1:])
    else:
        states = sample_log_normal_states(process, z[:, :1], P_mean=math.log(s), P_std=0.0, noise=z[:, 1:])

    def pulls(coefficient: Coefficient) -> Tensor:
        D = linear(
            process, coefficient, states["t"][0, 0], prior="data" if name == "priorgrad" else "standard"
        )
        if D.prior is not None:
            D.prior.fit(z.new_tensor([[-1.0], [1.0]]))
        return moved(made(name, D), states)

    assert_stands_still(pulls, lambda t, r=0.0: row.of(t), *others(row))


@pytest.mark.parametrize("s", RATIOS)
@pytest.mark.parametrize("num_steps", KS)
@pytest.mark.parametrize(("name", "row"), rows("td_edm"))
def test_of_td_edm(name: str, row: Row, num_steps: int, s: float) -> None:
    process, z = EDM(), basis(3)
    coupling = given(row.words, "objective").get("coupling", default(name, "coupling"))
    noise = {"noise": z[:, 1:2], **({"fresh_noise": z[:, 2:]} if coupling == "markov" else {})}
    sigma = torch.full((3,), s, dtype=torch.float64)
    pair = sample_td_edm_pairs(
        process, z[:, :1], coupling=coupling, num_steps=num_steps, sigma=sigma, **noise
    )

    def pulls(coefficient: Coefficient) -> Tensor:
        return moved(made(name, linear(process, coefficient, sigma[:1])), pair)

    assert_stands_still(pulls, lambda t, r=0.0: row.of(t, num_steps), *others(row))


@pytest.mark.parametrize(("name", "row"), rows(*PAIRS))
def test_of_pairs_of_consistency(name: str, row: Row) -> None:
    """With l2, as means of products are exact."""
    process, z, index = EDM(), basis(2), torch.arange(N - 1)
    levels = process.time_grid(N)[:-1]
    x0, noise = (column.repeat(N - 1, 1) for column in (z[:, :1], z[:, 1:]))
    pairs = sample_consistency_pairs(process, x0, num_scales=N, index=index.repeat_interleave(2), noise=noise)
    if name == "cd":
        pairs = Transition(process, transition="teacher", teacher=exact(process))(
            pairs, generator=generator()
        )

    def pulls(coefficient: Coefficient) -> Tensor:
        D = linear(process, coefficient, levels[:-1], "consistency")
        return moved(made(name, D, metric="l2"), pairs)

    assert_stands_still(pulls, table(levels, row.of(process, N)), *others(row))


@pytest.mark.parametrize("s", RATIOS)
@pytest.mark.parametrize("name", ["ect", "stable_ct"])
def test_of_easy_consistency_tuning(name: str, s: float) -> None:
    """The mean target, whatever the metric; steps along a reference batch by their mean over many batches."""
    process, (row,), stage = EDM(), SOLUTIONS[name], default(name, "stages") - 1
    batches = 100 if name == "stable_ct" else 1
    found = []
    for seed in range(batches):
        z = basis(2) if name == "ect" else torch.randn(100, 2, generator=generator(seed), dtype=torch.float64)
        sigma = torch.full((len(z),), s, dtype=torch.float64)
        pairs = sample_ect_pairs(process, z[:, :1], stage=stage, sigma=sigma, noise=z[:, 1:])
        if name == "stable_ct":
            pairs = Transition(process, transition="reference")(pairs, generator=generator())
        loss = made(name, linear(process, lambda t, r=0.0: row.of(t), sigma[:1]))
        x = pairs["x_t"].flatten(0, 1)
        found.append(float(((loss.target(pairs) - row.of(s) * x) * x).mean() / (1 + s**2)))
    errors = torch.tensor(found, dtype=torch.float64)
    if name == "ect":
        assert abs(found[0]) < 1e-12
        assert abs(ect(s) - flow_map(s)) > 1e-4 and abs(ect(s) - denoiser(s)) > 1e-3
    else:
        assert_within(Estimate(errors.mean(), errors.std() / batches**0.5), 0.0)
        assert float(errors.std() / batches**0.5) < 4e-3 * (1 + s)


@pytest.mark.parametrize("name", ["ct", "ect"])
def test_metrics_move_nothing(name: str) -> None:
    """The default one, by normal draws of pairs from one level on."""
    process, (row,), k = EDM(), SOLUTIONS[name], 3
    levels = process.time_grid(N)[:-1]
    s, kind = float(levels[k]), "consistency" if name == "ct" else "edm"
    a = table(levels, row.of(process, N)) if name == "ct" else lambda t, r=0.0: row.of(t)

    def pairs(z: Tensor) -> TensorDict:
        if name == "ct":
            index = torch.full((len(z),), k)
            return sample_consistency_pairs(process, z[:, :1], num_scales=N, index=index, noise=z[:, 1:])
        stage, sigma = default(name, "stages") - 1, levels[k].expand(len(z))
        return sample_ect_pairs(process, z[:, :1], stage=stage, sigma=sigma, noise=z[:, 1:])

    def pull(coefficient: Coefficient) -> Estimate:
        loss = made(name, linear(process, coefficient, levels[k : k + 1], kind))
        return of_draws(lambda z: moved(loss, pairs(z)))

    right, wrong = pull(a), pull(lambda t, r=0.0: denoiser(t) if t == s else a(t))
    assert_within(right, 0.0)
    assert abs(float(wrong.value)) > 10 * float(right.error)


@pytest.mark.parametrize("s", RATIOS)
def test_of_cdm(s: float) -> None:
    """With the mean ends of its rollouts, as the mean product of independent residuals is the product of means."""
    (row,), n, far = SOLUTIONS["cdm"], 4000, 1e9
    draw = ShortRollouts(EDM(), denoiser=Smooth(False), P_mean=math.log(s), P_std=0.0)
    x0 = torch.full((n, 1), far, dtype=torch.float64)  # so far out that no noise counts
    twins = draw(x0, generator=generator())
    h = twins["next", "x_t"] / twins["x_t"]
    target = h[:, 0, 0] / (1 + twins["next", "t"][:, 0, 0] ** 2)
    assert float(target.mean()) == pytest.approx(row.at(s, 18), rel=1e-5)
    z = basis(2).repeat(n // 2, 1).unsqueeze(1).expand(n, 2, 2)
    twins["x0"], twins["x_t"] = z[..., :1], z[..., :1] + s * z[..., 1:]
    twins["next", "x_t"] = h * twins["x_t"]
    right, wrong = (float(moved(made("cdm", Smooth(is_map)), twins)) for is_map in (False, True))
    assert abs(right) < 1e-3 * abs(wrong)
