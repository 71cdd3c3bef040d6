"""What newcomers got wrong in their first hour is answered in one line that names it and the remedy."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import diffrl
from diffrl.configs.schema import schema
from diffrl.data.dataset import Data
from diffrl.errors import InputTypeError
from diffrl.experiments.check_run import _data as of_std

POINTS = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))


def value_error() -> Any:
    data, process = diffrl.data.gmm(dim=2), diffrl.EDM()
    m = data.mixture
    exact = diffrl.MixtureDenoiser(process, m.means, m.stds, m.weights)
    return diffrl.metrics.value_error(exact, exact, data.test[:4], process, 1.0, sigma_data=0.5)


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (lambda: diffrl.networks.MLP(2), "event_shape is 2: give a tuple, such as (2,)"),
    (value_error, "sigmas is 1.0: give a list, [1.0]"),
    (lambda: Data("mine", test=np.zeros((3, 2)), train=POINTS), "give a tensor, torch.as_tensor(..., "),
    (
        lambda: diffrl.data.npz(POINTS.numpy()),
        "path is a ndarray: give that of a file; of a tensor make Data",
    ),
]


@pytest.mark.parametrize(("mistake", "answer"), MISTAKES)
def test_mistakes(mistake: Callable[[], Any], answer: str) -> None:
    with pytest.raises(InputTypeError, match=re.escape(answer)) as found:
        mistake()
    assert "\n" not in str(found.value)


def test_an_option_without_a_type_is_named_with_what_to_write() -> None:
    def halfway(denoiser: Any, *, share=0.5) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
        ...

    with pytest.raises(
        InputTypeError, match="half_way: its option 'share' has no type.*write share: float = 0.5"
    ):
        schema("half_way", halfway, omit=("denoiser",))


def test_a_data_set_is_shown_in_a_line() -> None:
    assert repr(Data("mine", test=POINTS[:5], train=POINTS)) == (
        "Data('mine', samples (2,), 30 to train on, 5 held out)"
    )
    assert "fresh draws" in repr(diffrl.data.gmm(dim=2))


@pytest.mark.parametrize(("std", "passes"), [(0.5, True), (0.17, True), (0.16, False), (1.679, False)])
def test_the_check_of_a_run_sees_data_of_another_scale(std: float, passes: bool) -> None:
    check = of_std(std, 0.5)
    assert check.passed == passes and (passes or f"standard deviation is {std:.3g}" in check.cause)
