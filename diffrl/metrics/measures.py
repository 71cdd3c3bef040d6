"""Measures of samples by name: distances of points, and of named features their distances, precision and recall."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffrl.errors import InputError
from diffrl.metrics.discrepancy import clouds, mmd
from diffrl.metrics.features import FEATURES, named_features, takes_weights
from diffrl.metrics.kernel_distance import kid
from diffrl.metrics.manifolds import precision, recall
from diffrl.metrics.point_clouds import frechet_distance, sliced_w2, w2
from diffrl.metrics.reference_statistics import Features, Statistics, frechet, kept_statistics

__all__ = [
    "FEATURE_MEASURES",
    "SAMPLE_DISTANCES",
    "FigureName",
    "Reference",
    "features_of",
    "measure_names",
]

SAMPLE_DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "w2": w2,
    "sliced_w2": sliced_w2,
    "mmd": mmd,
}
"""Of the points themselves."""
FEATURE_MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "fd": frechet_distance,
    "kid": kid,
    "precision": precision,
    "recall": recall,
}
"""Of features of samples and of data: ``fd_digits_cnn`` is the Fréchet distance of the features digits_cnn."""
MANIFOLDS = ("precision", "recall")  # of as many data as samples
ORDER_SEED = 0  # of the choice of these data


def measure_names(*, with_weights: bool = True) -> list[str]:
    """All measures: the distances of points, then each measure of each registered features.

    Args:
        with_weights: whether those of features are told whose weights are in a file that the user gives.
    """
    named = [name for name in FEATURES if with_weights or not takes_weights(name)]
    return [*SAMPLE_DISTANCES, *(f"{measure}_{name}" for name in named for measure in FEATURE_MEASURES)]


def features_of(name: str) -> str | None:
    """The features that a measure is of; None of a distance of points.

    Raises:
        ValueError: no measure has that name.
    """
    if name in SAMPLE_DISTANCES:
        return None
    measure, _, features = name.partition("_")
    if measure not in FEATURE_MEASURES or features not in FEATURES:
        raise InputError(
            f"no distance is called {name!r}; there are {', '.join(SAMPLE_DISTANCES)}, and "
            f"{', '.join(f'{m}_' for m in FEATURE_MEASURES)} before one of {', '.join(FEATURES)}"
        )
    return features


class FigureName(NamedTuple):
    """What a figure is called: ``fd_digits_cnn@2000_seed7``, the measure, the number of samples, and their seed.

    With keyed streams (`diffrl.diffusion.samplers.Noise.of_rows`) the last part is ``key7``. Figures of diffrl 0.3 and
    before have no seed in their name; theirs was 2718281.

    >>> str(FigureName("kid_digits_cnn", 500, "seed7")), FigureName.of("sliced_w2@40")
    ('kid_digits_cnn@500_seed7', FigureName(measure='sliced_w2', samples=40, seed=''))

    Args:
        measure: its name.
        samples: how many.
        seed: ``seed`` or ``key`` and the number; empty if it is not known.
    """

    measure: str
    samples: int
    seed: str = ""

    @classmethod
    def of(cls, name: str) -> "FigureName":
        """Read a name.

        Raises:
            ValueError: it is none.
        """
        found = re.fullmatch(r"([^@]+)@(\d+)(?:_((?:seed|key)\d+))?", name)
        if found is None:
            raise InputError(f"{name!r} names no figure: they are called like sliced_w2@2000_seed7")
        return cls(found[1], int(found[2]), found[3] or "")

    def __str__(self) -> str:
        return f"{self.measure}@{self.samples}{'_' * bool(self.seed)}{self.seed}"


@dataclass(eq=False)
class Reference:
    """A set that samples are measured against; its features are computed once.

    Args:
        y: data, shape [m, *E].
        statistics: folder that keeps mean and covariance of its features, for ``fd_``; None keeps none.
        weights: file of the weights of features that take one.
        device: where features that are modules compute; all else happens where the samples are.
    """

    y: Tensor
    statistics: str | Path | None = None
    weights: str | Path | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self._features: dict[str, Features] = {}
        self._of_y: dict[str, Tensor] = {}
        self._gaussians: dict[str, Statistics] = {}

    def measured(self, names: Sequence[str], x: Tensor) -> dict[str, float]:
        """Each measure of samples x [n, *E], by its name; their features are computed once.

        Precision and recall are of as many data as samples, chosen by a fixed seed, where there are more.

        Raises:
            ValueError: an unknown measure, or samples that it refuses.
            FileError: a file of weights or of statistics is missing or damaged.
            MissingExtra: a measure needs a package that is not installed.
        """
        found: dict[str, float] = {}
        of_x: dict[str, Tensor] = {}
        for name in names:
            of = features_of(name)
            if of is None:
                found[name] = SAMPLE_DISTANCES[name](x, self.y)
                continue
            if of not in of_x:
                of_x[of] = self._named(of).compute(x).cpu()
            found[name] = self._of_features(name.partition("_")[0], of, of_x[of])
        return found

    def _named(self, of: str) -> Features:
        if of not in self._features:
            self._features[of] = named_features(of, weights=self.weights, device=self.device)
        return self._features[of]

    def _of_features(self, measure: str, of: str, fx: Tensor) -> float:
        if measure == "fd":
            return frechet(Statistics.of(clouds(fx, fx)[0]), self._gaussian(of))
        fy = self._reference_features(of)
        if measure in MANIFOLDS and len(fy) > len(fx):
            order = torch.randperm(len(fy), generator=torch.Generator().manual_seed(ORDER_SEED))
            fy = fy[order[: len(fx)]]
        return FEATURE_MEASURES[measure](fx, fy)

    def _reference_features(self, of: str) -> Tensor:
        if of not in self._of_y:
            self._of_y[of] = self._named(of).compute(self.y).cpu()
        return self._of_y[of]

    def _gaussian(self, of: str) -> Statistics:
        """Mean and covariance of the data's features, once."""
        if of not in self._gaussians:
            if self.statistics is None:
                fy = self._reference_features(of)
                self._gaussians[of] = Statistics.of(clouds(fy, fy)[0])
            else:
                self._gaussians[of] = kept_statistics(self._named(of), self.y, self.statistics)
        return self._gaussians[of]
