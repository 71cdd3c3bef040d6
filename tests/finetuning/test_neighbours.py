"""Neighbouring methods: where they coincide, by how much they differ, and the published numbers of each recipe."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import diffrl
from diffrl import keys, recipes
from diffrl.diffusion.renoising import renoise
from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.credit.preference import Preference
from diffrl.finetuning.finetuner import Finetuner
from diffrl.finetuning.guidance import Teacher
from diffrl.finetuning.methods.awm import AdvantageWeightedMatching, AWMLoss
from diffrl.finetuning.methods.d3po import D3PO, D3POLoss
from diffrl.finetuning.methods.ddpo import DDPOLoss, PPOClip
from diffrl.finetuning.methods.dgpo import GroupPreference
from diffrl.finetuning.methods.diffusion_dpo import DiffusionDPO
from diffrl.finetuning.methods.diffusion_nft import DiffusionNFT, NFTLoss
from diffrl.finetuning.methods.flow_cps import DistanceClip
from diffrl.finetuning.methods.group_preference import GroupPreferenceLoss
from diffrl.finetuning.methods.tdm import DistillationLoss, FakeScoreLoss, TrajectoryMatching
from diffrl.finetuning.methods.tdm_r1 import LearntReward
from diffrl.finetuning.placement.recorded import Recorded
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.placement.unpaid import Unpaid
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Regulariser
from diffrl.finetuning.rollouts.chains import Rollouts, collect_rollout
from diffrl.finetuning.rollouts.recorded_pairs import RecordedPairs
from diffrl.finetuning.updates.boundaries import BoundaryUpdates
from diffrl.finetuning.updates.preferences import PREFERENCE, PreferenceUpdates
from diffrl.finetuning.updates.samples import SampleUpdates
from diffrl.finetuning.updates.steps import Updates
from diffrl.training.loop import step_generator
from tests.kit.four_modes import generator_policy
from tests.kit.policies import make_policy, right


def moved(seed: int, num_steps: int = 4) -> DenoisingPolicy:
    policy = generator_policy(num_steps=num_steps, seed=seed)
    torch.manual_seed(seed)
    nn.init.normal_(policy.denoiser.network[-1].weight, std=0.1)
    return policy


def gradient(loss: Tensor, policy: DenoisingPolicy) -> Tensor:
    found = torch.autograd.grad(loss, [p for p in policy.denoiser.parameters() if p.requires_grad])
    return torch.cat([g.flatten() for g in found])


def assert_same(found: Tensor, expected: Tensor, within: float = 1e-4) -> None:
    assert float(expected.norm()) > 1e-4
    assert float((found - expected).norm() / expected.norm()) < within


def compared(policy: DenoisingPolicy, adv: Tensor, **plan: Any) -> TensorDict:
    """An update on the clean samples of groups of two."""
    g = torch.Generator().manual_seed(0)
    rollout = collect_rollout(policy, (2,), batch_size=len(adv), group_size=2, generator=g)
    rollout.set(keys.ADVANTAGE, adv[:, None, None].expand(*rollout.shape, 1))
    updates = PreferenceUpdates(compared="clean", draws=1, preference_t_min=0.3, **plan)
    return next(iter(updates(rollout, policy=policy, group_size=2, generator=g, entries=())))


def as_samples(part: TensorDict, policy: DenoisingPolicy) -> TensorDict:
    """The same samples, times and noise as updates of samples give them."""
    flat = part.get(PREFERENCE).reshape(-1)
    x0, t = flat.get((keys.NEXT, keys.X_T)), flat.get(keys.RENOISE_T)
    x_t = renoise(policy.process, x0, torch.zeros(len(x0)).double(), t.flatten(), flat.get(keys.NOISE))
    data = {keys.X_T: x_t, keys.T: t, keys.X0: x0, keys.ADVANTAGE: flat.get(keys.ADVANTAGE)}
    return TensorDict(data, [len(x0)])


# Losses on samples

SIGNS = torch.tensor([1.0, -1.0, -0.4, 0.4, 0.0, 0.0, 0.9, -0.9])


@pytest.mark.parametrize("times", ["update", "group"])
def test_at_its_reference_dgpo_is_half_of_awm(times: Any) -> None:
    """σ(0) = ½: what a dynamic reference that follows closely makes of the group loss is weighted matching."""
    policy, same = moved(1), moved(1)
    part = compared(same, SIGNS, times=times)
    loss = GroupPreferenceLoss(
        policy, old=same, reference=same, teacher=same, beta=70.0, clip_range=0, anchor_coef=0
    )
    loss.prepare(part, 100)
    awm = AWMLoss(policy, weight="one", advantage_clip=1.0)(as_samples(part, policy))
    assert_same(2 * gradient(loss(part)["loss_preference"], policy), gradient(awm["loss_policy"], policy))


def test_at_its_reference_nft_is_awm_with_a_norm_of_its_own() -> None:
    """∇L = A_max q ∇e - A_max (1-q) ∇e = adv ∇e, where e = l/|error|: AWM of the plain weight has l alone."""
    policy, same, c = moved(1), moved(1), 5.0
    td = as_samples(compared(same, SIGNS * c), policy)
    x_t, t, x0 = td.get(keys.X_T), td.get(keys.T).flatten(), td.get(keys.X0)
    error = policy.denoise(x_t, t.double()) - x0
    e = error.square().mean(1) / error.detach().abs().mean(1)
    expected = gradient((td.get(keys.ADVANTAGE).flatten() * e).mean(), policy)
    for strength in (1.0, 0.1):
        nft = NFTLoss(policy, old=same, reference=same, strength=strength, anchor_coef=0)(td)
        assert_same(gradient(nft["loss_policy"], policy), expected, 1e-3)


@pytest.mark.parametrize("beta", [1.0, 100.0])
def test_diffusion_dpo_is_dgpo_of_pairs_times_beta(beta: float) -> None:
    policy, same = moved(1), moved(1)
    with torch.no_grad():
        policy.denoiser.network[-1].bias.add_(0.02)
    part = compared(same, SIGNS.sign())
    found = []
    for surrogate in (DiffusionDPO(beta=beta), GroupPreference(beta=beta, clip_range=0.0)):
        loss = GroupPreferenceLoss(policy, old=same, reference=same, teacher=same, beta=beta, clip_range=0,
                                   anchor_coef=0, coef=surrogate.coef)  # fmt: skip
        loss.prepare(part, 100)
        found.append(gradient(loss(part)["loss_preference"], policy))
    assert_same(found[0], beta * found[1], 1e-6)


# Losses on steps


def test_at_its_reference_d3po_is_the_score_function_of_signs_times_beta() -> None:
    policy, reference, beta = make_policy(), make_policy(), 0.3
    g = torch.Generator().manual_seed(0)
    td = collect_rollout(reference, (2,), batch_size=6, group_size=2, generator=g)
    td.set(keys.ADVANTAGE, torch.tensor([1.0, -1.0]).repeat(3)[:, None, None].expand(*td.shape, 1))
    d3po = D3POLoss(policy, reference=reference, beta=beta)(td)["loss_policy"]
    ddpo = DDPOLoss(policy, surrogate="sf")(td)["loss_policy"]
    assert_same(gradient(d3po, policy), beta * gradient(ddpo, policy))


@pytest.mark.parametrize("shifted", [0.0, 0.05])
def test_flow_grpo_is_ddpo_with_a_divergence_beside_it(shifted: float) -> None:
    """Given the same advantages; at the start, where the policy is its reference, it is DDPO alone."""
    torch.manual_seed(0)
    denoiser = diffrl.Denoiser(diffrl.networks.MLP((2,), hidden=16, depth=1), diffrl.Flow())
    nn.init.normal_(denoiser.network.last.weight, std=0.3)
    policy = DenoisingPolicy(denoiser, diffrl.FlowSDE(), num_steps=4, reduction="mean")
    recipe = recipes.flow_grpo(rollouts=Rollouts(8, group_size=4))
    tuner = Finetuner(policy, right, recipe, event_shape=(2,))
    td = tuner.collect(step_generator(0, 0))
    with torch.no_grad():
        policy.denoiser.network.last.bias.add_(shifted)
    out = tuner.loss(td)
    plain = DDPOLoss(policy, clip_range=tuner.loss.clip_range)(td)["loss_policy"]
    torch.testing.assert_close(out["loss_policy"], plain)
    assert bool(out["loss_kl"] == 0) == (shifted == 0)
    if shifted == 0:
        assert_same(gradient(out["loss_policy"] + out["loss_kl"], policy), gradient(plain, policy), 1e-6)


# Few-step generators


def test_of_one_step_dmd2_is_tdm() -> None:
    """With one time and noise for both: the one boundary is the clean estimate itself."""
    policy, fake = moved(1, num_steps=1), moved(2, num_steps=1)
    teacher = Teacher(generator_policy(num_steps=1), 1.0)
    rollout = collect_rollout(policy, (2,), batch_size=8, generator=torch.Generator().manual_seed(0))
    rollout.set(keys.ADVANTAGE, torch.zeros(8, 1, 1))
    parts = []
    for of in ("boundary", "estimate"):
        plan = BoundaryUpdates(of=of)
        g = torch.Generator().manual_seed(1)
        parts.append(next(iter(plan(rollout, policy=policy, group_size=1, generator=g, entries=()))))
    tdm, dmd2 = parts
    torch.testing.assert_close(
        tdm.get((keys.NEXT, keys.X_T)), dmd2.get((keys.NEXT, keys.X_T)), rtol=1e-5, atol=1e-6
    )
    dmd2.update(tdm.select(keys.RENOISE_T, keys.NOISE))
    made = [
        [FakeScoreLoss(fake)(part)["loss_fake"], DistillationLoss(policy, fake, teacher)(part)["loss_policy"]]
        for part in (tdm, dmd2)
    ]
    assert_same(gradient(made[0][0], fake), gradient(made[1][0], fake))
    assert_same(gradient(made[0][1], policy), gradient(made[1][1], policy))
    several = moved(1)  # with more steps they are different
    rollout = collect_rollout(several, (2,), batch_size=8)
    rollout.set(keys.ADVANTAGE, torch.zeros(8, 4, 1))
    given: dict[str, Any] = {"policy": several, "group_size": 1, "entries": ()}
    for of in ("boundary", "estimate"):
        g = torch.Generator().manual_seed(1)
        parts.append(next(iter(BoundaryUpdates(of=of)(rollout, generator=g, **given))))
    assert not torch.allclose(
        parts[2].get((keys.NEXT, keys.X_T)), parts[3].get((keys.NEXT, keys.X_T)), atol=0.1
    )


def test_the_reward_that_tdm_r1_learns_from_clean_samples_is_dgpos() -> None:
    """Of one network, with one set of numbers; TDM-R1 trains a copy with it, and DGPO the policy itself."""
    numbers: dict[str, Any] = {"beta": 20.0, "clip_range": 0.0, "anchor_coef": 0.1}
    plan = PreferenceUpdates(compared="clean", draws=1)
    losses, parts = [], []
    for recipe in (
        recipes.tdm_r1(surrogate=LearntReward(reference="frozen", runaway=None, **numbers), updates=plan,
                       rollouts=Rollouts(8, group_size=4)),
        recipes.dgpo(surrogate=GroupPreference(**numbers), updates=plan, rollouts=Rollouts(8, group_size=4)),
    ):  # fmt: skip
        tuner = Finetuner(moved(1), right, recipe, event_shape=(2,))
        role = tuner.roles["surrogate" if "surrogate" in tuner.roles else "policy"]
        given = {
            "policy": tuner.policy,
            "group_size": 4,
            "generator": torch.Generator().manual_seed(0),
            "entries": (),
        }
        part = next(iter(plan(tuner.collect(step_generator(0, 0)), **given)))
        with torch.no_grad():
            role.module.network[-1].bias.add_(0.05)
        role.prepare(part, 100)
        parts.append(part)
        losses.append(gradient(role.loss(part)["loss_preference"], DenoisingPolicy(
            role.module, diffrl.DDIM(), num_steps=4, reduction="mean")))  # fmt: skip
    assert torch.equal(parts[0].get(PREFERENCE).get(keys.NOISE), parts[1].get(PREFERENCE).get(keys.NOISE))
    assert_same(losses[0], losses[1], 1e-5)


# Published numbers

GROUPS_OF_24 = {
    "rollouts": Rollouts(1152, group_size=24),
    "placement": Terminal(),
    "credit": GroupRelative("global"),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "awm": {
        **GROUPS_OF_24,
        "updates": SampleUpdates(draws=6, minibatches=1),
        "surrogate": AdvantageWeightedMatching("ghuber", 1e-3, 5.0, 3e-3, 1.0),
        "regulariser": Regulariser(decay=0.3),
    },
    "diffusion_nft": {
        **GROUPS_OF_24,
        "updates": SampleUpdates(minibatches=1),
        "surrogate": DiffusionNFT(strength=1.0, advantage_clip=5.0, anchor_coef=1e-4),
        "regulariser": Regulariser(decay=0.5, decay_ramp=0.001),
    },
    "d3po": {
        "rollouts": Rollouts(256, group_size=2),
        "placement": Terminal(),
        "updates": Updates(order="step"),
        "surrogate": D3PO(beta=0.1, clip_range=0.1),
    },
    "dmd2": {
        "placement": Unpaid(),
        "updates": BoundaryUpdates(of="estimate", margin=0.02, passes=5),
        "surrogate": TrajectoryMatching("dsm", 1.0, fake_updates=5, fake_lr=5e-7, betas=(0.9, 0.999)),
    },
    "dgpo": {
        **GROUPS_OF_24,
        "updates": PreferenceUpdates(compared="clean", draws=1, preference_t_min=0.3),
        "surrogate": GroupPreference("frozen", beta=100.0, clip_range=1e-3, anchor_coef=0.02),
    },
    "diffusion_dpo": {
        "rollouts": RecordedPairs(trajectories=2 * 2048),
        "placement": Recorded(),
        "credit": Preference(),
        "updates": PreferenceUpdates(
            of="estimate", compared="clean", times="group", draws=1, margin=1e-3, preference_t_min=0.0
        ),
        "surrogate": DiffusionDPO("frozen", beta=5000.0, clip_range=0.0),
    },
    "flow_grpo": {
        **GROUPS_OF_24,
        "updates": Updates(minibatches=2, drop_last=1),
        "surrogate": PPOClip(None, 5.0),
        "regulariser": Regulariser(0.04, by_time=True),
    },
    "flow_cps": {
        **GROUPS_OF_24,
        "updates": Updates(minibatches=2),
        "surrogate": DistanceClip(None, 5.0),
        "regulariser": Regulariser(0.04),
    },
    "tdm": {
        "updates": BoundaryUpdates(interval="trajectory"),
        "surrogate": TrajectoryMatching("dsm", 1.0, fake_updates=1, fake_lr=2e-5, betas=(0.0, 0.95)),
    },
}
"""What spec pages and public code say; rates of the policy, steps and samplers belong to the run."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_holds_the_published_numbers(name: str) -> None:
    recipe = getattr(recipes, name)()
    assert {piece: getattr(recipe, piece) for piece in PUBLISHED[name]} == PUBLISHED[name]


