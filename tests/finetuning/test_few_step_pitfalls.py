"""What goes wrong without a word when few-step generators are distilled and tuned, each shown to be right here."""

import math

import pytest
import torch

import diffrl
from diffrl import keys, recipes
from diffrl.diffusion.renoising import marginal_target, renoise
from diffrl.diffusion.schedules.base import Schedule
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.guidance import Teacher
from diffrl.finetuning.methods.tdm import DistillationLoss, pull, student_step
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.finetuning.updates.boundaries import BoundaryUpdates
from tests.kit.four_modes import generator_policy, mode_one


@pytest.mark.parametrize("process", [diffrl.Flow(), diffrl.VP(), diffrl.EDM()], ids=["flow", "vp", "edm"])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_boundary_that_is_replayed_is_the_one_that_was_drawn(process: Schedule, num_steps: int) -> None:
    policy = generator_policy(process, num_steps)
    torch.nn.init.normal_(policy.denoiser.network[-1].weight, std=0.1)
    generator = torch.Generator().manual_seed(0)
    rollout = collect_rollout(policy, (2,), batch_size=32, generator=generator)
    rollout.set(keys.ADVANTAGE, torch.zeros(32, num_steps, 1))
    updates = BoundaryUpdates(draws=num_steps)
    (part,) = updates(rollout, policy=policy, group_size=1, generator=generator, entries=[])
    D, b = student_step(policy, part)
    flat = part.reshape(-1)
    torch.testing.assert_close(b.x_s, flat.get((keys.NEXT, keys.X_T)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(D.detach(), flat.get(keys.X0_HAT), rtol=1e-5, atol=1e-6)
    assert D.requires_grad and not b.x_s.requires_grad  # one step of the student has a gradient, and no more


def test_the_students_estimate_is_a_biased_target_and_has_less_noise() -> None:
    # data N(0.4, 0.7²) in a flow: x_s at s = 0.25 as the data's own law, x̂ = E[x0 | x at t = 0.5]
    m, std, s, t, n = 0.4, 0.7, 0.25, 0.30, 2_000_000
    process, generator = diffrl.Flow(), torch.Generator().manual_seed(0)

    def clean(x: torch.Tensor, t: float) -> torch.Tensor:
        v = (1 - t) ** 2 * std**2 + t**2
        return m + (1 - t) * std**2 / v * (x - (1 - t) * m)

    def draw() -> torch.Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    x_k = 0.5 * (m + std * draw()) + 0.5 * draw()
    x0_hat = clean(x_k, 0.5)
    x_s = x0_hat + s * (x_k - x0_hat) / 0.5  # Euler's step to s
    eps, times = draw(), torch.full((n,), t, dtype=torch.float64)
    given = (process, x_s, torch.full_like(times, s), times, eps)
    x_t, exact = renoise(*given), marginal_target(*given)

    def slope(target: torch.Tensor) -> tuple[float, float]:
        """Of the target's mean over x_t, which is a line, and the spread about it."""
        x, y = x_t - x_t.mean(), target - target.mean()
        k = float((x * y).mean() / x.square().mean())
        return k, float((y - k * x).std())

    variance = float(x_t.var())  # the clean estimate that has the score of the law of x_t
    right = (1 - t**2 / variance) / (1 - t)
    (of_exact, noise), (of_estimate, less) = slope(exact), slope(x0_hat)
    assert math.isclose(of_exact, right, rel_tol=0.02)
    assert abs(of_estimate - right) > 0.1 and less < noise / 2


def test_each_role_is_clipped_by_its_own_norm() -> None:
    recipe = recipes.tdm_r1(rollouts=recipes.Rollouts(32, group_size=8))
    tuner = Finetuner(generator_policy(), mode_one, recipe, event_shape=(2,), length=Iterations(1))
    owned = {name: {id(p) for p in o.parameters} for name, o in tuner.optimisers.items()}
    assert set(owned) == {"fake", "surrogate", "policy"} and sum(map(len, owned.values())) == len(
        set.union(*owned.values())
    )
    for p in tuner.references.twin("fake").parameters():  # a role with an enormous gradient
        p.grad = torch.full_like(p, 1e6)
    for p in tuner.policy.parameters():
        p.grad = torch.full_like(p, 1e-3)
    tuner.optimisers["fake"].step(0.0)
    assert all(
        torch.equal(p.grad, torch.full_like(p, 1e-3)) for p in tuner.policy.parameters() if p.grad is not None
    )


def test_the_normaliser_of_each_sample_is_its_own_and_never_zero() -> None:
    D = torch.tensor([[1.0, 1.0], [5.0, 5.0]], requires_grad=True)
    d, towards = torch.ones(2, 2), torch.tensor([[0.0, 0.0], [5.0, 5.0]])
    loss = pull(D, d, towards)
    torch.testing.assert_close(loss.detach(), torch.tensor([1.0, 1 / 1e-6]))
    student, fake, teacher = (generator_policy() for _ in range(3))
    torch.manual_seed(0)
    rollout = collect_rollout(student, (2,), batch_size=8, generator=torch.Generator().manual_seed(0))
    rollout.set(keys.ADVANTAGE, torch.zeros(8, 4, 1))
    generator = torch.Generator().manual_seed(1)
    (part,) = BoundaryUpdates()(rollout, policy=student, group_size=1, generator=generator, entries=[])
    # a fake score that begins as the teacher moves nothing: warm it up, or take along that of the distillation
    out = DistillationLoss(student, fake, Teacher(teacher))(part)
    assert float(out["direction"]) == 0 and float(out["loss_policy"].detach()) == 0
