"""Flow-CPS: squared distances in place of log-probabilities, its pieces, and what its sampler has to do with DDIM."""

import pytest
import torch
from torch import Tensor

import diffrl
from diffrl import keys, recipes
from diffrl.diffusion.samplers.ddim import DDIM
from diffrl.diffusion.samplers.sde import CPS
from diffrl.diffusion.schedules.base import Schedule
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.ddpo import DDPOLoss
from diffrl.finetuning.methods.flow_cps import DistanceClip, DistanceLoss
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.finetuning.run_checks import check_tuner
from diffrl.training.optim import Optim
from tests.kit.oracles import every_process, randn
from tests.kit.policies import make_policy, right


def flow_policy(seed: int = 0, std_floor: float = 0.0) -> DenoisingPolicy:
    torch.manual_seed(seed)
    network = diffrl.networks.MLP((2,), hidden=16, depth=1)
    torch.nn.init.normal_(network.last.weight, std=0.3)
    denoiser = diffrl.Denoiser(network, diffrl.Flow())
    return DenoisingPolicy(denoiser, CPS(0.7), num_steps=5, reduction="mean", std_floor=std_floor)


@pytest.mark.parametrize("std_floor", [0.0, 0.3])
def test_ratio_and_divergence_are_squared_distances_without_a_scale(std_floor: float) -> None:
    policy, old = flow_policy(0, std_floor), flow_policy(0, std_floor)
    with torch.no_grad():
        policy.denoiser.network.last.weight.mul_(1.2)
    td = collect_rollout(old, (2,), batch_size=6, generator=torch.Generator().manual_seed(0))
    adv = torch.tensor([1.0, -1.0, 0.5, -2.0, 9.0, -9.0])
    td.set(keys.ADVANTAGE, adv[:, None, None].expand(*td.shape, 1))
    kept = td.get(keys.TRAINABLE)[0, :, 0]
    assert kept.tolist() == [True] * 4 + [std_floor > 0]  # onto clean data there is no noise
    eps, losses, divergences = 1e-3, [], []
    for k in kept.nonzero().flatten().tolist():
        x, a, index = td.get(keys.X_T)[:, k], td.get(keys.ACTION)[:, k], torch.full((6,), k)
        mean, mean_old = policy.law(x, index).mean, old.law(x, index).mean.detach()
        r = ((a - mean_old).square().mean(1) - (a - mean).square().mean(1)).exp()
        A = adv.clamp(-5, 5)
        losses.append(torch.maximum(-A * r, -A * r.clamp(1 - eps, 1 + eps)))
        divergences.append((mean - mean_old).square().mean(1))
    out = DistanceLoss(policy, clip_range=eps, reference=old, kl_coef=0.04)(td)
    torch.testing.assert_close(out["loss_policy"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out["kl"], torch.stack(divergences).mean().detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(out["loss_kl"], 0.04 * torch.stack(divergences).mean(), rtol=1e-4, atol=1e-7)
    assert 0 < float(out["clip_fraction"]) < 1


def test_of_one_step_it_is_flow_grpos_loss_times_twice_the_variance() -> None:
    """At the policy that acted; over several steps the noisier ones weigh more."""
    policy = flow_policy()
    td = collect_rollout(policy, (2,), batch_size=8, generator=torch.Generator().manual_seed(0))
    td.set(keys.ADVANTAGE, randn(8).float()[:, None, None].expand(*td.shape, 1))
    parameters = list(policy.denoiser.parameters())
    for k in range(4):
        step = td[:, k]
        found = torch.autograd.grad(DistanceLoss(policy)(step)["loss_policy"], parameters)
        plain = torch.autograd.grad(DDPOLoss(policy)(step)["loss_policy"], parameters)
        std = float(policy.sampler.law(policy.process, randn(1, 2), randn(1, 2), *policy.grid[k : k + 2]).std)
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, 2 * std**2 * b, rtol=1e-4, atol=1e-7)


@every_process
@pytest.mark.parametrize("eta", [0.1, 0.9])
def test_a_step_is_one_of_ddim_with_another_eta(process: Schedule, eta: float) -> None:
    """η_DDIM = σ_s sin(½π η)/std of DDIM(1): the noise is a share of σ_s, and not of what ancestral sampling has."""
    grid = process.time_grid(12)
    x, D_x = randn(1, 3), randn(1, 3, seed=1)
    beyond = 0
    for t, s in zip(grid[:-2], grid[1:-1], strict=True):
        cps, full = CPS(eta).law(process, x, D_x, t, s), DDIM(1.0).law(process, x, D_x, t, s)
        ratio = float(cps.std / full.std)
        if ratio > 1:  # more noise than ancestral sampling has
            beyond += 1
            continue
        ddim = DDIM(ratio).law(process, x, D_x, t, s)
        torch.testing.assert_close(cps.mean, ddim.mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(cps.std, ddim.std, rtol=1e-10, atol=0)
    assert beyond < 11 if eta == 0.1 else beyond > 0


def test_it_is_flow_grpo_with_other_pieces() -> None:
    cps, grpo = recipes.flow_cps(), recipes.flow_grpo()
    same = ("rollouts", "placement", "credit")
    assert all(getattr(cps, name) == getattr(grpo, name) for name in same)
    assert (
        cps.updates.drop_last == 0 and grpo.updates.drop_last == 1
    )  # the last step of CPS has no noise anyway
    assert cps.regulariser.kl_coef == grpo.regulariser.kl_coef and not cps.regulariser.by_time
    tuner = Finetuner(
        flow_policy(), right, recipes.flow_cps(rollouts=recipes.Rollouts(8, group_size=4)), event_shape=(2,)
    )
    assert tuner.num_trainable == 4


def test_steps_of_another_sampler_are_refused() -> None:
    recipe = recipes.flow_cps(rollouts=recipes.Rollouts(8, group_size=4))
    with pytest.raises(ValueError, match=r"not of DDIM\(eta=1.0\): set sampler=cps, or recipe=flow_grpo"):
        Finetuner(make_policy(), right, recipe, event_shape=(2,))


def last(x0: Tensor, cond: object = None) -> Tensor:
    return x0[:, 1]


@pytest.mark.parametrize("reward", [right, last])
def test_the_reward_rises(reward: object) -> None:
    recipe = recipes.flow_cps(
        rollouts=recipes.Rollouts(64, group_size=8), surrogate=DistanceClip(clip_range=0.02)
    )
    optim = Optim(3e-3, warmup_steps=0)
    tuner = Finetuner(flow_policy(), reward, recipe, event_shape=(2,), length=Iterations(30), optim=optim)
    check_tuner(tuner)
    rewards = [row["reward"] for row in tuner.steps()]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards
