"""SCT: which settings are ECT, its loss in a plain loop, less variance at the same mean."""

import math

import torch
from torch import Tensor

from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.objectives.ect import ECTLoss
from diffrl.objectives.ect_pairs import ECTPairs
from diffrl.objectives.stable_ct import StablePairs, stable_ct_loss
from tests.kit.oracles import Estimate, assert_within, generator
from tests.kit.value_loss import PROCESS, data, denoiser, gradient, perturb


def test_forward_is_ect() -> None:
    D, x0 = denoiser(), data(12)
    draws = StablePairs(PROCESS, transition="forward"), ECTPairs(PROCESS)
    found, plain = (
        make(D)(draw(x0, cond=None, generator=generator(2)))["loss_value"]
        for make, draw in zip((stable_ct_loss, ECTLoss), draws, strict=True)
    )
    assert torch.equal(found, plain) and torch.equal(gradient(found, D), gradient(plain, D))


def test_a_batch_of_one_is_ect() -> None:
    D, x0 = denoiser(), data(1)
    found, plain = (
        ECTLoss(D)(draw(x0, cond=None, generator=generator(2)))["loss_value"]
        for draw in (StablePairs(PROCESS), ECTPairs(PROCESS))
    )
    torch.testing.assert_close(found, plain, rtol=1e-11, atol=0)


def stable_field(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    w = [math.exp(-float((x - row).square().sum() / (2 * t**2))) for row in rows]
    return torch.stack([a * row for a, row in zip(w, rows, strict=True)]).sum(0) / sum(w)


def test_the_loss_in_a_plain_loop() -> None:
    D, x0 = denoiser(), data(10)
    perturb(D)
    draw = StablePairs(PROCESS, stages=4)
    draw.set_progress(1, 4)
    pairs = draw(x0, cond=None, generator=generator(2))
    total, ends = torch.zeros((), dtype=torch.float64), 0
    for i in range(10):
        x, t, r = pairs["x_t"][i, 0], pairs["t"][i, 0, 0], pairs["next", "t"][i, 0]
        S = stable_field(x, t, x0)
        x_r = x + (r - t) * (x - S) / t
        y = S if r == 0 else D(x_r[None], r)[0].detach()
        ends += int(r == 0)
        total = total + (D(x[None], t[None])[0] - y).norm() / (t - r[0]) / 10
    found = stable_ct_loss(D)(pairs)["loss_value"]
    assert 0 < ends < 10
    torch.testing.assert_close(found, total, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient(found, D), gradient(total, D), rtol=1e-9, atol=1e-12)


def test_its_target_has_the_mean_of_ect_and_less_variance() -> None:
    """Bootstrapping from f(x) = a x on normal data: y has mean a E[x_r | x_t], whatever the batch."""
    exact = GaussianDenoiser(PROCESS, torch.zeros(2), 0.36 * torch.eye(2))
    spread = []
    for draw in (ECTPairs(PROCESS, P_mean=0.5, P_std=0.0), StablePairs(PROCESS, P_mean=0.5, P_std=0.0)):
        draw.set_progress(3, 4)
        errors = []
        for k in range(300):
            x0 = 0.6 * torch.randn(8, 2, generator=generator(100 + k), dtype=torch.float64)
            pairs = draw(x0, cond=None, generator=generator(1000 + k))
            x, t, r = pairs["x_t"][:, 0], pairs["t"][:, 0, 0], pairs["next", "t"][:, 0, 0]
            wanted = x + ((r - t) / t)[:, None] * (x - exact(x, t))
            errors.append(((pairs["next", "x_t"][:, 0] - wanted) * x).sum(1))
        of_batches = torch.stack(errors).mean(1)
        assert_within(Estimate(of_batches.mean(), of_batches.std() / 300**0.5), 0.0)
        spread.append(float(torch.stack(errors).var()))
    assert spread[1] < 0.6 * spread[0]