def test_the_published_numbers_of_tdm_r1() -> None:
    recipe: Any = recipes.tdm_r1()
    s, u = recipe.surrogate, recipe.updates
    assert (s.beta, s.anchor_coef, s.clip_range, s.runaway, s.tdm_weight) == (1.0, 1e-3, 1e-3, 0.05, 0.3)
    assert (s.surrogate_lr, s.fake_lr, s.fake_anchor_coef, s.reference) == (3e-4, 3e-4, 0.02, "ema")
    assert (u.draws, u.interval, u.margin, u.preference_t_min, u.reward_t_min) == (
        2,
        "reverse",
        0.02,
        0.55,
        0.25,
    )
    assert (
        recipe.rollouts.group_size == 24
        and isinstance(recipe.credit, GroupRelative)
        and recipe.credit.std == "global"
    )


def test_the_published_clip_range_of_ppo_is_that_of_latents_of_16384_numbers() -> None:
    for surrogate in (PPOClip(), DistanceClip()):
        setting: Any = type("Setting", (), {"dim": 16_384, "policy": make_policy(diffrl.CPS()), "kl_reference": None,
                                            "kl_coef": 0.0, "kl_by_time": False})  # fmt: skip
        assert surrogate.loss(setting).clip_range == pytest.approx(1e-4)
