"""Transition sources: each step by hand, which of them are one, their means, and both ends."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.data.mixtures import Mixture
from diffrl.data.synthetic import gmm
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.vp import VP
from diffrl.errors import InputError, InputTypeError
from diffrl.objectives.ect_pairs import sample_ect_pairs
from diffrl.objectives.posteriors import ReferenceBatch
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.scheme import build_objective
from diffrl.objectives.teachers import teacher_of
from diffrl.objectives.transitions import Transition, ode_step
from tests.kit.oracles import Estimate, assert_within, generator, randn
from tests.kit.value_loss import PROCESS, data, denoiser, perturb

DATA = gmm(dim=2, components=3, test_size=64)
NORMAL = GaussianDenoiser(PROCESS, torch.zeros(2), torch.eye(2))


def pairs_of(x0: Tensor | None = None, seed: int = 0, **options: Any) -> TensorDict:  # noqa: ANN401
    x0 = data(8) if x0 is None else x0
    return sample_ect_pairs(PROCESS, x0, **{"stage": 0, "generator": generator(seed), **options})


def moved(pairs: TensorDict, **options: Any) -> TensorDict:  # noqa: ANN401
    return Transition(PROCESS, **options)(pairs, generator=generator(1))


def test_forward_leaves_the_pairs_alone() -> None:
    pairs = pairs_of()
    assert moved(pairs) is pairs


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_the_teachers_step_by_hand(solver: str) -> None:
    D = denoiser()
    perturb(D)
    sigma = torch.tensor([0.5, 3.0, 5.0, 9.0], dtype=torch.float64)
    pairs = pairs_of(data(4), sigma=sigma)
    found = moved(pairs, transition="teacher", teacher=D, solver=solver)
    for i in range(4):
        x, t, s = pairs["x_t"][i], pairs["t"][i, 0], pairs["next", "t"][i, 0]
        clean = D(x, t)
        v = (x - clean) / t
        x_s = x + (s - t) * v
        if s > 0 and solver == "heun":
            x_s = x + (s - t) * (v + (x_s - D(x_s, s)) / s) / 2
        torch.testing.assert_close(found["next", "x_t"][i], x_s)
        torch.testing.assert_close(found["x0"][i], clean)
        if s == 0:
            assert torch.equal(found["next", "x_t"][i], found["x0"][i])
    s = pairs["next", "t"].flatten()
    assert bool((s == 0).any() and (s > 0).any()) and torch.equal(found["valid"], pairs["valid"])
    assert found["evaluations"].flatten().tolist() == [2.0 if solver == "heun" and e else 1.0 for e in s > 0]
    assert not found["next", "x_t"].requires_grad


def test_a_batch_of_one_row_is_forward() -> None:
    """S of one row is x0; in float64 the two ways to write the step differ by rounding."""
    pairs = pairs_of(data(1))
    found = moved(pairs, transition="reference")
    torch.testing.assert_close(found["next", "x_t"], pairs["next", "x_t"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["x0"], pairs["x0"], rtol=1e-12, atol=0)


def test_a_reference_batch_is_its_own_teacher() -> None:
    """Where no further rows are drawn, S of the batch is the memorising denoiser of a data set of these rows."""
    x0 = data(8).float().double()
    pairs, rows = pairs_of(x0), Data("rows", test=x0.float(), train=x0.float())
    a = moved(pairs, transition="reference")
    b = moved(pairs, transition="teacher", teacher="exact", solver="euler", data=rows)
    assert torch.equal(a["next", "x_t"], b["next", "x_t"]) and torch.equal(a["x0"], b["x0"])


def test_further_rows_come_from_the_data() -> None:
    x0 = DATA.batch(4, generator(0))[0].double()
    pairs = pairs_of(x0)
    found = moved(pairs, transition="reference", reference=64, data=DATA)
    more = DATA.batch(60, generator(1))[0].double()
    S = ReferenceBatch(PROCESS, torch.cat([x0, more])).mean(pairs["x_t"][:, 0], pairs["t"][:, 0, 0])
    assert torch.equal(found["x0"][:, 0], S)


def test_sources_agree_on_average_and_only_forward_scatters() -> None:
    """Given x_t, of normal data: E[x_s | x_t] is the exact Euler step, for every source."""
    M = 4000
    t, s = torch.full((M,), 1.5, dtype=torch.float64), torch.full((M,), 0.7, dtype=torch.float64)
    x0 = randn(M, 2)
    x_t = x0 + 1.5 * randn(M, 2, seed=5)
    exact = ode_step(NORMAL, x_t, t, s, None, "euler")[1]
    forward = ode_step(lambda x, t, cond: x0, x_t, t, s, None, "euler")[1]
    pairs = torch.stack([x0.view(-1, 8, 2), x_t.view(-1, 8, 2)])
    S = torch.cat([ReferenceBatch(PROCESS, rows).mean(x, t[:8]) for rows, x in pairs.unbind(1)])
    reference = ode_step(lambda x, t, cond: S, x_t, t, s, None, "euler")[1]
    spread = []
    for step in (forward, reference):
        error = ((step - exact) * x_t).sum(1)  # a bias that depends on x_t would show
        assert_within(Estimate(error.mean(), error.std() / M**0.5), 0.0)
        spread.append(float((step - exact).square().mean()))
    assert 0 < spread[1] < 0.5 * spread[0]


def test_at_s_of_t_nothing_moves() -> None:
    x, t = randn(4, 2), torch.full((4,), 2.0, dtype=torch.float64)
    for solver in ("heun", "euler"):
        torch.testing.assert_close(ode_step(NORMAL, x, t, t, None, solver)[1], x)


def test_heun_is_of_second_order() -> None:
    """x_s = √((1+s²)/(1+t²)) x_t of standard normal data."""
    x, t = randn(4, 2), torch.full((4,), 2.0, dtype=torch.float64)
    errors = []
    for h in (0.2, 0.1):
        s = t - h
        exact = ((1 + s**2) / (1 + t**2)).sqrt()[:, None] * x
        errors.append(
            [float((ode_step(NORMAL, x, t, s, None, k)[1] - exact).norm()) for k in ("heun", "euler")]
        )
    heun, euler = (errors[0][k] / errors[1][k] for k in (0, 1))
    assert 7 < heun < 9 and 3.5 < euler < 4.5  # of one step: the third and the second power


def test_a_baseline_has_the_datum_as_its_target() -> None:
    D = denoiser(EDM())
    options = {"transition": "teacher", "teacher": "exact", **_defaults("ect")}
    config = {
        **{"objective": {"name": "ect", **options}, "starts": {"name": "uniform"}},
        "chain": {"x0": "datum", "reference": 0},
    }
    x0 = DATA.batch(8, generator(0))[0].double()
    draws = [build_objective(config, D, data=DATA, baseline=b).draw for b in (False, True)]
    own, plain = (draw(x0, cond=None, generator=generator(2)) for draw in draws)
    assert torch.equal(own["x_t"], plain["x_t"]) and torch.equal(plain["x0"][:, 0], x0)
    assert not torch.equal(own["x0"], plain["x0"])


def _defaults(name: str) -> dict[str, Any]:
    return {"stages": 8} if name in OBJECTIVES else {}


def test_exact_is_the_denoiser_of_the_mixture() -> None:
    m = DATA.mixture
    assert isinstance(m, Mixture)
    x, t = randn(4, 2), torch.tensor([0.1, 0.5, 1.0, 9.0], dtype=torch.float64)
    oracle = MixtureDenoiser(PROCESS, m.means, m.stds, m.weights)
    assert torch.equal(teacher_of("exact", PROCESS, DATA)(x, t, None), oracle(x, t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transition": "own"}, "transition is 'own': give 'forward', 'teacher' or 'reference'"),
        ({"transition": "teacher"}, "teacher is None: give a run folder"),
        ({"transition": "teacher", "teacher": "runs/x"}, r"diffrl\.load\('runs/x'\)\.denoiser"),
        ({"transition": "teacher", "teacher": "exact"}, "give them too, as data="),
        ({"transition": "teacher", "teacher": "exact", "solver": "rk4"}, "solver is 'rk4'"),
        ({"teacher": "exact"}, "transition=forward asks none"),
        ({"reference": 8}, "transition=forward uses no reference batch"),
        ({"transition": "reference", "reference": 8}, "the further rows need the data"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Transition(PROCESS, **options)


def test_a_teacher_of_other_states_is_refused() -> None:
    other = Denoiser(MLP((2,), hidden=4, depth=1), VP())
    with pytest.raises(InputError, match="teacher is of VP"):
        teacher_of(other, PROCESS, None)
    assert teacher_of(NORMAL, EDM(), None) is NORMAL  # ends of the grid do not matter
    with pytest.raises(InputTypeError, match="teacher is a int"):
        teacher_of(3, PROCESS, None)
