"""Options that published code needs, by plain arithmetic; and the recipes' numbers against those of their sources."""

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

import diffrl
from diffrl import keys, recipes
from diffrl.configs.cli import settings
from diffrl.errors import InputError
from diffrl.finetuning.build import build_recipe
from diffrl.finetuning.credit.critic import LearnedCritic
from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.credit.standardised import RewardsToGo, Standardised
from diffrl.finetuning.evaluation import EarlyStop, TuningEvaluation
from diffrl.finetuning.finetuner import Iterations
from diffrl.finetuning.methods.ddpo import DDPOLoss, PPOClip, Reinforce
from diffrl.finetuning.methods.sdpo import RewardDifference, SDPOLoss
from diffrl.finetuning.placement.dense import Dense
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Regulariser
from diffrl.finetuning.rollouts.chains import Rollouts, collect_rollout
from diffrl.finetuning.updates.samples import SampleUpdates
from diffrl.finetuning.updates.steps import Updates
from diffrl.training.optim import FinetuningOptim
from tests.finetuning.test_ddpo_sdpo import Given, steps
from tests.finetuning.test_updates import numbered, seen
from tests.kit.configs import composed
from tests.kit.oracles import generator


class Line(torch.nn.Module):
    """D(x) = x - shift·t, on the flow: a velocity that a parameter moves."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.process, self.shift = diffrl.Flow(shift=3.0), torch.nn.Parameter(torch.tensor(shift))

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return x_t - self.shift * t[:, None]


def flow_policy(shift: float) -> DenoisingPolicy:
    return DenoisingPolicy(Line(shift), diffrl.FlowSDE(a=0.7), num_steps=10, reduction="mean")


# Flow-GRPO


def test_the_kl_by_time_is_that_of_flow_grpos_code() -> None:
    """(mean over dims of) |m - m_ref|²/(2 sd²) with sd = a √(t/(1-t)), and at t = 1 the next level in place of t."""
    policy, base = flow_policy(0.5), flow_policy(0.2)
    td = collect_rollout(policy, (6,), batch_size=8, generator=generator(0)).reshape(-1)
    td[keys.ADVANTAGE] = torch.zeros(len(td), 1)
    i = td[keys.INDEX].squeeze(-1)
    t, s = policy.grid[i], policy.grid[i + 1]
    m, m_ref = (p.law(td[keys.X_T], i).mean.detach() for p in (policy, base))
    sd = 0.7 * (t / (1 - torch.where(t == 1, s, t))).sqrt()
    published = (m - m_ref).square().mean(1) / (2 * sd.square())
    exact = (m - m_ref).square().mean(1) / (2 * sd.square() * (t - s))
    for by_time, expected in ((True, published), (False, exact)):
        out = DDPOLoss(policy, reference=base, kl_coef=0.04, kl_by_time=by_time)(td)
        assert float(out["loss_kl"].detach()) == pytest.approx(0.04 * float(expected.mean()), rel=1e-4)
        assert float(out["kl"]) == pytest.approx(float(exact.mean()), rel=1e-4)
    assert float(exact.mean() / published.mean()) > 4


def test_the_last_steps_may_be_left_out_of_training() -> None:
    chains = numbered(4, 10, deterministic=(9,))
    for order in ("trajectory", "step"):
        found = torch.cat([m.flatten(0, 1) for m in seen(Updates(order, drop_last=1, minibatches=2), chains)])
        assert sorted(map(tuple, found.tolist())) == [(b, i) for b in range(4) for i in range(8)]
    some = seen(Updates(minibatches=1, drop_last=2, last=3), chains)[0]
    assert (some[..., 1].sort(1).values == torch.tensor([4, 5, 6])).all()
    updates = Updates("step", minibatches=2, drop_last=1)
    assert updates.count(9) == 16 == len(seen(updates, chains))
    assert updates.refuses(flow_policy(0.1)) is None
    assert "only 10 steps are stochastic" in str(Updates(drop_last=10).refuses(flow_policy(0.1)))
    with pytest.raises(ValueError, match="no step is stochastic but the last 9"):
        seen(Updates(drop_last=9), chains)


# SDPO


@pytest.mark.parametrize(
    ("rho", "expected"),
    [((2e-4, -3e-4), 1.0), ((-2e-4, 3e-4), 0.0), ((5e-5, -5e-5), 0.0), ((2e-4, 0.5e-4), 1.0)],
)
def test_sdpos_clip_fraction_is_the_share_of_pairs_whose_clipped_square_is_larger(
    rho: tuple[float, float], expected: float
) -> None:
    """Both ratios are beyond ε in the second case, but the clip acts only where it makes the loss larger."""
    policy: Any = Given(*rho)
    assert float(SDPOLoss(policy)(steps([1.5, -0.5]))["clip_fraction"]) == expected
    assert float(SDPOLoss(policy, clip_range=0)(steps([1.5, -0.5]))["clip_fraction"]) == 0


# DDPO's tracker


def a_rollout(B: int, K: int = 3) -> TensorDict:
    cond = torch.arange(B)[:, None].expand(B, K) % 2
    return TensorDict({keys.COND: cond}, [B, K])


def test_without_a_tracker_a_rollout_has_its_own_statistics() -> None:
    """(R - mean)/std of this rollout alone, whatever came before and whatever the prompts."""
    credit = Standardised(per="rollout")
    to_go = RewardsToGo(per="rollout", gamma=1.0)
    for scale in (1.0, 50.0):
        r = torch.randn(16, 3, 1, generator=generator(1)) * scale
        R = r.sum((1, 2))
        expected = (R - R.mean()) / (R.std(correction=0) + 1e-6)
        torch.testing.assert_close(credit(a_rollout(16), r)[:, 0, 0], expected)
        G = r.flip(1).cumsum(1).flip(1)[..., 0]
        expected = (G - G.mean(0)) / (G.std(0, correction=0) + 1e-6)
        torch.testing.assert_close(to_go(a_rollout(16), r)[..., 0], expected)
    assert credit.state_dict() == {} and credit.centred_over(one_condition=False) == "batch"


# Recipes by configuration

PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15_ddpo": {
        "recipe": recipes.ddpo_is(
            rollouts=Rollouts(256, at_once=8),
            credit=Standardised(buffer=16, min_count=16),
            updates=Updates(minibatches=4, micro_batch=8),
            surrogate=PPOClip(1e-4, 5.0),
        ),
        "optim": FinetuningOptim(lr=3e-4),
        "model": {"guidance_scale": 5.0, "lora_rank": 4, "lora_alpha": None, "train_unconditional": True},
        "steps": (50, 100),
    },
    "sd_turbo_sdpo": {
        "recipe": recipes.sdpo(
            rollouts=Rollouts(256, pairs=True, at_once=8),
            placement=Dense(interior=False, guarded=False),
            updates=Updates("step", minibatches=2, micro_batch=8),
            surrogate=RewardDifference(0.99, 1.0, 1e-4, 5.0),
        ),
        "optim": FinetuningOptim(lr=1e-4),
        "model": {"guidance_scale": 1.0, "lora_rank": 4},
        "steps": (50, 100),
    },
    "sd35_flow_grpo": {
        "recipe": recipes.ddpo_is(
            rollouts=Rollouts(1152, group_size=24, at_once=24),
            credit=GroupRelative("global"),
            updates=Updates(minibatches=2, drop_last=1, micro_batch=24),
            surrogate=PPOClip(1e-4, 5.0),
            regulariser=Regulariser(0.04, by_time=True),
        ),
        "optim": FinetuningOptim(lr=3e-4),
        "model": {"guidance_scale": 4.5, "lora_rank": 32, "lora_alpha": 64, "train_unconditional": False},
        "steps": (10, 1000),
    },
    "lcm_ddpo": {
        "recipe": recipes.ddpo_is(
            rollouts=Rollouts(32, at_once=8),
            updates=Updates(minibatches=1, micro_batch=8),
            surrogate=PPOClip(1e-4, 10.0),
        ),
        "optim": FinetuningOptim(lr=1e-4, weight_decay=0.0, clip_norm=5.0),
        "model": {"guidance_scale": 8.0, "lora_rank": 8, "lora_alpha": None},
        "steps": (8, 1000),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_numbers_of_its_source(name: str) -> None:
    expected = PUBLISHED[name]
    config = settings(composed(f"experiment={name}", name="finetune"), [])
    assert build_recipe(config) == expected["recipe"]
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config["optim"].items()}
    assert FinetuningOptim(**options) == expected["optim"]
    assert {key: config["model"][key] for key in expected["model"]} == expected["model"]
    assert (config["policy"]["num_steps"], config["loop"]["iterations"]) == expected["steps"]
    assert config["policy"]["reduction"] == "mean"


def test_the_default_optimiser_is_ddpos() -> None:
    """config/base.py of its code: rate, decay, betas, clipping, and no schedule."""
    optim = FinetuningOptim()
    assert (optim.lr, optim.weight_decay, optim.betas, optim.clip_norm) == (3e-4, 1e-4, (0.9, 0.999), 1.0)
    assert [optim.factor(step, 100) for step in (0, 50, 99)] == [1.0, 1.0, 1.0]


# Numbers from outside

POLICY: dict[str, Any] = {
    "denoiser": Line(0.0),
    "sampler": diffrl.FlowSDE(),
    "num_steps": 4,
    "reduction": "mean",
}
PLACES: list[tuple[Any, str, dict[str, Any]]] = [
    *(
        (Iterations, name, {})
        for name in ("iterations", "eval_every", "checkpoint_every", "keep_checkpoints")
    ),
    *((FinetuningOptim, name, {}) for name in ("lr", "weight_decay", "warmup_steps", "clip_norm")),
    *(
        (Updates, name, {})
        for name in ("minibatches", "passes", "last", "drop_last", "fraction", "micro_batch")
    ),
    *((SampleUpdates, name, {}) for name in ("draws", "minibatches", "passes", "micro_batch")),
    *((Rollouts, name, {}) for name in ("trajectories", "group_size", "at_once")),
    *((Standardised, name, {}) for name in ("buffer", "min_count")),
    (RewardsToGo, "gamma", {}),
    *((LearnedCritic, name, {}) for name in ("lmbda", "gamma", "lr", "passes", "hidden")),
    *((Regulariser, name, {}) for name in ("kl_coef", "decay")),
    *((PPOClip, name, {}) for name in ("clip_range", "advantage_clip")),
    (Reinforce, "advantage_clip", {}),
    *(
        (RewardDifference, name, {})
        for name in ("temporal_weight", "log_scale", "clip_range", "advantage_clip")
    ),
    *((TuningEvaluation, name, {}) for name in ("samples", "at_once")),
    *((EarlyStop, name, {}) for name in ("patience", "max_kl", "min_diversity")),
    *((DenoisingPolicy, name, POLICY) for name in ("num_steps", "std_floor")),
    *((DDPOLoss, name, {"policy": Given(0.0)}) for name in ("clip_range", "advantage_clip", "kl_coef")),
    *((SDPOLoss, name, {"policy": Given(0.0)}) for name in ("temporal_weight", "log_scale", "clip_range")),
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", [1]])
@pytest.mark.parametrize(("make", "name", "given"), PLACES)
def test_a_number_that_is_none_is_named(make: Any, name: str, given: dict[str, Any], value: Any) -> None:
    with pytest.raises(InputError, match=rf"^([a-z_]+\.)?{name} is "):
        make(**{**given, name: value})
