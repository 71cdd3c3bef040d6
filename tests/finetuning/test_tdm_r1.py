"""TDM-R1: each loss against its formula, groups kept whole, and a reward that rises without a gradient."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import diffrl
from diffrl import keys, recipes
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.guidance import Teacher
from diffrl.finetuning.methods.group_preference import GroupPreferenceLoss, group_sums
from diffrl.finetuning.methods.tdm import Boundary, DistillationLoss, student_step
from diffrl.finetuning.methods.tdm_r1 import LearntReward, RewardedDistillationLoss, slow_decay
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.finetuning.run_checks import check_tuner
from diffrl.finetuning.updates.boundaries import BoundaryUpdates
from diffrl.finetuning.updates.preferences import PREFERENCE, REWARD_NOISE, REWARD_T, PreferenceUpdates
from diffrl.rl.advantages import group_advantages
from diffrl.training.optim import Optim
from tests.kit.four_modes import ExactAndMore, generator_policy, mode_one

G = 4


def moved(seed: int, std: float = 0.1) -> DenoisingPolicy:
    """A generator whose network is not the exact one."""
    policy = generator_policy(seed=seed)
    nn.init.normal_(policy.denoiser.network[-1].weight, std=std)
    return policy


def minibatch(policy: DenoisingPolicy, groups: int = 3, draws: int = 2, **options: Any) -> TensorDict:
    g = torch.Generator().manual_seed(0)
    rollout = collect_rollout(policy, (2,), batch_size=groups * G, group_size=G, generator=g)
    adv = group_advantages(
        torch.randn(groups * G, generator=g), rollout.get(keys.GROUP)[:, 0, 0], std="global"
    )
    rollout.set(keys.ADVANTAGE, adv[:, None, None].expand(*rollout.shape, 1))
    plan = PreferenceUpdates(draws=draws, preference_t_min=0.0, reward_t_min=0.0, **options)
    made = {"policy": policy, "group_size": G, "generator": g, "entries": ()}
    return next(iter(plan(rollout, **made)))


def preference_loss(
    surrogate: DenoisingPolicy, other: DenoisingPolicy, **options: Any
) -> GroupPreferenceLoss:
    given = {"beta": 2.0, "clip_range": 0.0, "anchor_coef": 0.0, "runaway": None, **options}
    return GroupPreferenceLoss(surrogate, old=other, reference=other, teacher=other, **given)


# What an update is made of


def test_groups_stay_whole_and_share_time_step_and_noise() -> None:
    policy = generator_policy()
    part = minibatch(policy, groups=5, minibatches=2)
    compared = part.get(PREFERENCE)
    group = compared.get(keys.GROUP)[:, 0, 0]
    assert group.unique(return_counts=True)[1].tolist() == [G] * 3
    for entry in (keys.INDEX, keys.RENOISE_T):
        assert all(len(column.unique()) == 1 for column in compared.get(entry)[..., 0].T)  # the whole batch
    for noise in (compared.get(keys.NOISE), part.get(REWARD_NOISE)):
        for g in group.unique():
            assert (noise[group == g] == noise[group == g][:1]).all()
        assert len(noise.flatten(2)[:, 0, 0].unique()) == 3  # one for each group
    assert len(part.get(keys.NOISE)[:, 0, 0].unique()) == len(part)  # one for each row
    s = policy.grid[part.get(keys.INDEX)[..., 0] + 1]
    assert (part.get(REWARD_T)[..., 0] > s).all()


def test_later_boundaries_are_drawn_and_weighed_more() -> None:
    policy = generator_policy()
    counts = torch.zeros(4)
    rollout = collect_rollout(policy, (2,), batch_size=G, group_size=G)
    rollout.set(keys.ADVANTAGE, torch.zeros(*rollout.shape, 1))
    made = {"policy": policy, "group_size": G, "generator": torch.Generator().manual_seed(0), "entries": ()}
    for part in PreferenceUpdates(draws=4, passes=100)(rollout, **made):
        counts += torch.bincount(part.get(PREFERENCE).get(keys.INDEX)[0, :, 0], minlength=4)
    share = counts / counts.sum()
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.06)


def test_least_times_are_kept() -> None:
    policy = generator_policy()
    part = minibatch(policy)
    g = torch.Generator().manual_seed(0)
    rollout = collect_rollout(policy, (2,), batch_size=2 * G, group_size=G, generator=g)
    rollout.set(keys.ADVANTAGE, torch.zeros(*rollout.shape, 1))
    made = {"policy": policy, "group_size": G, "generator": g, "entries": ()}
    for part in PreferenceUpdates(passes=50, preference_t_min=0.55, reward_t_min=0.25)(rollout, **made):
        assert (part.get(PREFERENCE).get(keys.RENOISE_T) >= 0.55).all()
        assert (part.get(REWARD_T) >= 0.25).all()
    with pytest.raises(ValueError, match="surrogate.reference is 'slow': give 'ema' or 'frozen'"):
        LearntReward(reference="slow")
    with pytest.raises(ValueError, match="updates.reward_t_min is 1, but the first time is 1"):
        recipe = recipes.tdm_r1(updates=PreferenceUpdates(reward_t_min=1.0))
        Finetuner(generator_policy(), lambda x, c: x[:, 0], recipe, event_shape=(2,))
    with pytest.raises(ValueError, match="set rollouts.group_size"):
        recipes.tdm_r1(rollouts=recipes.Rollouts(8))
    for method in (recipes.tdm_r1, recipes.dgpo):
        with pytest.raises(ValueError, match="reads preferences, but these updates give boundaries"):
            method(updates=BoundaryUpdates())


# The surrogate


def by_hand(loss: GroupPreferenceLoss, policy: DenoisingPolicy, part: TensorDict) -> torch.Tensor:
    """(1/β) mean_g softplus(z_g), of velocities, with the factor (j+1)/K."""
    flat = part.get(PREFERENCE).reshape(-1)
    j, t = flat.get(keys.INDEX).flatten(), flat.get(keys.RENOISE_T).flatten()
    s, x_s, eps = policy.grid[j + 1], flat.get((keys.NEXT, keys.X_T)), flat.get(keys.NOISE)
    a = (1 - t) / (1 - s)
    b = (t**2 - (a * s) ** 2).sqrt()
    x_t = (a[:, None] * x_s + b[:, None] * eps).float()
    target = -x_s / (1 - s)[:, None] + eps * ((t + s**2 * a / (1 - s)) / b)[:, None]

    def error(of: DenoisingPolicy) -> torch.Tensor:
        v = (x_t - of.denoiser(x_t, t.float())) / t[:, None]
        return (v - target).square().mean(1).view(part.shape)

    adv, group = flat.get(keys.ADVANTAGE).view(part.shape), part.get(PREFERENCE).get(keys.GROUP)[:, 0, 0]
    difference = error(policy) - error(loss.__dict__["reference"]).detach()
    z = torch.stack([(adv * difference)[group == g].mean(0) for g in group.unique()]) * loss.beta
    weight = (part.get(PREFERENCE).get(keys.INDEX)[0, :, 0] + 1) / policy.num_steps
    return (weight * nn.functional.softplus(z) / loss.beta).mean()


@pytest.mark.parametrize("at_once", [1, 3, 5, 1000])
def test_the_gradient_is_that_of_the_group_bradley_terry_loss(at_once: int) -> None:
    surrogate, reference = moved(1), generator_policy()
    part, loss = minibatch(reference), preference_loss(surrogate, reference)
    parameters = list(surrogate.denoiser.network.parameters())
    expected = torch.autograd.grad(by_hand(loss, surrogate, part), parameters)
    loss.prepare(part, at_once)  # a group may be split over what is forwarded at once
    found = torch.autograd.grad(loss(part)["loss_preference"], parameters)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-3, atol=1e-6)


def test_parts_of_a_group_sum_to_the_whole() -> None:
    surrogate, reference = moved(1), generator_policy()
    part, loss = minibatch(reference), preference_loss(surrogate, reference, anchor_coef=0.1)
    loss.prepare(part, 7)
    whole = loss(part)["loss_preference"]
    rows = [loss(one)["loss_preference"] for one in part.split(1)]  # every row alone
    torch.testing.assert_close(torch.stack(rows).mean(), whole)


def test_equal_rewards_have_no_gradient_and_constants_no_effect() -> None:
    surrogate, reference = moved(1), generator_policy()
    group = torch.arange(3).repeat_interleave(G)
    values = torch.randn(3 * G, generator=torch.Generator().manual_seed(1))
    shifted = values + torch.tensor([5.0, -2.0, 100.0])[group]
    a, b = (group_advantages(v, group) for v in (values, shifted))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
    difference = torch.randn(3 * G, 1)
    torch.testing.assert_close(
        group_sums(a[:, None] * difference, group),
        group_sums(b[:, None] * difference, group),
        rtol=0,
        atol=1e-3,
    )
    part, loss = minibatch(reference), preference_loss(surrogate, reference)
    part.get(PREFERENCE).set(keys.ADVANTAGE, torch.zeros(*part.shape, 1))
    loss.prepare(part, 100)
    found = torch.autograd.grad(loss(part)["loss_preference"], surrogate.denoiser.network.parameters())
    assert all(not g.any() for g in found)


def test_at_the_reference_nothing_is_preferred_and_the_learnt_reward_is_zero() -> None:
    policy = generator_policy()
    part, same = minibatch(policy), generator_policy()
    loss = preference_loss(policy, same)
    loss.prepare(part, 100)
    assert float(loss(part)["preference"]) == 0.5
    out = student_loss(policy, fake=moved(1), surrogate=same)(part)
    assert float(out["reward_direction"]) == 0 and float(out["kl_direction"]) > 0


def test_the_trust_region_stops_what_has_gone_too_far() -> None:
    surrogate, old = moved(1, std=0.3), generator_policy()
    part = minibatch(old)
    free, clipped = preference_loss(surrogate, old), preference_loss(surrogate, old, clip_range=0.05)
    for loss in (free, clipped):
        loss.prepare(part, 100)
    flat = part.get(PREFERENCE).reshape(-1)
    b, adv = Boundary(flat, surrogate), flat.get(keys.ADVANTAGE).flatten()
    with torch.no_grad():
        rho = (free.error(old, b) - free.error(surrogate, b)).exp()
    stopped = torch.where(adv > 0, rho > 1.05, rho < 0.95)
    assert 0 < int(stopped.sum()) < len(stopped)
    torch.testing.assert_close(clipped(part)["clip_fraction"], stopped.float().mean())
    assert float(free(part)["clip_fraction"]) == 0
    kept = part.reshape(-1)[~stopped]  # the gradient is that of the others alone
    a = torch.autograd.grad(clipped(part)["loss_preference"], surrogate.denoiser.network.parameters())
    c = torch.autograd.grad(free(kept)["loss_preference"], surrogate.denoiser.network.parameters())
    for x, y in zip(a, c, strict=True):
        torch.testing.assert_close(x, y * len(kept) / len(flat), rtol=1e-4, atol=1e-7)


def test_the_guard_stops_what_has_run_away_from_the_teacher() -> None:
    surrogate, teacher = moved(1, std=1.0), generator_policy()
    part = minibatch(teacher)
    far, near = (preference_loss(surrogate, teacher, runaway=r) for r in (1e-3, 1e6))
    for loss in (far, near):
        loss.prepare(part, 100)
    assert float(far(part)["anchor"]) > 1e-3
    assert float(near(part)["clip_fraction"]) == 0 < float(far(part)["clip_fraction"]) < 1


def test_the_guard_looks_at_the_whole_update_whatever_its_parts() -> None:
    surrogate, teacher = moved(1, std=1.0), generator_policy()
    part = minibatch(teacher)
    loss = preference_loss(surrogate, teacher, runaway=None)
    loss.prepare(part, 100)
    anchors = [float(loss(row)["anchor"]) for row in part.split(4)]
    between = sum(anchors) / len(anchors)
    assert min(anchors) < between < max(anchors)
    for runaway, stops in ((0.999 * between, True), (1.001 * between, False)):
        guarded = preference_loss(surrogate, teacher, runaway=runaway)
        guarded.prepare(part, 4)
        assert [float(guarded(row)["clip_fraction"]) > 0 for row in part.split(4)] == [stops] * len(anchors)


def test_the_slow_copy_follows_as_published() -> None:
    assert [round(slow_decay(n), 6) for n in (0, 1, 9, 298, 299, 300, 10_000)] == [
        0.001, 0.002, 0.01, 0.299, 0.3, 0.3, 0.3,
    ]  # fmt: skip


# The student


def student_loss(
    student: DenoisingPolicy, *, fake: DenoisingPolicy, surrogate: DenoisingPolicy, **options: Any
) -> RewardedDistillationLoss:
    teachers = {"teacher": Teacher(generator_policy()), "surrogate": Teacher(surrogate)}
    return RewardedDistillationLoss(student, fake=fake, **teachers, **options)


def test_without_guidance_and_with_one_noise_it_distils_the_surrogate() -> None:
    student, fake, surrogate = generator_policy(), moved(1), moved(2)
    part = minibatch(student)
    part.update({REWARD_T: part.get(keys.RENOISE_T), REWARD_NOISE: part.get(keys.NOISE)})
    _, b = student_step(student, part)
    with torch.no_grad():
        D_T, D_fake, D_phi = (p.denoise(b.x_t, b.t) for p in (generator_policy(), fake, surrogate))
    d_kl, d_rl = D_T - D_fake, D_phi - D_T
    out = student_loss(student, fake=fake, surrogate=surrogate)(part)
    torch.testing.assert_close(out["kl_direction"], d_kl.square().mean().sqrt())
    torch.testing.assert_close(out["reward_direction"], d_rl.square().mean().sqrt())
    torch.testing.assert_close(d_kl + d_rl, D_phi - D_fake)
    same = DistillationLoss(student, fake, Teacher(surrogate))(part)
    torch.testing.assert_close(same["direction"], (d_kl + d_rl).square().mean().sqrt())


@pytest.mark.parametrize("truncated", [None, 2, 0])
def test_from_the_truncated_step_on_there_is_no_reward(truncated: int | None) -> None:
    student, fake, surrogate = generator_policy(), moved(1), moved(2)
    flat = minibatch(student, groups=6).reshape(-1)
    k = flat.get(keys.INDEX).flatten()
    loss = student_loss(student, fake=fake, surrogate=surrogate, truncated=truncated, tdm_weight=0.25)
    last = 4 if truncated is None else truncated
    for i in range(4):
        part = flat[k == i]
        out = loss(part)["loss_policy"]
        weights = {"tdm_weight": 0.25, "kl_weight": 1.0, "reward_weight": 0.75}
        if i >= last:
            weights |= {"kl_weight": 0.25, "reward_weight": 0.0}
        expected = student_loss(student, fake=fake, surrogate=surrogate, **weights)(part)["loss_policy"]
        torch.testing.assert_close(out, expected)


def test_no_network_but_the_student_has_a_gradient() -> None:
    student, fake, surrogate = generator_policy(), moved(1), moved(2)
    student_loss(student, fake=fake, surrogate=surrogate)(minibatch(student))["loss_policy"].backward()
    assert any(p.grad is not None for p in student.denoiser.parameters())
    assert all(p.grad is None for other in (fake, surrogate) for p in other.denoiser.parameters())


# Runs


def tuner_for(
    *,
    iterations: int = 4,
    policy: DenoisingPolicy | None = None,
    reward: Callable[..., Any] = mode_one,
    groups: int = 3,
    group_size: int = 16,
    passes: int = 1,
    micro_batch: int = 256,
    surrogate: dict[str, Any] | None = None,
    **options: Any,
) -> Finetuner:
    learnt = {
        "beta": 50.0,
        "anchor_coef": 0.3,
        "clip_range": 1e-2,
        "runaway": None,
        "surrogate_lr": 5e-4,
        "fake_lr": 2e-3,
        "fake_anchor_coef": 0.0,
        "reward_weight": 1.0,
        **(surrogate or {}),
    }
    recipe = recipes.tdm_r1(
        rollouts=recipes.Rollouts(groups * group_size, group_size=group_size),
        updates=PreferenceUpdates(
            interval="trajectory",
            draws=1,
            passes=passes,
            micro_batch=micro_batch,
            preference_t_min=0.0,
            reward_t_min=0.0,
        ),
        surrogate=LearntReward(**learnt),
    )
    optim = Optim(5e-4, betas=(0.0, 0.999), warmup_steps=0, decay="none")
    given = {"length": Iterations(iterations, checkpoint_every=iterations), "optim": optim, **options}
    return Finetuner(policy or generator_policy(), reward, recipe, event_shape=(2,), **given)


def test_the_reward_is_asked_once_a_sample_without_a_gradient() -> None:
    asked: list[int] = []

    def reward(x0: torch.Tensor, cond: Any) -> list[float]:
        assert not torch.is_grad_enabled() and not x0.requires_grad
        asked.append(len(x0))
        return mode_one(x0)

    tuner = tuner_for(reward=reward, passes=2)
    for _ in tuner.steps():
        pass
    assert sum(asked) == tuner.figures["queries"] == 4 * 48
    assert {name: o.steps for name, o in tuner.optimisers.items()} == dict.fromkeys(tuner.roles, 8)
    assert list(tuner.roles) == ["fake", "surrogate", "policy"]


def test_micro_batches_that_split_groups_change_nothing() -> None:
    one, many = tuner_for(micro_batch=1000), tuner_for(micro_batch=10)
    for tuner in (one, many):
        for _ in tuner.steps():
            pass
    for name in one.roles:
        pairs = zip(one.roles[name].module.parameters(), many.roles[name].module.parameters(), strict=True)
        assert all(torch.allclose(a, b, rtol=0, atol=2e-5) for a, b in pairs), name


@pytest.mark.parametrize("reference", ["ema", "frozen"])
def test_a_stopped_run_ends_as_one_that_was_not(reference: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"surrogate": {"reference": reference}, "teacher": ExactAndMore(diffrl.Flow())}
    whole = tuner_for(policy=moved(3), **options)
    check_tuner(whole)
    rows = list(whole.steps())
    assert {"surrogate/preference", "surrogate/anchor", "kl_direction", "reward_direction"} <= rows[-1].keys()
    part = tuner_for(policy=moved(3), folder=tmp_path, **options)
    assert not part.fit(stop=lambda: part.step == 2, progress=False)
    rest = tuner_for(policy=moved(3), folder=tmp_path, **options)
    assert rest.resume()
    rest.fit(progress=False)
    for name in ("fake", "surrogate", "slow"):
        pairs = zip(
            whole.references.twin(name).parameters(), rest.references.twin(name).parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs), name
    assert all(
        torch.equal(a, b) for a, b in zip(whole.policy.parameters(), rest.policy.parameters(), strict=True)
    )
    assert whole.figures["network_evaluations"] == rest.figures["network_evaluations"]


def test_twins_begin_as_the_teacher_and_not_as_the_student() -> None:
    teacher = ExactAndMore(diffrl.Flow())
    tuner = tuner_for(policy=moved(3), teacher=copy.deepcopy(teacher))
    for name in ("fake", "surrogate", "slow"):
        twin = tuner.references.twin(name).denoiser
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), teacher.parameters(), strict=True))
        assert all(p.requires_grad for p in twin.parameters())
