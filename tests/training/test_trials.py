"""λ chosen along the training: what is tried, what decides, and that a trial leaves nothing behind."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl import EDM, Denoiser
from diffrl.data.dataset import Data
from diffrl.data.synthetic import rings
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.objectives import ValueLoss
from diffrl.objectives.posteriors import reference_mean
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.scheme import Objective
from diffrl.objectives.stand_ins import StandIn, StandInChains
from diffrl.objectives.td_adaptive import AdaptiveLoss, TrialPlan
from diffrl.training.identity import RunChanged
from diffrl.training.optim import Optim
from diffrl.training.trainer import Average, Length, Target, Trainer
from diffrl.training.trials import held_out
from tests.kit.trainers import differing, state, take, unfused

PLAN = TrialPlan(trials=2, trial_steps=0.1, heldout=16)


def make(folder: Path | None = None, data: Data | None = None, steps: int = 20, **options: Any) -> Trainer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        denoiser = Denoiser(MLP((2,), 0, hidden=16, depth=1), EDM())
    draw: Any = ChainSampler(Chain(denoiser.process, num_steps=5, coupling="markov"), jitter=False)
    if (stand_in := options.pop("stand_in", None)) is not None:
        draw = StandInChains(draw, stand_in, data)
    plan = options.pop("plan", PLAN)
    loss = ValueLoss(denoiser, lmbda=1.0) if plan is None else AdaptiveLoss(denoiser, plan, **options)
    return Trainer(
        Objective("td_adaptive", loss, draw),
        data or rings(test_size=16),
        seed=0,
        folder=folder,
        length=Length(steps, batch_size=8, checkpoint_every=5),
        optim=Optim(warmup_steps=3),
        average=Average(halflife=40),
        target=Target(),
    )


def settle(trainer: Trainer, lmbda: float) -> None:
    """Let every trial of it end with that λ."""

    def choose(before: Tensor, errors: Any) -> float:
        trainer.loss.lmbda = lmbda
        return lmbda

    trainer.loss.choose = choose


@pytest.mark.parametrize("bootstrap", ["own", "target"])
def test_a_trial_leaves_nothing_behind(bootstrap: str) -> None:
    """Where every trial ends with Monte Carlo, the run is Monte Carlo's bit for bit; only evaluations are spent."""
    tried, plain = make(bootstrap=bootstrap), unfused(make(plan=None))
    settle(tried, 1.0)
    take(tried, 20)
    take(plain, 20)
    assert len(tried.trials.history) == 2
    found = {k: v for k, v in state(tried).items() if not k.startswith("target")}
    expected = {k: v for k, v in state(plain).items() if not k.startswith("target")}
    assert differing(found, expected) == ["counts"]
    assert found["counts"][:2] == expected["counts"][:2] and found["counts"][2] > expected["counts"][2]


def test_evaluations_of_trials_are_counted() -> None:
    tried, plain = make(), make(plan=None)
    settle(tried, 0.0)
    take(tried, 20)
    take(plain, 20)
    extra = tried.loss.network_evaluations - plain.loss.network_evaluations
    steps, looks = PLAN.extra_steps(20), 2 * (1 + len(PLAN.candidates))
    assert PLAN.times(20) == [5, 10] and steps == 2 * 3 * 2
    assert extra == steps * 8 * 5 + looks * 16 * 5  # data × levels, on the network's own predictions


@pytest.mark.parametrize("lmbda", [None, 0.5])
def test_resuming_changes_no_bit(tmp_path: Path, lmbda: float | None) -> None:
    whole, stopped, resumed = make(), make(tmp_path), make(tmp_path)
    if lmbda is not None:
        for trainer in (whole, stopped, resumed):
            settle(trainer, lmbda)
    take(whole, 20)
    take(stopped, 13)  # a checkpoint at 10, after a trial, which is due at the next step
    assert resumed.resume() and resumed.step == 10
    take(resumed, 10)
    assert differing(state(whole), state(resumed)) == []
    assert resumed.trials.history == whole.trials.history
    assert resumed.loss.lmbda == whole.loss.lmbda


def test_a_run_with_another_plan_is_another_run(tmp_path: Path) -> None:
    take(make(tmp_path), 6)
    with pytest.raises(RunChanged, match="trials"):
        make(tmp_path, plan=replace(PLAN, trials=1)).resume()


@pytest.mark.parametrize("option", [{"bootstrap": "target"}, {"denoising_coef": 0.5}])
def test_a_run_with_another_option_of_the_loss_is_another_run(tmp_path: Path, option: dict[str, Any]) -> None:
    take(make(tmp_path), 6)
    with pytest.raises(RunChanged, match=next(iter(option))):
        make(tmp_path, **option).resume()


