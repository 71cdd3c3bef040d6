"""Advantages in numbers that float32 cannot add: equal rewards, and rewards far from 0."""

import pytest
import torch

from diffrl.errors import InputTypeError
from diffrl.rl.advantages import FifoStatistics, critic_advantages, group_advantages, rewards_to_go, spread

STDS = ["group", "global", "none"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1234.567, 0.1, 1e6 + 0.1, -98765.4321, 0.0, 1e30])
@pytest.mark.parametrize("n", [3, 7, 24, 100])
def test_equal_values_are_worth_nothing(n: int, value: float, dtype: torch.dtype) -> None:
    values, group = torch.full((n,), value, dtype=dtype), torch.zeros(n, dtype=torch.long)
    for std in STDS:
        adv = group_advantages(values, group, std=std)
        assert adv.dtype == dtype and adv.tolist() == [0.0] * n
    assert FifoStatistics(buffer=n, min_count=1)(values).tolist() == [0.0] * n
    assert FifoStatistics(buffer=2 * n, min_count=2 * n)(values).tolist() == [0.0] * n  # by the batch
    assert spread(values) == 0


@pytest.mark.parametrize("std", STDS)
def test_groups_that_are_each_equal_are_worth_nothing(std: str) -> None:
    group = torch.arange(24) % 4
    values = torch.tensor([0.1, 1e6 + 0.1, -7.3, 1234.567])[group]
    assert group_advantages(values, group, std=std).tolist() == [0.0] * 24


@pytest.mark.parametrize("offset", [0.0, 2.0**20, -(2.0**22)])
@pytest.mark.parametrize("std", STDS)
def test_an_offset_changes_no_digit(std: str, offset: float) -> None:
    """Quarters beside 2²² are exact in float32: the values differ by just what they did without the offset."""
    values = torch.randint(0, 40, (30, 3), generator=torch.Generator().manual_seed(0)) / 4
    group = torch.arange(30) % 5
    wanted = group_advantages(values.double(), group, std=std).float()
    adv = group_advantages(values + offset, group, std=std)
    torch.testing.assert_close(adv, wanted, rtol=1e-6, atol=1e-7)
    means = torch.stack([adv[group == g].double().mean(0) for g in range(5)])
    assert float(means.abs().max()) < 1e-6
    shifted = FifoStatistics(buffer=64, min_count=2)(values + offset, group)
    torch.testing.assert_close(
        shifted, FifoStatistics(buffer=64, min_count=2)(values, group), rtol=1e-6, atol=1e-6
    )
    assert spread(values + offset) == pytest.approx(float(values.double().std(correction=0)), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"buffer": 2.5}, "buffer is 2.5"),
        ({"min_count": 40}, "min_count is 40"),
        ({"tol": float("nan")}, "tol is nan"),
    ],
)
def test_statistics_name_what_they_cannot_use(options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FifoStatistics(**options)


def test_there_is_one_group_for_each_row() -> None:
    with pytest.raises(ValueError, match="group has 4 entries for 3 rows"):
        group_advantages(torch.zeros(3), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("shape", [(60,), (60, 1), (4, 15, 2)])
def test_steps_are_columns_of_rows(shape: tuple[int, ...]) -> None:
    """A flat [60, 1] is not guessed to be one trajectory or 60."""
    wrong, right = torch.zeros(shape), torch.zeros(4, 15, 1)
    with pytest.raises(ValueError, match="reward has shape"):
        rewards_to_go(wrong, gamma=0.9)
    with pytest.raises(ValueError, match="value has shape"):
        critic_advantages(right, wrong, lmbda=0.5)


def test_whole_numbers_are_refused_and_not_cut() -> None:
    values = torch.tensor([1, 2, 4, 8])
    for advantages in (FifoStatistics(), lambda v: group_advantages(v, torch.zeros(4))):
        with pytest.raises(InputTypeError, match=r"values have dtype torch.int64: give floating numbers"):
            advantages(values)
