"""The Stable Target Field of a reference batch: its formula, and that it is unbiased for every number of rows."""

import pytest
import torch
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.data.synthetic import gmm
from diffrl.diffusion.exact import EmpiricalDenoiser, MixtureDenoiser
from diffrl.diffusion.posterior import marginal
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError
from diffrl.objectives import ReferenceBatch, exact_x0_law, reference_mean
from tests.kit.oracles import Estimate, assert_within, every_process, generator, randn

MEANS = torch.tensor([[-1.0, 0.5], [0.2, -0.8], [1.1, 0.6]]).double()
STDS, WEIGHTS = torch.tensor([0.1, 0.3, 0.05]).double(), torch.tensor([0.3, 0.5, 0.2]).double()


def law(n: int, seed: int) -> Tensor:
    c = torch.multinomial(WEIGHTS, max(n, 1), replacement=True, generator=generator(seed))
    return (MEANS[c] + STDS[c, None] * randn(len(c), 2, seed=seed + 1))[:n]


def by_hand(process: Schedule, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """One state: weights by the density of each row, with no softmax."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    squares = torch.stack([(x - alpha * row).square().sum() for row in rows])
    w = (-(squares - squares.min()) / (2 * sigma**2)).exp()
    return sum(w[j] * rows[j] for j in range(len(rows))) / w.sum()


@every_process
def test_the_formula_at_all_levels(process: Schedule) -> None:
    """From pure noise, where the rows weigh the same, to the least noise, where one row has all the weight."""
    t = process.time_grid(6)[:-1]
    rows = law(5, 0)
    x = marginal(process, rows[:1].expand(6, 2), t, randn(6, 2, seed=3))
    S = reference_mean(process, x, t, rows)
    for k in range(6):
        torch.testing.assert_close(S[k], by_hand(process, x[k], t[k], rows), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(S, EmpiricalDenoiser(process, rows)(x, t), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(reference_mean(process, x, t, rows[:1]), rows[:1].expand(6, 2), rtol=0, atol=0)
    if float(process.alpha(t[0])) == 0:
        torch.testing.assert_close(S[0], rows.mean(0))


def test_float32_at_the_least_noise() -> None:
    """Rows of norm 40 that are 0.01 apart, at σ = 0.002: a squared distance in float32 would not tell them apart."""
    rows = torch.full((2, 64), 5.0) + torch.tensor([[0.0], [0.00125]])
    t = torch.full((2,), 0.002)
    S = reference_mean(EDM(), rows, t, rows)
    assert S.dtype == torch.float32
    wanted = torch.stack([by_hand(EDM(), x, t[0].double(), rows.double()) for x in rows.double()])
    torch.testing.assert_close(S, wanted.float(), rtol=0, atol=1e-6)
    assert float((S[0] - rows[0]).abs().max()) < 1e-5


def test_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, rows = randn(9, 3, 2), torch.linspace(0.1, 2, 9).double(), randn(4, 3, 2, seed=1)
    whole = reference_mean(EDM(), x, t, rows)
    monkeypatch.setattr("diffrl.objectives.posteriors.NUMBERS", 9)
    torch.testing.assert_close(reference_mean(EDM(), x, t, rows), whole, rtol=1e-12, atol=0)


# Unbiased, for every number of rows


@pytest.mark.parametrize("n", [1, 2, 3, 16])
def test_unbiased_at_a_fixed_state(n: int) -> None:
    """x0 from the exact posterior at x_t, the others from the law; without x0 among them S is biased."""
    M, t = 20_000, torch.tensor([0.5]).double()
    exact, x_t = MixtureDenoiser(EDM(), MEANS, STDS, WEIGHTS), torch.tensor([[0.3, 0.1]]).double()
    wanted = exact(x_t, t)[0]
    x0 = exact.sample_posterior(x_t, t, M, generator(4)).view(M, 1, 2)
    rows = torch.cat([x0, law(M * (n - 1), 5).view(M, n - 1, 2)], 1)
    logits = -(x_t - rows).square().sum(-1) / (2 * t**2)  # a batch of its own for each trial
    S = (logits.softmax(1).unsqueeze(-1) * rows).sum(1)
    assert_within(Estimate(S.mean(0), S.std(0) / M**0.5), wanted)
    torch.testing.assert_close(S[7], reference_mean(EDM(), x_t, t, rows[7])[0])
    if n == 3:
        rest = rows[:, 1:]
        others = ((-(x_t - rest).square().sum(-1) / (2 * t**2)).softmax(1).unsqueeze(-1) * rest).sum(1)
        assert float(((others.mean(0) - wanted).abs() / (others.std(0) / M**0.5)).max()) > 20


@every_process
@pytest.mark.parametrize("n", [2, 8])
def test_unbiased_along_all_levels(process: Schedule, n: int) -> None:
    """E[(S - D*(x_t)) φ(x_t)] = 0 for several φ, batch by batch, as training draws them: each row's own state."""
    M, t = 4000, process.time_grid(5)[2]
    exact = MixtureDenoiser(process, MEANS, STDS, WEIGHTS)
    x0 = law(M * n, 6)
    x = marginal(process, x0, t.expand(M * n), randn(M * n, 2, seed=8))
    error = torch.cat([
        reference_mean(process, x[i : i + n], t.expand(n), x0[i : i + n]) for i in range(0, M * n, n)
    ]) - exact(x, t.expand(M * n))  # fmt: skip
    for phi in (torch.ones(M * n, 1), x, x.sin(), (x[:, :1] > 0)):
        mean = (error * phi).view(M, n, 2).mean(1)  # rows of a batch depend on each other
        assert_within(Estimate(mean.mean(0), mean.std(0) / M**0.5), 0.0)


def test_many_rows_tend_to_the_exact_denoiser_and_vary_less() -> None:
    exact, x0 = MixtureDenoiser(EDM(), MEANS, STDS, WEIGHTS), law(200, 9)
    t = torch.full((200,), 0.4).double()
    x = x0 + 0.4 * randn(200, 2, seed=11)
    far = [
        float((reference_mean(EDM(), x, t, torch.cat([x0, law(n, 12)])) - exact(x, t)).square().mean())
        for n in (0, 2000, 200_000)
    ]
    assert far[1] < far[0] / 4 and far[2] < far[1] / 20, far


def test_a_drawn_row_is_distributed_as_x0_given_the_state() -> None:
    """So E[(x_j - D*) φ(x_t)] = 0, and its spread is the whole posterior's, not that of S."""
    M, n = 4000, 4
    exact, x0 = MixtureDenoiser(EDM(), MEANS, STDS, WEIGHTS), law(M * n, 13)
    t = torch.full((n,), 0.5).double()
    x, g = x0 + 0.5 * randn(M * n, 2, seed=15), generator(16)
    parts = [
        ReferenceBatch(EDM(), x0[i : i + n]).draw(x[i : i + n], t, generator=g) for i in range(0, M * n, n)
    ]
    D = exact(x, t[:1].expand(M * n))
    drawn = torch.cat(parts) - D
    for phi in (torch.ones(M * n, 1), x):
        mean = (drawn * phi).view(M, n, 2).mean(1)
        assert_within(Estimate(mean.mean(0), mean.std(0) / M**0.5), 0.0)
    extra = (drawn.square() - (x0 - D).square()).view(M, n, 2).mean(1)
    assert_within(Estimate(extra.mean(0), extra.std(0) / M**0.5), 0.0)
    assert float((drawn - (x0 - D)).abs().max()) > 0.1  # some rows were others


# Labels


def test_a_label_sees_its_own_rows_and_the_null_label_all() -> None:
    rows, labels = randn(6, 2), torch.tensor([0, 0, 1, 1, 2, 2])  # 2 is the null label: not known
    batch, x, t = ReferenceBatch(EDM(), rows, labels, 2), randn(3, 2, seed=1), torch.ones(3).double()
    S = batch.mean(x, t, torch.tensor([1, 2, 0]))
    for k, seen in enumerate([rows[2:4], rows, rows[:2]]):
        torch.testing.assert_close(S[k], by_hand(EDM(), x[k], t[k], seen))
    drawn = batch.draw(x, t, torch.tensor([1, 1, 1]), generator=generator())
    assert all(bool((rows[2:4] == row).all(1).any()) for row in drawn)
    with pytest.raises(InputError, match="no row of the reference batch has label 1"):
        ReferenceBatch(EDM(), rows[:2], labels[:2], 2).mean(x, t, torch.tensor([0, 0, 1]))
    with pytest.raises(InputError, match="knows labels only"):
        batch.mean(x, t, randn(3, 4))


def test_what_is_no_reference_batch_is_refused() -> None:
    with pytest.raises(InputError, match="one row at least"):
        ReferenceBatch(EDM(), randn(0, 2))
    with pytest.raises(InputError, match=r"labels have shape \(3,\), expected \(2,\)"):
        ReferenceBatch(EDM(), randn(2, 2), torch.zeros(3, dtype=torch.int64))


# The exact law


def test_the_exact_law_is_the_mixtures_or_that_of_the_rows() -> None:
    data = gmm(dim=2, components=3, test_size=8)
    assert data.mixture is not None
    m = data.mixture
    x, t = data.test, torch.full((8,), 0.5)
    exact = MixtureDenoiser(Flow(), m.means, m.stds, m.weights)
    torch.testing.assert_close(exact_x0_law(Flow(), data).mean(x, t), exact(x, t), rtol=0, atol=0)
    finite = Data("mine", test=x, train=x)
    torch.testing.assert_close(exact_x0_law(Flow(), finite).mean(x, t), reference_mean(Flow(), x, t, x))
    with pytest.raises(InputError, match="the law of mine is not known"):
        exact_x0_law(EDM(), Data("mine", test=x, draw=lambda n, generator: x[:n]))
