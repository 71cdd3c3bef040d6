"""Which noise levels are trained: laws of single states, and where windows of chains begin."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives import SoftUpdate

from diffrl import keys
from diffrl.data.registry import DATASETS
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.diffusion.starts import STARTS, CurriculumStarts, LossAwareStarts, Starts, UniformStarts
from diffrl.diffusion.trajectories import ChainSampler, draw_chain, sample_chain
from diffrl.objectives.denoising import sample_log_normal_states, sample_uniform_states
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.scheme import Adaptive, Objective
from diffrl.objectives.td_edm import sample_td_edm_pairs, td_edm_loss
from diffrl.objectives.value import ValueLoss
from diffrl.training.optim import Optim
from diffrl.training.trainer import Average, Length, Target, Trainer
from tests.kit.networks import small_denoiser
from tests.kit.oracles import CONTINUOUS, DISCRETE, generator, randn

PROCESSES = {**CONTINUOUS, **DISCRETE}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def denoise(denoiser: Denoiser, states: TensorDict) -> Tensor:
    return denoiser(states["x_t"].flatten(0, 1), states["t"].flatten()).view_as(states["x_t"])


# Single states


@pytest.mark.parametrize("coupling", ["shared", "markov"])
def test_edm_sees_the_noise_levels_and_noise_of_td_edm(coupling: str) -> None:
    x0 = randn(50, 2)
    pairs = sample_td_edm_pairs(EDM(), x0, coupling=coupling, generator=generator(3))
    states = sample_log_normal_states(EDM(), x0, generator=generator(3))
    torch.testing.assert_close(states["t"], pairs["t"], rtol=1e-14, atol=0)
    if coupling == "shared":
        torch.testing.assert_close(states["x_t"], pairs["x_t"], rtol=1e-13, atol=1e-13)
    else:  # the noise that the pair's later state has
        later, t = pairs["next", "x_t"], pairs["next", "t"]
        n = (states["x_t"] - states["x0"]) / states["t"]
        torch.testing.assert_close(later, pairs["x0"] + t * n, rtol=1e-10, atol=1e-10)


def test_edm_is_the_published_loss() -> None:
    """λ(σ) ‖D - x0‖² with λ = (σ² + σd²)/(σ σd)², which is also what TD-EDM adds to its own."""
    x0, denoiser = randn(40, 2), small_denoiser(EDM(), sigma_data=0.7)
    states = sample_log_normal_states(EDM(), x0, generator=generator(3))
    loss = monte_carlo_loss(denoiser)(states)["loss_value"]
    sigma, D_x = states["t"], denoise(denoiser, states)
    by_hand = ((sigma**2 + 0.7**2) / (sigma * 0.7) ** 2 * (D_x - states["x0"]) ** 2).mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-10, atol=0)

    pairs = sample_td_edm_pairs(EDM(), x0, coupling="shared", generator=generator(3))
    pairs[keys.VALID] = torch.zeros_like(pairs[keys.VALID])
    td = td_edm_loss(denoiser, denoising_coef=0.0)
    SoftUpdate(td, tau=0.01)
    torch.testing.assert_close(td(pairs)["loss_value"], loss, rtol=1e-10, atol=0)


@every_process
@pytest.mark.parametrize("draw", [sample_log_normal_states, sample_uniform_states])
def test_single_states_are_chains_of_one_step(process: Schedule, draw: Callable[..., TensorDict]) -> None:
    options = {"num_steps": 50} if draw is sample_uniform_states else {}
    x0, labels, noise = randn(30, 2), torch.arange(30), randn(30, 2, seed=1)
    states = draw(process, x0, cond=labels, noise=noise, generator=generator(), **options)
    assert states.batch_size == (30, 1) and states["x_t"].dtype == x0.dtype
    t = states["t"].squeeze(-1)
    x_t = process.alpha(t) * x0 + process.sigma(t) * noise
    torch.testing.assert_close(states["x_t"].squeeze(1), x_t)
    assert torch.equal(states["x0"].squeeze(1), x0) and torch.equal(states["cond"].squeeze(1), labels)
    reached = states["next"]
    assert bool(reached["terminated"].all()) and not bool(reached["truncated"].any())
    assert torch.equal(reached["x_t"], states["x0"]) and torch.equal(reached["reward"], states["x0"])
    assert bool((reached["t"] == process.t_clean).all())
    assert set(sample_chain(process, x0, num_steps=3).keys(True, True)) - set(states.keys(True, True)) == {
        "index",
        ("next", "index"),
    }


@pytest.mark.parametrize("process", [EDM(), Flow(), VP()], ids=["edm", "flow", "vp"])
@pytest.mark.parametrize("options", [{}, {"lmbda": 0.3}, {"lmbda": 1.0}, {"n_steps": 2, "gamma": 0.5}])
def test_every_target_of_a_single_state_is_its_datum(process: Schedule, options: dict[str, float]) -> None:
    denoiser = small_denoiser(process)
    draw = {"x0": randn(20, 2), "generator": generator(1)}
    states = sample_log_normal_states(process, **draw)
    td = ValueLoss(denoiser, weight="x0", **options)(states)["loss_value"]
    torch.testing.assert_close(td, (denoise(denoiser, states) - states["x0"]).square().mean())


@pytest.mark.parametrize("process", [EDM(), VP(), Flow()], ids=["edm", "vp", "flow"])
def test_the_noise_to_signal_ratio_is_log_normal(process: Schedule) -> None:
    n = 40_000
    states = sample_log_normal_states(process, randn(n, 1), P_mean=-0.5, P_std=0.8, generator=generator())
    z = (-process.log_snr(states["t"]) / 2).flatten()
    assert float(z.mean()) == pytest.approx(-0.5, abs=5 * 0.8 / n**0.5)
    assert float(z.std()) == pytest.approx(0.8, rel=5 / (2 * n) ** 0.5)
    if isinstance(process, Flow):  # and its logit is normal, by the same numbers
        torch.testing.assert_close(states["t"].logit().flatten(), z, rtol=1e-8, atol=1e-8)


def test_discrete_times_are_those_nearest_to_the_log_normal_draw() -> None:
    process = DDPM(train_steps=100)
    t = sample_log_normal_states(process, randn(500, 1), generator=generator())["t"]
    assert torch.equal(t, t.round()) and 0 <= float(t.min()) < float(t.max()) <= 99


def test_uniform_indices() -> None:
    n = 20_000
    t = sample_uniform_states(DDPM(train_steps=20), randn(n, 1), num_steps=20, generator=generator())["t"]
    counts = t.flatten().long().bincount(minlength=20)
    assert len(counts) == 20 and float((counts - n / 20).abs().max()) < 5 * (n / 20) ** 0.5
    for process, low, high in ((Flow(), 0.01, 1.0), (VP(), 0.001, 0.999)):
        t = sample_uniform_states(process, randn(n, 1), num_steps=100, generator=generator())["t"]
        u = (t.flatten() - low) / (high - low)
        assert 0 <= float(u.min()) < 1e-3 and 0.999 < float(u.max()) <= 1
        assert float(u.mean()) == pytest.approx(0.5, abs=5 / (12 * n) ** 0.5)
        assert float(u.std()) == pytest.approx(12**-0.5, rel=0.03)
    sigma = sample_uniform_states(EDM(), randn(n, 1), generator=generator())["t"].flatten()
    u = (80 ** (1 / 7) - sigma ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert float(u.mean()) == pytest.approx(0.5, abs=5 / (12 * n) ** 0.5)


def test_a_wrong_number_is_named() -> None:
    with pytest.raises(ValueError, match="P_std is -1"):
        sample_log_normal_states(EDM(), randn(2, 1), P_std=-1.0)
    with pytest.raises(ValueError, match="only 100 timesteps"):
        sample_uniform_states(DDPM(train_steps=100), randn(2, 1))
    with pytest.raises(TypeError, match="int64"):
        sample_uniform_states(EDM(), torch.ones(2, 1, dtype=torch.long))


# Starts


def test_uniform_starts_are_those_of_the_chain() -> None:
    chain = Chain(EDM(), num_steps=9, coupling="markov")
    x0 = randn(16, 2)
    ours = ChainSampler(chain, window=2, jitter=False)(x0, cond=None, generator=generator(5))
    theirs = draw_chain(chain, x0, window=2, generator=generator(5))
    for key in ("index", "x_t", ("next", "x_t")):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    assert keys.IMPORTANCE not in ours.keys()


def test_windows_begin_where_they_are_told_to() -> None:
    chain = Chain(VP(), num_steps=9, coupling="markov")
    start = torch.tensor([0, 3, 6, 6])
    drawn = draw_chain(chain, randn(4, 2), window=3, start=start, generator=generator())
    assert drawn["index"].squeeze(-1).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8]]
    assert drawn["next", "terminated"][:, -1, 0].tolist() == [False, False, True, True]


def filled(losses: Tensor, **options: Any) -> LossAwareStarts:
    """Starts 0..T-1 that have seen the losses [T, n], one batch a column."""
    starts = LossAwareStarts(**options)
    for column in losses.T:
        starts.update(torch.arange(len(losses)), column)
    return starts


def test_loss_aware_starts_are_the_published_law() -> None:
    losses = randn(7, 10).abs()
    w = losses.square().mean(1).sqrt()
    by_hand = w / w.sum() * (1 - 0.001) + 0.001 / 7
    torch.testing.assert_close(filled(losses).probabilities(7), by_hand)


def test_only_the_last_losses_count_in_whatever_batches_they_come() -> None:
    """Against a plain list of losses per start."""
    rng = np.random.default_rng(0)
    starts = LossAwareStarts(history=4, uniform=0.1)
    seen: list[list[float]] = [[] for _ in range(5)]
    for batch in (1, 3, 50, 2, 17, 9):
        index, losses = rng.integers(5, size=batch), rng.exponential(size=batch)
        for i, loss in zip(index, losses, strict=True):
            seen[i].append(loss)
        starts.update(torch.from_numpy(index), torch.from_numpy(losses))
    w = np.array([np.sqrt(np.mean(np.square(s[-4:]))) for s in seen])
    by_hand = 0.9 * w / w.sum() + 0.1 / 5
    torch.testing.assert_close(starts.probabilities(5), torch.from_numpy(by_hand))


def test_uniform_until_every_start_has_its_losses() -> None:
    losses = 1 + randn(6, 10).abs()
    starts = filled(losses[:, :9])
    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(starts.probabilities(6), uniform)
    starts.update(torch.arange(5), losses[:5, 9])
    torch.testing.assert_close(starts.probabilities(6), uniform)
    _, importance = starts.draw(4, 6, generator())
    torch.testing.assert_close(importance, torch.ones(4, dtype=torch.float64))
    starts.update(torch.tensor([5]), losses[5, 9:])
    assert float((starts.probabilities(6) - uniform).abs().max()) > 0.01
    torch.testing.assert_close(starts.probabilities(6), filled(losses).probabilities(6))
    # a chain that is one longer has a start without losses
    torch.testing.assert_close(starts.probabilities(7), torch.full((7,), 1 / 7, dtype=torch.float64))


def test_starts_of_no_loss_at_all_are_uniform() -> None:
    p = filled(torch.zeros(4, 10)).probabilities(4)
    torch.testing.assert_close(p, torch.full((4,), 0.25, dtype=torch.float64))


def test_importance_keeps_the_loss_unbiased() -> None:
    starts = filled(randn(5, 10).exp(), uniform=0.05)
    p = starts.probabilities(5)
    index, importance = starts.draw(40_000, 5, generator())
    torch.testing.assert_close(importance, 1 / (5 * p[index]))
    assert float((p / (5 * p)).sum()) == pytest.approx(1)  # E[importance] is 1 exactly
    frequency = index.bincount(minlength=5) / 40_000
    assert float(((frequency - p) / (p / 40_000).sqrt()).abs().max()) < 5
    f = torch.tensor([3.0, -1.0, 4.0, 1.0, 5.0], dtype=torch.float64)
    product = importance * f[index]
    assert abs(float(product.mean() - f.mean())) < 5 * float(product.std()) / 200


def test_the_loss_is_multiplied_by_the_importance_and_remembered_without() -> None:
    chain = Chain(EDM(), num_steps=6, coupling="markov")
    starts = filled(randn(6, 10).exp())
    drawn = ChainSampler(chain, window=1, jitter=False, starts=starts)(
        randn(8, 2), cond=None, generator=generator()
    )
    plain = drawn.clone().exclude(keys.IMPORTANCE)
    loss = ValueLoss(small_denoiser(EDM()), denoising_coef=0.3)
    weighted, unweighted = loss(drawn)["loss_value"], loss(plain)["loss_value"]
    torch.testing.assert_close(drawn[keys.LOSS], plain[keys.LOSS], rtol=0, atol=0)
    assert not drawn[keys.LOSS].requires_grad and drawn[keys.LOSS].shape == (8, 1, 1)
    torch.testing.assert_close(unweighted, plain[keys.LOSS].mean())
    torch.testing.assert_close(weighted, (drawn[keys.IMPORTANCE] * drawn[keys.LOSS]).mean())
    assert float((weighted - unweighted).abs().detach()) > 1e-3


@pytest.mark.parametrize("shape", [(8,), (2, 4), (2, 2, 2)])
def test_a_loss_is_left_in_batches_of_every_shape(shape: tuple[int, ...]) -> None:
    chain = sample_chain(EDM(), randn(8, 2), num_steps=4, window=1, generator=generator())
    flat = chain.clone()
    loss = ValueLoss(small_denoiser(EDM())).make_value_estimator("monte_carlo")
    loss(flat)
    reshaped = chain.squeeze(1).reshape(shape)
    loss(reshaped)
    torch.testing.assert_close(reshaped[keys.LOSS].flatten(), flat[keys.LOSS].flatten())


@pytest.mark.parametrize("jitter", [False, True])
@pytest.mark.parametrize("window", [1, 3])
def test_starts_learn_from_the_chains_that_they_began(window: int, jitter: bool) -> None:
    """A loss that grows along the chain: later starts become likelier, also where the grid shifts."""
    starts = LossAwareStarts(history=5)
    sampler = ChainSampler(
        Chain(EDM(), num_steps=6, coupling="markov", t_max=30.0), window=window, jitter=jitter, starts=starts
    )
    assert isinstance(sampler, Adaptive)
    g = generator()
    for _ in range(30):
        states = sampler(randn(40, 1), cond=None, generator=g)
        states[keys.LOSS] = 1.0 + states[keys.INDEX].double()
        sampler.update(states)
    T = sampler.chain.num_transitions - window + 1
    w = 1 + torch.arange(T, dtype=torch.float64) + (window - 1) / 2  # the mean over a window
    torch.testing.assert_close(starts.probabilities(T), 0.999 * w / w.sum() + 0.001 / T)


# Curriculum


def stages(starts: CurriculumStarts, losses: list[float]) -> list[int]:
    found = []
    for loss in losses:
        starts.update(torch.zeros(2, dtype=torch.long), torch.full((2,), float(loss)))
        found.append(starts.stage)
    return found


def test_the_curriculum_advances_when_the_loss_has_stopped_falling() -> None:
    starts = CurriculumStarts(clusters=3, patience=2, every=1)
    assert stages(starts, [5, 4, 4, 3, 3, 3]) == [1, 1, 1, 1, 1, 2]  # an equal loss is no improvement
    assert stages(starts, [9, 8, 8.5, 7, 7.5, 7.5]) == [2, 2, 2, 2, 2, 3]  # with a best of its own
    assert stages(starts, [1, 1, 1, 1]) == [3, 3, 3, 3]  # and stays


def test_a_stage_is_judged_by_averages() -> None:
    starts = CurriculumStarts(clusters=2, patience=1, every=3)
    assert stages(starts, [9, 1, 2, 1, 9, 1, 4, 4, 4]) == [1, 1, 1, 1, 1, 1, 1, 1, 2]  # 4, 11/3, then 4


@pytest.mark.parametrize("num_starts", [1, 5, 18, 40])
@pytest.mark.parametrize("order", ["high_to_low", "low_to_high"])
def test_stages_are_cumulative_from_the_easy_end(order: Any, num_starts: int) -> None:
    starts = CurriculumStarts(clusters=4, patience=1, every=1, order=order)
    last: set[int] = set()
    for stage in range(1, 5):
        starts.stage = stage
        index, importance = starts.draw(4000, num_starts, generator(stage))
        seen = set(index.tolist())
        n = math.ceil(num_starts * stage / 4)
        easy = range(n) if order == "high_to_low" else range(num_starts - n, num_starts)
        assert seen == set(easy) and seen >= last and importance is None
        last = seen
    assert last == set(range(num_starts))
    assert float(index.double().mean()) == pytest.approx((num_starts - 1) / 2, abs=0.1 * num_starts)


# What all starts promise


def trained(starts: Starts, folder: Path | None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    denoiser = Denoiser(MLP((2,), hidden=16, depth=1, x_features=8, noise_features=8), EDM())
    chain = Chain(EDM(), num_steps=5, coupling="markov", t_max=20.0)
    return Trainer(
        Objective("td", ValueLoss(denoiser, **options), ChainSampler(chain, window=1, starts=starts)),
        DATASETS["gmm"](dim=2),
        seed=0,
        folder=folder,
        length=Length(grad_steps=24, batch_size=16, checkpoint_every=9),
        optim=Optim(warmup_steps=0),
        average=Average(),
        target=Target(),
    )


MAKE: dict[str, Callable[[], Starts]] = {
    "uniform": UniformStarts,
    "loss_aware": lambda: LossAwareStarts(history=2),
    "curriculum": lambda: CurriculumStarts(clusters=4, patience=1, every=2),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
def test_a_run_that_is_resumed_is_the_run_that_was_not_stopped(
    make: Callable[[], Starts], tmp_path: Path
) -> None:
    whole = trained(make(), None)
    for _ in whole.steps():
        pass
    stopped = trained(make(), tmp_path)
    for _ in stopped.steps():
        if stopped.step == 13:
            stopped.save()
            break
    resumed = trained(make(), tmp_path)
    assert resumed.resume() and resumed.step == 13
    for _ in resumed.steps():
        pass
    for a, b in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(a, b)
    draws: list[Any] = [whole.objective.draw, resumed.objective.draw]
    ours, theirs = (draw.state_dict() for draw in draws)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]


def test_what_is_learnt_changes_the_training() -> None:
    """Else the test above could not fail."""
    found = []
    for make in MAKE.values():
        trainer = trained(make(), None)
        for _ in trainer.steps():
            pass
        found.append(torch.cat([p.detach().flatten() for p in trainer.parameters]))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("options", [{"lmbda": 0.5}, {"n_steps": 3}, {"bootstrap": "target"}])
def test_starts_serve_every_target(options: dict[str, Any]) -> None:
    trainer = trained(LossAwareStarts(history=1), None, **options)
    losses = [figures["loss_value"] for figures in trainer.steps()]
    assert len(losses) == 24 and all(math.isfinite(loss) for loss in losses)


def test_the_registries() -> None:
    assert STARTS == {"uniform": UniformStarts, "loss_aware": LossAwareStarts, "curriculum": CurriculumStarts}
    assert OBJECTIVES.entry("edm").also is sample_log_normal_states
    assert OBJECTIVES.entry("denoising").also is sample_uniform_states


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: LossAwareStarts(history=0), "history is 0"),
        (lambda: LossAwareStarts(uniform=1.5), "uniform is 1.5"),
        (lambda: CurriculumStarts(clusters=0), "clusters is 0"),
        (lambda: CurriculumStarts(patience=0), "patience is 0"),
        (lambda: CurriculumStarts(every=0), "every is 0"),
        (lambda: CurriculumStarts(order="up"), "order is 'up'"),
        (
            lambda: ChainSampler(Chain(EDM(), num_steps=4, coupling="markov"), starts=LossAwareStarts()),
            "set chain.window",
        ),
        (
            lambda: ChainSampler(Chain(EDM(), num_steps=4, coupling="markov"), 4, starts=CurriculumStarts()),
            "set chain.window",
        ),
    ],
)
def test_a_bad_argument_is_named(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