def chosen(before: float, *means: float, spread: float = 0.01, n: int = 100) -> float:
    """The choice between errors with these means on n chains, whose differences have that standard deviation."""
    loss = make().loss
    assert isinstance(loss, AdaptiveLoss)
    noise = torch.linspace(-1, 1, n, dtype=torch.float64)
    noise = spread * noise / noise.std()
    common = torch.rand(n, dtype=torch.float64)  # of a chain, the same for all candidates
    errors = [common + m + (noise if i else 0) for i, m in enumerate(means)]
    return loss.choose(common + before, errors)


def test_the_least_error_is_taken_if_it_is_clearly_less() -> None:
    assert chosen(0.5, 0.5, 0.4, 0.3) == 0.0
    assert chosen(0.5, 0.5, 0.3, 0.4) == 0.5
    assert chosen(0.5, 0.5, 0.6, 0.7) == 1.0
    # 2 standard errors are 2 · 0.01/√100 = 0.002
    assert chosen(0.5, 0.5, 0.5 - 0.0021, 0.6) == 0.5
    assert chosen(0.5, 0.5, 0.5 - 0.0019, 0.6) == 1.0


def test_where_monte_carlo_gains_much_little_more_does_not_count() -> None:
    # Monte Carlo gains 0.1 in the trial; a fifth of it is 0.02
    assert chosen(0.6, 0.5, 0.479, 0.6) == 0.5
    assert chosen(0.6, 0.5, 0.481, 0.6) == 1.0


def test_finite_data_are_parted_once_for_all() -> None:
    rows = torch.arange(40.0).view(20, 2)
    data = Data("mine", test=rows[:3], train=rows)
    kept, held = held_out(data, seed=0)
    assert kept.train is not None and held.train is not None
    assert len(kept.train) == 18 and len(held.train) == 2
    both = torch.cat([kept.train, held.train])
    assert torch.equal(both[both[:, 0].argsort()], rows)
    again = held_out(data, seed=0)[1].train
    assert again is not None and torch.equal(again, held.train)
    trainer = make(data=data)
    seen = {tuple(row.tolist()) for i in range(50) for row in trainer.batch(i)[0]}
    assert seen == {tuple(row.tolist()) for row in kept.train}
    law = rings(test_size=4)
    assert held_out(law, 0) == (law, law)


@pytest.mark.parametrize("x0", [StandIn("reference", 9), StandIn("exact")])
def test_what_stands_in_for_x0_knows_nothing_that_is_held_out(x0: StandIn) -> None:
    rows = torch.arange(400.0).view(200, 2) / 400
    data = Data("mine", test=rows[:3], train=rows)
    trainer = make(data=data, stand_in=x0)
    draw: Any = trainer.objective.draw
    kept = held_out(data, 0)[0].train
    assert kept is not None and torch.equal(draw.data.train, kept)
    if x0.x0 == "exact":
        chain = draw(trainer.batch(0)[0], cond=None, generator=torch.Generator().manual_seed(0))
        x_t, t = chain["x_t"].flatten(0, 1), chain["t"].flatten()
        assert torch.equal(chain["x0_mean"].flatten(0, 1), reference_mean(EDM(), x_t, t, kept))
    take(trainer, 20)  # the 16 held-out chains are more than the 9 rows of a reference batch
    assert len(trainer.trials.history) == 2


def test_times_halve_towards_the_beginning() -> None:
    assert TrialPlan(trials=4).times(2000) == [125, 250, 500, 1000]
    assert TrialPlan(trials=4).times(1) == [0]
    assert TrialPlan().length(2000) == 50 and TrialPlan().length(3) == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"candidates": (0.5, 0.0)}, "candidates"),
        ({"candidates": (1.0,)}, "candidates"),
        ({"candidates": (1.0, 1.5)}, "candidates"),
        ({"trials": 0}, "trials"),
        ({"trial_steps": 0.0}, "trial_steps"),
        ({"trial_steps": 0.2}, "trial_steps"),
        ({"heldout": 1}, "heldout"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        TrialPlan(**options)


def test_the_registered_name_makes_it() -> None:
    denoiser = Denoiser(MLP((2,), 0, hidden=16, depth=1), EDM())
    loss = OBJECTIVES.entry("td_adaptive").make(denoiser, trials=3, bootstrap="target")
    assert isinstance(loss, AdaptiveLoss) and loss.plan == TrialPlan(trials=3)
    assert loss.bootstrap == "target" and loss.lmbda == 1.0
    assert list(itertools.islice(loss.plan.times(80), 3)) == [10, 20, 40]
