"""Fused steps against the loss of the states that they do not write down: the same numbers, and random numbers."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torchrl.objectives import ValueEstimators

from diffrl import keys
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError, InputTypeError
from diffrl.objectives import (
    FusedStep,
    LambdaSchedule,
    SoftUpdate,
    ValueLoss,
    fused,
    sample_td_edm_pairs,
    td_edm_loss,
)
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.td import td_loss
from tests.kit.value_loss import TARGETS, data, denoiser, gradient, perturb

Draw = Callable[..., Any]


def apart(loss: ValueLoss) -> ValueLoss:
    """With a network that has left its target."""
    if loss.bootstrap == "target":
        SoftUpdate(loss, tau=0.1)
    perturb(loss.denoiser)
    return loss


def sampler(
    process: Schedule | None = None, coupling: float | str = "markov", **options: Any
) -> ChainSampler:
    chain = Chain(process or EDM(), num_steps=options.pop("num_steps", 7), coupling=coupling)
    return ChainSampler(chain, **options)


def close(x: Tensor, y: Tensor) -> None:
    """But for what rounding leaves: float64 to 1e-11, float32 to 1e-4, of the greatest of a tensor."""
    assert x.dtype == y.dtype
    x, y = x.detach(), y.detach()
    tolerance = 1e-11 if x.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


def same_numbers(loss: ValueLoss, draw: Draw, x0: Tensor, cond: Tensor | None = None, times: int = 2) -> None:
    """Loss, TD error, gradient, evaluations, and where the generator stands; again, when levels are kept."""
    step, ours, theirs = fused(loss, draw), Generator().manual_seed(5), Generator().manual_seed(5)
    assert step is not None
    for _ in range(times):
        before = loss.network_evaluations
        value, error = step(x0, cond=cond, generator=ours)
        spent = loss.network_evaluations - before
        out = loss(draw(x0, cond=cond, generator=theirs))
        assert spent == loss.network_evaluations - before - spent > 0
        close(value, out["loss_value"])
        close(error, out["td_error"])
        assert value > 0 and error > 0
        close(gradient(value, loss.denoiser), gradient(out["loss_value"], loss.denoiser))
        assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("bootstrap", ["own", "target"])
@pytest.mark.parametrize("jitter", [False, True])
def test_targets(target: Any, bootstrap: Any, jitter: bool) -> None:
    loss = apart(ValueLoss(denoiser(EDM()), bootstrap=bootstrap, **target))
    same_numbers(loss, sampler(jitter=jitter), data())


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "float32": ({"dtype": torch.float32}, {}),
    "images": ({"event_shape": (2, 3, 3)}, {}),
    "share": ({}, {"bootstrap_share": 0.3}),
    "no share": ({}, {"bootstrap_share": 0.0}),
    "denoising": ({}, {"denoising_coef": 0.5}),
    "pairwise": ({}, {"weight": "pairwise"}),
    "p2": ({}, {"weight": "p2", "weight_options": {"gamma": 0.5}}),
    "velocity": ({"process": Flow(), "prediction_type": "velocity"}, {"lmbda": 0.5}),
    "eps": ({"process": DDPM(), "prediction_type": "eps"}, {"n_steps": 2}),
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("coupling", ["markov", 0.5, "shared"])
def test_options_processes_and_couplings(case: str, coupling: float | str) -> None:
    of, options = OPTIONS[case]
    D = denoiser(**{"process": EDM(), **of})
    x0 = data(3, of.get("event_shape", (2,)), of.get("dtype", torch.float64))
    chosen = {} if {"n_steps", "lmbda"} & options.keys() else {"lmbda": 0.5}
    for loss in (td_loss(copy.deepcopy(D), **options), ValueLoss(D, **options, **chosen)):
        same_numbers(apart(loss), sampler(D.process, coupling), x0)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_short_chains_and_one_datum(num_steps: int) -> None:
    for loss in (ValueLoss(denoiser(EDM()), lmbda=0.5), td_loss(denoiser(EDM()))):
        same_numbers(apart(loss), sampler(num_steps=num_steps, jitter=False), data(1))


@pytest.mark.parametrize("make", [monte_carlo_loss, td_loss])
def test_labels_and_second_times(make: Callable[[Denoiser], ValueLoss]) -> None:
    torch.manual_seed(0)
    network = MLP((2,), num_classes=3, hidden=8, second_time=True)
    loss = apart(make(Denoiser(network, EDM(), time_input="c_noise_x1000")))
    labels = torch.tensor([0, 3, 2])
    same_numbers(loss, sampler(), data(dtype=torch.float32), labels)
    step = fused(apart(make(Denoiser(network, EDM()))), sampler())
    assert step is not None
    with pytest.raises(InputError, match="takes labels .*cond is missing"):
        step(data(dtype=torch.float32), cond=None, generator=Generator())


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ({}, {}),
        ({"weight": "pairwise", "denoising_coef": 0.0}, {"coupling": "shared", "span": 1.0, "stride": 0.25}),
        ({"bootstrap_share": 0.3}, {"P_mean": 1.0}),
        ({"bootstrap_share": 0.0}, {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs(options: dict[str, Any], drawn: dict[str, Any], dtype: torch.dtype) -> None:
    loss = apart(td_edm_loss(denoiser(EDM(), dtype=dtype), **options))
    same_numbers(loss, partial(sample_td_edm_pairs, EDM(), **drawn), data(40, dtype=dtype))


def test_pairs_with_labels_and_bad_ones() -> None:
    torch.manual_seed(0)
    network = MLP((2,), num_classes=3, hidden=8)
    loss, draw = td_edm_loss(Denoiser(network, EDM())), partial(sample_td_edm_pairs, EDM())
    x0 = data(4, dtype=torch.float32)
    same_numbers(apart(loss), draw, x0, torch.tensor([0, 3, 2, 1]))
    for options, x, message in (
        ({"span": -1.0}, x0, "span is -1"),
        ({}, x0 / 0, "x0 holds NaN or infinity, first in row 0"),
    ):
        step = fused(loss, partial(sample_td_edm_pairs, EDM(), **options))
        assert step is not None
        with pytest.raises(InputError, match=message):
            step(x, cond=torch.zeros(4, dtype=torch.long), generator=Generator())


def test_levels_follow_what_they_were_made_of() -> None:
    loss, draw = apart(ValueLoss(denoiser(EDM(), dtype=torch.float32), lmbda=0.5)), sampler(jitter=False)
    step, x0 = fused(loss, draw), data(dtype=torch.float32)
    assert step is not None
    for change in (lambda: None, lambda: setattr(loss.denoiser, "sigma_data", 0.3), loss.double):
        change()
        x0 = x0.to(next(loss.denoiser.parameters()).dtype)
        value, _ = step(x0, cond=None, generator=Generator().manual_seed(5))
        out = loss(draw(x0, cond=None, generator=Generator().manual_seed(5)))
        close(value, out["loss_value"])
    with pytest.raises(InputTypeError, match="float16"):
        step(x0.half(), cond=None, generator=Generator())


def test_levels_made_where_there_are_no_gradients_are_made_again() -> None:
    step, x0 = fused(ValueLoss(denoiser(EDM(), dtype=torch.float32)), sampler(jitter=False)), data()
    assert step is not None
    with torch.inference_mode():
        step(x0.float(), cond=None, generator=Generator())
    step(x0.float(), cond=None, generator=Generator())[0].backward()


class Mine(ValueLoss):
    """A loss whose arithmetic may be another."""


def test_what_is_not_known_is_not_fused() -> None:
    D, draw = denoiser(EDM()), sampler()
    schedule = LambdaSchedule(low_noise=0.1, high_noise=0.9)
    assert isinstance(fused(ValueLoss(D), draw), FusedStep)
    for loss in (
        Mine(D),
        ValueLoss(D, gamma=0.9),
        ValueLoss(D, bootstrap="residual"),
        ValueLoss(D, lmbda=schedule),
        ValueLoss(D).make_value_estimator(ValueEstimators.TD0, gamma=1.0),
    ):
        assert fused(loss, draw) is None
    for other in (sampler(window=2), lambda x0, **options: draw(x0, **options)):
        assert fused(ValueLoss(D), other) is None
    assert fused(ValueLoss(D, lmbda=0.5), partial(sample_td_edm_pairs, EDM())) is None
    assert fused(torch.nn.Linear(1, 1), draw) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda loss: loss.make_value_estimator(ValueEstimators.TD0, gamma=1.0),
        lambda loss: setattr(loss.denoiser, "forward", loss.denoiser.forward),
        lambda loss: loss.register_forward_hook(lambda *_: None),
        lambda loss: loss.denoiser.register_forward_pre_hook(lambda *_: None),
    ],
)
def test_it_steps_back_where_somebody_changes_the_calls_that_it_leaves_out(change: Any) -> None:
    loss = ValueLoss(denoiser(EDM()), lmbda=0.5)
    step = fused(loss, sampler())
    assert step is not None and step.fits
    change(loss)
    assert not step.fits


def test_a_forgotten_target_network_is_told() -> None:
    step = fused(td_loss(denoiser(EDM())), sampler())
    assert step is not None
    with pytest.warns(UserWarning, match="No target network updater"):
        step(data(), cond=None, generator=Generator())


def test_states_are_those_of_the_chain() -> None:
    step, draw, x0 = fused(ValueLoss(denoiser(EDM())), sampler(coupling=0.5)), sampler(coupling=0.5), data()
    assert step is not None
    drawn = step.draw(x0, cond=None, generator=Generator().manual_seed(1))
    chain = draw(x0, cond=None, generator=Generator().manual_seed(1))
    assert torch.equal(drawn.x, chain[keys.X_T])
