"""EDM's augmentation: each change against a transformation made by hand, how often it happens, and its labels."""

import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from diffrl.data.augmentation import augment, augment_labels, draw_augmentation, transformed
from diffrl.errors import InputError


def image(H: int = 6, W: int = 6, seed: int = 0) -> Tensor:
    return 2 * torch.rand(1, 3, H, W, generator=Generator().manual_seed(seed), dtype=torch.float64) - 1


def parameters(**values: float) -> Tensor:
    a = torch.zeros(1, 8, dtype=torch.float64)
    for name, value in values.items():
        a[0, int(name[1:])] = value
    return a


def test_parameters_of_nothing_change_nothing_and_have_no_labels() -> None:
    x = image(5, 7)
    assert torch.equal(transformed(x, parameters()), x)
    assert torch.equal(augment_labels(parameters()), torch.zeros(1, 9, dtype=torch.float64))


def test_flips_are_exact() -> None:
    x = image(5, 7)
    right = torch.stack([x[..., 6 - column] for column in range(7)], -1)
    down = torch.stack([x[..., 4 - row, :] for row in range(5)], -2)
    assert torch.equal(transformed(x, parameters(a0=1)), right)
    assert torch.equal(transformed(x, parameters(a1=1)), down)
    assert torch.equal(transformed(x, parameters(a0=1, a1=1)), right.flip(2))
    assert torch.equal(transformed(x.float(), parameters(a0=1)), right.float())


def test_quarter_turns_and_whole_shifts_fall_on_pixels() -> None:
    x = image()
    turned = transformed(x, parameters(a3=math.pi / 2))  # G = rotate(-π/2): (x, y) goes to (y, -x)
    by_hand = torch.empty_like(x)
    for row in range(6):
        for column in range(6):
            by_hand[:, :, 5 - column, row] = x[:, :, row, column]
    torch.testing.assert_close(turned, by_hand, rtol=0, atol=1e-12)
    wide = image(8, 16)
    shifted = transformed(wide, parameters(a6=1, a7=-1))  # 16/8 = 2 to the right, 8/8 = 1 up
    torch.testing.assert_close(shifted[:, :, :-1, 2:], wide[:, :, 1:, :-2], rtol=0, atol=1e-12)


def matrix(entries: list[list[float]]) -> np.ndarray:
    return np.array(entries, np.float64)


def rotate(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return matrix([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def stretch(sx: float, sy: float) -> np.ndarray:
    return np.diag([sx, sy, 1.0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alone", [None, 2, 3, 5, 6])
def test_all_together_move_a_smooth_image_as_the_product_of_the_papers_matrices(
    seed: int, alone: int | None
) -> None:
    H, W = 48, 64
    rng = np.random.default_rng(seed)
    a = np.array([0, 0, *rng.normal(0, 0.4, 1), *rng.uniform(-3, 3, 2), *rng.normal(0, 0.5, 3)])
    if alone is not None:
        kept = {2: [2], 3: [3], 5: [4, 5], 6: [6, 7]}[alone]
        a[[i for i in range(2, 8) if i not in kept]] = 0
    s = 2 ** (0.2 * a[5])
    shift = matrix([[1, 0, W * a[6] / 8], [0, 1, H * a[7] / 8], [0, 0, 1]])
    aniso = rotate(a[4]) @ stretch(s, 1 / s) @ rotate(-a[4])
    G = shift @ aniso @ rotate(-a[3]) @ stretch(2 ** (0.2 * a[2]), 2 ** (0.2 * a[2]))

    def value(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.cos(0.11 * x + 0.05 * y + 0.4) + np.sin(0.09 * y - 0.04 * x)

    rows, columns = np.mgrid[:H, :W]
    x, y = columns - (W - 1) / 2, rows - (H - 1) / 2
    found = transformed(torch.from_numpy(value(x, y))[None, None], torch.from_numpy(a)[None])[0, 0].numpy()
    u, v, _ = np.linalg.inv(G) @ np.stack([x.ravel(), y.ravel(), np.ones(H * W)])
    inside = (np.abs(u) < W / 2 - 2.5) & (
        np.abs(v) < H / 2 - 2.5
    )  # what comes from beyond the edge is mirrored
    assert inside.sum() > 300
    np.testing.assert_allclose(found.ravel()[inside], value(u, v)[inside], atol=0.012)


def test_labels_are_those_of_the_table() -> None:
    a = torch.tensor([[1.0, 0.0, -0.3, 2.0, 0.7, 1.5, 0.2, -0.1]], dtype=torch.float64)
    expected = [1, 0, -0.3, math.cos(2) - 1, math.sin(2), 1.5 * math.cos(0.7), 1.5 * math.sin(0.7), 0.2, -0.1]
    assert augment_labels(a)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("p", [0.0, 0.12, 1.0])
def test_each_change_is_as_frequent_and_as_large_as_the_table_says(p: float) -> None:
    N = 40_000
    a = draw_augmentation(N, p, Generator().manual_seed(1))
    done = (a != 0).double()
    rates = done.mean(0).tolist()
    expected = [0.5, p / 2, p, p, p, p, p, p]
    for rate, share in zip(rates, expected, strict=True):
        assert abs(rate - share) <= 5 * math.sqrt(share * (1 - share) / N)
    assert torch.equal(done[:, 4], done[:, 5]) and torch.equal(done[:, 6], done[:, 7])
    if p == 1:
        for i in (2, 5, 6, 7):
            assert abs(float(a[:, i].mean())) < 5 / math.sqrt(N) and abs(float(a[:, i].std()) - 1) < 0.02
        for i in (3, 4):  # uniform on (-π, π): its std is π/√3
            assert float(a[:, i].abs().max()) <= math.pi
            assert abs(float(a[:, i].std()) - math.pi / math.sqrt(3)) < 0.02
    corr = torch.corrcoef(done[:, [0, 2, 3, 5, 6]].T) if 0 < p < 1 else torch.eye(5)
    assert float((corr - torch.eye(5)).abs().max()) < 5 / math.sqrt(N)


def test_augment_draws_both_and_depends_on_its_generator_alone() -> None:
    x = torch.cat([image(seed=i) for i in range(50)]).float()
    y, labels = augment(x, 0.3, Generator().manual_seed(7))
    again, labels_again = augment(x, 0.3, Generator().manual_seed(7))
    a = draw_augmentation(50, 0.3, Generator().manual_seed(7))
    assert torch.equal(y, again) and torch.equal(labels, labels_again)
    assert torch.equal(y, transformed(x, a)) and torch.equal(labels, augment_labels(a).float())
    untouched = (labels == 0).all(1)
    assert 0 < int(untouched.sum()) < 50 and torch.equal(y[untouched], x[untouched])
    assert bool((y[~untouched] != x[~untouched]).flatten(1).any(1).all())


def test_what_cannot_be_augmented_is_refused() -> None:
    with pytest.raises(InputError, match="p is 1.5"):
        augment(image(), 1.5)
    with pytest.raises(InputError, match=r"augmentation takes images \[N, C, H, W\]"):
        augment(torch.zeros(4, 2), 0.1)
