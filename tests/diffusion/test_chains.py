"""Chains and their TensorDicts: levels, coefficients, joint law, stepping, windows."""

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.diffusion import trajectories
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.diffusion.trajectories import ChainSampler, draw_chain, sample_chain
from tests.kit.oracles import CONTINUOUS, Estimate, assert_within, continuous, every_process, generator, randn

couplings = pytest.mark.parametrize("coupling", ["markov", 0.5, "shared"])
values = pytest.mark.parametrize("value", ["posterior_mean", "clean"])
# levels 4, 3, 2, 1, clean: every coefficient below is a fraction to be checked by hand
HAND = EDM(sigma_min=1.0, sigma_max=4.0, rho=1.0)


def close(a: Tensor, b: Any, atol: float = 1e-12) -> None:  # noqa: ANN401
    torch.testing.assert_close(
        a.double(), torch.as_tensor(b, dtype=torch.float64).expand_as(a), rtol=0, atol=atol
    )


# Levels and coefficients


@pytest.mark.parametrize("span", range(1, 10))
@pytest.mark.parametrize("N", [1, 2, 5, 8])
def test_a_span_visits_every_kth_level_and_then_lands(N: int, span: int) -> None:
    chain = Chain(EDM(), N, "markov", span=span)
    assert chain.num_transitions == math.ceil(N / span)
    assert chain.indices.tolist() == [*range(0, N, span), N]
    close(chain.t, EDM().time_grid(N)[chain.indices.long()])
    assert [float(c[-1]) for c in chain.step_coefficients] == [1, 0, 0]


def test_coefficients_by_hand() -> None:
    chain = Chain(HAND, 4, "markov")
    close(chain.t, [4, 3, 2, 1, 0])
    A, kappa = chain.value_coefficients
    close(kappa, [9 / 16, 4 / 9, 1 / 4, 0, 0])
    close(A, [7 / 16, 5 / 9, 3 / 4, 1, 0])
    close(chain.step_coefficients.kappa, [9 / 16, 4 / 9, 1 / 4, 0])
    shared = Chain(HAND, 4, "shared", span=3)
    close(shared.t, [4, 1, 0])
    close(shared.value_coefficients[1], [3 / 4, 0, 0])  # a stride of one level whatever the span
    close(shared.step_coefficients.kappa, [1 / 4, 0])
    close(shared.step_coefficients.A, [3 / 4, 1])


@pytest.mark.parametrize(
    ("stride", "reached"),
    [(0.5, [3.5, 2.5, 1.5, 0]), (1.0, [3, 2, 1, 0]), (2.0, [2, 1, 0, 0]), (3.5, [0, 0, 0, 0])],
)
def test_a_stride_is_real_and_lands_beyond_the_last_level(stride: float, reached: list[float]) -> None:
    A, kappa = Chain(HAND, 4, "markov", stride=stride).value_coefficients
    witness = [(s / t) ** 2 for s, t in zip(reached, [4, 3, 2, 1], strict=True)]
    close(kappa, [*witness, 0])
    close(A, [*(1 - k for k in witness), 0])


@every_process
@couplings
def test_clean_value_is_an_endless_stride(process: Schedule, coupling: float | str) -> None:
    named = Chain(process, 6, coupling, value="clean", stride=1.0).value_coefficients
    endless = Chain(process, 6, coupling, stride=math.inf).value_coefficients
    long = Chain(process, 6, coupling, stride=6.0).value_coefficients
    for A, kappa in (named, endless, long):
        close(A, [1.0] * 6 + [0.0])
        close(kappa, 0.0)


@every_process
@couplings
@pytest.mark.parametrize("span", [1, 4])
def test_noise_mixing_has_unit_variance(process: Schedule, coupling: float | str, span: int) -> None:
    rho, fresh = Chain(process, 9, coupling, span=span).noise_mixing
    close(rho[:-1] ** 2 + fresh[:-1] ** 2, 1.0)
    assert (rho[0], fresh[0], rho[-1], fresh[-1]) == (0, 1, 0, 0)
    if coupling == "shared":
        close(rho[1:-1], 1.0)


