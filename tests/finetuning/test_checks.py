"""Self-checks: a healthy policy passes all of them, and each planted fault fails with its cause named."""

import copy
import math
import random
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

import diffrl
from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.samplers.ddim import DDIM
from diffrl.diffusion.samplers.sde import CPS
from diffrl.diffusion.schedules.flow import Flow
from diffrl.finetuning.check_report import Check, CheckFailed, Report
from diffrl.finetuning.checks import check
from diffrl.finetuning.methods.ddpo import DDPOLoss
from diffrl.finetuning.methods.sdpo import SDPOLoss
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.rl.advantages import group_advantages
from tests.kit.oracles import generator

RATIO, STORED, KL, SUM = "ratio - 1", "stored log π", "KL to itself", "accumulation: error of the gradient"
ROLLOUT, MEAN = "rollout: |log π| a dim", "advantages: mean of a group"


class Network(nn.Module):
    """A small network with dropout, off in eval mode, and a guidance that may be turned on."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.mlp = MLP((3,), hidden=16, depth=2, num_classes=2)
        self.dropout, self.guidance, self.crowding = nn.Dropout(dropout), 0.0, 0.0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        out = self.mlp(self.dropout(x), t, cond) + self.guidance
        return out + self.crowding * len(x)


def policy_of(
    *,
    dropout: float = 0.0,
    K: int = 5,
    eta: float = 0.7,
    reduction: Literal["mean", "sum"] = "mean",
    std_floor: float = 0.0,
) -> DenoisingPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(dropout)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
    return DenoisingPolicy(
        Denoiser(network, Flow()), CPS(eta), num_steps=K, reduction=reduction, std_floor=std_floor
    )


def network_of(policy: DenoisingPolicy) -> Any:
    return policy.denoiser.network


def credited(policy: DenoisingPolicy, B: int = 16, *, pairs: bool = True) -> TensorDict:
    cond = torch.arange(B // 2 if pairs else B) % 2
    td = collect_rollout(policy, (3,), batch_size=B, pairs=pairs, cond=cond, generator=generator(1))
    R = reward(td[keys.ACTION][:, -1])[:, None].expand(B, policy.num_steps)
    A = group_advantages(R, td[keys.GROUP][:, 0], std="none")
    return td.set(keys.ADVANTAGE, A.unsqueeze(-1))


def reward(x0: Tensor, cond: Any = None) -> Tensor:
    return x0.square().sum(1)


def failures(report: Report) -> dict[str, str]:
    return {c.name: c.cause for c in report.failed}


# Healthy policies


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch_rows", [None, 1, 6, 64, 1000])
@pytest.mark.parametrize("kind", ["sf", "is", "sdpo", "kl"])
def test_a_healthy_policy_passes(kind: str, batch_rows: int | None, reduction: Any) -> None:
    policy = policy_of(dropout=0.3, reduction=reduction).eval()
    reference = copy.deepcopy(policy)
    losses = {
        "sf": lambda: DDPOLoss(policy, surrogate="sf"),
        "is": lambda: DDPOLoss(policy, surrogate="is", clip_range=0.007),
        "sdpo": lambda: SDPOLoss(policy, clip_range=0.007),
        "kl": lambda: DDPOLoss(policy, reference=reference, kl_coef=0.5, clip_range=0.007),
    }
    report = check(
        policy,
        losses[kind](),
        credited(policy),
        batch_rows=batch_rows,
        reward=reward,
        reference=reference,
        centred="group",
    )
    assert report.passed and not report.failed and len(report.checks) == 7
    report.raise_if_failed()
    assert not any(c.cause for c in report.checks)
    values = {c.name: c.value for c in report.checks}
    assert values[KL] == 0 and values[RATIO] < 1e-5 and values[SUM] < 1e-5


def test_it_is_public_and_prints_a_table() -> None:
    policy = policy_of().eval()
    report = diffrl.check(policy, DDPOLoss(policy), credited(policy))
    lines = str(report).splitlines()
    assert lines[0].split() == ["check", "value", "at", "most"] and set(lines[1]) == {"-", " "}
    assert len(lines) == 2 + len(report.checks) and all(line.endswith(" ok") for line in lines[2:])


@pytest.mark.parametrize("B", [1, 2, 3, 40])
def test_rollouts_of_any_size(B: int) -> None:
    policy = policy_of(K=2).eval()
    td = credited(policy, B, pairs=False)
    assert check(policy, DDPOLoss(policy, clip_range=0.007), td).passed


def test_half_precision_has_its_own_limits() -> None:
    """A network in bfloat16 forwards other numbers in other batch shapes; the limits follow the clip range."""
    policy = policy_of().eval()
    with torch.autocast("cpu", torch.bfloat16):
        td = credited(policy)
    loss = DDPOLoss(policy, clip_range=0.2)
    report = check(policy, loss, td, batch_rows=3, autocast=torch.bfloat16)
    assert report.passed
    whole = {c.name: c.limit for c in report.checks}
    exact = {c.name: c.limit for c in check(policy, loss, credited(policy)).checks}
    eps_D = 0.0128 / math.sqrt(3)
    assert whole[RATIO] == pytest.approx(0.1 * min(0.2, 10 * eps_D))
    assert exact[RATIO] == pytest.approx(0.1 * eps_D)
    # a rollout of another precision than its updates
    assert set(failures(check(policy, DDPOLoss(policy, clip_range=1e-4), td))) >= {RATIO, STORED}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_limits_follow_the_clip_range(reduction: Any) -> None:
    policy = policy_of(reduction=reduction).eval()
    td = credited(policy)
    limit = {c.name: c.limit for c in check(policy, DDPOLoss(policy, clip_range=1e-4), td).checks}
    assert limit[RATIO] == limit[STORED] == pytest.approx(1e-5)
    # log-ratios of a shift of the mean by δ std in every dim: their variance is δ²/D (mean) or D δ² (sum)
    delta = 1e-5 * math.sqrt(3) if reduction == "mean" else 1e-5 / math.sqrt(3)
    assert limit[KL] == pytest.approx(delta**2 / 2 * (1 if reduction == "mean" else 3))
    unclipped = {c.name: c.limit for c in check(policy, SDPOLoss(policy, clip_range=0), td).checks}
    eps_D = 0.0128 / math.sqrt(3) if reduction == "mean" else 0.0128 * math.sqrt(3)
    assert unclipped[RATIO] == pytest.approx(0.1 * eps_D)


# Nothing is changed


def test_nothing_is_changed() -> None:
    policy = policy_of(dropout=0.5).eval()
    network = network_of(policy)
    network.norm = nn.BatchNorm1d(3)
    td = credited(policy)
    network.dropout.train()  # draws random numbers
    next(policy.parameters()).grad = marked = torch.ones_like(next(policy.parameters()))
    loss, reference = DDPOLoss(policy), copy.deepcopy(policy)
    stored = td.clone()
    before = {k: v.clone() for k, v in policy.state_dict().items()}

    def noisy(x0: Tensor, cond: Any) -> Tensor:
        return torch.rand(len(x0)) + random.random() + float(np.random.rand())

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    counts = policy.nfe, reference.nfe
    check(policy, loss, td, reward=noisy, reference=reference)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert (policy.nfe, reference.nfe) == counts
    assert next(policy.parameters()).grad is marked and bool((marked == 1).all())
    assert all(p.grad is None for p in list(policy.parameters())[1:])
    assert network.dropout.training and not network.mlp.training
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert bool((td == stored).all())


def test_running_statistics_are_restored() -> None:
    policy = policy_of().eval()
    network = network_of(policy)
    network.dropout = nn.BatchNorm1d(3)  # counts batches in train mode
    policy.train()
    td = credited(policy)
    before = network.dropout.running_mean.clone()
    assert not check(policy, DDPOLoss(policy), td, batch_rows=4).passed  # it depends on the batch
    assert torch.equal(network.dropout.running_mean, before)


def test_it_is_cheap() -> None:
    """Of 512 chains of 50 steps: all rows at two steps, and about four times 64 states."""
    policy = policy_of(K=50).eval()
    td = credited(policy, 512)
    forwarded = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal forwarded
        forwarded += len(args[0])

    network_of(policy).register_forward_hook(count)
    assert check(policy, DDPOLoss(policy, clip_range=0.007), td, batch_rows=16).passed
    assert forwarded <= 2 * 512 + 6 * 64


# Planted faults


def test_dropout_fails_and_is_named() -> None:
    policy = policy_of(dropout=0.3).eval()
    td = credited(policy)
    policy.train()
    found = failures(check(policy, DDPOLoss(policy), td))
    assert set(found) == {RATIO, STORED, KL, SUM}
    assert all("dropout is active (train mode)" in cause for cause in found.values())


def test_other_weights_fail() -> None:
    policy = policy_of().eval()
    td, reference = credited(policy), copy.deepcopy(policy)
    with torch.no_grad():
        next(policy.parameters()).mul_(1.01)
    found = failures(check(policy, DDPOLoss(policy), td, reference=reference))
    assert set(found) == {RATIO, STORED, KL}
    assert "its weights" in found[STORED] and "reference's weights" in found[KL]
    assert set(failures(check(policy, DDPOLoss(policy), td))) == {RATIO, STORED}  # it is itself all the same


def test_guidance_in_training_alone_fails() -> None:
    policy = policy_of().eval()
    td = credited(policy)
    network_of(policy).guidance = 0.1
    assert (
        "guidance (used in only one of rollout and training)"
        in failures(check(policy, SDPOLoss(policy), td))[RATIO]
    )


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", [keys.ACTION, keys.X_T])
def test_latents_stored_in_half_precision_fail(key: str, dtype: torch.dtype, kept: bool) -> None:
    policy = policy_of().eval()
    td = credited(policy)
    rounded = td[key].to(dtype)
    td[key] = rounded if kept else rounded.float()
    found = failures(check(policy, DDPOLoss(policy, clip_range=1e-4), td))
    assert set(found) == {RATIO, STORED}
    for cause in found.values():
        assert f"stored {key} is rounded to {str(dtype)[6:]}: store latents in float32" in cause


@pytest.mark.parametrize("batch_rows", [3, 15, 64, 201])
def test_log_probabilities_that_depend_on_the_batch_size_fail(batch_rows: int) -> None:
    """Even where an update is larger than the rollout, of 64 stochastic steps."""
    policy = policy_of().eval()
    network_of(policy).crowding = 1e-2
    td = credited(policy)
    found = failures(check(policy, DDPOLoss(policy), td, batch_rows=batch_rows))
    assert STORED not in found and KL not in found
    assert f"depends on the batch size: {batch_rows} states an update, 16 a step" in found[RATIO]


def test_another_reduction_fails() -> None:
    policy, other = policy_of(reduction="sum").eval(), policy_of(reduction="mean").eval()
    found = failures(check(policy, DDPOLoss(policy), credited(other)))
    assert set(found) == {RATIO, STORED}
    assert "reduction over dims is not the policy's, 'sum'" in found[STORED]


def test_another_floor_or_eta_fails() -> None:
    acting, policy = policy_of(std_floor=0.2).eval(), policy_of().eval()
    td = credited(acting)  # even its last step is stochastic
    assert "std_floor or the sampler's η differ" in failures(check(policy, DDPOLoss(policy), td))[STORED]
    other = policy_of(eta=0.5).eval()
    found = failures(check(policy, DDPOLoss(policy), credited(policy), reference=other))
    assert set(found) == {KL} and "other standard deviations" in found[KL]
    found = failures(check(other, DDPOLoss(other), credited(policy)))
    assert "sampler's η" in found[STORED]


@pytest.mark.parametrize("K", [4, 6])
def test_another_grid_fails(K: int) -> None:
    policy = policy_of(K=K).eval()
    report = check(policy, DDPOLoss(policy), credited(policy_of(K=5).eval()))
    assert "num_steps differ" in failures(report)[ROLLOUT]


def test_a_chain_without_noise_fails() -> None:
    policy = DenoisingPolicy(policy_of().denoiser, DDIM(0.0), num_steps=4, reduction="mean")
    assert "no step is stochastic" in failures(check(policy, DDPOLoss(policy), credited(policy)))[ROLLOUT]


def test_numbers_that_are_not_finite_or_absurd_fail() -> None:
    policy = policy_of().eval()
    td = credited(policy)
    td[keys.X0_HAT] = td[keys.X0_HAT].clone()
    td[keys.X0_HAT][3, 1] = math.nan
    assert "x0_hat hold NaN" in failures(check(policy, DDPOLoss(policy), td))[ROLLOUT]
    td = credited(policy)
    td[keys.ACTION_LOG_PROB] = td[keys.ACTION_LOG_PROB] - 60
    report = check(policy, DDPOLoss(policy), td)
    assert "almost no noise" in failures(report)[ROLLOUT] and report.failed[0].value > 50
    td = credited(policy)
    td[keys.ADVANTAGE] = td[keys.ADVANTAGE] * math.nan
    assert "NaN" in failures(check(policy, DDPOLoss(policy), td))["advantages: mean of a batch"]


def test_shuffled_groups_fail_where_credit_should_be_centred() -> None:
    policy = policy_of().eval()
    td = credited(policy)
    td[keys.ADVANTAGE] = td[keys.ADVANTAGE][torch.randperm(16, generator=generator(2))]
    found = failures(check(policy, DDPOLoss(policy), td, centred="group"))
    assert set(found) == {MEAN} and "shuffled apart from their group" in found[MEAN]
    assert check(policy, DDPOLoss(policy), td, centred="batch").passed  # whose mean is 0 still
    shifted = td.clone().set(keys.ADVANTAGE, td[keys.ADVANTAGE] + 0.1)
    found = failures(check(policy, DDPOLoss(policy), shifted, centred="batch"))
    assert "without a mean" in found["advantages: mean of a batch"]
    reported = check(policy, DDPOLoss(policy), shifted).checks[-1]
    assert reported.passed and math.isinf(reported.limit) and reported.value > 0.01


def test_pairs_that_were_parted_fail() -> None:
    policy = policy_of().eval()
    td = credited(policy)[torch.randperm(16, generator=generator(2))]
    found = failures(check(policy, SDPOLoss(policy), td))
    assert set(found) == {SUM} and "never shuffle them apart" in found[SUM]
    assert check(policy, DDPOLoss(policy, clip_range=0.007), td).passed


class Sum(DDPOLoss):
    """A loss that grows with the batch."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = super().forward(tensordict)
        return out.set("loss_policy", out["loss_policy"] * tensordict.numel())


