"""D3PO and Flow-GRPO: the loss against its formula, the published pieces, and rewards that rise."""

from typing import Any

import pytest
import torch
from torch import nn

import diffrl
from diffrl import keys, recipes
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.d3po import D3PO, D3POLoss
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.finetuning.run_checks import check_tuner
from diffrl.finetuning.updates.steps import Updates
from diffrl.training.optim import Optim
from tests.kit.policies import make_policy, right


def test_every_step_is_compared_with_the_others_step() -> None:
    policy, reference = make_policy(seed=0), make_policy(seed=0)
    with torch.no_grad():
        policy.denoiser.network.last.weight.mul_(1.05)
    td = collect_rollout(
        reference, (2,), batch_size=8, group_size=2, generator=torch.Generator().manual_seed(0)
    )
    adv = torch.tensor([1.0, -1.0, -0.5, 0.5, 0.0, 0.0, 2.0, -2.0])
    td.set(keys.ADVANTAGE, adv[:, None, None].expand(*td.shape, 1))
    log_rho = torch.stack(
        [
            policy.log_prob(
                policy.law(td.get(keys.X_T)[:, k], torch.full((8,), k)), td.get(keys.ACTION)[:, k]
            )
            - td.get(keys.ACTION_LOG_PROB)[:, k]
            for k in range(4)
        ],
        1,
    )
    beta, eps = 2.0, 0.02
    rho = log_rho.exp().clamp(1 - eps, 1 + eps).log()
    won, lost = torch.tensor([0, 3, 6]), torch.tensor([1, 2, 7])  # the pair without a winner is left out
    expected = -nn.functional.logsigmoid(beta * rho[won] - beta * rho[lost]).mean()
    out = D3POLoss(policy, reference=reference, beta=beta, clip_range=eps)(td)
    torch.testing.assert_close(out["loss_policy"], expected)
    torch.testing.assert_close(out["accuracy"], (rho[won] > rho[lost]).float().mean())
    alone = D3POLoss(policy, reference=reference, beta=beta, clip_range=eps)
    with pytest.raises(ValueError, match="rows 2p and 2p\\+1 must be one group"):
        alone(td[1:7])


def test_at_the_reference_the_gradient_is_that_of_the_difference_of_log_probabilities() -> None:
    policy, reference = make_policy(), make_policy()
    td = collect_rollout(
        reference, (2,), batch_size=6, group_size=2, generator=torch.Generator().manual_seed(0)
    )
    adv = torch.tensor([1.0, -1.0]).repeat(3)
    td.set(keys.ADVANTAGE, adv[:, None, None].expand(*td.shape, 1))
    loss = D3POLoss(policy, reference=reference, beta=0.3)(td)["loss_policy"]
    found = torch.autograd.grad(loss, list(policy.denoiser.parameters()))
    flat = td.reshape(-1)
    law = policy.law(flat.get(keys.X_T), flat.get(keys.INDEX).flatten())
    log_p = policy.log_prob(law, flat.get(keys.ACTION)).view(td.shape)
    by_hand = -0.5 * 0.3 * (log_p[0::2] - log_p[1::2]).mean()
    expected = torch.autograd.grad(by_hand, list(policy.denoiser.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="set rollouts.group_size=2"):
        recipes.d3po(rollouts=recipes.Rollouts(12, group_size=3))


RUNS: dict[str, dict[str, Any]] = {
    "d3po": {
        "rollouts": recipes.Rollouts(64, group_size=2),
        "updates": Updates(order="step"),
        "surrogate": D3PO(beta=1.0, clip_range=0.2),
    },
    "flow_grpo": {"rollouts": recipes.Rollouts(64, group_size=8)},
}


@pytest.mark.parametrize("method", RUNS)
def test_the_reward_rises(method: str) -> None:
    recipe = getattr(recipes, method)(**RUNS[method])
    optim = Optim(3e-3, warmup_steps=0)
    tuner = Finetuner(make_policy(), right, recipe, event_shape=(2,), length=Iterations(20), optim=optim)
    check_tuner(tuner)
    rewards = [row["reward"] for row in tuner.steps()]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards


def test_flow_grpo_and_flow_cps_are_one_recipe_with_two_samplers() -> None:
    torch.manual_seed(0)
    for sampler in (diffrl.FlowSDE(), diffrl.CPS()):
        network = diffrl.networks.MLP((2,), hidden=16, depth=1)
        denoiser = diffrl.Denoiser(network, diffrl.Flow(t_min=0.05))
        policy = diffrl.DenoisingPolicy(denoiser, sampler, num_steps=4, reduction="mean")
        recipe = recipes.flow_grpo(rollouts=recipes.Rollouts(8, group_size=4))
        tuner = Finetuner(policy, right, recipe, event_shape=(2,), length=Iterations(2))
        rows = list(tuner.steps())
        assert rows[-1]["loss_kl"] > 0 or rows[-1]["kl"] >= 0
        assert tuner.updates == 4
