"""λ by the length of the chain: its values, its end points, and the loss with it."""

from typing import Any

import pytest
import torch
from torchrl.objectives import SoftUpdate

from diffrl.objectives import ValueLoss
from diffrl.objectives.lookahead import Lookahead
from tests.kit.value_loss import data, denoiser, draw, gradient, number


@pytest.mark.parametrize(("share", "K"), [(0.125, 18), (0.125, 100), (0.5, 3), (1.0, 7)])
def test_a_lambda_return_is_that_long_on_average(share: float, K: int) -> None:
    """Σ_n n (1-λ) λ^(n-1), by summing it."""
    lmbda = Lookahead(share).lmbda(K)
    n = torch.arange(1, 20_000, dtype=torch.float64)
    assert float((n * (1 - lmbda) * lmbda ** (n - 1)).sum()) == pytest.approx(share * K, rel=1e-9)


def test_short_chains_have_td_0() -> None:
    assert [Lookahead(0.125).lmbda(K) for K in (1, 2, 7, 8)] == [0, 0, 0, 0]
    assert [Lookahead(1.0).lmbda(K) for K in (1, 2, 4)] == [0, 0.5, 0.75]


@pytest.mark.parametrize("K", [1, 4, 8, 9, 18])
@pytest.mark.parametrize("bootstrap", ["own", "target", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_td_lambda_at_that_lambda(K: int, bootstrap: Any, dtype: torch.dtype) -> None:
    network, chain = denoiser(dtype=dtype), draw(x0=data(dtype=dtype), num_steps=K)
    ours = ValueLoss(network, lookahead=0.25, bootstrap=bootstrap)
    theirs = ValueLoss(network, lmbda=max(0, 1 - 4 / K), bootstrap=bootstrap)
    if bootstrap == "target":
        for loss in (ours, theirs):
            SoftUpdate(loss, eps=0.5)
    a, b = ours(chain.clone())["loss_value"], theirs(chain.clone())["loss_value"]
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradient(a, network), gradient(b, network))


def test_a_window_is_as_long_as_it_is() -> None:
    """Half a chain of 16 steps is a row of 8, for which h = 1/4 is λ = 1/2."""
    network, chain = denoiser(), draw(num_steps=16)[:, :8]
    ours = ValueLoss(network, lookahead=0.25)(chain.clone())
    theirs = ValueLoss(network, lmbda=0.5)(chain.clone())
    assert number(ours["loss_value"]) == pytest.approx(number(theirs["loss_value"]), rel=1e-12)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_named(share: float) -> None:
    with pytest.raises(ValueError, match=r"lookahead is .*lie in \(0, 1\]"):
        ValueLoss(denoiser(), lookahead=share)
