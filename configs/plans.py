"""Schema of a comparison: studies of schemes on cases over seeds, as the files in `plan/` write them down."""

from dataclasses import dataclass, field

from omegaconf import MISSING

__all__ = ["CompareConfig", "PlanConfig", "StudyConfig", "StudyTuningConfig", "TuningConfig"]


@dataclass
class TuningConfig:
    """Each scheme at its own learning rate: what is tried, on what, and what decides."""

    enabled: bool = True
    """Whether studies are tuned, but for those that say no."""
    grid: dict[str, str | None] = field(
        default_factory=lambda: {"lr": "optim.lr=1e-3,2e-3,4e-3,8e-3,1.6e-2", "betas": None}
    )
    """By the label of each axis its setting and values, as in a study's `axes`; each point of their product is tried.
    null leaves an axis out. For Adam's β1 too: ``betas: optim.betas=[0.5,0.999],[0.9,0.999]``."""
    seeds: list[int] = field(default_factory=lambda: [101, 102])
    """Of the runs that are compared. No study may report one of them; a case with ``data.mixture_seed={seed}`` is
    tuned on other mixtures by it."""
    by: str = "error"
    """error: the least value error at `score_sigmas` where the data's law is known, else the least denoising error on
    held-out data; samples: the least sample distance. A consistency function has a map error in place of the former."""
    beside: bool = True
    """Whether tuned studies run at the plan's own values too, to be reported beside."""


@dataclass
class StudyTuningConfig:
    """What a study tunes otherwise than the plan."""

    enabled: bool = True
    """Whether it is tuned at all, if the plan is."""
    grid: dict[str, str | None] = field(default_factory=dict)
    """Axes in place of the plan's of the same label, or beside them; null leaves one out."""
    seeds: list[int] | None = None
    """null: the plan's."""
    by: str | None = None
    """null: the plan's."""


@dataclass
class StudyConfig:
    """One question; an *override* is a word for the command line of `python -m diffrl train`."""

    title: str = ""
    """The question, in words."""
    cases: list[str] = MISSING
    """Names of the plan's cases."""
    schemes: dict[str, list[str]] = field(default_factory=dict)
    """Overrides of each scheme, by its name."""
    axes: dict[str, str] = field(default_factory=dict)
    """A grid of further schemes: by the label of each axis its setting and values, as ``objective.lmbda=0,0.5,1``. A
    value may be a list: ``optim.betas=[0.5,0.999],[0.9,0.999]``."""
    baseline: str = MISSING
    """The scheme that the others are measured by; one of a grid has a name such as ``λ=1, η=1``."""
    matched: str = "grad_steps"
    """What all schemes have in common: grad_steps, network_evaluations or seconds."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of every cell of the study."""
    seeds: list[int] = MISSING
    tuning: StudyTuningConfig = field(default_factory=StudyTuningConfig)
    """What it tunes otherwise than the plan."""


@dataclass
class PlanConfig:
    """What to compare."""

    name: str = MISSING
    data_dir: str = "data"
    """Folder of the user's own data."""
    score_sigmas: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0])
    """The score is the mean of the value errors at these, each as a multiple of the baseline's."""
    cases: dict[str, list[str]] = MISSING
    """Overrides of each case: data, network, sizes. ``{seed}`` stands for the seed of a cell, ``{data_dir}`` for
    `data_dir`."""
    studies: dict[str, StudyConfig] = MISSING
    tuning: TuningConfig = field(default_factory=TuningConfig)
    """How each scheme gets a learning rate of its own."""


@dataclass
class CompareConfig:
    """How to run and report a plan."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    out: str = MISSING
    """Folder of the comparison."""
    studies: list[str] = field(default_factory=list)
    """Run only these; all if empty."""
    workers: int = 2
    """Processes, with one thread each; 0 runs all in one."""
    report: bool = False
    """Only draw the report anew, from what is in `out`."""
