"""λ by noise level: its values, its ends, and which state each λ belongs to."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives import SoftUpdate

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.vp import VP
from diffrl.diffusion.trajectories import sample_chain
from diffrl.objectives.lambda_schedule import LambdaSchedule
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.td_lambda_schedule import td_lambda_schedule_loss
from diffrl.objectives.value import ValueLoss
from diffrl.rl.estimators import TDLambda
from diffrl.rl.returns import lambda_returns
from tests.kit.networks import small_denoiser
from tests.kit.oracles import every_process, generator, randn


def chain_of(process: Schedule, **options: Any) -> TensorDict:
    options = {"num_steps": 8, "generator": generator(), **options}
    return sample_chain(process, randn(5, 2), **options)


def loss_of(denoiser: Denoiser, chain: TensorDict, **options: Any) -> tuple[Tensor, list[Tensor]]:
    loss = ValueLoss(denoiser, **options)
    if loss.bootstrap == "target":
        SoftUpdate(loss, tau=0.01)
    value = loss(chain.clone())["loss_value"]
    return value, list(torch.autograd.grad(value, list(denoiser.parameters())))


def test_it_is_linear_in_the_log_of_the_noise_to_signal_ratio() -> None:
    schedule = LambdaSchedule(0.2, 0.8, nsr_low=0.01, nsr_high=100.0)
    nsr = torch.tensor([0.0, 1e-4, 0.01, 0.1, 1.0, 10.0, 100.0, 1e6, math.inf], dtype=torch.float64)
    expected = torch.tensor([0.2, 0.2, 0.2, 0.35, 0.5, 0.65, 0.8, 0.8, 0.8], dtype=torch.float64)
    torch.testing.assert_close(schedule(-2 * nsr.log()), expected)


@every_process
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_of_every_process_has_one(process: Schedule, dtype: torch.dtype) -> None:
    """Also pure noise and clean data; in float32 too it stays within its ends."""
    schedule = LambdaSchedule(0.1, 0.9)
    t = process.time_grid(12).to(dtype)
    lmbda = schedule(process.log_snr(t))
    assert lmbda.dtype == dtype and bool((lmbda.diff() <= 0).all())
    assert float(lmbda.min()) >= torch.tensor(0.1, dtype=dtype) and float(lmbda[-1]) == pytest.approx(0.1)
    assert float(lmbda.max()) <= torch.tensor(0.9, dtype=dtype) and float(lmbda[0]) == pytest.approx(0.9)


@pytest.mark.parametrize("lmbda", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("process", [EDM(), VP(), DDPM(train_steps=50)], ids=["edm", "vp", "ddpm"])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("bootstrap", ["own", "target", "residual"])
def test_equal_ends_are_a_constant(lmbda: float, process: Schedule, gamma: float, bootstrap: Any) -> None:
    denoiser, chain = small_denoiser(process), chain_of(process)
    options = {"gamma": gamma, "bootstrap": bootstrap}
    ours, ours_grad = loss_of(denoiser, chain, lmbda=LambdaSchedule(lmbda, lmbda), **options)
    theirs, theirs_grad = loss_of(denoiser, chain, lmbda=lmbda, **options)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(a, b)


def test_the_ends_are_td_0_and_monte_carlo() -> None:
    denoiser, chain = small_denoiser(EDM()), chain_of(EDM())
    td_0, _ = loss_of(denoiser, chain, n_steps=1)
    torch.testing.assert_close(loss_of(denoiser, chain, lmbda=LambdaSchedule(0.0, 0.0))[0], td_0)
    monte_carlo = ValueLoss(denoiser).make_value_estimator("monte_carlo")(chain)["loss_value"]
    torch.testing.assert_close(loss_of(denoiser, chain, lmbda=LambdaSchedule(1.0, 1.0))[0], monte_carlo)
    between, _ = loss_of(denoiser, chain, lmbda=LambdaSchedule(0.0, 1.0))
    assert float((between - td_0).abs().detach()) > 1e-3 < float((between - monte_carlo).abs().detach())


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("window", [None, 3])
def test_the_lambda_of_a_row_is_that_of_the_state_reached(gamma: float, window: int | None) -> None:
    """The recursion in rewards and values, written out backwards for one chain at a time."""
    process, schedule = VP(), LambdaSchedule(0.9, 0.1, nsr_low=0.05, nsr_high=5.0)
    denoiser, chain = small_denoiser(process), chain_of(process, window=window)
    loss = ValueLoss(denoiser, lmbda=schedule, gamma=gamma, weight="none")(chain)["loss_value"]

    def value(states: TensorDict, b: int, k: int) -> Tensor:
        A, kappa, x, t = (states[name][b, k] for name in ("A", "kappa", "x_t", "t"))
        return A * denoiser(x[None], t)[0] + kappa * x

    square = []
    for b in range(chain.shape[0]):
        G = None
        for k in reversed(range(chain.shape[1])):
            reached = chain["next"]
            r, V = reached["reward"][b, k], value(reached, b, k).detach()
            t = reached["t"][b, k]
            lmbda = schedule(2 * (process.alpha(t) / process.sigma(t)).log())
            if bool(reached["terminated"][b, k]):
                G = r
            else:
                G = r + gamma * ((1 - lmbda) * V + lmbda * (V if G is None else G))
            square.append((G - value(chain, b, k)).square().mean())
    torch.testing.assert_close(loss, torch.stack(square).mean())


def test_a_lambda_of_zero_cuts_the_returns_at_the_low_noise_states() -> None:
    """Where λ is 0 at and below a level, states before it do not see what lies beyond."""
    process, denoiser = EDM(), small_denoiser(EDM())
    chain = chain_of(process)
    schedule = LambdaSchedule(0.0, 1.0, nsr_low=1.0, nsr_high=1.0 + 1e-9)
    estimator = ValueLoss(denoiser, lmbda=schedule).value_estimator
    first = int((chain["next", "t"][0, :, 0] < 1).nonzero()[0])
    reward, value = chain["next", "reward"], randn(5, 8, 2, seed=3)
    flags = chain["next", "terminated"], chain["next", "done"]
    G = estimator.returns(reward, value, *flags, chain["next"])
    changed = reward.clone()
    changed[:, first + 1 :] += 7
    same = estimator.returns(changed, value, *flags, chain["next"])
    torch.testing.assert_close(G[:, : first + 1], same[:, : first + 1], rtol=0, atol=0)
    torch.testing.assert_close(G[:, 0], reward[:, : first + 1].sum(1) + value[:, first])
    assert bool(((G - same)[:, first + 1 :] != 0).all())


def test_an_estimator_takes_a_function_of_the_states_reached() -> None:
    chain = chain_of(EDM(), num_steps=6).reshape(5, 6)
    value, names = randn(5, 6, 2, seed=3), ("reward", "terminated", "done")
    estimator = TDLambda(value_network=None, lmbda=lambda reached: (reached["t"] < 1).double())
    r, end, done = (chain["next", name] for name in names)
    by_hand = lambda_returns(r, value, end, done, lmbda=(chain["next", "t"] < 1).double())
    torch.testing.assert_close(estimator.value_estimate(chain, next_value=value), by_hand)
    nested = chain.unsqueeze(0).expand(2, 5, 6).contiguous()
    twice = estimator.value_estimate(nested, next_value=value.expand(2, 5, 6, 2))
    torch.testing.assert_close(twice, by_hand.expand(2, 5, 6, 2))
    with pytest.raises(ValueError, match="function of the states reached"):
        estimator.returns(r, value, end, done)


def test_a_loss_with_a_schedule_can_be_copied_and_changed() -> None:
    chain = chain_of(EDM())
    loss = ValueLoss(small_denoiser(EDM()), lmbda=LambdaSchedule(0.1, 0.7))
    value = loss(chain)["loss_value"]
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(twin(chain)["loss_value"], value, rtol=0, atol=0)
    assert not torch.equal(loss.make_value_estimator("n_step", n_steps=1)(chain)["loss_value"], value)
    loss.make_value_estimator("td_lambda", lmbda=LambdaSchedule(0.1, 0.7))
    torch.testing.assert_close(loss(chain)["loss_value"], value, rtol=0, atol=0)


def test_the_objective_of_that_name() -> None:
    assert OBJECTIVES["td_lambda_schedule"] is td_lambda_schedule_loss
    denoiser, chain = small_denoiser(EDM()), chain_of(EDM())
    named = td_lambda_schedule_loss(denoiser, low_noise=0.3, high_noise=0.8, nsr_low=0.5, nsr_high=2.0)
    theirs, _ = loss_of(denoiser, chain, lmbda=LambdaSchedule(0.3, 0.8, 0.5, 2.0))
    torch.testing.assert_close(named(chain)["loss_value"], theirs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: LambdaSchedule(-0.1, 1.0), "low_noise"),
        (lambda: LambdaSchedule(0.0, 1.1), "high_noise"),
        (lambda: LambdaSchedule(0.0, 1.0, nsr_low=0.0), "nsr_low"),
        (lambda: LambdaSchedule(0.0, 1.0, nsr_low=2.0, nsr_high=1.0), "nsr_low is 2.0"),
    ],
)
def test_a_bad_argument_is_named(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
