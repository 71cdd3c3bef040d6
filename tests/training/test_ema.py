"""Moving averages of weights: their formula, their warm-up, resuming, and several of them at once."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffrl.diffusion.networks.mlp import MLP
from diffrl.training.checkpoints import load_weights
from diffrl.training.ema import EMA, Average
from diffrl.training.identity import RunChanged
from tests.kit.trainers import differing, make, state, take


class Counter(nn.Module):
    """One parameter of each of two shapes, and buffers of two dtypes."""

    calls: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("scale", torch.ones(2))


def set_all(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_half_life() -> None:
    module = Counter()
    ema = EMA(module, halflife_samples=1000, ramp=None)
    set_all(module, 1.0)
    for _ in range(10):
        ema.update(100)
    torch.testing.assert_close(ema.module.a, torch.full_like(module.a, 0.5))
    for _ in range(4):
        ema.update(250)  # the half-life is in samples, whatever the batch
    torch.testing.assert_close(ema.module.b, torch.full_like(module.b, 0.75))
    assert ema.samples == 2000


@pytest.mark.parametrize("batch", [1, 32, 1000])
def test_equals_the_geometric_average_of_a_plain_loop(batch: int) -> None:
    module, halflife = Counter(), 300.0
    ema = EMA(module, halflife, ramp=None)
    values = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    for value in values:
        set_all(module, value)
        ema.update(batch)
    beta = 0.5 ** (batch / halflife)
    closed = sum((1 - beta) * beta ** (len(values) - 1 - i) * value for i, value in enumerate(values))
    torch.testing.assert_close(ema.module.a, torch.full_like(module.a, closed))


def test_equals_torch_averaged_model() -> None:
    torch.manual_seed(0)
    module = MLP((2,), hidden=16)
    batch, halflife = 64, 1000.0
    beta = 0.5 ** (batch / halflife)
    ema = EMA(module, halflife, ramp=None)
    witness = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(beta))
    witness.update_parameters(module)  # its first update copies
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(25):
        x = torch.randn(batch, 2)
        (module(x, torch.zeros(batch)) - x).square().mean().backward()
        optimiser.step(), optimiser.zero_grad()
        ema.update(batch)
        witness.update_parameters(module)
    for one, other, now in zip(
        ema.module.parameters(), witness.module.parameters(), module.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other)
        assert not torch.equal(one, now)


def test_warm_up_follows_the_samples_seen() -> None:
    module, batch, ramp, halflife = Counter(), 10, 0.05, 20.0
    ema = EMA(module, halflife, ramp=ramp)
    average, seen = 0.0, 0
    for step in range(100):
        value = float(step**2)
        set_all(module, value)
        ema.update(batch)
        h = min(halflife, ramp * seen)
        beta = 0.5 ** (batch / h) if h > 0 else 0.0
        average, seen = beta * average + (1 - beta) * value, seen + batch
        torch.testing.assert_close(ema.module.a, torch.full_like(module.a, average))
    assert ema.new_weight(batch) == pytest.approx(1 - 0.5**0.5)  # the warm-up is over


def test_first_update_of_a_warm_up_copies() -> None:
    module = Counter()
    ema = EMA(module, halflife_samples=1e6)
    set_all(module, 3.0)
    ema.update(1)
    assert torch.equal(ema.module.a, module.a)


def test_no_half_life_is_no_average() -> None:
    module = Counter()
    ema = EMA(module, halflife_samples=0, ramp=None)
    for value in (2.0, 7.0):
        set_all(module, value)
        ema.update(5)
        assert torch.equal(ema.module.b, module.b)


def test_weight_is_exact_for_a_tiny_step() -> None:
    ema = EMA(Counter(), halflife_samples=1e15, ramp=None)
    assert ema.new_weight(1) == pytest.approx(0.6931471805599453e-15, rel=1e-12, abs=0)


def test_buffers_are_copied_even_when_replaced() -> None:
    module = Counter()
    ema = EMA(module, halflife_samples=1e6)
    module.calls += 3
    module.scale = torch.tensor([5.0, 6.0])
    ema.update(1)
    assert ema.module.calls.item() == 3 and ema.module.scale.tolist() == [5.0, 6.0]
    assert ema.module.scale.data_ptr() != module.scale.data_ptr()


def test_the_copy_is_for_evaluation_and_leaves_the_module_alone() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    before = copy.deepcopy(module.state_dict())
    ema = EMA(module, halflife_samples=10)
    ema.update(4)
    assert not ema.module.training and module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


def test_resumed_average_is_bit_exact() -> None:
    def train(module: nn.Module, ema: EMA, steps: range) -> None:
        for step in steps:
            g = torch.Generator().manual_seed(step)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
            ema.update(7)

    torch.manual_seed(0)
    module = MLP((2,), hidden=8)
    start = copy.deepcopy(module)
    ema = EMA(module, 40.0)
    train(module, ema, range(20))

    half = copy.deepcopy(start)
    first = EMA(half, 40.0)
    train(half, first, range(10))
    state = copy.deepcopy(first.state_dict())
    resumed = copy.deepcopy(half)
    second = EMA(resumed, 40.0)
    with torch.no_grad():
        for parameter in second.module.parameters():
            parameter.zero_()
    second.load_state_dict(state)
    train(resumed, second, range(10, 20))
    assert second.samples == ema.samples == 140
    for name, x in ema.module.state_dict().items():
        assert torch.equal(x, second.module.state_dict()[name]), name


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="halflife_samples"):
        EMA(Counter(), -1.0)
    with pytest.raises(ValueError, match="halflife_samples"):
        EMA(Counter(), float("nan"))
    with pytest.raises(ValueError, match="ramp"):
        EMA(Counter(), 1.0, ramp=0.0)
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16"):
        EMA(nn.Linear(2, 2).bfloat16(), 1.0)
    with pytest.raises(ValueError, match="samples"):
        EMA(Counter(), 1.0).update(0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        EMA(nn.Linear(2, 2), 1.0).load_state_dict(EMA(nn.Linear(2, 3), 1.0).state_dict())


# Several half-lives


def test_each_of_several_half_lives_is_what_it_is_alone() -> None:
    several = make(average=Average(40, 0.5, also=(8, 160)))
    alone = {name: make(average=Average(h, 0.5)) for name, h in [("ema", 40), ("ema_8", 8), ("ema_160", 160)]}
    take(several, 12)
    assert [*several.averages] == [*alone] and several.ema is several.averages["ema"]
    for name, trainer in alone.items():
        take(trainer, 12)
        kept, one = (t.module.state_dict() for t in (several.averages[name], trainer.ema))
        assert all(torch.equal(kept[key], value) for key, value in one.items()), name
    ends = [several.averages[name].module.network.last.weight for name in alone]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(ends, 2))


def test_a_run_with_several_half_lives_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    average = Average(40, also=(8, 160))
    whole = make(average=average)
    take(whole, 12)
    take(make(tmp_path, average=average), 7)
    assert load_weights(tmp_path / "step_000005", "ema_160").keys() == whole.denoiser.state_dict().keys()
    resumed = make(tmp_path, average=average)
    assert resumed.resume() and resumed.step == 5
    take(resumed, 12)
    assert differing(state(whole), state(resumed)) == []
    with pytest.raises(RunChanged, match=r"ema\.also \[8, 160\] → \[8\]"):
        make(tmp_path, average=Average(40, also=(8,))).resume()


@pytest.mark.parametrize("also", [(0,), (2.5,), (8, 8), (40,)])
def test_further_half_lives_are_whole_numbers_once_each(also: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"ema\.also is "):
        Average(40.0, also=also)
