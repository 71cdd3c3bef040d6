"""The loop of every reverse sampler: from noise to data with a denoiser."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diffrl.devices import usable_device
from diffrl.diffusion.denoisers import DenoiserFn
from diffrl.diffusion.laws import NoiseFn
from diffrl.diffusion.samplers.base import Model, Noise, Sampler, Streams
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_int

__all__ = ["sample", "trajectory"]


@torch.no_grad()
def sample(
    denoiser: DenoiserFn,
    shape: Sequence[int],
    *,
    sampler: Sampler,
    num_steps: int,
    process: Schedule | None = None,
    cond: Tensor | None = None,
    seed: int | None = None,
    noise: NoiseFn | None = None,
    at_once: int | None = None,
    first: int = 0,
    streams: Streams = "added",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw samples: start from σ ε at the noisiest level and step down the grid to clean data.

    >>> import diffrl, torch
    >>> exact = diffrl.GaussianDenoiser(diffrl.EDM(), torch.zeros(2), torch.eye(2))
    >>> diffrl.sample(exact, (3, 2), sampler=diffrl.Heun(), num_steps=18, seed=0).shape
    torch.Size([3, 2])

    With a seed, sample i is the same (up to the rounding of the network) whatever is drawn beside it. So a large set
    can be drawn in parts of `at_once`, or by several processes, each of which draws its share from `first` on:

    >>> options = {"sampler": diffrl.Ancestral(), "num_steps": 18, "seed": 0, "dtype": torch.float64}
    >>> whole = diffrl.sample(exact, (5, 2), at_once=2, **options)
    >>> share = diffrl.sample(exact, (2, 2), first=3, **options)
    >>> torch.testing.assert_close(share, whole[3:])

    Args:
        denoiser: D. Put a network in eval mode first.
        shape: shape of the result, [N, *E], whole numbers ≥ 1.
        sampler: the reverse step, such as `diffrl.Heun()`; `diffrl.diffusion.samplers.SAMPLERS` has all.
        num_steps: N ≥ 1, the number of noise levels. A sampler of second order evaluates the network more often.
        process: noise schedule; taken from ``denoiser.process`` if None.
        cond: condition of each sample, shape [N, ...].
        seed: ≥ 0; sample i has noise of its own, by default from a generator with seed + i. Give this or `noise`.
        noise: another source of standard normal numbers.
        at_once: samples that go through the network side by side; None: all.
        first: number i of the first sample, ≥ 0.
        streams: "added", or "keyed", with which no two seeds share a sample: see `Noise.of_rows`.
        device: where the samples are drawn.
        dtype: of the samples, floating.

    Returns:
        Samples, shape [N, *E].

    Raises:
        TypeError: sampler is no sampler, shape no sequence, or cond no tensor of rows.
        ValueError: neither or both of seed and noise; no process given, and the denoiser has none; a size, a seed or
            num_steps that is no whole number, another number of conditions than of samples, parts or a number of the
            first sample without a seed, or a device that is not here.
    """
    if not isinstance(sampler, Sampler):
        raise InputTypeError(f"sampler is {sampler!r}: give one such as diffrl.Heun()")
    if not dtype.is_floating_point:
        raise InputError(f"dtype is {dtype}: samples are of a floating dtype")
    if not isinstance(shape, Sequence) or not shape:
        raise InputTypeError(f"shape is {shape!r}: give that of the result, [N, *E]")
    shape, device = [require_int("a size in shape", size) for size in shape], usable_device(device)
    if cond is not None and not (isinstance(cond, Tensor) and cond.ndim):
        raise InputTypeError(f"cond is {cond!r}: give a tensor with a row for each of {shape[0]} samples")
    if cond is not None and len(cond) != shape[0]:
        raise InputError(f"cond has {len(cond)} entries, but shape asks for {shape[0]} samples")
    if (seed is None) == (noise is None):
        raise InputError("give either seed or noise")
    process = process or getattr(denoiser, "process", None)
    if process is None:
        raise InputError("this denoiser does not know its process: give process=")
    like = torch.empty(tuple(shape), dtype=dtype, device=device)
    if noise is not None:
        if at_once is not None or first != 0 or streams != "added":
            raise InputError("at_once, first and streams are of samples by seed: give seed and no noise")
        return _last(Model(denoiser, process, num_steps, cond), sampler, like, noise)
    assert seed is not None
    require_int("first", first, 0)
    size = shape[0] if at_once is None else require_int("at_once", at_once)
    parts = []
    for rows in range(shape[0])[::size]:
        part = like[rows : rows + size]
        noise = Noise.of_rows(streams, seed, range(first + rows, first + rows + len(part)))
        model = Model(denoiser, process, num_steps, None if cond is None else cond[rows : rows + size])
        parts.append(_last(model, sampler, part, noise))
    return torch.cat(parts)


def _last(model: Model, sampler: Sampler, like: Tensor, noise: NoiseFn) -> Tensor:
    """The end of `trajectory`."""
    return deque(trajectory(model, sampler, like, noise), maxlen=1).pop()


def trajectory(model: Model, sampler: Sampler, like: Tensor, noise: NoiseFn) -> Iterator[Tensor]:
    """The N+1 states of a batch of reverse chains, each [N, *E]: the start σ ε, then one for each step.

    A denoiser with a prior N(m, S) has noise of that S at the start, which is α m + σ ε, and in every step.

    Args:
        model: the denoiser, with its process and grid.
        sampler: the reverse step.
        like: any tensor of the wanted shape [N, *E], dtype and device; its values are not read.
        noise: source of standard normal numbers, for the start too.
    """
    grid, prior = sampler.grid(model.process, model.num_steps), getattr(model.denoiser, "prior", None)
    start: Tensor | float = 0.0
    if prior is not None:
        noise, start = (
            prior.colour(noise, model.cond),
            model.process.alpha(grid[0]) * prior.of(model.cond, like)[0],
        )
    x = start + model.process.sigma(grid[0]) * noise(like)
    yield x
    for t, s in itertools.pairwise(grid):
        x = sampler.step(model, x, t, s, noise)
        yield x
