"""Studies of training: each asks one question of schemes on cases, and its cells are training runs over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffrl.errors import InputError
from diffrl.experiments.comparison import Cell, Execution, run_cells

__all__ = ["WHERE", "Comparison", "Study", "grid_scheme", "run_comparison", "study_cell"]

WHERE = ("study", "case", "scheme", "seed")
MATCHED = ("grad_steps", "network_evaluations", "seconds")


@dataclass(frozen=True)
class Study:
    """One question: schemes against a baseline.

    Args:
        name: of the study.
        title: the question, in words.
        baseline: the scheme that the others are measured by.
        matched: what all schemes have in common: "grad_steps", "network_evaluations" or "seconds".
        cases: names, in the order of the report.
        schemes: names, in the order of the report.
        seeds: of every cell.
        axes: where schemes form a grid, the values of each axis by its label.

    Raises:
        ValueError: the baseline is none of the schemes, `matched` is unknown, or there is no case or no seed.
    """

    name: str
    title: str
    baseline: str
    matched: str
    cases: tuple[str, ...]
    schemes: tuple[str, ...]
    seeds: tuple[int, ...]
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.baseline not in self.schemes:
            known = "; ".join(self.schemes)
            raise InputError(
                f"study {self.name}: the baseline {self.baseline!r} is none of its schemes: {known}"
            )
        if self.matched not in MATCHED:
            raise InputError(
                f"study {self.name}: matched is {self.matched!r}: give one of {', '.join(MATCHED)}"
            )
        for what, values in (("case", self.cases), ("seed", self.seeds)):
            if not values:
                raise InputError(f"study {self.name} has no {what}: give at least one")

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> "Study":
        """A study as the index of a comparison has it, with lists for tuples.

        Raises:
            ValueError: it is none.
        """
        try:
            axes = {label: tuple(values) for label, values in entry["axes"].items()}
            lists = {key: tuple(entry[key]) for key in ("cases", "schemes", "seeds")}
            return cls(**{**entry, **lists, "axes": axes})
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"index.json is damaged: a study of it cannot be read ({error}): the comparison's own command writes "
                "it anew"
            ) from error


@dataclass(frozen=True)
class Comparison:
    """Studies and their cells.

    Args:
        name: of the plan.
        score_sigmas: noise levels, as keys of ``value_error``, whose errors make the score.
        studies: what is asked.
        cells: all of them, made by `study_cell`.
    """

    name: str
    score_sigmas: tuple[str, ...]
    studies: tuple[Study, ...]
    cells: tuple[Cell, ...]


def study_cell(study: str, case: str, scheme: str, identity: str, config: Mapping[str, Any]) -> Cell:
    """The training run of a scheme on a case.

    Args:
        study: name of the study.
        case: name of the case.
        scheme: name of the scheme.
        identity: letters and digits that differ where configurations differ.
        config: what `run_experiment` takes, but for ``run_dir`` and ``resume``.
    """
    where = dict(zip(WHERE, (study, case, scheme, config["seed"]), strict=True))
    return Cell("train", where, (case, scheme), identity, config)


def grid_scheme(axes: Mapping[str, str]) -> str:
    """Name of the scheme at a point of a grid, such as "λ=0.5, η=1.0", from the value of each axis."""
    return ", ".join(f"{label}={value}" for label, value in axes.items())


def run_comparison(
    comparison: Comparison,
    out: Path,
    *,
    studies: Sequence[str] = (),
    workers: int = 2,
    progress: bool = True,
) -> Execution:
    """Run every cell that is not finished yet; those that were begun continue where they stopped.

    Args:
        comparison: what to run.
        out: folder of the comparison.
        studies: run only these; all if empty.
        workers: processes, with one thread each; 0 runs the cells in this process.
        progress: whether to show one bar, in gradient steps, for all cells.

    Raises:
        RunFolderError: the folder of a cell holds a run with another configuration, or `out` another kind of
            comparison.
        ValueError: no study of that name.
    """
    names = [study.name for study in comparison.studies]
    if unknown := [name for name in studies if name not in names]:
        raise InputError(f"no study {unknown[0]!r} in plan {comparison.name}: there are {', '.join(names)}")
    only = [cell for cell in comparison.cells if not studies or cell.where["study"] in studies]
    about = {
        "plan": comparison.name,
        "score_sigmas": comparison.score_sigmas,
        "studies": [asdict(study) for study in comparison.studies],
    }
    return run_cells(comparison.cells, out, only=only, about=about, workers=workers, progress=progress)
