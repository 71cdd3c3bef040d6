"""Studies of training: each asks one question of schemes on cases, and its cells are training runs over seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffrl.errors import InputError
from diffrl.experiments.comparison import Cell, Execution, Stage, cell_folders, run_cells
from diffrl.experiments.rates import Choice, Tuning, choose, has_diverged, is_settled, measured_by
from diffrl.objectives.place import Solution
from diffrl.objectives.solutions import solution_of

__all__ = ["WHERE", "Comparison", "Study", "run_comparison", "study_cell"]

WHERE = ("study", "case", "scheme", "rate", "point", "seed")
"""`rate` is "fixed" for a run at the plan's own values, "tuning" for one that is tried, "tuned" for one at the best."""
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
        tuning: what each scheme is tuned over before it is reported; None: the plan's own values serve.

    Raises:
        ValueError: the baseline is none of the schemes, `matched` is unknown, there is no case or no seed, a case
            stands there twice, or one of the seeds is tuned on.
    """

    name: str
    title: str
    baseline: str
    matched: str
    cases: tuple[str, ...]
    schemes: tuple[str, ...]
    seeds: tuple[int, ...]
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tuning: Tuning | None = None

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
        if twice := [case for i, case in enumerate(self.cases) if case in self.cases[:i]]:
            raise InputError(f"study {self.name}: cases has {twice[0]} twice: give it once")
        if self.tuning is not None and (both := {*self.seeds} & {*self.tuning.seeds}):
            raise InputError(
                f"study {self.name}: seed {min(both)} is reported, and tuned on: choose other tuning.seeds"
            )

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> "Study":
        """A study as the index of a comparison has it, with lists for tuples.

        Raises:
            ValueError: it is none.
        """
        try:
            axes = {label: tuple(values) for label, values in entry["axes"].items()}
            lists = {key: tuple(entry[key]) for key in ("cases", "schemes", "seeds")}
            tuning = None if entry.get("tuning") is None else Tuning.read(entry["tuning"])
            return cls(**{**entry, **lists, "axes": axes, "tuning": tuning})
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
        cells: those at the plan's own values, made by `study_cell`.
        tuning: those of tuning.
        tuned: takes names of a study, a case, a scheme and a point; returns the cells that are reported.
    """

    name: str
    score_sigmas: tuple[str, ...]
    studies: tuple[Study, ...]
    cells: tuple[Cell, ...]
    tuning: tuple[Cell, ...] = ()
    tuned: Callable[[str, str, str, str], Sequence[Cell]] = lambda study, case, scheme, point: ()

    def choices(self, out: Path) -> list[Choice]:
        """The point of each scheme whose tuning runs have all ended, in the folder of the comparison."""
        folders, measures = cell_folders(self.tuning, out), dict[tuple[str, str, Solution], str]()
        by = {study.name: study.tuning.by for study in self.studies if study.tuning is not None}
        runs: dict[tuple[str, str, str], dict[Path, Cell]] = {}
        for cell in self.tuning:
            study, case, scheme = (cell.where[key] for key in ("study", "case", "scheme"))
            runs.setdefault((study, case, scheme), {})[folders[cell.identity]] = cell
        found = []
        for (study, case, _), own in runs.items():
            config = next(iter(own.values())).config
            kind = (case, by[study], solution_of(config["objective"]["name"]))
            if kind not in measures:
                measures[kind] = measured_by(by[study], config)
            found.append(choose(own, measures[kind], self.score_sigmas))
        return [choice for choice in found if choice is not None]

    def at(self, choices: Sequence[Choice]) -> list[Cell]:
        """The cells that are reported at the points that were chosen."""
        return [
            cell
            for choice in choices
            if choice.point is not None
            for cell in self.tuned(choice.study, choice.case, choice.scheme, choice.point)
        ]


