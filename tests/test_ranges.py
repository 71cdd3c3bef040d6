"""Numbers from outside: what is a whole number, what lies in a range, and the sentence that says so."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from diffrl.errors import InputError
from diffrl.ranges import require_int, require_number


@pytest.mark.parametrize("value", [5, np.int64(5), torch.tensor(5)])
def test_whole_numbers(value: Any) -> None:
    assert require_int("n", value) == 5 and type(require_int("n", value)) is int


@pytest.mark.parametrize(
    "value", [5.5, 5.0, True, np.bool_(True), "5", None, math.nan, math.inf, [5], torch.tensor(5.5)]
)
def test_what_is_no_whole_number_is_named(value: Any) -> None:
    with pytest.raises(InputError, match="num_steps is .*, but must be a whole number >= 1"):
        require_int("num_steps", value)


def test_the_range_of_whole_numbers() -> None:
    assert require_int("n", 0, least=0) == 0 and require_int("n", 9, most=9) == 9
    with pytest.raises(InputError, match=r"n is 10, but must be a whole number in \[1, 9\]"):
        require_int("n", 10, most=9)


@pytest.mark.parametrize(
    ("value", "limits", "says"),
    [
        (1.5, (0, 1), r"lie in \[0, 1\]"),
        (0, (0, 1, "(]"), r"in \(0, 1\]"),
        (1, (0, 1, "[)"), r"in \[0, 1\)"),
        (0.0, (0, math.inf, "()"), "> 0"),
        (-1, (0,), ">= 0"),
        (math.inf, (0,), ">= 0"),
        (math.nan, (), "finite number$"),
        (10**400, (), "finite number$"),
        (True, (), "finite number$"),
        ("1", (), "finite number$"),
        (None, (), "finite number$"),
        (torch.ones(2), (), "finite number$"),
    ],
)
def test_numbers_outside_their_range_are_named(value: Any, limits: tuple[Any, ...], says: str) -> None:
    with pytest.raises(InputError, match=f"^gamma is .*, but must .*{says}"):
        require_number("gamma", value, *limits)


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.25), torch.tensor(0.5)])
def test_numbers_in_their_range(value: Any) -> None:
    assert require_number("gamma", value, 0, 1) == float(value)
