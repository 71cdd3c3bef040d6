"""TD-EDM against the published formula, written out pair by pair."""

import copy
import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.objectives import ValueLoss, sample_td_edm_pairs, td_edm_loss
from tests.kit.networks import Net
from tests.kit.oracles import randn

SIGMA_MIN, SIGMA_MAX, RHO, N, SD = 0.002, 80.0, 7.0, 18, 0.5
WEIGHTS = ["pairwise", "edm", "sum_sq", "sum", "none"]
RELEASED, TEXT = {"span": 3.0, "stride": 0.2}, {"span": 1.0, "stride": 0.25}


def losses(
    event_shape: tuple[int, ...], dtype: torch.dtype, dropout: float = 0.0, **options: Any
) -> tuple[ValueLoss, nn.Module, nn.Module]:
    """The loss, its network, and what its target network was before the two went apart."""
    torch.manual_seed(0)
    denoiser = Denoiser(Net(event_shape, dropout), EDM(), SD).to(dtype)
    loss = td_edm_loss(denoiser, **options)
    SoftUpdate(loss, tau=0.001)
    target = copy.deepcopy(denoiser.network).eval()
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return loss, denoiser.network, target


def grid(index: float) -> float:
    """σ of a real-valued index, clamped to [σ_min, σ_max]."""
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return min(max((high + index / (N - 1) * (low - high)) ** RHO, SIGMA_MIN), SIGMA_MAX)


def index_of(sigma: float) -> float:
    sigma = min(max(sigma, SIGMA_MIN), SIGMA_MAX)
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return (sigma ** (1 / RHO) - high) / (low - high) * (N - 1)


def loss_by_hand(
    online: nn.Module,
    target: nn.Module,
    x0: Tensor,
    sigmas: list[float],
    noise: Tensor,
    fresh_noise: Tensor,
    *,
    coupling: str,
    span: float,
    stride: float,
    weight: str,
    c: float,
    cond: Tensor | None = None,
) -> Tensor:
    def denoised(network: nn.Module, x: Tensor, sigma: float, j: int) -> Tensor:
        total = sigma**2 + SD**2
        c_noise = torch.full((1,), math.log(sigma) / 4, dtype=x.dtype)
        F_x = network(x[None] / math.sqrt(total), c_noise, None if cond is None else cond[j : j + 1])[0]
        return SD**2 / total * x + sigma * SD / math.sqrt(total) * F_x

    terms = []
    for j, sigma_t in enumerate(sigmas):
        i = index_of(sigma_t)
        sigma_next = grid(i + span)
        if coupling == "markov":
            x_next = x0[j] + sigma_next * noise[j]
            x_t = x_next + math.sqrt(max(sigma_t**2 - sigma_next**2, 0.0)) * fresh_noise[j]
        else:
            x_t, x_next = x0[j] + sigma_t * noise[j], x0[j] + sigma_next * noise[j]
        power = 2 if coupling == "markov" else 1
        A = 1 - (grid(i + stride) / sigma_t) ** power
        A_next = 1 - (grid(i + span + stride) / sigma_next) ** power
        c_out, c_next = (s * SD / math.sqrt(s**2 + SD**2) for s in (sigma_t, sigma_next))
        error = x0[j] - denoised(online, x_t, sigma_t, j)
        L_den = (sigma_t**2 + SD**2) / (sigma_t * SD) ** 2 * (error**2).mean()
        if SIGMA_MIN <= sigma_t <= SIGMA_MAX and i <= (N - 1) - (span + stride):
            with torch.no_grad():
                e_next = A_next * (x0[j] - denoised(target, x_next, sigma_next, j))
            w = {
                "pairwise": 1 / (A**2 * c_out**2 + A_next**2 * c_next**2),
                "edm": 1 / max(A**2 * c_out**2, 1e-8),
                "sum_sq": 1 / max(A**2 + A_next**2, 0.01),
                "sum": 1 / max(A + A_next, 0.01),
                "none": 1.0,
            }[weight]
            terms.append(w * ((A * error - e_next) ** 2).mean() + c * L_den)
        else:
            terms.append((1 + c) * L_den)
    return torch.stack(terms).mean()


