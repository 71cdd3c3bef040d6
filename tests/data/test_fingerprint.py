"""The fingerprint of a data set: the same for the same training data, another for any change of them."""

import time
from dataclasses import replace

import pytest
import torch

from diffrl.data.dataset import Data
from diffrl.data.files import digits
from diffrl.data.mixtures import Mixture
from diffrl.data.registry import DATASETS

X = torch.arange(24.0).reshape(12, 2) / 10
Y = torch.arange(12) % 3
BASE = Data("base", X[:2], Y[:2], X, Y, 3)


def test_it_is_16_hexadecimal_digits_and_the_same_for_equal_data() -> None:
    again = Data("another name", X[5:], Y[5:], X.clone(), Y.clone(), 3)
    assert again.fingerprint == BASE.fingerprint
    assert len(BASE.fingerprint) == 16 and int(BASE.fingerprint, 16) > 0
    rows = torch.empty(12, 4)[:, ::2].copy_(X)  # the same values, laid out otherwise
    assert replace(BASE, train=rows).fingerprint == BASE.fingerprint


def test_any_change_of_what_is_trained_on_changes_it() -> None:
    touched = X.clone()
    touched[7, 1] += 1e-6
    relabelled = Y.clone()
    relabelled[3] = 1
    unlabelled = Data("base", X[:2], train=X)
    changed = [
        replace(BASE, train=touched),
        replace(BASE, train=X.flip(0)),
        replace(BASE, train=X[:-1], train_labels=Y[:-1]),
        replace(BASE, train=X.reshape(12, 1, 2), test=X.reshape(12, 1, 2)[:2]),
        replace(BASE, train_labels=relabelled),
        replace(BASE, num_classes=4),
        unlabelled,
    ]
    assert replace(BASE, train=X.double()).fingerprint == BASE.fingerprint  # whose samples are float32
    assert len({BASE.fingerprint, *(data.fingerprint for data in changed)}) == 1 + len(changed)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gmm", {"mixture_seed": 1}),
        ("rings", {"std": 0.06}),
        ("checkerboard", {"cells": 6}),
        ("moons", {"noise": 0.06}),
        ("spirals", {"arms": 3}),
    ],
)
def test_a_law_has_one_too_whatever_the_test_points(name: str, other: dict[str, float]) -> None:
    make = DATASETS[name]
    assert make().fingerprint == make(test_size=300).fingerprint != make(**other).fingerprint


def test_digits_beyond_float32_do_not_count_for_a_law() -> None:
    means = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
    laws = [Mixture(m, torch.ones(2) / 10, torch.ones(2) / 2) for m in (means, means * (1 + 1e-15))]
    first, second = (Data("law", X[:2, :1], mixture=law).fingerprint for law in laws)
    assert first == second


def test_labels_count_and_30_000_images_take_seconds() -> None:
    assert digits(conditional=True).fingerprint != digits(conditional=False).fingerprint
    large = Data("large", torch.rand(2, 3, 32, 32), train=torch.rand(30_000, 3, 32, 32))
    begin = time.perf_counter()
    assert large.fingerprint == large.fingerprint
    assert time.perf_counter() - begin < 10  # 0.2 s on one free core