def test_a_loss_that_sums_fails() -> None:
    policy = policy_of().eval()
    found = failures(check(policy, Sum(policy, clip_range=0.007), credited(policy)))
    assert set(found) == {SUM} and "a sum" in found[SUM]


def test_a_loss_of_another_policy_fails() -> None:
    policy = policy_of().eval()
    loss = DDPOLoss(copy.deepcopy(policy), clip_range=0.007)
    found = failures(check(policy, loss, credited(policy)))
    assert set(found) == {SUM} and "built on another one" in found[SUM]
    frozen = policy_of().eval().requires_grad_(False)
    found = failures(check(frozen, DDPOLoss(frozen, clip_range=0.007), credited(frozen)))
    assert "no parameter of the policy requires a gradient" in found[SUM]


def test_a_random_reward_is_noted() -> None:
    policy = policy_of().eval()
    g = generator(0)
    loss = DDPOLoss(policy, clip_range=0.007)
    report = check(policy, loss, credited(policy), reward=lambda x0, c: torch.rand(len(x0), generator=g))
    note = report.checks[-1]
    assert report.passed and note.value > 0 and "it is random" in note.cause
    assert str(report).splitlines()[-2].endswith(" note") and "it is random" in str(report)


def test_a_rollout_that_teaches_nothing_is_noted() -> None:
    policy = policy_of().eval()
    td = credited(policy)
    td[keys.ADVANTAGE] = torch.zeros_like(td[keys.ADVANTAGE])
    report = check(policy, SDPOLoss(policy, clip_range=0.007), td, centred="group")
    assert report.passed and "nothing is learned" in report.checks[-1].cause


# Reports and errors


def test_failures_raise_one_error_that_names_them_all() -> None:
    bad = Check("this", False, 2.0, 1.0, "because of that"), Check("other", False, math.nan, 3.0, "whatever")
    report = Report((Check("fine", True, 0.0, 1.0), *bad))
    assert report.failed == bad and not report.passed
    with pytest.raises(CheckFailed, match="this is 2, at most 1: because of that; other is nan") as raised:
        report.raise_if_failed()
    assert "fine" not in str(raised.value)
    assert "FAILED" in str(report) and "this: because of that" in str(report)


def test_arguments_that_do_not_fit_are_refused() -> None:
    policy = policy_of().eval()
    td, loss = credited(policy), DDPOLoss(policy)
    with pytest.raises(ValueError, match="has no advantage: collect it and set its advantages first"):
        check(policy, loss, td.exclude(keys.ADVANTAGE))
    with pytest.raises(ValueError, match=r"batch size \(80,\): give whole chains"):
        check(policy, loss, td.reshape(-1))
    with pytest.raises(ValueError, match="batch_rows is 0"):
        check(policy, loss, td, batch_rows=0)
    with pytest.raises(ValueError, match="centred is 'prompt'"):
        check(policy, loss, td, centred="prompt")