def study_cell(
    study: str,
    case: str,
    scheme: str,
    identity: str,
    config: Mapping[str, Any],
    *,
    rate: str = "fixed",
    point: str = "",
) -> Cell:
    """The training run of a scheme on a case.

    Args:
        study: name of the study.
        case: name of the case.
        scheme: name of the scheme.
        identity: letters and digits that differ where configurations differ.
        config: what `run_experiment` takes, but for ``run_dir`` and ``resume``.
        rate: "fixed", "tuning" or "tuned".
        point: name of the tuning grid's point that it is at; empty where `rate` is "fixed".
    """
    where = dict(zip(WHERE, (study, case, scheme, rate, point, config["seed"]), strict=True))
    return Cell("train", where, (case, scheme), identity, config, (point,) if point else ())


def run_comparison(
    comparison: Comparison,
    out: Path,
    *,
    studies: Sequence[str] = (),
    workers: int = 2,
    progress: bool = True,
) -> Execution:
    """Run every cell that is not finished yet; those that were begun continue where they stopped.

    First all runs of tuning; when each of them has ended, those that are reported, at the plan's own values and at
    each scheme's best ones. A tuning run that diverges has told what it can, and fails nothing.

    Args:
        comparison: what to run.
        out: folder of the comparison.
        studies: run only these; all if empty.
        workers: processes, with one thread each; 0 runs the cells in this process.
        progress: whether to show a bar, in gradient steps, for all cells of tuning, and one for the others.

    Raises:
        RunFolderError: the folder of a cell holds a run with another configuration, or `out` another kind of
            comparison.
        ValueError: no study of that name.
    """
    names = [study.name for study in comparison.studies]
    if unknown := [name for name in studies if name not in names]:
        raise InputError(f"no study {unknown[0]!r} in plan {comparison.name}: there are {', '.join(names)}")

    def asked(cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if not studies or cell.where["study"] in studies]

    def run(only: Sequence[Cell], choices: Sequence[Choice], stage: Stage) -> Execution:
        cells = [*comparison.cells, *comparison.tuning, *comparison.at(choices)]
        about = {
            "plan": comparison.name,
            "score_sigmas": comparison.score_sigmas,
            "studies": [asdict(study) for study in comparison.studies],
            "tuning": [choice.plain for choice in choices],
        }
        return run_cells(cells, out, only=only, stage=stage, about=about, workers=workers, progress=progress)

    tuning, folders = asked(comparison.tuning), cell_folders(comparison.tuning, out)
    count, tried = len({cell.identity for cell in tuning}), False
    before = Execution(count, count, {}, interrupted=False)
    if not all(is_settled(folders[cell.identity]) for cell in tuning):
        stage, tried = Stage(_later(comparison, asked), is_settled), True
        before = run(tuning, comparison.choices(out), stage)
        if before.interrupted:
            return before
    choices = comparison.choices(out)
    done = run(asked([*comparison.at(choices), *comparison.cells]), choices, Stage(tries=not tried))
    return _together(before, done, [c for c in choices if not studies or c.study in studies], comparison)


def _later(comparison: Comparison, asked: Callable[[Sequence[Cell]], list[Cell]]) -> list[Cell]:
    """What follows tuning at most: each cell at the plan's own values, and again where its study is tuned."""
    seeds = {study.name: study.seeds for study in comparison.studies}
    one = {tuple(cell.where[key] for key in WHERE[:3]): cell for cell in asked(comparison.tuning)}
    return [*asked(comparison.cells), *(cell for place, cell in one.items() for _ in seeds[place[0]])]


def _together(
    tuning: Execution, done: Execution, choices: Sequence[Choice], comparison: Comparison
) -> Execution:
    """What both stages came to; the reported cells of a scheme without a point have failed."""
    seeds = {study.name: study.seeds for study in comparison.studies}
    without = {
        f"{choice.case}, {choice.scheme}, tuned, seed {seed}": choice.reason
        for choice in choices
        if choice.point is None
        for seed in seeds[choice.study]
    }
    others = {label: error for label, error in tuning.failed.items() if not has_diverged(error)}
    return Execution(
        tuning.finished + done.finished,
        tuning.total + done.total + len(without),
        {**others, **without, **done.failed},
        done.interrupted,
    )
