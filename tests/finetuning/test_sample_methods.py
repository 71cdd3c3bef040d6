"""AWM, DiffusionNFT and DGPO: losses against their formulas, relations between them, and rewards that rise."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import diffrl
from diffrl import keys, recipes
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.awm import AdvantageWeightedMatching, AWMLoss
from diffrl.finetuning.methods.dgpo import GroupPreference
from diffrl.finetuning.methods.diffusion_nft import DiffusionNFT, NFTLoss
from diffrl.finetuning.methods.group_preference import GroupPreferenceLoss
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Regulariser
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.finetuning.run_checks import check_tuner
from diffrl.finetuning.updates.preferences import PREFERENCE, PreferenceUpdates
from diffrl.finetuning.updates.samples import SampleUpdates
from diffrl.training.optim import Optim
from tests.kit.four_modes import ExactAndMore, generator_policy


def moved(seed: int) -> DenoisingPolicy:
    policy = generator_policy(seed=seed)
    nn.init.normal_(policy.denoiser.network[-1].weight, std=0.1)
    return policy


def samples(n: int = 8, seed: int = 0) -> TensorDict:
    """Points of a flow with noise, as updates of samples give them."""
    g = torch.Generator().manual_seed(seed)
    x0, eps, t = torch.randn(n, 2, generator=g), torch.randn(n, 2, generator=g), torch.rand(n, 1, generator=g)
    adv = torch.randn(n, 1, generator=g)
    states = {keys.X_T: (1 - t) * x0 + t * eps, keys.T: t, keys.X0: x0, keys.ADVANTAGE: adv, "eps": eps}
    return TensorDict(states, [n])


def velocity_error(policy: DenoisingPolicy, td: TensorDict) -> Tensor:
    """‖v - (ε - x0)‖² as a mean over the dims."""
    x_t, t = td.get(keys.X_T), td.get(keys.T)
    v = (x_t - policy.denoiser(x_t, t.flatten())) / t
    return (v - (td.get("eps") - td.get(keys.X0))).square().mean(1)


def gradient(loss: Tensor, policy: DenoisingPolicy) -> Tensor:
    found = torch.autograd.grad(loss, policy.denoiser.network.parameters())
    return torch.cat([g.flatten() for g in found])


# AWM


@pytest.mark.parametrize("weight", ["one", "t", "t2", "ghuber"])
def test_on_policy_it_is_matching_weighed_by_the_advantage(weight: Any) -> None:
    policy, td = moved(1), samples()
    l, t = velocity_error(policy, td), td.get(keys.T).flatten()
    p, e = 0.25, 1e-6
    W = {"one": l, "t": t * l, "t2": t**2 * l, "ghuber": t / p * ((l + e) ** p - e**p)}[weight]
    adv = td.get(keys.ADVANTAGE).flatten().clamp(-5, 5) / 5
    expected = gradient((adv * W).mean(), policy)
    for old in (None, moved(1)):  # the same network
        out = AWMLoss(policy, old=old, weight=weight)(td)
        assert float(out["ratio"]) == pytest.approx(1)
        torch.testing.assert_close(gradient(out["loss_policy"], policy), expected, rtol=1e-4, atol=1e-6)


def test_ratios_are_clipped_as_in_ppo() -> None:
    policy, old, td = moved(1), moved(2), samples(64)
    W, W_old = velocity_error(policy, td), velocity_error(old, td)
    adv, r = td.get(keys.ADVANTAGE).flatten().clamp(-5, 5) / 5, (W_old - W).exp()
    eps = 0.05
    expected = torch.maximum(-adv * r, -adv * r.clamp(1 - eps, 1 + eps)).mean()
    out = AWMLoss(policy, old=old, weight="one", clip_range=eps)(td)
    torch.testing.assert_close(out["loss_policy"], expected, rtol=1e-4, atol=1e-6)
    assert 0 < float(out["clip_fraction"]) == pytest.approx(float(((r - 1).abs() > eps).float().mean()))


def test_it_holds_on_to_the_reference_and_to_the_average() -> None:
    policy, td = moved(1), samples()
    plain = AWMLoss(policy)(td)["loss_policy"]
    for name, other in (("reference", moved(2)), ("ema", moved(3))):
        held: dict[str, Any] = {name: other, f"{name}_coef": 0.5}
        x_t, t = td.get(keys.X_T), td.get(keys.T)
        v, u = ((x_t - p.denoiser(x_t, t.flatten())) / t for p in (policy, other))
        expected = plain + 0.5 * (v - u).square().mean()
        torch.testing.assert_close(AWMLoss(policy, **held)(td)["loss_policy"], expected, rtol=1e-4, atol=1e-6)
        with pytest.raises(ValueError, match=f"{name}_coef needs a policy"):
            AWMLoss(policy, **{f"{name}_coef": 0.5})


# DiffusionNFT


def test_both_pulls_are_the_published_ones() -> None:
    policy, old, td, b = moved(1), moved(2), samples(), 0.4
    x_t, t, x0 = td.get(keys.X_T), td.get(keys.T), td.get(keys.X0)
    r = (td.get(keys.ADVANTAGE).flatten() / 5).clamp(-1, 1) / 2 + 0.5
    v, v_old = ((x_t - p.denoiser(x_t, t.flatten())) / t for p in (policy, old))
    v_plus, v_minus = (1 - b) * v_old + b * v, (1 + b) * v_old - b * v

    def error(u: Tensor) -> Tensor:
        off = x_t - t * u - x0
        return off.square().mean(1) / off.detach().abs().mean(1)

    expected = 5 / b * (r * error(v_plus) + (1 - r) * error(v_minus)).mean()
    loss = NFTLoss(policy, old=old, reference=moved(3), strength=b, anchor_coef=0.0)(td)["loss_policy"]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(loss, policy), gradient(expected, policy), rtol=1e-3, atol=1e-5)


def test_a_sample_of_no_advantage_has_no_gradient_at_the_old_network_and_pulls_to_it_elsewhere() -> None:
    td = samples()
    td.set(keys.ADVANTAGE, torch.zeros(8, 1))
    policy, same = moved(1), moved(1)
    loss = NFTLoss(policy, old=same, reference=same, anchor_coef=0.0)(td)["loss_policy"]
    assert float(gradient(loss, policy).abs().max()) < 1e-5
    anchored = NFTLoss(policy, old=same, reference=moved(3), anchor_coef=0.5)(td)["loss_policy"]
    assert float(gradient(anchored, policy).abs().max()) > 1e-3  # the anchor's alone
    other = moved(2)
    optimiser = torch.optim.Adam(policy.denoiser.network.parameters(), 1e-3)
    distances = []
    for _ in range(30):
        out = NFTLoss(policy, old=other, reference=other, anchor_coef=0.0)(td)
        distances.append(float(out["moved"]))
        optimiser.zero_grad()
        out["loss_policy"].backward()
        optimiser.step()
    assert distances[-1] < 0.7 * distances[0]


# DGPO and Diffusion-DPO


def test_pairs_of_advantage_one_are_diffusion_dpo() -> None:
    policy, reference, beta = moved(1), generator_policy(), 3.0
    g = torch.Generator().manual_seed(0)
    rollout = collect_rollout(reference, (2,), batch_size=8, group_size=2, generator=g)
    rollout.set(keys.ADVANTAGE, torch.tensor([1.0, -1.0]).repeat(4)[:, None, None].expand(*rollout.shape, 1))
    plan = PreferenceUpdates(compared="clean", draws=1, preference_t_min=0.3)
    made = {"policy": reference, "group_size": 2, "generator": g, "entries": ()}
    part = next(iter(plan(rollout, **made)))
    flat = part.get(PREFERENCE).reshape(-1)
    x0, eps, t = flat.get((keys.NEXT, keys.X_T)), flat.get(keys.NOISE), flat.get(keys.RENOISE_T).float()
    assert torch.equal(eps[0::2], eps[1::2]) and (t >= 0.3).all()  # one noise and time for both
    pair = TensorDict({keys.X_T: (1 - t) * x0 + t * eps, keys.T: t, keys.X0: x0, "eps": eps}, [8])
    l, l_ref = velocity_error(policy, pair), velocity_error(reference, pair).detach()
    won, lost = (l - l_ref)[0::2], (l - l_ref)[1::2]
    expected = -nn.functional.logsigmoid(-beta / 2 * (won - lost)).mean() / beta
    loss = GroupPreferenceLoss(
        policy, old=reference, reference=reference, teacher=reference, beta=beta, clip_range=0, anchor_coef=0
    )
    loss.prepare(part, 100)
    torch.testing.assert_close(
        gradient(loss(part)["loss_preference"], policy), gradient(expected, policy), rtol=1e-3, atol=1e-6
    )


# Runs


def near_mode_one(x0: Tensor, cond: Any = None) -> Tensor:
    """Higher nearer to mode 1."""
    return x0[:, 1]


RUNS: dict[str, dict[str, Any]] = {
    "awm": {"updates": SampleUpdates(draws=4, minibatches=2), "surrogate": AdvantageWeightedMatching(clip_range=0.1)},
    "diffusion_nft": {
        "updates": SampleUpdates(draws=4, minibatches=2),
        "surrogate": DiffusionNFT(),
        "regulariser": Regulariser(decay=0.5, decay_ramp=0.05),
    },
    "dgpo": {
        "updates": PreferenceUpdates(compared="clean", draws=1, passes=4, preference_t_min=0.3),
        "surrogate": GroupPreference(beta=10.0, clip_range=0.1),
    },
}  # fmt: skip


@pytest.mark.parametrize("method", RUNS)
def test_the_reward_of_a_deterministic_sampler_rises(method: str) -> None:
    torch.manual_seed(0)
    policy = DenoisingPolicy(ExactAndMore(diffrl.Flow()), diffrl.DDIM(), num_steps=6, reduction="mean")
    recipe = getattr(recipes, method)(rollouts=recipes.Rollouts(96, group_size=16), **RUNS[method])
    optim = Optim(2e-3, warmup_steps=0, decay="none")
    tuner = Finetuner(policy, near_mode_one, recipe, event_shape=(2,), length=Iterations(25), optim=optim)
    check_tuner(tuner)
    rewards = [row["reward"] for row in tuner.steps()]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3, rewards
