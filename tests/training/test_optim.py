"""Optimisers by name: one step of each written out, the same steps after resuming, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffrl.configs.cells import _by_seed, _composed
from diffrl.training.identity import RunChanged
from diffrl.training.optim import ALGORITHMS, FinetuningOptim, Optim, Optimiser
from tests.kit.trainers import differing, make, state, take

NAMES = [*ALGORITHMS]
LR, B1, B2, DECAY, EPS = 0.1, 0.8, 0.9, 0.01, 1e-8


def by_hand(name: str, x: Tensor, gradients: list[Tensor]) -> Tensor:
    """The published recursions, in plain numbers."""
    m = v = b = torch.zeros_like(x)
    for t, raw in enumerate(gradients, 1):
        g = raw if name in ("adamw", "radam") else raw + DECAY * x
        if name in ("adamw", "radam"):
            x = x - LR * DECAY * x
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        if name == "sgd":
            b = B1 * b + g
            x = x - LR * b
        elif name == "rmsprop":
            b = B1 * b + g / (v.sqrt() + EPS)
            x = x - LR * b
        else:
            m_hat, v_hat = m / (1 - B1**t), v / (1 - B2**t)
            longest = 2 / (1 - B2) - 1
            rho = longest - 2 * t * B2**t / (1 - B2**t)
            if name != "radam":
                x = x - LR * m_hat / (v_hat.sqrt() + EPS)
            elif rho > 5:
                r = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
                x = x - LR * math.sqrt(r) * m_hat / (v_hat.sqrt() + EPS)
            else:
                x = x - LR * m_hat
    return x


@pytest.mark.parametrize("vectorised", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_published_ones(name: str, vectorised: bool) -> None:
    g = torch.Generator().manual_seed(0)
    start = torch.randn(3, generator=g, dtype=torch.float64)
    gradients = [
        torch.randn(3, generator=g, dtype=torch.float64) for _ in range(12)
    ]  # radam changes at ρ = 5
    p = nn.Parameter(start.clone())
    optim = Optim(LR, (B1, B2), DECAY, warmup_steps=0, decay="none", clip_norm=None, name=name)
    optimiser = Optimiser([p], optim, 12, vectorised=vectorised)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimiser.step(0.0)
    torch.testing.assert_close(p.detach(), by_hand(name, start, gradients), rtol=1e-6, atol=1e-9)


def test_without_momentum_rmsprop_is_adams_step_but_for_its_correction() -> None:
    p, q = (nn.Parameter(torch.tensor([1.0], dtype=torch.float64)) for _ in range(2))
    for x, name in ((p, "rmsprop"), (q, "adam")):
        optim = Optim(0.1, (0.0, 0.5), warmup_steps=0, decay="none", clip_norm=None, name=name)
        optimiser = Optimiser([x], optim, 60)
        for _ in range(60):
            x.grad = torch.ones_like(x)
            optimiser.step(0.0)
    # after t steps the correction is 1 - .5^t: it is gone after the first few
    lead = sum(0.1 * (1 / math.sqrt(1 - 0.5**t) - 1) for t in range(1, 61))
    assert q.item() - p.item() == pytest.approx(lead, rel=1e-6)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)])
@pytest.mark.parametrize("name", NAMES)
def test_resuming_changes_no_bit(name: Any, betas: tuple[float, float], tmp_path: Path) -> None:
    optim = Optim(1e-3, betas, 0.01, warmup_steps=3, name=name)
    whole = make(optim=optim)
    figures = take(whole, 13)
    take(make(tmp_path, optim=optim), 7)
    resumed = make(tmp_path, optim=optim)
    assert resumed.resume() and resumed.step == 5
    assert take(resumed, 13) == figures[5:]
    assert differing(state(whole), state(resumed)) == []


def test_each_trains_otherwise() -> None:
    ends = [take(make(optim=Optim(1e-3, name=name)), 12)[-1]["loss_value"] for name in NAMES]
    assert len(set(ends)) == len(NAMES) - 1  # adam is adamw without decay
    assert make().optimiser.optim.name == "adamw" == FinetuningOptim().name


def test_another_optimiser_is_another_run(tmp_path: Path) -> None:
    take(make(tmp_path), 6)
    changed = make(tmp_path, optim=Optim(warmup_steps=3, name="sgd"))
    with pytest.raises(RunChanged, match="optim.name 'adamw' → 'sgd'"):
        changed.resume()
    with pytest.raises(
        ValueError, match="optim.name is sgd, but the checkpoint holds the moments of another"
    ):
        changed.resume(accept_changes=True)


def test_options_that_were_accepted_hold(tmp_path: Path) -> None:
    take(make(tmp_path), 6)
    changed = make(tmp_path, optim=Optim(warmup_steps=3, betas=(0.5, 0.9), weight_decay=0.1, name="radam"))
    assert changed.resume(accept_changes=True)
    group = changed.optimiser.algorithm.param_groups[0]
    assert group["betas"] == (0.5, 0.9) and group["weight_decay"] == 0.1 and group["decoupled_weight_decay"]
    take(changed, 3)


def test_an_unknown_one_is_named() -> None:
    with pytest.raises(
        ValueError, match="optim.name is 'lion': give one of adamw, adam, radam, rmsprop, sgd"
    ):
        Optim(name="lion")


def test_the_default_does_not_rename_cells() -> None:
    """A cell of a comparison is found again by what differs from the defaults."""
    words = ["data=gmm", "optim.lr=1e-3"]
    [(usual, _)] = _by_seed(_composed("train", words), [0])
    [(said, _)] = _by_seed(_composed("train", [*words, "optim.name=adamw"]), [0])
    [(other, _)] = _by_seed(_composed("train", [*words, "optim.name=radam"]), [0])
    assert usual == said != other
