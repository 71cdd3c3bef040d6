"""TDM-unify: one generator for 1, 2 and 4 steps, of which each rollout takes one number."""

from pathlib import Path
from typing import Any

import pytest
import torch

import diffrl
from diffrl import recipes
from diffrl.diffusion.step_counts import StepConditioned
from diffrl.errors import InputError
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.tdm import TrajectoryMatching
from diffrl.finetuning.methods.tdm_r1 import LearntReward
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.step_counts import StepCounts
from diffrl.finetuning.updates.boundaries import BoundaryUpdates
from diffrl.training.optim import Optim
from tests.kit.four_modes import ExactAndMore, generator_policy, mode_one, on_modes, samples_of

COUNTS = (1, 2, 4)


def several(*, told: bool = True) -> DenoisingPolicy:
    torch.manual_seed(0)
    denoiser = ExactAndMore(diffrl.Flow())
    made = StepConditioned(denoiser, COUNTS, "network.0") if told else denoiser
    return DenoisingPolicy(made, diffrl.DDIM(), num_steps=4, reduction="mean")


def tuner_of(policy: DenoisingPolicy, iterations: int, folder: Path | None = None, **more: Any) -> Finetuner:
    matching = TrajectoryMatching(fake_target="x0", fake_updates=3, fake_lr=2e-3, betas=(0.9, 0.99))
    pieces = {
        "rollouts": StepCounts(256, counts=COUNTS),
        "updates": BoundaryUpdates(passes=3),
        "surrogate": matching,
    }
    optim = Optim(1e-3, betas=(0.9, 0.99), warmup_steps=0, decay="none")
    recipe = recipes.tdm(**{**pieces, **more})
    return Finetuner(
        policy, mode_one, recipe, event_shape=(2,), length=Iterations(iterations), optim=optim, folder=folder
    )


def test_each_rollout_takes_one_of_the_counts() -> None:
    tuner, seen = tuner_of(several(), 12), []
    for _ in tuner.steps():
        assert tuner.policy.num_steps == tuner.references.num_steps == 4  # again, for evaluations
        seen.append(tuner.references.twin("fake").nfe)
    spent = {tuner.policy.nfe}
    again = tuner_of(several(), 12)
    for _ in again.steps():
        pass
    assert {again.policy.nfe} == spent and 12 * 256 < spent.pop() < 12 * 256 * 5


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    ends = []
    for stops in ((6,), (2, 4, 6)):
        for stop in stops:
            tuner = tuner_of(several(), 6, folder=tmp_path / str(len(stops)))
            tuner.resume()
            steps = tuner.steps()
            while tuner.step < stop:
                next(steps)
            tuner.save()
        ends.append([p.detach().clone() for p in tuner.policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_fake_score_is_told_too_and_the_teacher_need_not_be() -> None:
    policy = several()
    plain = ExactAndMore(diffrl.Flow())
    recipe = recipes.tdm_r1(
        rollouts=StepCounts(32, group_size=8, counts=COUNTS), surrogate=LearntReward(beta=50.0, runaway=None)
    )
    tuner = Finetuner(policy, mode_one, recipe, event_shape=(2,), length=Iterations(6), teacher=plain)
    for name in ("fake", "surrogate", "slow"):
        assert tuner.references.twin(name).denoiser.step_counts == COUNTS
    assert tuner.references("teacher").denoiser.__class__ is ExactAndMore
    for _ in tuner.steps():
        pass
    told = tuner.references.twin("fake").denoiser.embedding
    assert bool(told.any())


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(InputError, match="the number of updates would vary .* set rollouts=chains"):
        recipes.ddpo_is(rollouts=StepCounts(32))
    with pytest.raises(
        InputError, match=r"rollouts.counts has \[3\], but the denoiser knows \[1, 2, 4\] steps"
    ):
        tuner_of(several(), 1, rollouts=StepCounts(32, counts=(1, 3)))
    with pytest.raises(InputError, match="rollouts.counts is empty"):
        StepCounts(32, counts=())


@pytest.mark.slow
def test_one_generator_serves_one_two_and_four_steps() -> None:
    policy = several()
    for _ in tuner_of(policy, 450).steps():
        pass
    found, before = {}, {}
    for K in COUNTS:
        policy.num_steps = K
        found[K], before[K] = (
            on_modes(samples_of(policy)),
            on_modes(samples_of(generator_policy(num_steps=K))),
        )
    assert found[1] > before[1] + 0.3 and found[2] > before[2] + 0.1 and found[4] > before[4]
