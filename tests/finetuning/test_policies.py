"""Policies from kernels: log-probabilities against torch and by hand, ratios, deterministic steps, precision."""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from diffrl import keys
from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.samplers.base import GaussianSampler, Noise
from diffrl.diffusion.samplers.consistency import Multistep
from diffrl.diffusion.samplers.ddim import DDIM, Ancestral
from diffrl.diffusion.samplers.ode import Euler, Heun
from diffrl.diffusion.samplers.sde import CPS, FlowSDE
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.finetuning.methods.ddpo import DDPOLoss
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import collect_rollout
from tests.kit.networks import random_denoiser
from tests.kit.oracles import generator, randn

KERNELS: list[tuple[Schedule, GaussianSampler]] = [
    (EDM(), Ancestral()),
    (VP("cosine"), DDIM(0.4)),
    (DDPM(), Ancestral()),
    (Flow(), FlowSDE(0.7)),
    (Flow(3.0), CPS(0.5)),
    (EDM(), Multistep()),
]
kernels = pytest.mark.parametrize(
    ("process", "sampler"), KERNELS, ids=lambda p: str(p).partition("(kind")[0][:40]
)


def exact(process: Schedule, D: int = 3) -> GaussianDenoiser:
    return GaussianDenoiser(process, torch.full((D,), 0.3), 0.5 * torch.eye(D))


def policy_of(
    process: Schedule,
    sampler: GaussianSampler,
    *,
    K: int = 6,
    reduction: Literal["mean", "sum"] = "mean",
    std_floor: float = 0.0,
    denoiser: nn.Module | None = None,
) -> DenoisingPolicy:
    denoiser = exact(process) if denoiser is None else denoiser
    return DenoisingPolicy(denoiser, sampler, num_steps=K, reduction=reduction, std_floor=std_floor)


def rollout(policy: DenoisingPolicy, B: int = 8, *event: int, **options: Any) -> TensorDict:
    return collect_rollout(policy, event or (3,), batch_size=B, generator=generator(1), **options)


# Log-probabilities


