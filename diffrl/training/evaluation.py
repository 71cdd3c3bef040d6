"""What a trained denoiser is worth: errors by noise level, sample distance by network evaluations."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.diffusion.denoisers import Denoiser, DenoiserFn
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.guidance import GuidedDenoiser
from diffrl.diffusion.samplers.base import Model, Noise, Sampler, Streams
from diffrl.diffusion.samplers.loop import trajectory
from diffrl.errors import InputError, of_group
from diffrl.metrics.distances import check_distance, denoising_error, value_error
from diffrl.metrics.features import takes_weights
from diffrl.metrics.map_error import check_pairs, map_error
from diffrl.metrics.measures import FigureName, Reference, features_of
from diffrl.metrics.scheme_targets import scheme_target_errors
from diffrl.objectives.place import Solution
from diffrl.objectives.scheme import Objective
from diffrl.ranges import require_int, require_number
from diffrl.training.build import Events

__all__ = ["Evaluation", "class_labels", "draw_samples"]

SAMPLE_SEED = 2_718_281  # evaluation noise is the same for every run, and no training seed's


@dataclass(frozen=True)
class Evaluation:
    """What to measure.

    Args:
        sigmas: noise-to-signal ratios at which the errors are taken.
        points: data at which they are taken: of a set in memory, training rows for the value error, and test rows for
            the denoising error; else test points for both.
        num_steps: levels of the sampling grids.
        samples: samples drawn for each.
        distance: between samples and data, one of `diffrl.metrics.measure_names`.
        quality: further measures of the same samples, such as [kid_digits_cnn,precision_digits_cnn,recall_digits_cnn].
        quality_every: gradient steps between looks at distance and quality while the network trains, a multiple of
            trainer.eval_every; 0: at the end alone.
        weights: file of the weights of features that take one (inception).
        seed: of the samples' noise.
        streams: "added", or "keyed", with which no two seeds share a sample: see
            `diffrl.diffusion.samplers.Noise.of_rows`.
        at_once: points or samples that go through the network side by side.
        max_gib: GiB of memory that the distance may take.
        map_pairs: pairs [t, r] of noise-to-signal ratios, r = 0 included, at which the error of the flow map X_{t→r} is
            taken, on `points` points: of denoisers with a second time, and to r = 0 of consistency models. It needs
            data with a known law. None are given by default: then consistency models alone have it, from `sigmas` to 0.
        target_states: states at which, at the end, bias and variance of the objective's target are taken, see
            `diffrl.metrics.scheme_targets`; none by default. It needs data with a known law, and no labels.
        target_draws: of the datum at each of them, at least 2.
        statistics: folder where a distance between features (fd_digits_cnn) keeps the mean and covariance of those of
            the data, by a hash of data and features, so that they are computed once; None keeps none.

    Raises:
        ValueError: an argument outside its range.
    """

    sigmas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    points: int = 2000
    num_steps: tuple[int, ...] = (3, 5, 8, 13, 18)
    samples: int = 2000
    distance: str = "sliced_w2"
    quality: tuple[str, ...] = ()
    quality_every: int = 0
    weights: str | None = None
    seed: int = SAMPLE_SEED
    streams: Streams = "added"
    at_once: int = 1000
    max_gib: float = 8.0
    map_pairs: tuple[tuple[float, float], ...] = ()
    target_states: int = 0
    target_draws: int = 16
    statistics: str | None = None

    def __post_init__(self) -> None:
        for name in ("points", "samples", "at_once"):
            require_int(f"eval.{name}", getattr(self, name))
        require_number("eval.max_gib", self.max_gib, 0)
        require_int("eval.quality_every", self.quality_every, 0)
        with of_group("eval", ("seed", "streams")):
            Noise.of_rows(self.streams, self.seed, range(self.samples - 1, self.samples))
        require_int("eval.target_states", self.target_states, 0)
        require_int("eval.target_draws", self.target_draws, 2)
        if not self.num_steps or min(self.num_steps) < 1:
            raise InputError(f"eval.num_steps is {list(self.num_steps)}: give grids of at least 1 level")
        with of_group("eval", ("map_pairs",)):
            check_pairs(self.map_pairs)

    @property
    def measures(self) -> tuple[str, ...]:
        """All that is measured of samples, once each."""
        return tuple(dict.fromkeys((self.distance, *self.quality)))

    def figure(self, measure: str) -> str:
        """What a figure of samples is called, with features, number and seed: see `FigureName`."""
        word = "seed" if self.streams == "added" else "key"
        return str(FigureName(measure, self.samples, f"{word}{self.seed}"))

    def reference(self, data: Data, device: torch.device | str = "cpu") -> Reference:
        """What samples are measured against: points of the law that training saw; modules of features on `device`."""
        return Reference(_reference(data), self.statistics, self.weights, device)

    def check(
        self,
        denoiser: Denoiser,
        oracle: MixtureDenoiser | None,
        data: Data,
        draw: Callable[[int, int], object] = lambda num_steps, samples: None,
    ) -> None:
        """Evaluate what the memory has to hold at once, so that what cannot be evaluated is said at the start.

        Args:
            denoiser: D.
            oracle: D*, or None.
            data: the set.
            draw: draws samples: (number of levels, number of samples).

        Raises:
            ValueError: a noise level out of reach, a distance that is unknown or does not fit the data, or more than
                the memory holds.
            MissingExtra: the distance needs a package that is not installed.
        """
        self.check_measures(data)
        few = replace(self, points=1)
        few.value_error(denoiser, oracle, data)
        few.map_error(denoiser, oracle, data)
        with self._in_memory():
            full = replace(self, sigmas=self.sigmas[:1], points=min(self.points, self.at_once))
            full.value_error(denoiser, oracle, data)
            full.denoising_error(denoiser, data)
            draw(1, min(self.samples, self.at_once))

    def check_measures(self, data: Data) -> None:
        """Take every measure of a few data, so that what cannot be taken is said before samples are drawn.

        Raises:
            ValueError: a measure that is unknown, does not fit the data, or takes too much memory; or an option that
                none of them wants.
            FileError: a file of weights or of statistics cannot be read.
            MissingExtra: a measure needs a package that is not installed.
        """
        for key, names in (("distance", [self.distance]), ("quality", self.quality)):
            for name in names:
                try:
                    features_of(name)
                except InputError as error:
                    raise InputError(f"eval.{key}: {error}") from error
        y = _reference(data)
        few = y[:64]
        with of_group("eval", ("max_gib", "statistics", "weights")):
            for name in self.measures:
                check_distance(name, self.samples, len(y), y[0].numel(), max_gib=self.max_gib)
            if self.weights is not None and not any(
                map(takes_weights, filter(None, map(features_of, self.measures)))
            ):
                raise InputError("weights is given, but no measure has features that take them: leave it out")
            if self.statistics is not None and not any(name.startswith("fd_") for name in self.measures):
                raise InputError(
                    "statistics is given, but no measure keeps them: take a distance such as fd_digits_cnn"
                )
            kept = few if self.statistics is None else y
            # as few samples as there will be: some measures need more than one
            Reference(kept, self.statistics, self.weights).measured(self.measures, few[: self.samples])

    @contextmanager
    def _in_memory(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "alloc" not in str(error):
                raise
            raise InputError(
                f"eval.at_once is {self.at_once}, which the memory of the device does not hold: lower it"
            ) from error

    def value_error(self, denoiser: Denoiser, oracle: DenoiserFn | None, data: Data) -> dict[str, float]:
        """‖D - D*‖²/c_out² by σ; empty without an oracle, which knows the noise of no prior but the standard one.

        A conditional denoiser is asked without labels.
        Of a finite set it is taken on the rows that were trained on, whose exact denoiser D* is.
        """
        if oracle is None or getattr(denoiser, "prior", None) is not None:
            return {}
        x0 = _reference(data)[: self.points].to(next(denoiser.parameters()))
        return value_error(
            denoiser,
            oracle,
            x0,
            denoiser.process,
            self.sigmas,
            sigma_data=denoiser.sigma_data,
            batch_size=self.at_once,
        )

    def pairs_for(self, solution: Solution, data: Data) -> tuple[tuple[float, float], ...]:
        """The pairs at which a network with that solution is compared with the exact map."""
        if self.map_pairs or solution != "to_clean" or data.mixture is None:
            return self.map_pairs
        return tuple((sigma, 0.0) for sigma in self.sigmas)

    def map_error(
        self,
        denoiser: Denoiser,
        oracle: MixtureDenoiser | None,
        data: Data,
        solution: Solution | None = None,
    ) -> dict[str, float]:
        """Mean of ‖X_{t→r} - X*_{t→r}‖²/(α_r² dim(E)) by "t->r"; empty where no pair is asked for, or without a map.

        Args:
            denoiser: D.
            oracle: D*, or None.
            data: the set.
            solution: what the network is meant as; None: what it looks like.

        Raises:
            ValueError: data whose law is not known.
        """
        pairs = self.map_pairs if solution is None else self.pairs_for(solution, data)
        if not pairs:
            return {}
        if oracle is None or data.mixture is None:
            raise InputError(
                f"eval.map_pairs asks for the exact flow map, but the law of {data.name} is not known: take data=gmm "
                "or data=rings, or leave it out"
            )
        x0 = _reference(data)[: self.points].to(next(denoiser.parameters()))
        to_clean = None if solution is None else solution == "to_clean"
        return map_error(denoiser, oracle, x0, pairs, to_clean=to_clean, batch_size=self.at_once)

    def target_error(
        self, objective: Objective, oracle: MixtureDenoiser | None, data: Data, batch_size: int | None = None
    ) -> dict[str, float]:
        """Bias and variance of a target at its own networks; empty unless asked for, or where none is defined.

        Args:
            objective: at its networks as they are.
            oracle: D*, or None.
            data: the set.
            batch_size: data of a training batch, where a target refers to it.
        """
        denoiser = objective.loss.denoiser
        known = oracle is not None and data.mixture is not None and getattr(denoiser, "prior", None) is None
        if not self.target_states or not known or _num_classes(denoiser):
            return {}
        assert oracle is not None
        x0 = _reference(data)[: self.target_states].to(next(denoiser.parameters()))
        objective.loss.eval()
        return scheme_target_errors(objective, oracle, x0, draws=self.target_draws, batch_size=batch_size)

    def denoising_error(self, denoiser: Denoiser, data: Data) -> dict[str, float]:
        """‖D - x0‖²/c_out² by σ on test points, never trained on; a conditional denoiser gets their labels."""
        x0 = data.test[: self.points].to(next(denoiser.parameters()))
        labels = data.test_labels if _num_classes(denoiser) else None
        return denoising_error(
            denoiser,
            x0,
            denoiser.process,
            self.sigmas,
            sigma_data=denoiser.sigma_data,
            cond=None if labels is None else labels[: self.points].to(x0.device),
            batch_size=self.at_once,
        )

    def measured(self, samples: Tensor, reference: Reference) -> dict[str, float]:
        """Each of `measures` of samples, by its name; images are first clipped to [-1, 1]."""
        samples = samples.clamp(-1, 1) if samples.ndim == 4 else samples
        return reference.measured(self.measures, samples.cpu())

    def sample_distance(self, samples: Tensor, data: Data) -> float:
        """The distance alone, between samples and the law that training saw."""
        only = replace(self, quality=())
        return only.measured(samples, self.reference(data, samples.device))[self.distance]


def _reference(data: Data) -> Tensor:
    """Points of the law that training sees: training rows that are in memory, else test points, which are fresh."""
    return data.test if data.train is None else data.train


def _num_classes(denoiser: Denoiser) -> int:
    """Labels that the network knows."""
    return int(getattr(denoiser.network, "num_classes", 0))


def class_labels(shares: Sequence[float], n: int) -> Tensor:
    """Labels whose shares are those wanted, up to about one sample, however many are taken: int64 [n].

    Each is of the class that is furthest behind: argmax_c (share_c (j + 1) - count_c). Equal shares go in turn.

    Args:
        shares: of the classes 0..C-1, with sum 1.
        n: how many.
    """
    wanted, counts, labels = np.array(shares), np.zeros(len(shares)), []
    for j in range(n):
        labels.append(int((wanted * (j + 1) - counts).argmax()))
        counts[labels[-1]] += 1
    return torch.tensor(labels)


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
    streams: Streams = "added",
) -> tuple[Tensor, int]:
    """Samples of the data's shape, each with noise of its own, so that the batch size changes nothing.

    Args:
        denoiser: D; if its network takes labels, classes are drawn with their shares in the data.
        data: for its event shape and the shares of its classes; equal ones if it tells none.
        sampler: the reverse step.
        num_steps: noise levels N.
        samples: how many.
        seed: ≥ 0, see `streams`.
        guidance_scale: see `diffrl.diffusion.denoisers.GuidedDenoiser`; 1 is off.
        batch_size: samples drawn at once.
        streams: how the noise of a sample follows from the seed, see `diffrl.diffusion.samplers.Noise.of_rows`.

    Returns:
        The samples [samples, *E], and the network evaluations of each.

    Raises:
        ValueError: guidance of a network without labels, no sample, or seeds below 0 or above what torch takes.
    """
    require_int("samples", samples)
    num_classes = _num_classes(denoiser)
    if guidance_scale != 1 and num_classes == 0:
        raise InputError(
            f"guidance_scale is {guidance_scale:g}, but there were no labels in training: "
            "data.conditional=true uses those of the data"
        )
    parameter = next(denoiser.parameters())
    guided = GuidedDenoiser(denoiser, num_classes, guidance_scale) if num_classes else denoiser
    classes = None
    if num_classes:
        shares = data.class_shares or [1 / num_classes] * num_classes
        classes = class_labels(shares, samples).to(parameter.device)
    parts, nfe = [], 0
    for first in range(0, samples, batch_size):
        n = min(batch_size, samples - first)
        labels = None if classes is None else classes[first : first + n]
        model = Model(guided, denoiser.process, num_steps, labels)
        x = torch.zeros(n, *data.event_shape, dtype=parameter.dtype, device=parameter.device)
        noise = Noise.of_rows(streams, seed, range(first, first + n))
        with torch.no_grad():
            x = deque(trajectory(model, sampler, x, noise), maxlen=1).pop()
        parts.append(x)
        nfe = model.nfe * (2 if num_classes and guidance_scale not in (0, 1) else 1)
    return torch.cat(parts), nfe
