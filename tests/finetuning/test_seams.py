"""Every seam of fine-tuning, used by a small method that learns: a number moves, and a resumed run ends the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.objectives.common import LossModule

import diffrl
from diffrl import keys, recipes
from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.ddpo import DDPOLoss, PPOClip
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.placement.dense import Dense
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.rollouts.base import RolloutPlan
from diffrl.finetuning.rollouts.chains import Rollouts, Start, collect_rollout
from diffrl.finetuning.run_checks import check_tuner
from diffrl.finetuning.surrogate import Role, Surrogate
from diffrl.finetuning.updates.samples import SampleUpdates
from diffrl.finetuning.updates.steps import Updates
from diffrl.rl.advantages import group_advantages
from diffrl.training.optim import Optim
from tests.kit.policies import make_policy, right


def tuned(recipe: Recipe, policy: DenoisingPolicy | None = None, **options: Any) -> Finetuner:
    given = {"length": Iterations(15, checkpoint_every=5), "optim": Optim(3e-3, warmup_steps=0), **options}
    tuner = Finetuner(policy or make_policy(), right, recipe, event_shape=(2,), **given)
    check_tuner(tuner)
    return tuner


def gain(tuner: Finetuner) -> float:
    """Rise of the mean reward, over the first and the last three rollouts."""
    rewards = [figures["reward"] for figures in tuner.steps()]
    return sum(rewards[-3:]) / 3 - sum(rewards[:3]) / 3


MANY = Rollouts(trajectories=64)
OFTEN = Updates(minibatches=4)


# Samples instead of steps: a deterministic sampler is tuned


class MatchingLoss(LossModule):
    """mean adv ‖D(x_t) - x_K‖²: samples of a high advantage are denoised towards, others away from."""

    in_keys: ClassVar[list[str]] = [keys.X_T, keys.T, keys.X0, keys.ADVANTAGE]
    out_keys: ClassVar[list[str]] = ["loss_policy"]

    def __init__(self, policy: DenoisingPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        x_t, t, x0, adv = (tensordict.reshape(-1).get(key) for key in self.in_keys)
        error = (self.policy.denoiser(x_t, t.flatten(), None) - x0).square().mean(1)
        return TensorDict({"loss_policy": (adv.flatten().clamp(-1, 1) * error).mean()})


@dataclass(frozen=True)
class Matching(Surrogate):
    reads: ClassVar[Any] = "samples"

    def loss(self, setting: Setting) -> MatchingLoss:
        return MatchingLoss(setting.policy)


@pytest.mark.parametrize("sampler", [diffrl.DDIM(0.0), diffrl.DDIM(1.0)], ids=["deterministic", "stochastic"])
@pytest.mark.parametrize("times", ["uniform", "log_normal"])
def test_samples_are_trained_on_whatever_the_sampler(sampler: Any, times: Any) -> None:
    policy = make_policy(sampler, std_floor=0.0, num_steps=6)
    updates = SampleUpdates(times, draws=2, minibatches=2)
    recipe = recipes.ddpo_is(rollouts=MANY, updates=updates, surrogate=Matching())
    tuner = tuned(recipe, policy, length=Iterations(15), optim=Optim(1e-2, warmup_steps=0))
    assert gain(tuner) > 0.05 and tuner.updates == 15 * updates.count(0)


def test_minibatches_of_samples_hold_every_sample_at_fresh_times() -> None:
    policy = make_policy(diffrl.DDIM(0.0), std_floor=0.0)
    recipe = recipes.ddpo_is(
        rollouts=Rollouts(8), updates=SampleUpdates(draws=3, minibatches=2), surrogate=Matching()
    )
    tuner = Finetuner(policy, right, recipe, event_shape=(2,))
    rollout = tuner.collect(torch.Generator().manual_seed(0))
    made = {"policy": policy, "group_size": 1, "entries": MatchingLoss.in_keys}
    parts = list(recipe.updates(rollout, generator=torch.Generator().manual_seed(0), **made))
    assert [part.shape for part in parts] == [(4, 3), (4, 3)]
    x0 = torch.cat([part.get(keys.X0)[:, 0] for part in parts])
    samples = rollout.get((keys.NEXT, keys.X_T))[:, -1]
    assert sorted(x0.tolist()) == sorted(samples.tolist())
    everything: Any = torch.cat([part.reshape(-1) for part in parts])
    assert len(everything.get(keys.T).unique()) == 24
    # x_t = x0 + σ ε with ε of unit variance: EDM has α = 1
    eps = (everything.get(keys.X_T) - everything.get(keys.X0)) / everything.get(keys.T)
    assert 0.6 < float(eps.std()) < 1.4


def test_samples_take_no_dense_rewards_and_steps_no_deterministic_policy() -> None:
    options = {"rollouts": MANY, "surrogate": Matching(), "updates": SampleUpdates()}
    with pytest.raises(ValueError, match="take placement terminal"):
        recipes.sdpo(**{**options, "rollouts": Rollouts(8)})
    with pytest.raises(ValueError, match="reads samples, but these updates give steps: set updates=samples"):
        recipes.ddpo_is(**{**options, "updates": Updates()})
    with pytest.raises(ValueError, match="no step of the policy is stochastic"):
        Finetuner(make_policy(diffrl.DDIM(0.0), std_floor=0.0), right, recipes.ddpo_is(), event_shape=(2,))


# Noise that is masked


def test_only_masked_steps_have_noise_and_are_trained() -> None:
    policy = make_policy(noise_steps=[1, 2])
    assert policy.stochastic_steps == [1, 2]
    td = collect_rollout(policy, (2,), batch_size=3, generator=torch.Generator().manual_seed(0))
    assert td.get(keys.TRAINABLE)[..., 0].tolist() == [[False, True, True, False]] * 3
    tuner = tuned(recipes.ddpo_is(rollouts=MANY, updates=OFTEN), policy)
    assert gain(tuner) > 0.1


@dataclass(frozen=True)
class OneNoisyStep(RolloutPlan):
    """Each trajectory has noise at one step of its own."""

    trajectories: int = 64

    def collect(self, policy: DenoisingPolicy, event_shape: Any, **options: Any) -> TensorDict:
        n, generator = options.pop("trajectories"), options["generator"]
        step = torch.randint(policy.num_steps, (n, 1), generator=generator)
        mask = step == torch.arange(policy.num_steps)
        return collect_rollout(policy, event_shape, batch_size=n, stochastic=mask, **options)


@pytest.mark.parametrize("order", ["trajectory", "step"])
def test_trained_steps_may_differ_by_trajectory(order: Any) -> None:
    recipe = recipes.ddpo_is(rollouts=OneNoisyStep(), updates=Updates(order, minibatches=4))
    policy = make_policy()
    td = recipe.rollouts.collect(
        policy, (2,), trajectories=64, cond=None, generator=torch.Generator(), device=torch.device("cpu")
    )
    trainable = td.get(keys.TRAINABLE)[..., 0]
    assert (trainable.sum(1) == 1).all() and (trainable.sum(0) > 4).all()
    assert gain(tuned(recipe, policy)) > 0.05


# A start on the way


@dataclass(frozen=True)
class Renoised(RolloutPlan):
    """Chains that begin at step 2, at noised samples of the policy."""

    trajectories: int = 64

    def collect(self, policy: DenoisingPolicy, event_shape: Any, **options: Any) -> TensorDict:
        n = options.pop("trajectories")
        x0 = collect_rollout(policy, event_shape, batch_size=n, **options).get((keys.NEXT, keys.X_T))[:, -1]
        x_t = x0 + policy.grid[2].float() * torch.randn(x0.shape, generator=options["generator"])
        return collect_rollout(policy, event_shape, batch_size=n, start=Start(x_t, 2), **options)


def test_a_rollout_may_start_on_the_way() -> None:
    policy = make_policy()
    x, g = torch.randn(5, 2), torch.Generator()
    td = collect_rollout(policy, (2,), batch_size=5, start=Start(x, 2), generator=g.manual_seed(0))
    assert td.shape == (5, 2) and torch.equal(td.get(keys.X_T)[:, 0], x)
    assert td.get(keys.INDEX)[0, :, 0].tolist() == [2, 3]
    torch.testing.assert_close(td.get(keys.T)[0, :, 0].double(), policy.grid[2:4], rtol=1e-6, atol=0)
    law = policy.law(x, torch.full((5,), 2))
    z = torch.randn(5, 2, generator=g.manual_seed(0))
    torch.testing.assert_close(td.get(keys.ACTION)[:, 0], law.mean + law.std[:, None] * z)
    assert gain(tuned(recipes.ddpo_is(rollouts=Renoised(), updates=OFTEN), policy)) > 0.05
    with pytest.raises(ValueError, match=r"start.step is 4: the policy's steps are 0\.\.3"):
        collect_rollout(policy, (2,), batch_size=5, start=Start(x, 4))
    with pytest.raises(ValueError, match="start.x_t has shape"):
        collect_rollout(policy, (2,), batch_size=4, start=Start(x, 1))
    with pytest.raises(ValueError, match="stochastic has shape"):
        mask = torch.ones(5, 4, dtype=torch.bool)
        collect_rollout(policy, (2,), batch_size=5, start=Start(x, 2), stochastic=mask)


# Rollouts that keep the gradient


@dataclass(frozen=True)
class Differentiable(RolloutPlan):
    trajectories: int = 32

    def collect(self, policy: DenoisingPolicy, event_shape: Any, **options: Any) -> TensorDict:
        n = options.pop("trajectories")
        return collect_rollout(policy, event_shape, batch_size=n, keep_gradient=True, **options)


class AscentLoss(LossModule):
    """-R(x_K), through the whole chain."""

    in_keys: ClassVar[list[Any]] = [(keys.NEXT, keys.X_T), keys.TRAINABLE]
    out_keys: ClassVar[list[str]] = ["loss_policy"]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        return TensorDict({"loss_policy": -right(tensordict.get((keys.NEXT, keys.X_T))[:, -1]).mean()})


@dataclass(frozen=True)
class Ascent(Surrogate):
    on_policy: ClassVar[bool] = True

    def loss(self, setting: Setting) -> AscentLoss:
        return AscentLoss()


def test_a_reward_with_a_gradient_is_climbed_through_the_chain() -> None:
    policy = make_policy()
    td = collect_rollout(policy, (2,), batch_size=4, keep_gradient=True, generator=torch.Generator())
    last = td.get((keys.NEXT, keys.X_T))[:, -1]
    assert last.requires_grad
    assert not collect_rollout(policy, (2,), batch_size=4).get(keys.ACTION).requires_grad
    # steps of a trajectory are one update, unshuffled in what the loss reads: the last column is the last step
    updates = Updates(minibatches=1, last=1)
    recipe = recipes.ddpo_is(rollouts=Differentiable(), updates=updates, surrogate=Ascent())
    tuner = Finetuner(policy, right, recipe, event_shape=(2,), length=Iterations(15), optim=Optim(3e-3))
    assert gain(tuner) > 0.1


# References, whatever the KL weight


class TowardsLoss(DDPOLoss):
    """DDPO and a pull of the mean towards another copy of the policy."""

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        out = super().forward(tensordict)
        return out.set("loss_pull", out.pop("kl"))


@dataclass(frozen=True)
class Pulled(Surrogate):
    kind: str = "old"

    def loss(self, setting: Setting) -> DDPOLoss:
        return DDPOLoss(setting.policy, clip_range=0.01, reference=setting.reference(self.kind), kl_coef=0.1)


@pytest.mark.parametrize("kind", ["frozen", "old", "ema"])
def test_a_surrogate_may_ask_for_a_reference_without_a_kl_weight(kind: str, tmp_path: Path) -> None:
    def recipe() -> Recipe:  # each run has a credit of its own
        kl = Regulariser(decay=0.5)
        return recipes.ddpo_is(rollouts=MANY, updates=OFTEN, surrogate=Pulled(kind), regulariser=kl)

    tuner = tuned(recipe(), folder=tmp_path)
    start = [p.detach().clone() for p in tuner.policy.denoiser.parameters()]
    steps = tuner.steps()
    next(steps)
    after_one = [p.detach().clone() for p in tuner.policy.denoiser.parameters()]
    copies = list(tuner.references(kind).denoiser.parameters())
    between = [0.5 * a + 0.5 * b for a, b in zip(start, after_one, strict=True)]
    for copy, expected in zip(copies, between if kind == "ema" else start, strict=True):
        torch.testing.assert_close(copy.detach(), expected)
    next(steps)  # the second rollout was collected by the policy after one iteration
    expected = {"frozen": start, "old": after_one}.get(kind, [])
    for copy, theirs in zip(copies, expected, strict=False):
        torch.testing.assert_close(copy.detach(), theirs)
    assert tuner.figures["network_evaluations"] > tuner.policy.nfe
    for _ in steps:
        pass
    again = tuned(recipe(), folder=tmp_path)
    assert again.resume() and again.figures == tuner.figures
    for a, b in zip(again.references(kind).denoiser.parameters(), copies, strict=True):
        # "old" is taken anew from the policy before its next use
        assert kind == "old" or torch.equal(a, b)


# Several trained roles


class BaselineLoss(LossModule):
    """(b - R)²: a network that learns the advantage of a state."""

    in_keys: ClassVar[list[str]] = [keys.X_T, keys.ADVANTAGE]
    out_keys: ClassVar[list[str]] = ["loss_baseline"]

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        steps = tensordict.reshape(-1)
        error = self.network(steps.get(keys.X_T))[:, 0] - steps.get(keys.ADVANTAGE).flatten()
        return TensorDict({"loss_baseline": error.square().mean()})


@dataclass(frozen=True)
class WithBaseline(PPOClip):
    def roles(self, setting: Setting) -> dict[str, Role]:
        torch.manual_seed(setting.seed)
        network = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1))
        optim = Optim(lr=1e-2, warmup_steps=0, clip_norm=None)
        return {"baseline": Role(network, BaselineLoss(network), optim, repeats=2), **super().roles(setting)}


def test_roles_have_optimisers_of_their_own_and_one_checkpoint(tmp_path: Path) -> None:
    recipe = recipes.ddpo_is(rollouts=MANY, updates=OFTEN, surrogate=WithBaseline())
    tuner = tuned(recipe, folder=tmp_path / "whole")
    rows = list(tuner.steps())
    losses = [row["baseline/loss_baseline"] for row in rows]
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])  # it has learnt
    assert sum(r["reward"] for r in rows[-3:]) > sum(r["reward"] for r in rows[:3]) + 0.2
    counts = {name: optimiser.steps for name, optimiser in tuner.optimisers.items()}
    assert counts == {"baseline": 2 * 15 * 4, "policy": 15 * 4}
    assert {row["baseline/grad_norm"] > 0 for row in rows} == {True}

    # stopped after seven iterations, and continued
    part = tuned(
        recipes.ddpo_is(rollouts=MANY, updates=OFTEN, surrogate=WithBaseline()), folder=tmp_path / "part"
    )
    assert not part.fit(stop=lambda: part.step == 7, progress=False)
    rest = tuned(
        recipes.ddpo_is(rollouts=MANY, updates=OFTEN, surrogate=WithBaseline()), folder=tmp_path / "part"
    )
    assert rest.resume() and rest.step == 7
    rest.fit(progress=False)
    for name in tuner.roles:
        pairs = zip(tuner.roles[name].module.parameters(), rest.roles[name].module.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# Groups, step by step


def test_steps_are_compared_with_the_same_steps_of_their_group() -> None:
    credit = GroupRelative(of="step", std="group")
    group = torch.arange(3).repeat_interleave(4)
    rollout = TensorDict({keys.GROUP: group[:, None, None].expand(12, 5, 1)}, [12, 5])
    r = torch.randn(12, 5, 1, generator=torch.Generator().manual_seed(0))
    adv = credit(rollout, r)
    for g in range(3):
        for i in range(5):
            own = r[group == g, i, 0]
            expected = (own - own.mean()) / (own.std(correction=0) + 1e-4)
            torch.testing.assert_close(adv[group == g, i, 0], expected)
    torch.testing.assert_close(adv[..., 0], group_advantages(r[..., 0], group))
    assert credit.takes_dense and not GroupRelative().takes_dense

    plan = Rollouts(64, group_size=8)
    options = {"rollouts": plan, "placement": Dense("all", timing="next"), "updates": OFTEN}
    assert gain(tuned(recipes.ddpo_is(credit=credit, **options))) > 0.1
    with pytest.raises(ValueError, match="one advantage, so dense rewards would only be summed"):
        recipes.ddpo_is(credit=GroupRelative(), **options)
    with pytest.raises(ValueError, match="at least 2: set rollouts.group_size"):
        recipes.ddpo_is(credit=credit, **{**options, "rollouts": MANY})
