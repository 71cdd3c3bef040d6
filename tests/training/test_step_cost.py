"""The cost of a step in forward passes: of steps whose number of passes is known, and of a trainer left as it was."""

import itertools
import time

import pytest
import torch

from diffrl.diffusion.schedules.edm import EDM
from diffrl.objectives import DoubleSamplingLoss, ValueLoss
from diffrl.objectives.maps.states import LogNormalPairs
from diffrl.training.step_cost import PLACES, forward_equivalents, step_over_forward
from diffrl.training.trainer import Trainer
from tests.kit.maps import two_times
from tests.kit.trainers import differing, make, state, take


def test_a_step_of_three_passes_is_three_on_a_clock_that_runs_unevenly() -> None:
    now, pace = [0.0], itertools.cycle([1.0, 5.0, 1.0, 40.0, 1.0])
    slow = [1.0]

    def forward() -> None:
        now[0] += slow[0]

    def step(place: int) -> None:
        now[0] += 3 * slow[0]

    def next_round() -> None:
        slow[0] = next(pace)

    found = step_over_forward(step, [(0, forward), (7, forward)], clock=lambda: now[0], after=next_round)
    assert found == pytest.approx(3.0, rel=1e-12)


def test_places_have_equal_weight_and_a_round_that_was_disturbed_none() -> None:
    now, calls = [0.0], [0]

    def forward() -> None:
        now[0] += 1

    def step(place: int) -> None:
        calls[0] += 1
        now[0] += (2 if place == 0 else 6) + (1000 if calls[0] == 4 else 0)

    assert step_over_forward(step, [(0, forward), (1, forward)], clock=lambda: now[0]) == pytest.approx(4.0)


def test_three_passes_of_a_network_cost_three_on_the_processor() -> None:
    network = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    x = torch.randn(256, 256)

    def forward() -> None:
        with torch.no_grad():
            network(x)

    def step(place: int) -> None:
        for _ in range(3):
            forward()

    found = step_over_forward(step, [(0, forward)], clock=time.process_time)
    assert found == pytest.approx(3.0, rel=0.3)


def counted(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Steps that are taken, and states that go through plain passes."""
    steps, passes, train_on, forward = [], [], trainer.train_on, trainer.denoiser.forward

    def stepped(place: int) -> dict[str, float]:
        steps.append(place)
        return train_on(place)

    def passed(x: torch.Tensor, *args: object) -> torch.Tensor:
        if not torch.is_grad_enabled():
            passes.append(len(x))
        return forward(x, *args)

    monkeypatch.setattr(trainer, "train_on", stepped)
    monkeypatch.setattr(trainer.denoiser, "forward", passed)
    return steps, passes


def test_it_times_steps_along_the_training_on_the_states_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(grad_steps=20)
    steps, passes = counted(trainer, monkeypatch)
    assert forward_equivalents(trainer) > 1
    assert sorted(set(steps)) == [2, 6, 10, 14, 18] and len(set(steps)) == PLACES
    assert set(passes) == {8 * 5}  # 8 chains of 5 states


@pytest.mark.parametrize("loss", [{}, {"bootstrap": "target"}, {"anneal": {"lmbda": [1, 0]}}])
def test_the_trainer_goes_on_as_if_nothing_had_been(loss: dict[str, object]) -> None:
    measured, plain = make(loss=dict(loss)), make(loss=dict(loss))
    for trainer in (measured, plain):
        take(trainer, 6)
    before = state(measured)
    forward_equivalents(measured)
    assert differing(before, state(measured)) == []
    assert take(measured, 6) == take(plain, 6) and differing(state(measured), state(plain)) == []


def test_a_training_of_one_step_has_one_place() -> None:
    assert forward_equivalents(make(grad_steps=1)) > 1


# --- the states of a step


def test_states_left_are_one_a_row_and_twins_leave_one() -> None:
    trainer = make()
    x0, _, generator = trainer.batch(0)
    chain = trainer.objective.draw(x0, cond=None, generator=generator)
    x, t, cond = trainer.loss.left(chain)
    assert (
        torch.equal(x, chain["x_t"].reshape(40, 2))
        and torch.equal(t, chain["t"].reshape(40))
        and cond is None
    )

    denoiser = two_times(EDM(0.01, 20.0))
    states = LogNormalPairs(EDM(0.01, 20.0))(torch.randn(6, 2).double(), generator=generator)
    states["cond"] = torch.arange(6).view(6, 1)
    x, t, cond = ValueLoss(denoiser).left(states)
    assert x.shape == (6, 2) and t.shape == (6,) and torch.equal(cond, torch.arange(6))

    twins = torch.cat([states, states], 1)
    assert torch.equal(DoubleSamplingLoss(denoiser).left(twins)[0], x)
