"""The noise of sample i depends on (seed, i) alone: whatever the batch, the part, the number of processes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffrl.diffusion.samplers.base import Noise, Sampler
from diffrl.diffusion.samplers.ddim import Ancestral
from diffrl.diffusion.samplers.edm_stochastic import EDMStochastic
from diffrl.diffusion.samplers.loop import sample
from diffrl.diffusion.samplers.ode import Heun
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from tests.kit.samplers import normal_denoiser

BOTH = pytest.mark.parametrize("streams", ["added", "keyed"])


def numbers(streams: Any, seed: int, rows: range, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Two draws of each row, as a stochastic sampler makes them: [2, rows, 3]."""
    noise, like = Noise.of_rows(streams, seed, rows), torch.empty(len(rows), 3, dtype=dtype)
    return torch.stack([noise(like), noise(like)])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_the_same_bit_for_bit_in_every_batch(streams: str, dtype: torch.dtype) -> None:
    together = numbers(streams, 5, range(7), dtype=dtype)
    for size in (1, 2, 3, 7):
        parts = [numbers(streams, 5, range(7)[i : i + size], dtype=dtype) for i in range(0, 7, size)]
        assert torch.equal(torch.cat(parts, 1), together)


@BOTH
@pytest.mark.parametrize("sampler", [Heun(), Ancestral(), EDMStochastic()], ids=str)
def test_images_are_the_same_whatever_is_drawn_beside_them(sampler: Sampler, streams: str) -> None:
    exact, cond = normal_denoiser(EDM(), D=2), torch.arange(7.0)[:, None]

    def shifted(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return exact(x, t, None) + 0.1 * cond

    def draw(n: int, first: int = 0, at_once: int | None = None) -> Tensor:
        given: dict[str, Any] = {"cond": cond[first : first + n], "process": EDM(), "num_steps": 5, "seed": 4}
        given |= {"streams": streams, "dtype": torch.float64, "sampler": sampler}
        return sample(shifted, (n, 2), first=first, at_once=at_once, **given)

    whole = draw(7)
    for at_once in (1, 3, 100):
        torch.testing.assert_close(draw(7, at_once=at_once), whole, rtol=1e-12, atol=1e-12)
    of_ranks = [draw(3), draw(2, first=3), draw(2, first=5, at_once=1)]
    torch.testing.assert_close(torch.cat(of_ranks), whole, rtol=1e-12, atol=1e-12)
    assert len({round(float(x), 9) for x in whole[:, 0]}) == 7


def test_keyed_streams_are_philox_by_hand_and_rounded_in_float32() -> None:
    found = numbers("keyed", 9, range(3, 5))
    for row, i in enumerate((3, 4)):
        stream = np.random.Generator(np.random.Philox(key=np.array([9, i], np.uint64), counter=1 << 192))
        np.testing.assert_array_equal(found[:, row].numpy(), stream.standard_normal((2, 3)))
    assert torch.equal(numbers("keyed", 9, range(3, 5), dtype=torch.float32), found.float())


def test_seeds_share_samples_where_they_are_added_and_none_where_they_are_keys() -> None:
    def rows(streams: str, seed: int) -> set[float]:
        return {float(x) for x in numbers(streams, seed, range(50))[0, :, 0]}

    assert len(rows("added", 0) & rows("added", 1)) == 49
    assert rows("added", 0) == rows("added", 2**32)  # torch takes 32 bits of a seed on a CPU
    keys = [rows("keyed", seed) for seed in (0, 1, 49, 2**32, 2**63 - 1)]
    assert len(set.union(*keys)) == 5 * 50


def test_what_does_not_fit_is_refused() -> None:
    like = torch.zeros(2, 3)
    with pytest.raises(InputError, match="streams is 'mixed': give added or keyed"):
        numbers("mixed", 0, range(2))
    for seed in (-1, 2**63):
        with pytest.raises(InputError, match=r"seed is .*must be a whole number in"):
            numbers("keyed", seed, range(2))
    given: dict[str, Any] = {"sampler": Heun(), "num_steps": 2}
    exact = normal_denoiser(EDM(), D=3)
    for options in ({"at_once": 1}, {"first": 1}, {"streams": "keyed"}):
        with pytest.raises(InputError, match="are of samples by seed: give seed and no noise"):
            sample(exact, like.shape, noise=torch.randn_like, **given, **options)
    with pytest.raises(InputError, match="at_once is 0"):
        sample(exact, like.shape, seed=0, at_once=0, **given)
    with pytest.raises(InputError, match="first is -1"):
        sample(exact, like.shape, seed=0, first=-1, **given)