def log_normal(B: int, dtype: torch.dtype) -> Tensor:
    """Noise levels, with invalid ones on either side as far as B reaches."""
    sigma = (-1.2 + 1.2 * randn(B, seed=3, dtype=dtype)).exp()
    # float32 rounds x0 - D by 1e-8, which is 1e-5 of it at σ = 0.0015
    low = 0.0015 if dtype == torch.float64 else 0.05
    edges = torch.tensor([0.3, low, 95.0], dtype=dtype)[:B]
    return torch.cat([edges, sigma[len(edges) :]])


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("coupling", ["markov", "shared"])
@pytest.mark.parametrize("pairs", [RELEASED, TEXT])
@pytest.mark.parametrize(("B", "event_shape"), [(24, (2,)), (1, (2,)), (5, (1, 3, 4))])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_is_the_published_formula(
    dtype: torch.dtype,
    tolerance: float,
    B: int,
    event_shape: tuple[int, ...],
    pairs: dict[str, float],
    coupling: str,
    weight: str,
) -> None:
    x0 = SD * randn(B, *event_shape, seed=1, dtype=dtype)
    sigma = log_normal(B, dtype)
    noise, fresh_noise = (randn(B, *event_shape, seed=s, dtype=dtype) for s in (4, 5))
    drawn = sample_td_edm_pairs(
        EDM(), x0, coupling=coupling, sigma=sigma, noise=noise, fresh_noise=fresh_noise, **pairs
    )
    assert drawn.batch_size == (B, 1)
    for c in (0.0, 0.5, 1.0):
        loss, online, target = losses(event_shape, dtype, weight=weight, denoising_coef=c)
        value = loss(drawn)["loss_value"]
        by_hand = loss_by_hand(
            online,
            target,
            x0,
            sigma.tolist(),
            noise,
            fresh_noise,
            coupling=coupling,
            weight=weight,
            c=c,
            **pairs,
        )
        assert value.item() == pytest.approx(by_hand.item(), rel=tolerance)
    if dtype == torch.float64:
        grads = (
            torch.autograd.grad(v, list(online.parameters()), allow_unused=True) for v in (value, by_hand)
        )
        for a, b in zip(*grads, strict=True):
            assert a is b is None or (a - b).norm() <= 1e-11 * b.norm()


@pytest.mark.parametrize("coupling", ["markov", "shared"])
def test_labels_and_evaluation_mode(coupling: str) -> None:
    """The target sees the same labels, and drops no units."""
    B, x0, cond = 6, SD * randn(6, 2), torch.tensor([0, 1, 2, 2, 1, 0])
    noise = {
        "noise": randn(B, 2, seed=4),
        "fresh_noise": randn(B, 2, seed=5) if coupling == "markov" else None,
    }
    sigma = log_normal(B, torch.float64)
    drawn = sample_td_edm_pairs(EDM(), x0, coupling=coupling, sigma=sigma, cond=cond, **noise)
    loss, online, target = losses((2,), torch.float64)
    by_hand = loss_by_hand(
        online,
        target,
        x0,
        sigma.tolist(),
        randn(B, 2, seed=4),
        randn(B, 2, seed=5),
        coupling=coupling,
        weight="edm",
        c=0.5,
        cond=cond,
        **RELEASED,
    )
    assert loss(drawn)["loss_value"].item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert loss.network_evaluations == 2 * B
    assert all(p.grad is None for p in target.parameters())

    dropping, online, _ = losses((2,), torch.float64, dropout=0.5)
    online.eval()
    values = {dropping(drawn)["loss_value"].item() for _ in range(3)}
    online.train()
    noisy = {dropping(drawn)["loss_value"].item() for _ in range(3)}
    assert len(values) == 1 and len(noisy) == 3


@pytest.mark.parametrize(("pairs", "share", "lowest"), [(RELEASED, 0.884, 0.0716), (TEXT, 0.998, 0.0101)])
def test_validity(pairs: dict[str, float], share: float, lowest: float) -> None:
    n = 200_000
    drawn = sample_td_edm_pairs(EDM(), torch.zeros(n, 1), generator=torch.Generator().manual_seed(0), **pairs)
    valid, t, t_next = drawn["valid"], drawn["t"], drawn["next", "t"]
    assert valid.double().mean().item() == pytest.approx(
        share, abs=4 * math.sqrt(share * (1 - share) / n) + 5e-4
    )
    assert (drawn["A"][valid] > 0).all() and (drawn["next", "A"][valid] > 0).all()
    assert (t_next[valid] < t[valid]).all()
    assert t_next.min() >= SIGMA_MIN * (1 - 1e-6)

    edges = torch.tensor(
        [lowest * 0.995, lowest * 1.005, SIGMA_MAX, SIGMA_MAX * 1.001, 1e-3], dtype=torch.float64
    )
    at_edges = sample_td_edm_pairs(EDM(), torch.zeros(5, 1, dtype=torch.float64), sigma=edges, **pairs)
    assert at_edges["valid"].flatten().tolist() == [False, True, True, False, False]
    assert torch.equal(at_edges["t"].flatten(), edges)  # not clamped


