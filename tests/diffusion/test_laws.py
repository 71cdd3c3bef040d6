"""Laws of one reverse step: draws, densities and divergences against torch's own normal distribution."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from diffrl.diffusion.laws import Gaussian, Law
from tests.kit.oracles import generator, randn

events = pytest.mark.parametrize("event", [(), (5,), (2, 3, 3)], ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def stds(N: int) -> list[Tensor]:
    """One for each state, and one for all; float64 as samplers give them."""
    return [torch.rand(N, generator=generator(), dtype=torch.float64) + 0.1, torch.tensor(0.3).double()]


def torchs(mean: Tensor, std: Tensor) -> Normal:
    wide = std.expand(len(mean)).view(-1, *[1] * (mean.ndim - 1))
    return Normal(mean.double(), wide.expand(mean.shape))


@events
@dtypes
def test_the_log_density_is_that_of_torch(event: tuple[int, ...], dtype: torch.dtype) -> None:
    x, mean = randn(2, 4, *event, dtype=dtype)
    for std in stds(4):
        each = torchs(mean, std).log_prob(x.double()).view(4, -1)
        law: Law = Gaussian(mean, std)
        for reduction, witness in (("sum", each.sum(1)), ("mean", each.mean(1))):
            torch.testing.assert_close(law.log_prob(x, reduction), witness.to(dtype))


@events
@dtypes
def test_the_divergence_is_that_of_torch(event: tuple[int, ...], dtype: torch.dtype) -> None:
    mean, other = randn(2, 4, *event, dtype=dtype)
    for std in stds(4):
        law, reference = Gaussian(mean, std), Gaussian(other, std)
        each = kl_divergence(torchs(mean, std), torchs(other, std)).view(4, -1)
        torch.testing.assert_close(law.kl(reference, "sum"), each.sum(1).to(dtype))
        torch.testing.assert_close(law.kl(reference, "mean"), each.mean(1).to(dtype))
        assert float(law.kl(law, "sum").abs().max()) == 0


def test_the_divergence_is_the_mean_log_ratio_of_draws() -> None:
    mean, other = randn(2, 1, 3)
    std = torch.tensor(0.7).double()
    law, reference = (Gaussian(m.expand(200_000, 3), std) for m in (mean, other))
    x = law.sample(lambda like: randn(*like.shape, seed=1))
    ratio = law.log_prob(x, "sum") - reference.log_prob(x, "sum")
    error = float(ratio.std()) / len(x) ** 0.5
    assert float(ratio.mean()) == pytest.approx(float(law.kl(reference, "sum")[0]), abs=5 * error)


def test_draws_follow_the_law() -> None:
    mean, std, z = randn(4, 3), torch.tensor([0.0, 0.5, 1.0, 2.0]), randn(4, 3, seed=1)
    drawn = Gaussian(mean, std).sample(lambda x: z)
    torch.testing.assert_close(drawn, mean + std[:, None] * z)


def test_rows_without_noise_count_nothing_and_give_no_gradient() -> None:
    mean = randn(3, 2).requires_grad_()
    law = Gaussian(mean, torch.tensor([0.5, 0.0, 2.0]).double())
    assert law.stochastic.tolist() == [True, False, True]
    x = randn(3, 2, seed=1)
    log_p, kl = law.log_prob(x, "sum"), law.kl(Gaussian(x, law.std), "sum")
    whole = Independent(Normal(mean[::2], law.std[::2, None]), 1).log_prob(x[::2])
    torch.testing.assert_close(log_p[::2], whole)
    assert log_p[1].item() == 0 and kl[1].item() == 0 and kl[0].item() > 0
    (gradient,) = torch.autograd.grad(log_p.sum() + kl.sum(), mean)
    assert bool(gradient.isfinite().all()) and float(gradient[1].abs().max()) == 0


def test_one_std_for_all_states_holds_for_each() -> None:
    assert Gaussian(randn(3, 2), torch.tensor(0.5)).stochastic.tolist() == [True] * 3
    assert Gaussian(randn(3, 2), torch.tensor(0.0)).stochastic.tolist() == [False] * 3


def test_a_point_has_no_density_and_asks_for_no_noise() -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("noise was asked for")

    x = torch.zeros(3, 2)
    law = Gaussian(x, torch.tensor(0.0))
    assert law.sample(never) is x and Gaussian(x, torch.zeros(3)).sample(never) is x
    with pytest.raises(ValueError, match=r"std is 0.*use eta > 0 or a floor on std"):
        law.log_prob(x, "sum")


def test_laws_of_different_width_are_not_compared() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="differ in std"):
        Gaussian(x, torch.ones(3)).kl(Gaussian(x, 2 * torch.ones(3)), "sum")
