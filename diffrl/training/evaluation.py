"""What a trained denoiser is worth: value error by noise level, sample distance by network evaluations."""

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.diffusion.denoisers import Denoiser, DenoiserFn
from diffrl.diffusion.guidance import GuidedDenoiser
from diffrl.diffusion.samplers.base import Model, Noise, Sampler
from diffrl.diffusion.samplers.loop import trajectory
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.metrics.distances import sample_distance, value_error
from diffrl.training.build import Events

__all__ = ["Evaluation", "draw_samples", "grid_for"]

SAMPLE_SEED = 2_718_281  # evaluation noise is the same for every run, and no training seed's


@dataclass(frozen=True)
class Evaluation:
    """What to measure.

    Args:
        sigmas: noise-to-signal ratios at which the value error is taken.
        points: data at which it is taken.
        num_steps: levels of the sampling grids.
        samples: samples drawn for each.
        distance: name in `diffrl.metrics.distances.SAMPLE_DISTANCES`.
    """

    sigmas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    points: int = 2000
    num_steps: tuple[int, ...] = (3, 5, 8, 13, 18)
    samples: int = 2000
    distance: str = "sliced_w2"

    def __post_init__(self) -> None:
        for name in ("points", "samples"):
            if getattr(self, name) < 1:
                raise InputError(f"eval.{name} is {getattr(self, name)}: it must be at least 1")
        if not self.num_steps or min(self.num_steps) < 1:
            raise InputError(f"eval.num_steps is {list(self.num_steps)}: give grids of at least 1 level")

    def check(self, denoiser: Denoiser, oracle: DenoiserFn | None, data: Data) -> None:
        """Evaluate a few points now, so that what cannot be evaluated is said at the start.

        Raises:
            ValueError: a noise level out of reach, a distance that is unknown or does not fit the data.
            MissingExtra: the distance needs a package that is not installed.
        """
        replace(self, points=1).value_error(denoiser, oracle, data)
        few = _reference(data)[:64]
        sample_distance(self.distance, few, few)

    def value_error(self, denoiser: Denoiser, oracle: DenoiserFn | None, data: Data) -> dict[str, float]:
        """‖D - D*‖²/c_out² by σ; empty without an oracle. A conditional denoiser is asked without labels."""
        if oracle is None:
            return {}
        x0, process = _reference(data)[: self.points], denoiser.process
        x0 = x0.to(next(denoiser.parameters()))
        return value_error(denoiser, oracle, x0, process, self.sigmas, sigma_data=denoiser.sigma_data)

    def sample_distance(self, samples: Tensor, data: Data) -> float:
        """Distance between samples and the law that training saw; images are first clipped to [-1, 1]."""
        samples = samples.clamp(-1, 1) if len(data.event_shape) == 3 else samples
        return sample_distance(self.distance, samples.cpu(), _reference(data))


def _reference(data: Data) -> Tensor:
    """Points of the law that training sees: a finite set's training rows, else fresh points."""
    return data.test if data.train is None else data.train


def draw_samples(
    denoiser: Denoiser,
    data: Data | Events,
    sampler: Sampler,
    *,
    num_steps: int,
    samples: int,
    seed: int = SAMPLE_SEED,
    guidance_scale: float = 1.0,
    batch_size: int = 1000,
) -> tuple[Tensor, int]:
    """Samples of the data's shape, each from a seed of its own, so that the batch size changes nothing.

    Args:
        denoiser: D; if its network takes labels, classes are drawn in turn.
        data: for its event shape.
        sampler: the reverse step.
        num_steps: noise levels N.
        samples: how many.
        seed: sample j is drawn with seed + j.
        guidance_scale: see `diffrl.diffusion.denoisers.GuidedDenoiser`; 1 is off.
        batch_size: samples drawn at once.

    Returns:
        The samples [samples, *E], and the network evaluations of each.

    Raises:
        ValueError: guidance of a network without labels.
    """
    num_classes = int(getattr(denoiser.network, "num_classes", 0))
    if guidance_scale != 1 and num_classes == 0:
        raise InputError(
            f"guidance_scale is {guidance_scale:g}, but there were no labels in training: "
            "data.conditional=true uses those of the data"
        )
    parameter = next(denoiser.parameters())
    guided = GuidedDenoiser(denoiser, num_classes, guidance_scale) if num_classes else denoiser
    parts, nfe = [], 0
    for first in range(0, samples, batch_size):
        n = min(batch_size, samples - first)
        labels = (
            torch.arange(first, first + n, device=parameter.device) % num_classes if num_classes else None
        )
        model = Model(guided, denoiser.process, num_steps, labels)
        x = torch.zeros(n, *data.event_shape, dtype=parameter.dtype, device=parameter.device)
        noise = Noise.per_sample(range(seed + first, seed + first + n))
        with torch.no_grad():
            x = deque(trajectory(model, sampler, x, noise), maxlen=1).pop()
        parts.append(x)
        nfe = model.nfe * (2 if num_classes and guidance_scale not in (0, 1) else 1)
    return torch.cat(parts), nfe


def grid_for(sampler: Sampler, process: Schedule, nfe: int) -> int:
    """Levels of the grid on which a sampler evaluates the denoiser `nfe` times.

    Raises:
        ValueError: there is no such grid.
    """
    counts = [0]
    while counts[-1] < nfe and len(counts) <= nfe:  # a step evaluates at least once
        model = Model(lambda x, t, cond: x, process, num_steps=len(counts))
        deque(trajectory(model, sampler, torch.zeros(1, 1), Noise(torch.Generator())), maxlen=0)
        counts.append(model.nfe)
    if counts[-1] != nfe:
        name = type(sampler).__name__
        raise InputError(f"{name} cannot sample with {nfe} evaluations, but {counts[-2]} or {counts[-1]}")
    return len(counts) - 1
