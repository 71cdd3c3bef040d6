"""Options that change along the training: their values, the bootstrap's share, and what each objective lets anneal."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from diffrl.experiments.train import run_experiment
from diffrl.objectives import ValueLoss
from diffrl.objectives.annealing import annealed
from diffrl.objectives.consistency import ConsistencyLoss, ct_loss, td_ct_loss
from diffrl.objectives.consistency_pairs import sample_consistency_pairs
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.scheme import Progressive
from diffrl.objectives.td_edm import sample_td_edm_pairs, td_edm_loss
from diffrl.objectives.td_lambda_schedule import td_lambda_schedule_loss
from diffrl.training.identity import RunChanged
from diffrl.training.trainer import Target
from tests.kit.configs import small
from tests.kit.consistency import consistency
from tests.kit.trainers import differing, make, state, take
from tests.kit.value_loss import PROCESS, data, denoiser, distance, draw, gradient, number, perturb

# The values


def test_linear_between_evenly_spaced_points() -> None:
    found = [annealed([1.0, 0.0, 4.0], step, 9) for step in range(9)]
    assert found == [1.0, 0.75, 0.5, 0.25, 0.0, 1.0, 2.0, 3.0, 4.0]
    assert [annealed([0.1, 0.9], step, 7) for step in (0, 6, 7, 100)] == [0.1, 0.9, 0.9, 0.9]
    assert annealed([0.3], 5, 9) == 0.3 and annealed([0.3, 0.7], 0, 1) == 0.3


def test_no_last_bit_leads_out_of_the_range() -> None:
    for low, total in itertools.product((0.1, 0.3, 0.7, 0.9), (10, 101, 1000)):
        rising = [annealed([low, 1.0], step, total) for step in range(total)]
        assert min(rising) == low and max(rising) == 1.0 and rising == sorted(rising)
        assert {annealed([low, low], step, total) for step in range(total)} == {low}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"anneal": {"lmbada": [1, 0]}},
            "anneal has 'lmbada', but what can be annealed here is lmbda, n_steps",
        ),
        ({"anneal": {"lmbda": [1, 1.5]}}, r"anneal\.lmbda is 1\.5, but must lie in \[0, 1\]"),
        ({"anneal": {"lmbda": []}}, r"anneal\.lmbda is \[\]: give a list of at least one value"),
        ({"anneal": {"lmbda": 0.5}}, r"anneal\.lmbda is 0\.5: give a list"),
        ({"anneal": {"lmbda": "10"}}, r"anneal\.lmbda is '10': give a list"),
        ({"anneal": [1, 0]}, r"anneal is \[1, 0\]: give lists of values by the name of an option"),
        ({"anneal": {"n_steps": [0, 3]}}, r"anneal\.n_steps is 0"),
        ({"anneal": {"lmbda": [1, 0]}, "lmbda": 0.5}, "lmbda is 0.5 and annealed too"),
        ({"anneal": {"lmbda": [1, 0]}, "n_steps": 2}, "give one of lmbda, n_steps, lookahead"),
        ({"anneal": {"lmbda": [1, 0], "n_steps": [2, 1]}}, "give one of lmbda, n_steps, lookahead"),
        ({"bootstrap_share": 1.5}, "bootstrap_share is 1.5"),
    ],
)
def test_wrong_schedules_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ValueLoss(denoiser(), **options)
    assert "\n" not in str(error.value)


def test_a_target_without_the_option_is_named() -> None:
    loss = ValueLoss(denoiser(), anneal={"lmbda": [1, 0]}).make_value_estimator("n_step", n_steps=2)
    with pytest.raises(ValueError, match=r"anneal\.lmbda: the target NStep has no lmbda"):
        loss.set_progress(1, 2)


# The bootstrap's share

GIVEN = [{"lmbda": 0.0}, {"lmbda": 0.6}, {"n_steps": 2}]


def loss_and_gradient(loss: Any, chain: TensorDict) -> tuple[float, torch.Tensor]:  # noqa: ANN401
    if loss.bootstrap == "target":
        SoftUpdate(loss, eps=0.9)
    value = loss(chain.clone())["loss_value"]
    return number(value), gradient(value, loss.denoiser)


@pytest.mark.parametrize("bootstrap", ["own", "target", "residual"])
@pytest.mark.parametrize("target", GIVEN)
def test_no_share_is_monte_carlo_and_costs_the_same(target: dict[str, Any], bootstrap: str) -> None:
    D, chain = denoiser(), draw()
    loss, plain = ValueLoss(D, **target, bootstrap=bootstrap, bootstrap_share=0.0), monte_carlo_loss(D)
    found, expected = loss_and_gradient(loss, chain), loss_and_gradient(plain, chain)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    assert loss.network_evaluations == plain.network_evaluations == chain.numel()


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("with_x0", [True, False])
@pytest.mark.parametrize("target", GIVEN)
def test_the_target_is_the_mean_of_both_returns(target: dict[str, Any], with_x0: bool, gamma: float) -> None:
    """The gradient is linear in the target, whether errors or values are what is bootstrapped."""
    D, chain = denoiser(), draw()
    perturb(D)
    if not with_x0:
        del chain["x0"]
    losses = {s: ValueLoss(D, **target, gamma=gamma, bootstrap_share=s) for s in (0.0, 0.25, 1.0)}
    g = {s: loss_and_gradient(loss, chain)[1] for s, loss in losses.items()}
    assert distance(g[0.25], 0.75 * g[0.0] + 0.25 * g[1.0]) < 1e-11 < distance(g[0.0], g[1.0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_of_two_states_td0_with_a_share_is_td_lambda(share: float) -> None:
    D, chain = denoiser(), draw(num_steps=2)
    perturb(D)
    assert chain.shape[1] == 2
    mixed = loss_and_gradient(ValueLoss(D, lmbda=0.0, bootstrap_share=share), chain)
    by_lambda = loss_and_gradient(ValueLoss(D, lmbda=1 - share), chain)
    assert mixed[0] == pytest.approx(by_lambda[0], rel=1e-12) and distance(mixed[1], by_lambda[1]) < 1e-12


def test_a_chain_that_is_cut_needs_x0_for_its_monte_carlo_part() -> None:
    chain = draw(window=2)
    D = denoiser()
    known = ValueLoss(D, lmbda=0.0, bootstrap_share=0.0)(chain.clone())["loss_value"]
    assert number(known) == number(monte_carlo_loss(D)(chain.clone())["loss_value"])
    del chain["x0"]
    with pytest.raises(ValueError, match="the Monte Carlo return of a chain that is cut"):
        ValueLoss(D, lmbda=0.0, bootstrap_share=0.5)(chain)


# What each objective lets anneal


def same(annealing: Any, constant: Any, chain: TensorDict) -> None:  # noqa: ANN401
    assert isinstance(annealing, Progressive)
    a, b = loss_and_gradient(annealing, chain), loss_and_gradient(constant, chain)
    assert a[0] == b[0] and torch.equal(a[1], b[1])


CHAIN_CASES: list[tuple[str, list[float], list[dict[str, Any]]]] = [
    ("lmbda", [1.0, 0.5, 0.0], [{"lmbda": v} for v in (1.0, 0.75, 0.5, 0.25, 0.0)]),
    ("n_steps", [6, 1], [{"n_steps": n} for n in (6, 5, 4, 2, 1)]),
    ("bootstrap_share", [0.0, 1.0], [{"bootstrap_share": v} for v in (0.0, 0.25, 0.5, 0.75, 1.0)]),
    ("denoising_coef", [1.0, 0.0], [{"denoising_coef": v} for v in (1.0, 0.75, 0.5, 0.25, 0.0)]),
]


@pytest.mark.parametrize("bootstrap", ["own", "target"])
@pytest.mark.parametrize(("name", "values", "constants"), CHAIN_CASES)
def test_td(name: str, values: list[float], constants: list[dict[str, Any]], bootstrap: str) -> None:
    """At each step it is the loss with the constant, however it came there."""
    D, chain = denoiser(), draw()
    perturb(D)
    loss = ValueLoss(D, anneal={name: values}, bootstrap=bootstrap)
    same(loss, ValueLoss(D, **constants[0], bootstrap=bootstrap), chain)  # before it is told
    for step in (4, 0, 1, 2, 3):
        loss.set_progress(step, 5)
        same(loss, ValueLoss(D, **constants[step], bootstrap=bootstrap), chain)


def test_the_ends_of_td_lambda_schedule() -> None:
    D, chain = denoiser(), draw()
    perturb(D)
    loss = td_lambda_schedule_loss(D, anneal={"low_noise": [0.8, 0.0], "bootstrap_share": [1.0, 0.5]})
    for step, low, share in ((0, 0.8, 1.0), (1, 0.4, 0.75), (2, 0.0, 0.5)):
        loss.set_progress(step, 3)
        same(loss, td_lambda_schedule_loss(D, low_noise=low, bootstrap_share=share), chain)
    with pytest.raises(ValueError, match="anneal has 'lmbda', but what can be annealed here is low_noise"):
        td_lambda_schedule_loss(D, anneal={"lmbda": [1, 0]})


def test_td_edm() -> None:
    D = denoiser()
    pairs = sample_td_edm_pairs(PROCESS, data(64), generator=torch.Generator().manual_seed(0))
    loss = td_edm_loss(D, anneal={"bootstrap_share": [0, 1], "denoising_coef": [2, 0]})
    perturb(D)
    for step, share, c in ((0, 0.0, 2.0), (1, 0.5, 1.0), (2, 1.0, 0.0)):
        loss.set_progress(step, 3)
        constant = td_edm_loss(D, bootstrap_share=share, denoising_coef=c)
        constant.__dict__["_target_network"] = loss.bootstrap_network
        same(loss, constant, pairs)
    assert loss.network_evaluations == (1 + 2 + 2) * 64  # without a share nothing is evaluated for a target


def ct_pairs() -> TensorDict:
    g = torch.Generator().manual_seed(0)
    return sample_consistency_pairs(consistency().process, data(8), num_scales=5, generator=g)


@pytest.mark.parametrize("td_coef", [0.0, 1.0])
def test_consistency_training_with_a_share(td_coef: float) -> None:
    """f⁻ is what is mixed: with no share both terms regress on the datum."""
    D, pairs = consistency(), ct_pairs()
    options = {"td_coef": td_coef, "consistency_coef": 1.0, "metric": "l2", "bootstrap": "own"}
    g = {
        s: loss_and_gradient(ConsistencyLoss(D, bootstrap_share=s, **options), pairs)[1]
        for s in (0.0, 0.25, 1.0)
    }
    assert distance(g[0.25], 0.75 * g[0.0] + 0.25 * g[1.0]) < 1e-11
    loss = ct_loss(D, metric="l2", bootstrap_share=0.0, bootstrap="own")
    x0, f = pairs["x0"], D(pairs["x_t"].squeeze(1), pairs["t"].flatten(), None).unsqueeze(1)
    assert number(loss(pairs)["loss_value"]) == pytest.approx(number((x0 - f).square().mean()), rel=1e-12)
    assert loss.network_evaluations == 8


def test_consistency_training_anneals() -> None:
    D, pairs = consistency(), ct_pairs()
    loss = td_ct_loss(D, bootstrap="own", anneal={"bootstrap_share": [0, 1], "consistency_coef": [1, 0]})
    for step, share, c in ((0, 0.0, 1.0), (1, 0.5, 0.5), (2, 1.0, 0.0)):
        loss.set_progress(step, 3)
        constant = td_ct_loss(D, bootstrap="own", bootstrap_share=share, consistency_coef=c)
        same(loss, constant, pairs)


def test_it_survives_a_copy() -> None:
    loss = copy.deepcopy(ValueLoss(denoiser(), anneal={"lmbda": [1, 0]}))
    loss.set_progress(1, 2)
    assert loss.value_estimator.lmbda == 0


def test_monte_carlo_has_nothing_to_anneal() -> None:
    for name in ("monte_carlo", "edm", "denoising"):
        with pytest.raises(TypeError, match="has no option anneal"):
            OBJECTIVES[name](denoiser(), anneal={"lmbda": [1, 0]})


# In a training


@pytest.mark.parametrize(
    "loss",
    [
        {"anneal": {"lmbda": [1.0, 0.0]}, "bootstrap": "target"},
        {"anneal": {"n_steps": [5, 1], "bootstrap_share": [0, 1]}},
    ],
)
def test_resuming_changes_no_bit(loss: dict[str, Any], tmp_path: Path) -> None:
    whole = make(loss=loss, target=Target(0.9))
    figures = take(whole, 13)
    take(make(tmp_path, loss, target=Target(0.9)), 7)
    resumed = make(tmp_path, loss, target=Target(0.9))
    assert resumed.resume() and resumed.step == 5
    assert take(resumed, 13) == figures[5:]
    assert differing(state(whole), state(resumed)) == []


def test_another_schedule_is_another_run(tmp_path: Path) -> None:
    take(make(tmp_path, {"anneal": {"lmbda": [1.0, 0.0]}}), 6)
    with pytest.raises(RunChanged, match=r"objective\.anneal\.lmbda \[1\.0, 0\.0\] → \[1\.0, 0\.5\]"):
        make(tmp_path, {"anneal": {"lmbda": [1.0, 0.5]}}).resume()


def test_a_constant_schedule_trains_as_the_constant_does() -> None:
    a, b = make(loss={"anneal": {"lmbda": [0.25]}}), make(loss={"lmbda": 0.25})
    assert take(a, 12) == take(b, 12) and differing(state(a), state(b)) == []


def test_on_the_command_line(tmp_path: Path) -> None:
    config = small(
        f"run_dir={tmp_path}",
        "objective.anneal={lmbda: [1, 0.5, 0], denoising_coef: [1, 0]}",
        "compare=false",
    )
    folder = run_experiment(config, progress=False)
    assert folder.config()["objective"]["anneal"] == {"lmbda": [1, 0.5, 0], "denoising_coef": [1, 0]}
    again = run_experiment({**folder.config(), "resume": str(folder.path), "extend": 35}, progress=False)
    assert again.results()["objectives"]["td"]["grad_steps"] == 35
