"""TDM: losses against their formulas, and generators of few steps that beat their teacher's own few steps."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

import diffrl
from diffrl import keys, recipes
from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.guidance import GuidedDenoiser
from diffrl.diffusion.step_counts import StepConditioned
from diffrl.errors import InputError, InputTypeError
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.guidance import Teacher
from diffrl.finetuning.methods.tdm import (
    DistillationLoss,
    FakeScoreLoss,
    TrajectoryMatching,
    pull,
    student_step,
)
from diffrl.finetuning.methods.tdm_r1 import LearntReward
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.finetuning.run_checks import check_tuner
from diffrl.finetuning.updates.boundaries import BoundaryUpdates
from diffrl.metrics.point_clouds import sliced_w2
from diffrl.training.optim import Optim
from tests.kit.four_modes import MIXTURE, generator_policy, on_modes, samples_of
from tests.kit.policies import make_policy


def never(x0: Any, cond: Any) -> Any:
    raise AssertionError("a method without a reward asked for one")


def boundaries(policy: DenoisingPolicy, n: int = 6, **options: Any) -> TensorDict:
    """A minibatch of boundaries."""
    g = torch.Generator().manual_seed(0)
    rollout = collect_rollout(policy, (2,), batch_size=n, generator=g)
    rollout.set(keys.ADVANTAGE, torch.zeros(*rollout.shape, 1))
    made = {"policy": policy, "group_size": 1, "generator": g, "entries": ()}
    return next(iter(BoundaryUpdates(**options)(rollout, **made)))


def exact_policy(mean: list[float], num_steps: int = 3) -> DenoisingPolicy:
    exact = GaussianDenoiser(diffrl.Flow(), torch.tensor(mean), 0.3 * torch.eye(2))
    return DenoisingPolicy(exact, diffrl.DDIM(), num_steps=num_steps, reduction="mean")


# Boundaries


@pytest.mark.parametrize("interval", ["trajectory", "reverse"])
@pytest.mark.parametrize("draws", [1, 4])
def test_every_trajectory_is_at_so_many_different_steps(interval: Any, draws: int) -> None:
    policy = generator_policy()
    part = boundaries(policy, n=200, interval=interval, draws=draws)
    k = part.get(keys.INDEX)[..., 0]
    assert k.shape == (200, draws) and k.unique().tolist() == [0, 1, 2, 3]
    assert all(len(set(row.tolist())) == draws for row in k)
    t, s = part.get(keys.RENOISE_T)[..., 0], policy.grid[k + 1]
    assert (t > s).all() and (t <= (policy.grid[k] if interval == "trajectory" else 1)).all()
    assert interval == "trajectory" or bool((t > policy.grid[k]).any())
    rollout_x = part.get((keys.NEXT, keys.X_T))
    law = policy.law_of_estimate(
        part.get(keys.X_T).flatten(0, 1), k.flatten(), part.get(keys.X0_HAT).flatten(0, 1)
    )
    torch.testing.assert_close(law.mean, rollout_x.flatten(0, 1))


def test_passes_and_minibatches_hold_every_trajectory() -> None:
    policy = generator_policy()
    g = torch.Generator().manual_seed(0)
    rollout = collect_rollout(policy, (2,), batch_size=9, generator=g)
    made = {"policy": policy, "group_size": 1, "generator": g, "entries": ()}
    plan = BoundaryUpdates(minibatches=2, passes=3)
    parts = list(plan(rollout, **made))
    assert [len(p) for p in parts] == [5, 4] * 3 and plan.count(4) == 6
    for first, second in zip(parts[::2], parts[1::2], strict=True):
        assert sorted([*first.get(keys.GROUP).flatten(), *second.get(keys.GROUP).flatten()]) == list(range(9))


def test_a_teacher_and_twins_that_cannot_be_are_refused() -> None:
    policy = generator_policy()
    other = make_policy(diffrl.DDIM(), std_floor=0.0).denoiser
    assert repr(other.process) != repr(policy.process)
    for given, says in (
        ({"teacher": "base"}, "teacher is a str: give a denoiser"),
        ({"teacher": policy}, "teacher is a DenoisingPolicy: give a denoiser"),
        ({"teacher": other}, r"teacher has the process EDM\(.*but the policy"),
        ({"twins": policy.denoiser}, "twins is a .*: give denoisers by name"),
        ({"twins": {"fake": None}}, r"twins\['fake'\] is a NoneType: give a denoiser"),
        ({"twins": {"fake": other}}, r"twins\['fake'\] has the process EDM"),
        ({"twins": {"fak": policy.denoiser}}, "twins has fak, but what is trained is fake"),
    ):
        with pytest.raises((InputError, InputTypeError), match=says):
            Finetuner(policy, never, recipes.tdm(), event_shape=(2,), **given)


def test_a_stochastic_policy_and_too_many_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="the generator must be deterministic"):
        Finetuner(make_policy(), never, recipes.tdm(), event_shape=(2,))
    with pytest.raises(ValueError, match="updates.draws is 5, but the policy has 4 steps"):
        Finetuner(generator_policy(), never, recipes.tdm(updates=BoundaryUpdates(draws=5)), event_shape=(2,))
    with pytest.raises(ValueError, match="set updates.passes to surrogate.fake_updates"):
        recipes.tdm(surrogate=TrajectoryMatching(fake_updates=2))


def test_estimates_are_noised_over_the_whole_range_whatever_the_sampler() -> None:
    policy = generator_policy()
    stochastic = DenoisingPolicy(policy.denoiser, diffrl.CPS(1.0), num_steps=4, reduction="mean")
    assert stochastic.stochastic_steps
    part = boundaries(stochastic, n=300, of="estimate")
    assert torch.equal(part.get((keys.NEXT, keys.X_T)), part.get(keys.X0_HAT))
    t = part.get(keys.RENOISE_T)
    assert (
        not part.get((keys.NEXT, keys.T)).any()
        and 0.02 <= float(t.min()) < 0.1
        and 0.9 < float(t.max()) <= 0.98
    )
    flat = part.reshape(-1)
    x_t = (1 - flat.get(keys.RENOISE_T)) * flat.get(keys.X0_HAT) + flat.get(keys.RENOISE_T) * flat.get(
        keys.NOISE
    )
    D, b = student_step(stochastic, part)
    torch.testing.assert_close(D.detach(), flat.get(keys.X0_HAT))
    torch.testing.assert_close(b.x_t, x_t.float())
    both = [FakeScoreLoss(stochastic, fake_target=kind)(part)["loss_fake"] for kind in ("dsm", "x0")]
    torch.testing.assert_close(*both)  # of clean boundaries the two targets are one


# Losses


def test_the_fake_score_learns_the_exact_target_or_the_students_estimate() -> None:
    policy = generator_policy()
    part = boundaries(policy, draws=2)
    flat = part.reshape(-1)
    k, t = flat.get(keys.INDEX).flatten(), flat.get(keys.RENOISE_T).flatten()
    s, x_s, eps = policy.grid[k + 1], flat.get((keys.NEXT, keys.X_T)), flat.get(keys.NOISE)
    a = (1 - t) / (1 - s)
    b = (t**2 - (a * s) ** 2).sqrt()
    x_t = (a[:, None] * x_s + b[:, None] * eps).float()
    v = (x_t - policy.denoiser(x_t, t.float())) / t[:, None]
    # the published form: unit noise times the squared error of velocities
    target = -x_s / (1 - s)[:, None] + eps * ((t + s**2 * a / (1 - s)) / b)[:, None]
    lam = (b / (t + s**2 * a / (1 - s))) ** 2
    expected = (lam[:, None] * (v - target).square()).mean()
    found = FakeScoreLoss(policy, fake_target="dsm")(part)["loss_fake"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    expected = (v - (x_t - flat.get(keys.X0_HAT)) / t[:, None]).square().mean()
    found = FakeScoreLoss(policy, fake_target="x0")(part)["loss_fake"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_the_anchor_of_the_fake_score_is_its_distance_to_the_teacher() -> None:
    policy, other = generator_policy(), generator_policy(seed=1)
    torch.nn.init.normal_(other.denoiser.network[-1].weight, std=0.1)
    part, teacher = boundaries(policy), Teacher(policy)
    plain = FakeScoreLoss(other, fake_target="x0")(part)["loss_fake"]
    held = FakeScoreLoss(other, teacher, fake_target="x0", anchor_coef=0.5)(part)["loss_fake"]
    same = FakeScoreLoss(policy, teacher, fake_target="x0", anchor_coef=0.5)(part)["loss_fake"]
    assert held > plain
    torch.testing.assert_close(same, FakeScoreLoss(policy, fake_target="x0")(part)["loss_fake"])


def test_the_direction_is_the_difference_of_scores() -> None:
    student, fake, teacher = exact_policy([0.0, 0.0]), exact_policy([0.5, 0.0]), exact_policy([0.0, 1.0])
    part = boundaries(student)
    flat = part.reshape(-1)
    k, t = flat.get(keys.INDEX).flatten(), flat.get(keys.RENOISE_T).flatten()
    s = student.grid[k + 1]
    a = (1 - t) / (1 - s)
    b = (t**2 - (a * s) ** 2).sqrt()
    x_t = a[:, None] * flat.get((keys.NEXT, keys.X_T)) + b[:, None] * flat.get(keys.NOISE)
    variance = ((1 - t) ** 2 * 0.3 + t**2)[:, None]

    def score(mean: list[float]) -> torch.Tensor:
        return -(x_t - (1 - t)[:, None] * torch.tensor(mean)) / variance

    d = (t**2 / (1 - t))[:, None] * (score([0.0, 1.0]) - score([0.5, 0.0]))
    found = DistillationLoss(student, fake, Teacher(teacher))(part)["direction"]
    torch.testing.assert_close(found.double(), d.square().mean().sqrt(), rtol=1e-4, atol=0)


def test_the_students_gradient_points_along_d_and_no_other_network_has_one() -> None:
    D = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    d, towards = torch.randn(5, 2, 3).double(), torch.randn(5, 2, 3).double()
    (gradient,) = torch.autograd.grad(pull(D, d, towards).sum(), D)
    c = (D.detach() - towards).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(gradient, -2 * d / c / 6)
    h = 0.01
    (huber,) = torch.autograd.grad(pull(D, d, towards, h).sum(), D)
    torch.testing.assert_close(huber, -d / (d.square() + h**2).sqrt() / c / 6)
    assert torch.equal(pull(D, torch.zeros_like(d), D.detach()), torch.zeros(5).double())  # no 0/0

    student, fake, teacher = (generator_policy() for _ in range(3))
    torch.nn.init.normal_(fake.denoiser.network[-1].weight, std=0.1)
    DistillationLoss(student, fake, Teacher(teacher))(boundaries(student))["loss_policy"].backward()
    assert all(p.grad is not None for p in student.denoiser.parameters())
    others = [*fake.denoiser.parameters(), *teacher.denoiser.parameters()]
    assert all(p.grad is None for p in others)
    assert not dict(DistillationLoss(student, fake, Teacher(teacher)).named_modules()).keys() & {"fake"}


@pytest.mark.parametrize("method", ["tdm", "tdm_r1", "dgpo", "awm", "diffusion_nft"])
def test_a_guided_model_can_be_tuned(method: str) -> None:
    labelled = make_policy(diffrl.DDIM(), num_classes=3, std_floor=0.0).denoiser
    guided = StepConditioned(GuidedDenoiser(labelled, 3, 2.0), [2])
    policy = DenoisingPolicy(guided, diffrl.DDIM(), num_steps=2, reduction="mean")
    recipe = getattr(recipes, method)(rollouts=recipes.Rollouts(8, group_size=4))
    tuner = Finetuner(
        policy,
        lambda x, c: x[:, 0],
        recipe,
        event_shape=(2,),
        conditions=torch.arange(3),
        length=Iterations(1),
    )
    (row,) = tuner.steps()
    assert math.isfinite(row["grad_norm"]) and tuner.updates > 0


def test_guidance_strengthens_the_condition() -> None:
    policy = make_policy(diffrl.DDIM(), num_classes=3, std_floor=0.0)
    x, t, c = torch.randn(5, 2), torch.full((5,), 2.0), torch.tensor([0, 1, 2, 0, 1])
    D_c, D_0 = policy.denoiser(x, t, c), policy.denoiser(x, t, torch.full_like(c, 3))
    torch.testing.assert_close(Teacher(policy, 4.5)(x, t, c), D_c + 3.5 * (D_c - D_0))
    guided = GuidedDenoiser(policy.denoiser, 3, 4.5)
    torch.testing.assert_close(Teacher(policy, 4.5)(x, t, c), guided(x, t, c))
    assert torch.equal(Teacher(policy)(x, t, c), D_c)
    with pytest.raises(ValueError, match="guidance needs conditions"):
        Teacher(policy, 2.0)(x, t, None)
    for recipe in (
        recipes.tdm(surrogate=TrajectoryMatching(guidance_scale=2.0)),
        recipes.tdm_r1(surrogate=LearntReward(guidance_scale=2.0)),
        recipes.tdm_r1(surrogate=LearntReward(surrogate_guidance=2.0)),
    ):
        with pytest.raises(ValueError, match="guidance_scale is 2, but the model has no conditions"):
            Finetuner(policy, lambda x, cond: x[:, 0], recipe, event_shape=(2,))
    with pytest.raises(ValueError, match="takes no labels"):
        make_policy(diffrl.DDIM(), std_floor=0.0).denoiser.null_condition(c)
    with pytest.raises(ValueError, match="no condition to leave out"):
        Teacher(generator_policy(), 2.0)


# Runs


def distilled(
    policy: DenoisingPolicy, *, iterations: int, passes: int = 3, minibatches: int = 1, **options: Any
) -> Finetuner:
    """A run in which every update has 256 trajectories; with minibatches they are new to each."""
    updates = passes * minibatches
    matching = {
        "fake_updates": updates,
        "fake_lr": 2e-3,
        "betas": (0.9, 0.99),
        **options.pop("surrogate", {}),
    }
    recipe = recipes.tdm(
        rollouts=recipes.Rollouts(256 * minibatches),
        updates=BoundaryUpdates(passes=passes, minibatches=minibatches),
        surrogate=TrajectoryMatching(**matching),
    )
    optim = Optim(1e-3, betas=(0.9, 0.99), warmup_steps=0, decay="none")
    given = {"length": Iterations(iterations, checkpoint_every=iterations), "optim": optim, **options}
    tuner = Finetuner(policy, never, recipe, event_shape=(2,), **given)
    check_tuner(tuner)
    return tuner


def test_a_run_asks_no_reward_counts_every_network_and_resumes_exactly(tmp_path: Path) -> None:
    whole = distilled(generator_policy(), iterations=6, passes=2)
    rows = list(whole.steps())
    assert whole.figures["queries"] == 0 and whole.updates == 6
    assert {name: o.steps for name, o in whole.optimisers.items()} == {"fake": 12, "policy": 6}
    # rollout, two fake scores, the student's step; teacher and fake score of its direction
    assert whole.figures["network_evaluations"] == 6 * 256 * (4 + 2 + 1 + 2)
    assert all({"fake/loss_fake", "loss_policy", "direction"} <= row.keys() for row in rows)
    part = distilled(generator_policy(), iterations=6, passes=2, folder=tmp_path)
    assert not part.fit(stop=lambda: part.step == 3, progress=False)
    rest = distilled(generator_policy(), iterations=6, passes=2, folder=tmp_path)
    assert rest.resume()
    rest.fit(progress=False)
    for a, b in zip(
        [*whole.policy.parameters(), *whole.references.twin("fake").parameters()],
        [*rest.policy.parameters(), *rest.references.twin("fake").parameters()],
        strict=True,
    ):
        assert torch.equal(a, b)
    assert rest.figures["network_evaluations"] == whole.figures["network_evaluations"]


@pytest.mark.slow
def test_dmd2_improves_on_the_teachers_stochastic_steps() -> None:
    start = generator_policy()
    policy = DenoisingPolicy(start.denoiser, diffrl.CPS(1.0), num_steps=4, reduction="mean")
    matching = TrajectoryMatching(fake_updates=5, fake_lr=2e-3, betas=(0.9, 0.99))
    recipe = recipes.dmd2(surrogate=matching)
    optim = Optim(1e-3, betas=(0.9, 0.99), warmup_steps=0, decay="none")
    tuner = Finetuner(policy, never, recipe, event_shape=(2,), length=Iterations(300), optim=optim)
    check_tuner(tuner)

    def quality(of: DenoisingPolicy) -> float:
        g = torch.Generator().manual_seed(1)
        return on_modes(
            collect_rollout(of, (2,), batch_size=4000, generator=g).get((keys.NEXT, keys.X_T))[:, -1]
        )

    before = quality(tuner.base)
    for _ in tuner.steps():
        pass
    assert quality(policy) > before + 0.02


@pytest.mark.parametrize(
    ("fake_target", "least", "iterations", "minibatches"),  # the teacher itself: 0.896
    [
        pytest.param("x0", 0.93, 600, 1, marks=pytest.mark.soak),
        pytest.param("dsm", 0.915, 1200, 3, marks=pytest.mark.soak),
    ],
)
def test_four_steps_are_at_least_as_near_to_the_data_as_the_teachers_four(
    fake_target: str, least: float, iterations: int, minibatches: int
) -> None:
    found = []
    for seed in range(3):
        tuner = distilled(
            generator_policy(seed=seed),
            iterations=iterations,
            passes=3 // minibatches,
            minibatches=minibatches,
            seed=seed,
            surrogate={"fake_target": fake_target},
        )
        for _ in tuner.steps():
            pass
        found.append(on_modes(samples_of(tuner.policy)))
    teacher = on_modes(samples_of(tuner.base))
    assert 0.88 < teacher < 0.92 and sorted(found)[1] >= least, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "num_steps"), [(diffrl.Flow(), 1), (diffrl.Flow(), 2), (diffrl.VP(), 1), (diffrl.EDM(), 1)]
)
def test_students_of_few_steps_are_nearer_to_the_data_than_their_teacher(
    process: Any, num_steps: int
) -> None:
    tuner = distilled(generator_policy(process, num_steps), iterations=200, passes=1, minibatches=3)
    for _ in tuner.steps():
        pass
    data = MIXTURE.sample(4000, torch.Generator().manual_seed(0))
    student, teacher = (
        sliced_w2(samples_of(policy), data, projections=50) for policy in (tuner.policy, tuner.base)
    )
    assert student < 0.6 * teacher