def test_draws_are_the_level_then_the_noises() -> None:
    x0 = randn(7, 1, 2, 2)
    for coupling in ("markov", "shared"):
        drawn = sample_td_edm_pairs(EDM(), x0, coupling=coupling, generator=torch.Generator().manual_seed(8))
        g = torch.Generator().manual_seed(8)
        level = torch.randn(7, generator=g, dtype=torch.float64)
        noise, fresh = (torch.randn(7, 1, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
        sigma = (-1.2 + 1.2 * level).exp()
        fresh_noise = fresh if coupling == "markov" else None
        given = sample_td_edm_pairs(
            EDM(), x0, coupling=coupling, sigma=sigma, noise=noise, fresh_noise=fresh_noise
        )
        for key in drawn.keys(True, True):
            torch.testing.assert_close(drawn[key], given[key], rtol=1e-14, atol=0)


def test_marginals_are_those_of_the_process() -> None:
    """x_t - x0 has standard deviation σ_t at both ends, also where the pair is invalid."""
    sigma = torch.full((40_000,), 0.0)
    for level in (0.01, 0.5, 90.0):
        for coupling in ("markov", "shared"):
            x0 = torch.zeros(len(sigma), 1, dtype=torch.float64)
            drawn = sample_td_edm_pairs(
                EDM(), x0, coupling=coupling, sigma=sigma + level, generator=torch.Generator().manual_seed(2)
            )
            for states in (drawn, drawn["next"]):
                ratio = (states["x_t"] / states["t"]).std().item()
                assert ratio == pytest.approx(1.0, abs=0.02)
            correlation = torch.corrcoef(torch.stack([drawn["x_t"], drawn["next", "x_t"]]).view(2, -1))[
                0, 1
            ].item()
            wanted = 1.0 if coupling == "shared" else (drawn["next", "t"] / drawn["t"])[0].item()
            assert correlation == pytest.approx(wanted, abs=0.02)


def test_a_pair_is_a_cut_chain_of_one_transition() -> None:
    drawn = sample_td_edm_pairs(EDM(), randn(3, 2), generator=torch.Generator().manual_seed(0))
    reached = drawn["next"]
    assert reached["done"].all() and reached["truncated"].all() and not reached["terminated"].any()
    mu, mu_next = (s["A"] * drawn["x0"] + s["kappa"] * s["x_t"] for s in (drawn, reached))
    torch.testing.assert_close(reached["reward"], mu - mu_next)
    loss, *_ = losses((2,), torch.float64, denoising_coef=0.0)
    del drawn["valid"]
    hidden: TensorDict = drawn.exclude("x0")
    assert loss(hidden)["loss_value"].item() == pytest.approx(loss(drawn)["loss_value"].item(), rel=1e-9)


def test_published_target_update() -> None:
    """θ⁻ ← 0.999 θ⁻ + 0.001 θ after each step."""
    loss, online, before = losses((2,), torch.float64)
    update = SoftUpdate(loss, tau=0.001)  # attaching copies the network as it stands
    start = [p.clone() for p in online.parameters()]
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1)
    for _ in range(2):
        update.step()
    averages = dict(loss.target_value_network_params.flatten_keys(".").items())
    for name, p, old in zip(dict(online.named_parameters()), online.parameters(), start, strict=True):
        by_hand = 0.999**2 * old + (1 - 0.999**2) * p
        torch.testing.assert_close(
            averages[f"module.denoiser.network.{name}"], by_hand, rtol=1e-12, atol=1e-14
        )
    assert before is not online


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"process": DDPM()}, ValueError, "the process is DDPM: TD-EDM is defined for EDM"),
        ({"coupling": 0.5}, ValueError, "TD-EDM is defined for 'markov' and 'shared'"),
        ({"coupling": "shred"}, ValueError, "coupling is 'shred'"),
        ({"span": 0.0}, ValueError, "span is 0.0"),
        ({"stride": -0.2}, ValueError, "stride is -0.2"),
        ({"x0": torch.zeros(3, 2, dtype=torch.uint8)}, TypeError, "x0 has dtype torch.uint8"),
        ({"x0": torch.zeros(3)}, ValueError, "x0 has shape"),
        ({"sigma": torch.ones(2)}, ValueError, "sigma has shape"),
        ({"sigma": torch.ones(3, 1)}, ValueError, "sigma has shape"),
        ({"noise": torch.ones(2)}, ValueError, "noise has shape"),
        ({"fresh_noise": torch.ones(2)}, ValueError, "fresh_noise has shape"),
        ({"cond": torch.ones(2)}, ValueError, "cond has 2 entries"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample_td_edm_pairs(**{"process": EDM(), "x0": torch.zeros(3, 2), **options})