@every_process
@couplings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [1, 12])
def test_running_sums_are_the_steps(
    process: Schedule, coupling: float | str, dtype: torch.dtype, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, x0 = Chain(process, K, coupling), randn(3, 2).to(dtype)
    drawn = []
    for small in (True, False):
        monkeypatch.setattr(trajectories, "_is_small", lambda noise, small=small: small)
        drawn.append(draw_chain(chain, x0, generator=generator())[keys.X_T])
    torch.testing.assert_close(*drawn, rtol=64 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)


def test_which_steps_are_summed() -> None:
    small, large = torch.empty(4, 8, 2), torch.empty(64, 18, 3072)
    assert trajectories._is_small(small)
    assert not trajectories._is_small(large) and not trajectories._is_small(small.half())  # 1e-20 is 0 there


def test_offset_and_t_max_choose_levels() -> None:
    def levels(**chain: Any) -> list[float]:  # noqa: ANN401
        return Chain(HAND, 4, "markov", **chain).t.tolist()

    assert levels(offset=0.5) == pytest.approx([3.5, 2.5, 1.5, 0])  # 0.5 would lie below the last level
    assert levels(offset=-0.5) == pytest.approx([4.5, 3.5, 2.5, 1.5, 0])
    assert levels(offset=0.5, span=2) == pytest.approx([3.5, 1.5, 0])
    assert levels(t_max=2.5) == pytest.approx([2, 1, 0])
    assert levels(t_max=1.0) == pytest.approx([1, 0])
    assert levels(offset=0.25, t_max=2.5) == pytest.approx([1.75, 0])
    rounded = Chain(HAND, 4, "markov", offset=-0.2, stride=0.2)  # 3.2 is not reached: 2.8 + 0.2 is the last
    assert float(rounded.value_coefficients[1][3]) == pytest.approx((1 / 1.2) ** 2)


@continuous
@couplings
def test_offsets_give_finite_chains(process: Schedule, coupling: float | str) -> None:
    for offset in (-0.999, -0.5, 0.5, 0.999):
        chain = Chain(process, 5, coupling, offset=offset, stride=0.3)
        data = draw_chain(chain, randn(2, 3), generator=generator())
        assert bool(torch.isfinite(data[keys.NEXT, keys.REWARD]).all())
        assert bool(torch.isfinite(data[keys.X_T]).all())


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 2.5}, "num_steps is 2.5"),
        ({"span": 0}, "span is 0"),
        ({"span": 1.5}, "span is 1.5"),
        ({"stride": 0.0}, "stride is 0.0"),
        ({"stride": math.nan}, "stride is nan"),
        ({"value": "x0"}, "value is 'x0'"),
        ({"offset": 1.0}, "offset is 1.0"),
        ({"coupling": "eta"}, "coupling is 'eta'"),
        ({"coupling": 2.0}, "coupling is 2.0"),
        ({"t_max": 1e-5}, "no noise level is left.*t_max = 1e-05"),
        ({"num_steps": 1, "offset": 0.5}, "no noise level is left.*offset = 0.5"),
        ({"process": DDPM(), "num_steps": 1001}, "only 1000 timesteps"),
        ({"process": DDPM(), "offset": 0.5}, "whole numbers"),
    ],
)
def test_a_bad_argument_is_named(chain: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chain(**{"process": EDM(), "num_steps": 8, "coupling": "markov", **chain})


def test_ddpm_has_no_fractional_stride() -> None:
    with pytest.raises(ValueError, match="span, stride and offset must be whole numbers"):
        sample_chain(DDPM(), randn(2, 3), num_steps=10, stride=0.5)


# The TensorDict


@values
@pytest.mark.parametrize("event", [(2,), (1, 4, 4), (5,), (1, 9, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_shapes_and_flags(value: str, event: tuple[int, ...], dtype: torch.dtype) -> None:
    B, K = 3, 5
    x0 = randn(B, *event, dtype=dtype)
    label = torch.tensor([4, 0, 2])
    chain = sample_chain(EDM(), x0, num_steps=K, value=value, cond=label, generator=generator())
    assert chain.batch_size == (B, K) and chain[keys.NEXT].batch_size == (B, K)
    assert set(chain.keys()) == {"x_t", "t", "A", "kappa", "x0", "index", "cond", "next"}
    assert set(chain["next"].keys()) == {
        "x_t", "t", "A", "kappa", "index", "reward", "terminated", "truncated", "done",
    }  # fmt: skip
    for entries in (chain, chain["next"]):
        for name in ("t", "A", "kappa", "index"):
            assert entries[name].shape == (B, K, 1)
        assert entries["x_t"].shape == (B, K, *event) and entries["x_t"].dtype == dtype
    assert chain["next", "reward"].shape == (B, K, *event)
    grid = EDM().time_grid(K).to(dtype)
    for b in range(B):
        torch.testing.assert_close(chain["t"][b, :, 0], grid[:-1], rtol=0, atol=0)
        torch.testing.assert_close(chain["next", "t"][b, :, 0], grid[1:], rtol=0, atol=0)
        assert chain["index"][b, :, 0].tolist() == [0, 1, 2, 3, 4]
        assert chain["next", "index"][b, :, 0].tolist() == [1, 2, 3, 4, 5]
        assert chain["cond"][b].tolist() == [label[b]] * K
        assert chain["next", "terminated"][b, :, 0].tolist() == [False] * 4 + [True]
        torch.testing.assert_close(chain["x0"][b], x0[b].expand(K, *event), rtol=0, atol=0)
    assert not chain["next", "truncated"].any()
    assert torch.equal(chain["next", "done"], chain["next", "terminated"])
    torch.testing.assert_close(chain["next", "x_t"][:, :-1], chain["x_t"][:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(chain["next", "x_t"][:, -1], x0, rtol=0, atol=0)


@every_process
@couplings
@values
def test_rewards_telescope(process: Schedule, coupling: float | str, value: str) -> None:
    """What is still to be paid from a state is the posterior mean there: Σ_{j≥i} r_j = A_i x0 + κ_i x_i."""
    chain = sample_chain(
        process, randn(3, 2), num_steps=7, span=2, coupling=coupling, value=value, generator=generator()
    )
    reward, total = chain["next", "reward"], torch.zeros(3, 2).double()
    for i in reversed(range(4)):
        total = total + reward[:, i]
        mu = chain["A"][:, i] * chain["x0"][:, i] + chain["kappa"][:, i] * chain["x_t"][:, i]
        torch.testing.assert_close(total, mu)
    if value == "clean":  # nothing until the end, which pays x0
        assert float(reward[:, :-1].abs().max()) < 1e-12
        torch.testing.assert_close(reward[:, -1], chain["x0"][:, -1])


@every_process
@couplings
@pytest.mark.parametrize(("span", "side"), [(1, 2), (3, 2), (3, 9)])
def test_a_path_is_its_steps(process: Schedule, coupling: float | str, span: int, side: int) -> None:
    x0, noise = randn(3, 1, side, side), randn(3, math.ceil(8 / span), 1, side, side, seed=1)
    chain = Chain(process, 8, coupling, span=span)
    path = draw_chain(chain, x0, noise=noise)
    alpha, sigma = process.alpha(chain.t), process.sigma(chain.t)
    x = alpha[0] * x0 + sigma[0] * noise[:, 0]
    for k in range(chain.num_transitions):
        torch.testing.assert_close(path["x_t"][:, k], x)
        law = posterior(process, chain.t[k], chain.t[k + 1], chain.eta)
        z = noise[:, k + 1] if k + 1 < chain.num_transitions else torch.full_like(x, 1e6)
        by_hand = law.A * x0 + law.kappa * x + law.std * z
        x = chain.step(torch.full((3,), k), x0, x, z)
        torch.testing.assert_close(x, by_hand)
    torch.testing.assert_close(path["next", "x_t"][:, -1], x)
    torch.testing.assert_close(x, x0, rtol=0, atol=0)


def test_steps_of_different_places_go_together() -> None:
    chain, (x0, x, z) = Chain(VP(), 5, 0.5), randn(3, 4, 2)
    index = torch.tensor([4, 0, 2, 2])
    together = chain.step(index, x0, x, z)
    for b, k in enumerate(index):
        torch.testing.assert_close(together[b], chain.step(k, x0[b], x[b], z[b]))


@pytest.mark.parametrize("name", ["edm_even", "vp_linear", "vp_cosine", "flow"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_joint_law_of_the_states(name: str, eta: float) -> None:
    """Covariance of all states at once.

    The noises of t and s correlate by √(1-η² + η² (α_t σ_s/(α_s σ_t))²) a step, hence by 1 for shared noise;
    for a Markov chain the steps compose to α_t σ_s/(α_s σ_t) of the ends.
    """
    process, M, N, spread = CONTINUOUS[name], 50_000, 4, 0.7
    x0 = spread * randn(M, 1) + 0.3
    chain = sample_chain(process, x0, num_steps=N, coupling=eta, generator=generator(1))
    t = process.time_grid(N)[:-1]
    alpha, sigma = process.alpha(t), process.sigma(t)
    expected = spread**2 * torch.outer(alpha, alpha)
    for i in range(N):
        for j in range(i, N):
            steps = range(i, j)
            ratio = [float(alpha[k] * sigma[k + 1] / (alpha[k + 1] * sigma[k])) for k in steps]
            rho = math.prod(math.sqrt(1 - eta**2 + (eta * r) ** 2) for r in ratio)
            if eta == 1:
                assert rho == pytest.approx(
                    float(alpha[i] * sigma[j] / (alpha[j] * sigma[i])) if i < j else 1.0, abs=1e-12
                )
            expected[i, j] += rho * sigma[i] * sigma[j]
            expected[j, i] = expected[i, j]
    x = chain["x_t"].squeeze(-1)
    x = x - x.mean(0)
    products = x.unsqueeze(1) * x.unsqueeze(2)
    assert_within(Estimate(products.mean(0), products.std(0) / M**0.5), expected)
    mean = chain["x_t"].squeeze(-1)
    assert_within(Estimate(mean.mean(0), mean.std(0) / M**0.5), 0.3 * alpha)


@pytest.mark.parametrize("window", [None, 2])
def test_coordinates_are_drawn_alike_and_apart(window: int | None) -> None:
    """A large event is two small ones side by side."""
    x0, noise = randn(3, 80), randn(3, 6 if window is None else window + 1, 80, seed=1)

    def draw(part: slice) -> TensorDict:
        chain = Chain(VP(), 6, 0.5)
        return draw_chain(chain, x0[:, part], window=window, noise=noise[..., part], generator=generator())

    whole, left, right = draw(slice(None)), draw(slice(40)), draw(slice(40, None))
    for name in ("x_t", ("next", "x_t"), ("next", "reward")):
        torch.testing.assert_close(whole[name], torch.cat([left[name], right[name]], -1))


# Windows


@pytest.mark.parametrize("window", [5, 6, 100])
def test_a_window_of_everything_is_the_whole_chain(window: int) -> None:
    x0, noise = randn(3, 2), randn(3, 5, 2, seed=1)
    whole = sample_chain(EDM(), x0, num_steps=5, noise=noise)
    windowed = sample_chain(EDM(), x0, num_steps=5, noise=noise, window=window)
    assert windowed.batch_size == (3, 5) and bool((whole == windowed).all())


@every_process
@couplings
@values
@pytest.mark.parametrize("window", [1, 3])
def test_a_window_is_a_piece_of_a_chain(
    process: Schedule, coupling: float | str, value: str, window: int
) -> None:
    K, B = 5, 40
    spec = Chain(process, K, coupling, value=value)
    x0, noise = randn(B, 2), randn(B, window + 1, 2, seed=1)
    rows = draw_chain(spec, x0, window=window, noise=noise, generator=generator())
    assert rows.batch_size == (B, window)
    start = rows["index"][:, 0, 0]
    assert set(start.tolist()) == set(range(K - window + 1))  # every place, also the last
    A, kappa = spec.value_coefficients
    alpha, sigma = process.alpha(spec.t), process.sigma(spec.t)
    for b in range(B):
        x = alpha[start[b]] * x0[b] + sigma[start[b]] * noise[b, 0]
        for w in range(window):
            k = int(start[b]) + w
            row = rows[b, w]
            torch.testing.assert_close(row["x_t"], x)
            assert int(row["index"]) == k and int(row["next", "index"]) == k + 1
            close(torch.cat([row["t"], row["A"], row["kappa"]]), torch.stack([spec.t[k], A[k], kappa[k]]))
            close(
                torch.cat([row["next", "t"], row["next", "A"], row["next", "kappa"]]),
                torch.stack([spec.t[k + 1], A[k + 1], kappa[k + 1]]),
            )
            mu = A[k] * x0[b] + kappa[k] * x
            x = spec.step(torch.tensor(k), x0[b], x, noise[b, w + 1])
            torch.testing.assert_close(row["next", "x_t"], x)
            torch.testing.assert_close(row["next", "reward"], mu - A[k + 1] * x0[b] - kappa[k + 1] * x)
            lands = k == K - 1
            assert bool(row["next", "terminated"]) == lands
            assert bool(row["next", "truncated"]) == (w == window - 1 and not lands)
            assert bool(row["next", "done"]) == (lands or w == window - 1)


def test_windows_start_anywhere_equally_often() -> None:
    B = 6000
    rows = sample_chain(EDM(), randn(B, 1), num_steps=8, window=3, generator=generator())
    share = torch.bincount(rows["index"][:, 0, 0], minlength=6).double() / B
    error = (share * (1 - share) / B).sqrt()
    assert_within(Estimate(share, error), 1 / 6)


# Corners


@every_process
@couplings
@values
@pytest.mark.parametrize("K", [1, 4])
def test_one_datum_and_short_chains_are_finite(
    process: Schedule, coupling: float | str, value: str, K: int
) -> None:
    for dtype in (torch.float32, torch.float64):
        chain = sample_chain(process, randn(1, 3, dtype=dtype), num_steps=K, coupling=coupling, value=value)
        assert chain.batch_size == (1, K)
        for name, entry in chain.items(include_nested=True, leaves_only=True):
            assert bool(torch.isfinite(entry).all()), name
    assert float(chain["A"][0, -1]) == 1 and float(chain["kappa"][0, -1]) == 0


def test_the_generator_decides() -> None:
    x0 = randn(4, 2)
    a, b, c = (sample_chain(EDM(), x0, num_steps=6, window=2, generator=generator(s)) for s in (7, 7, 8))
    assert bool((a == b).all())
    assert not torch.equal(a["x_t"], c["x_t"])


@every_process
@pytest.mark.parametrize("window", [None, 2])
def test_chains_live_where_the_data_do(process: Schedule, window: int | None) -> None:
    """The meta device refuses, as an accelerator does, to meet tensors of the CPU."""
    x0 = torch.empty(3, 2, device="meta")
    chain = sample_chain(process, x0, num_steps=4, coupling=0.5, window=window)
    for name, entry in chain.items(include_nested=True, leaves_only=True):
        assert entry.device.type == "meta", name
    index = torch.zeros(3, dtype=torch.long, device="meta")
    assert Chain(process, 4, 0.5).step(index, x0, x0, x0).device.type == "meta"


def test_markov_is_the_public_default() -> None:
    x0, noise = randn(2, 2), randn(2, 4, 2, seed=1)
    named = sample_chain(EDM(), x0, num_steps=4, noise=noise, coupling="markov")
    assert bool((sample_chain(EDM(), x0, num_steps=4, noise=noise) == named).all())


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"x0 has dtype torch.uint8.*x0.float\(\)"):
        sample_chain(EDM(), torch.zeros(2, 3, dtype=torch.uint8), num_steps=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x0": torch.zeros(3)}, r"x0 has shape \(3,\).*x0.unsqueeze\(0\)"),
        ({"window": 0}, "window is 0"),
        ({"noise": torch.zeros(2, 5, 3)}, r"noise has shape \(2, 5, 3\), the chain needs \(2, 4, 3\)"),
        ({"noise": torch.zeros(2, 4, 3), "window": 2}, r"the chain needs \(2, 3, 3\)"),
        ({"cond": torch.zeros(3)}, "cond has 3 entries, but there are 2 data"),
    ],
)
def test_wrong_tensors_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_chain(**{"process": EDM(), "x0": torch.zeros(2, 3), "num_steps": 4, **arguments})


# What a run draws


def test_chain_sampler_draws_the_chain_itself() -> None:
    spec, x0, cond = Chain(Flow(), 6, "shared", span=2), randn(3, 2), torch.arange(3)
    drawn = ChainSampler(spec, window=2, jitter=False)(x0, cond=cond, generator=generator())
    assert bool((drawn == draw_chain(spec, x0, window=2, cond=cond, generator=generator())).all())


def test_jitter_shifts_the_grid_by_less_than_half_a_level() -> None:
    draw, g = ChainSampler(Chain(EDM(), 6, "markov")), generator()
    shifts = []
    for _ in range(200):
        chain = draw(randn(2, 2), cond=None, generator=g)
        index = EDM().index(chain["t"][0, :, 0], 6)
        shifts.append(float(index[0]))
        close(index.diff(), 1.0, atol=1e-9)
        assert chain.shape[1] == (5 if shifts[-1] > 0 else 6)
    assert -0.5 <= min(shifts) < -0.45 and 0.45 < max(shifts) < 0.5


def test_discrete_times_are_not_shifted() -> None:
    draw = ChainSampler(Chain(DDPM(), 6, "markov"))
    chain = draw(randn(2, 2), cond=None, generator=generator())
    close(chain["t"][0, :, 0], DDPM().time_grid(6)[:-1])
    with pytest.raises(ValueError, match="whole numbers"):
        ChainSampler(draw.chain, jitter=True)(randn(2, 2), cond=None, generator=generator())