@kernels
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_probabilities_are_those_of_torch(
    process: Schedule, sampler: GaussianSampler, reduction: Literal["mean", "sum"]
) -> None:
    """From the formulas of the process alone: clean estimate, kernel, torch's normal."""
    policy = policy_of(process, sampler, reduction=reduction)
    td = rollout(policy)
    grid = sampler.grid(process, 6)
    for k in range(6):
        x, a = td[keys.X_T][:, k], td[keys.ACTION][:, k]
        D_x = exact(process)(x, grid[k].expand(8))
        mean, std = sampler.law(process, x, D_x, grid[k], grid[k + 1])
        assert bool((td[keys.TRAINABLE][:, k] == (std > 0)).all())
        if std > 0:
            each = Normal(mean, std.float()).log_prob(a)
            expected = each.mean(1) if reduction == "mean" else each.sum(1)
            torch.testing.assert_close(td[keys.ACTION_LOG_PROB][:, k], expected, rtol=1e-4, atol=1e-4)
        else:
            assert not td[keys.ACTION_LOG_PROB][:, k].any()
            torch.testing.assert_close(a, mean, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Golden(DDIM):
    """DDIM on a grid of chosen ᾱ: 0.25, then 0.64, on the cosine process, where ᾱ = cos²(½π t)."""

    def grid(self, process: Schedule, num_steps: int) -> Tensor:
        alpha_bar = torch.tensor([0.25, 0.64, 1.0], dtype=torch.float64)
        return alpha_bar.sqrt().arccos() / (math.pi / 2)


class FromNoise(nn.Module):
    """The clean estimate of a noise estimate of no meaning."""

    process = VP("cosine")

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        eps = torch.tensor([0.2, 0.1])
        return (x - self.process.sigma(t)[:, None] * eps) / self.process.alpha(t)[:, None]


@pytest.mark.parametrize(("reduction", "dims"), [("mean", 1), ("sum", 2)])
def test_ddim_step_by_hand(reduction: Literal["mean", "sum"], dims: int) -> None:
    """ᾱ = 0.25, ᾱ' = 0.64, η = 1, x = (1, -0.5), ε̂ = (0.2, 0.1), x' = (0.5, 0)."""
    policy = DenoisingPolicy(FromNoise(), Golden(1.0), num_steps=2, reduction=reduction)
    state = torch.tensor([[1.0, -0.5]]), torch.tensor([0])
    law = policy.law(*state)
    torch.testing.assert_close(
        policy.estimate(*state), torch.tensor([[1.65359, -1.17321]]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(law.mean, torch.tensor([[1.374833, -0.912583]]), rtol=0, atol=1e-6)
    assert float(law.std) == pytest.approx(0.5408327, abs=1e-6)
    log_p = policy.log_prob(law, torch.tensor([[0.5, 0.0]]))
    assert float(log_p) == pytest.approx(-1.6702263 * dims, abs=2e-6)


# Ratios


@torch.no_grad()
@kernels
@pytest.mark.parametrize("sizes", [(48,), (1, 47), (7, 20, 21)], ids=str)
def test_ratio_is_one_before_the_first_update(
    process: Schedule, sampler: GaussianSampler, sizes: tuple[int, ...]
) -> None:
    """The stored action has the stored log-probability, in shuffled minibatches of any size."""
    policy = policy_of(process, sampler, denoiser=random_denoiser(process, 3).eval())
    td = rollout(policy).reshape(-1)
    td = td[torch.randperm(48, generator=generator(2))]
    for part in td.split(sizes):
        law = policy.law(part[keys.X_T], part[keys.INDEX].squeeze(-1))
        log_ratio = policy.log_prob(law, part[keys.ACTION]) - part[keys.ACTION_LOG_PROB]
        # a batch of another size may take another kernel, whose last bit a small std makes larger
        assert float(log_ratio.abs().max()) < 1e-4


def test_ratio_is_one_on_images_with_labels() -> None:
    denoiser = random_denoiser(Flow(), 1, 4, 4, num_classes=3).eval()
    policy = policy_of(Flow(), CPS(0.7), denoiser=denoiser)
    td = rollout(policy, 8, 1, 4, 4, cond=torch.tensor([0, 1, 2, 0]), pairs=True)
    figures = DDPOLoss(policy)(td.set(keys.ADVANTAGE, torch.ones(8, 6, 1)))
    assert float(figures["ratio"]) == pytest.approx(1, abs=1e-6)
    assert not figures["clip_fraction"] and float(figures["approx_kl"]) < 1e-12
    other = td.clone().set(keys.COND, (td[keys.COND] + 1) % 3)
    assert float(DDPOLoss(policy)(other)["approx_kl"]) > 1e-6  # the label is a part of the state


# Deterministic steps and the floor


def test_the_step_onto_clean_data_is_deterministic() -> None:
    denoiser = random_denoiser(VP(), 3)
    policy = policy_of(VP(), Ancestral(), denoiser=denoiser)
    td = rollout(policy)
    assert td[keys.TRAINABLE][:, :, 0].tolist() == [[True] * 5 + [False]] * 8
    assert not td[keys.ACTION_LOG_PROB][:, -1].any()
    torch.testing.assert_close(td[keys.ACTION][:, -1], td[keys.X0_HAT][:, -1])
    last = td[:, -1]
    policy.log_prob(
        policy.law(last[keys.X_T], last[keys.INDEX].squeeze(-1)), last[keys.ACTION]
    ).sum().backward()
    for parameter in denoiser.parameters():  # nothing is learnt there, and nothing is NaN
        assert parameter.grad is not None and not parameter.grad.any()


def test_a_chain_without_noise_has_no_step_to_train() -> None:
    for sampler in (DDIM(0.0), Euler(), CPS(0.0), FlowSDE(0.0)):
        policy = policy_of(Flow(), sampler)
        td = rollout(policy)
        assert not td[keys.TRAINABLE].any() and not td[keys.ACTION_LOG_PROB].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_floor_holds_in_the_draw_and_in_its_density(reduction: Literal["mean", "sum"]) -> None:
    """Steps of less noise get the floor, the others keep their own."""
    free, floored = (policy_of(Flow(), Ancestral(), std_floor=f, reduction=reduction) for f in (0.0, 0.2))
    x, index, z = randn(6, 3, dtype=torch.float32), torch.arange(6), randn(6, 3, seed=1, dtype=torch.float32)
    own, law = free.law(x, index), floored.law(x, index)
    assert torch.equal(law.std, own.std.clamp(min=0.2)) and 0 < int((own.std < 0.2).sum()) < 6
    assert torch.equal(law.mean, own.mean)
    action, _, _ = floored.act(x, index, noise=lambda like: z)
    torch.testing.assert_close(action, law.mean + law.std[:, None] * z)
    each = Normal(law.mean, law.std[:, None]).log_prob(action)
    expected = each.mean(1) if reduction == "mean" else each.sum(1)
    torch.testing.assert_close(floored.log_prob(law, action), expected)
    assert bool(rollout(floored)[keys.TRAINABLE].all())


# Precision


class Coarse(nn.Module):
    """A denoiser that answers in bfloat16."""

    process = Flow()

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return (self.scale * x * (1 - t[:, None])).bfloat16()


def test_a_coarse_denoiser_leaves_latents_and_log_probabilities_in_float32() -> None:
    """What bfloat16 rounds is the clean estimate alone: a rounded latent would cost 1e-3 of log-probability."""
    policy = policy_of(Flow(), Ancestral(), denoiser=Coarse())
    td = rollout(policy)
    for key in (keys.X_T, keys.ACTION, keys.ACTION_LOG_PROB, keys.X0_HAT):
        assert td[key].dtype == torch.float32
    assert not torch.equal(td[keys.ACTION], td[keys.ACTION].bfloat16().float())
    log_p = policy.get_dist(td).log_prob(td[keys.ACTION])
    torch.testing.assert_close(log_p, td[keys.ACTION_LOG_PROB], rtol=0, atol=1e-6)


def test_autocast_leaves_the_law_in_float32() -> None:
    policy = policy_of(Flow(), Ancestral(), denoiser=random_denoiser(Flow(), 3))
    with torch.autocast("cpu", torch.bfloat16):
        td = rollout(policy)
        again = policy.get_dist(td).log_prob(td[keys.ACTION])
    assert td[keys.ACTION].dtype == td[keys.ACTION_LOG_PROB].dtype == torch.float32
    torch.testing.assert_close(again, td[keys.ACTION_LOG_PROB], rtol=0, atol=1e-6)
    exactly = policy.get_dist(td).log_prob(td[keys.ACTION])
    assert not torch.equal(exactly, again)  # the network did run in bfloat16


# The policy as an actor


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_it_acts_on_tensordicts_of_any_batch(shape: tuple[int, ...]) -> None:
    policy = policy_of(Flow(), CPS(0.7))
    x, index = randn(*shape, 3, dtype=torch.float32), torch.full((*shape, 1), 2)
    td = TensorDict({keys.X_T: x, keys.INDEX: index, keys.T: 1 - index / 6}, shape)
    policy.generator = generator(3)
    td = policy(td)
    z = torch.randn((*shape, 3), generator=generator(3))
    law = policy.law(x.view(-1, 3), index.flatten())
    torch.testing.assert_close(td[keys.ACTION], (law.mean + law.std[:, None] * z.view(-1, 3)).view(*shape, 3))
    assert torch.equal(td[keys.X0_HAT], policy.estimate(x.view(-1, 3), index.flatten()).view(*shape, 3))
    assert td[keys.ACTION_LOG_PROB].shape == shape and td[keys.TRAINABLE].shape == (*shape, 1)
    assert set(policy.out_keys) <= set(td.keys())


def test_one_generator_for_each_state() -> None:
    policy = policy_of(Flow(), CPS(0.7))
    td = TensorDict({keys.X_T: torch.zeros(3, 3), keys.INDEX: torch.tensor([[1], [2], [3]])}, [3])
    policy.generator = [generator(s) for s in (5, 6, 7)]
    together = policy(td)[keys.ACTION]
    policy.generator = generator(6)
    assert torch.equal(policy(td[1:2].clone())[keys.ACTION][0], together[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_its_distribution_is_a_normal(reduction: Literal["mean", "sum"]) -> None:
    policy = policy_of(Flow(), CPS(0.7), reduction=reduction)
    td = rollout(policy)[:, :-1]
    dist, dims = policy.get_dist(td), 3 if reduction == "mean" else 1
    law = policy.law(td[keys.X_T].reshape(-1, 3), td[keys.INDEX].flatten())
    witness = Independent(Normal(law.mean.view(8, 5, 3), law.std.view(8, 5, 1).expand(8, 5, 3)), 1)
    assert (dist.batch_shape, dist.event_shape) == (witness.batch_shape, witness.event_shape)
    a = randn(8, 5, 3, dtype=torch.float32)
    torch.testing.assert_close(dist.log_prob(a), witness.log_prob(a) / dims, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dist.entropy(), witness.entropy() / dims, rtol=1e-5, atol=1e-5)
    for value in (dist.mean, dist.mode, dist.deterministic_sample):
        assert torch.equal(value, law.mean.view(8, 5, 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = dist.rsample((4000,))
    assert draws.shape == (4000, 8, 5, 3)
    standard = (draws - dist.mean) / law.std.view(8, 5, 1)
    assert float(standard.mean(0).abs().max()) < 5 / 4000**0.5
    assert float((standard.var(0) - 1).abs().max()) < 5 * (2 / 4000) ** 0.5


def test_the_distribution_of_a_deterministic_step_weighs_nothing() -> None:
    policy = policy_of(Flow(), CPS(0.7), reduction="sum")
    dist = policy.get_dist(rollout(policy)[:, -1])
    assert not dist.entropy().any() and not dist.log_prob(torch.ones(8, 3)).any()


def test_evaluations_are_counted() -> None:
    calls = 0

    class Counting(nn.Module):
        process = Flow()

        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            nonlocal calls
            calls += len(x)
            assert t.dtype == torch.float32 and t.shape == x.shape[:1]
            return 0 * x

    policy = policy_of(Flow(), CPS(0.7), denoiser=Counting())
    td = rollout(policy, 8)
    assert policy.nfe == calls == 8 * 6
    policy.get_dist(td)
    assert policy.nfe == calls == 2 * 8 * 6
    DDPOLoss(policy)(td.set(keys.ADVANTAGE, torch.ones(8, 6, 1)))
    assert policy.nfe == calls == 2 * 8 * 6 + 8 * 5  # a loss leaves deterministic steps out
    policy.denoiser.evaluations = 2  # type: ignore[assignment]  # guidance
    policy.get_dist(td)
    assert policy.nfe == calls + 8 * 6 == 4 * 8 * 6 + 8 * 5


def test_gradients_reach_the_denoiser_through_the_log_probability_only() -> None:
    policy = policy_of(Flow(), CPS(0.7), denoiser=Coarse())
    td = policy(TensorDict({keys.X_T: torch.ones(4, 3), keys.INDEX: torch.full((4, 1), 2)}, [4]))
    log_p = policy.get_dist(td).log_prob(td[keys.ACTION].detach())
    (gradient,) = torch.autograd.grad(log_p.sum(), list(policy.denoiser.parameters()))
    assert float(gradient.abs()) > 0
    assert not rollout(policy)[keys.ACTION].requires_grad


def test_a_copy_is_a_policy_of_its_own() -> None:
    """As a frozen reference is made."""
    policy = policy_of(Flow(), CPS(0.7), denoiser=Coarse())
    other = copy.deepcopy(policy)
    with torch.no_grad():
        next(policy.parameters()).mul_(2)
    x, index = torch.ones(4, 3), torch.full((4,), 2)
    assert not torch.equal(policy.law(x, index).mean, other.law(x, index).mean)
    assert torch.equal(other.estimate(x, index), Coarse()(x, other.grid[index].float()).float())


# Errors


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"std_floor": -1.0}, ValueError, "std_floor is -1.0"),
        ({"std_floor": math.nan}, ValueError, "std_floor is nan"),
        ({"sampler": Heun()}, TypeError, r"Heun\(\) has steps without a law"),
        ({"denoiser": nn.Identity()}, ValueError, "give process="),
        ({"num_steps": 0}, ValueError, "num_steps is 0"),
    ],
)
def test_arguments_that_are_refused(change: dict[str, Any], error: type[Exception], says: str) -> None:
    good = {"denoiser": exact(EDM()), "sampler": Ancestral(), "num_steps": 4, "reduction": "mean"}
    with pytest.raises(error, match=says):
        DenoisingPolicy(**{**good, **change})


def test_states_of_another_grid_are_refused() -> None:
    """A policy of 8 levels would take the states of a chain of 6 for less noisy ones."""
    td = rollout(policy_of(Flow(), CPS(0.7), K=6))
    with pytest.raises(ValueError, match="other times than those of the policy's grid of 8 levels"):
        policy_of(Flow(), CPS(0.7), K=8)(td)


def test_generator_count_is_checked() -> None:
    with pytest.raises(ValueError, match="2 generators for 8 samples"):
        collect_rollout(
            policy_of(Flow(), CPS(0.7)), (3,), batch_size=8, generator=Noise.per_sample([0, 1]).generators
        )


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("at_once", [1, 3, 4, 8, 99])
def test_chains_drawn_in_turn_are_those_drawn_together(pairs: bool, at_once: int) -> None:
    process = EDM()
    policy = DenoisingPolicy(
        GaussianDenoiser(process, torch.zeros(2), torch.eye(2)), Ancestral(), num_steps=3, reduction="mean"
    )

    def draw(at_once: int | None) -> TensorDict:
        own = [torch.Generator().manual_seed(j) for j in range(8)]
        return collect_rollout(
            policy,
            (2,),
            batch_size=8,
            pairs=pairs,
            cond=torch.arange(4 if pairs else 8),
            generator=torch.Generator().manual_seed(0) if pairs else own,
            at_once=at_once,
        )

    whole, parts = draw(None), draw(at_once)
    assert set(whole.keys(True)) == set(parts.keys(True)) and whole.shape == parts.shape
    for name in ("group", "cond", "index", "t", "trainable", ("next", "done"), ("next", "group")):
        assert torch.equal(whole[name], parts[name])
    if not pairs:  # a generator for each row
        torch.testing.assert_close(parts["action"], whole["action"], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(parts["x_t"][0::2, 0], parts["x_t"][1::2, 0])
        assert len(parts["x_t"][0::2, 0].unique(dim=0)) == 4
