"""Each scheme at its own learning rate: a grid is tried at seeds that are not reported, and the best point is taken."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.errors import InputError
from diffrl.experiments.comparison import Cell, cell_error, cell_figures
from diffrl.experiments.grids import Grid
from diffrl.objectives.solutions import solution_of
from diffrl.training.build import build_data
from diffrl.training.optim import NonFiniteLoss

__all__ = ["Choice", "Tuning", "choose", "has_diverged", "is_settled", "measured_by"]

CRITERIA = ("error", "samples")
SCHEME = ("study", "case", "scheme")


@dataclass(frozen=True)
class Tuning:
    """What the schemes of a study are tuned over, and by what.

    Args:
        grid: its points are tried.
        seeds: of the runs that are compared; none of them is reported.
        by: "error": the least value error where the data's law is known, else the least denoising error on held-out
            data; "samples": the least sample distance.

    Raises:
        ValueError: fewer than two points, no seed, or another `by`.
    """

    grid: Grid
    seeds: tuple[int, ...]
    by: str = "error"

    def __post_init__(self) -> None:
        if len(self.grid.points) < 2:
            raise InputError("tuning.grid has fewer than two points: give values, or tuning.enabled=false")
        if not self.seeds:
            raise InputError("tuning.seeds is empty: give at least one, or tuning.enabled=false")
        if self.by not in CRITERIA:
            raise InputError(f"tuning.by is {self.by!r}: give one of {', '.join(CRITERIA)}")

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> "Tuning":
        """As the index of a comparison has it, with lists for tuples."""
        axes = {label: tuple(values) for label, values in entry["grid"]["axes"].items()}
        return cls(Grid(dict(entry["grid"]["keys"]), axes), tuple(entry["seeds"]), entry["by"])


@dataclass(frozen=True)
class Choice:
    """The point that a scheme takes on a case.

    Args:
        study: name of the study.
        case: name of the case.
        scheme: name of the scheme.
        measure: what was compared: "value_error", "map_error", "denoising_error" or "sample_distance".
        scores: of each point, the geometric mean over seeds and noise levels (or numbers of evaluations); None where
            a run diverged or failed.
        point: the one with the least score; None if no point has one.
        folder: name of the folder of a run that failed; None if all ended well.
        error: one line on why that one failed.
    """

    study: str
    case: str
    scheme: str
    measure: str
    scores: Mapping[str, float | None]
    point: str | None
    folder: str | None
    error: str | None

    @classmethod
    def read(cls, entry: Any, points: Mapping[str, Collection[str]]) -> "Choice":
        """As the index of a comparison has it.

        Args:
            entry: of the index.
            points: of the tuning grid, by the study.

        Raises:
            ValueError: it is none, or of a study that is not tuned.
        """
        try:
            choice = cls(**entry)
            if not all(score is None or isinstance(score, int | float) for score in choice.scores.values()):
                raise TypeError("a score is no number")
            if choice.study not in points:
                raise TypeError(f"study {choice.study} is not tuned")
            if choice.point is not None and choice.point not in points[choice.study]:
                raise TypeError(f"{choice.point} is no point of its grid")
        except (AttributeError, TypeError) as error:
            raise InputError(
                f"index.json is damaged: what a scheme takes cannot be read ({error}): the comparison's own command "
                "writes it anew"
            ) from error
        return choice

    @property
    def plain(self) -> dict[str, Any]:
        """For the index of a comparison."""
        return asdict(self)

    @property
    def reason(self) -> str:
        """Why there is no point to take."""
        return f"no point of the tuning grid ended with finite figures; {self.error or 'no figure was taken'}"


def choose(runs: Mapping[Path, Cell], measure: str, sigmas: Sequence[str]) -> Choice | None:
    """The point of a scheme whose runs over all seeds are best; the first of equals.

    The score of a point is exp(mean_{s,k} ln e_{s,k}), of the errors e at seed s and noise level k: it has the same
    order whatever the scale of the errors, and depends on no other point.

    Args:
        runs: the tuning runs of one scheme on one case, by their folders.
        measure: "value_error", "map_error", "denoising_error" or "sample_distance".
        sigmas: at which errors are looked at, if a run has them all; else at all that it has.

    Returns:
        None while some run has neither ended nor failed.
    """
    found: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for path, cell in runs.items():
        figures, error = cell_figures(path), cell_error(path)
        if not figures and error is None:
            return None
        if not figures:
            failed.setdefault(path.name, error or "")
        found.setdefault(cell.where["point"], []).append(_log_error(figures, measure, sigmas))
    means = {point: float(np.mean(logs)) for point, logs in found.items()}
    scores = {point: math.exp(mean) if math.isfinite(mean) else None for point, mean in means.items()}
    finite = {point: score for point, score in scores.items() if score is not None}
    best = min(finite, key=lambda point: finite[point]) if finite else None
    study, case, scheme = (next(iter(runs.values())).where[key] for key in SCHEME)
    folder, error = next(iter(failed.items()), (None, None))
    return Choice(study, case, scheme, measure, scores, best, folder, error)


def measured_by(by: str, config: Mapping[str, Any]) -> str:
    """What is compared of a scheme on a case, from how the study tunes and the configuration of one of its runs.

    No error in denoising is one of a consistency function: its map error decides, or where that is not known the
    distance of its samples.
    """
    solution = solution_of(config["objective"]["name"])
    if by == "samples" or solution == "to_next":
        return "sample_distance"
    # an oracle that knows the training data by heart is no judge of a rate
    if build_data(config).mixture is None:
        return "sample_distance" if solution == "to_clean" else "denoising_error"
    if config["denoiser"]["prior"] != "standard":  # the oracle knows the noise of no other
        return "denoising_error"
    return "map_error" if solution == "to_clean" else "value_error"


def has_diverged(error: str | None) -> bool:
    """Whether the one line on why a run failed says that its loss was not finite, as it would be each time."""
    return error is not None and error.startswith(f"{NonFiniteLoss.__name__}:")


def is_settled(path: Path) -> bool:
    """Whether the tuning run in a folder has told what it can: it is finished, or has diverged."""
    return bool(cell_figures(path)) or has_diverged(cell_error(path))


def _log_error(figures: Mapping[str, Any], measure: str, sigmas: Sequence[str]) -> float:
    """The mean logarithm of a run's errors; infinite where they are missing or not finite."""
    found = figures.get(measure, {})
    errors = found.get("by_nfe", {}) if measure == "sample_distance" else found
    keys = sigmas if measure != "sample_distance" and set(sigmas) <= set(errors) else list(errors)
    values = [float(errors[key]) for key in keys]
    if not values or not all(math.isfinite(value) and value >= 0 for value in values):
        return math.inf
    return float(np.mean(np.log(np.maximum(values, np.finfo(float).tiny))))
