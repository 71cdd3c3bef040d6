"""From words of a command line to the cells of a comparison, each with the configuration that Hydra composes."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffrl.configs.cli import check_words, explain
from diffrl.configs.grids import read_grid, read_tuning, refuse_tuned_twice
from diffrl.configs.groups import SINGLE, register
from diffrl.configs.imported import with_imported_model
from diffrl.errors import DiffrlError, InputError
from diffrl.experiments.comparison import PLACE, Cell, cell_figures, run_in_folder
from diffrl.experiments.run import Interrupted
from diffrl.experiments.studies import Comparison, Study, study_cell
from diffrl.ranges import require_int
from diffrl.shell_words import override

__all__ = ["base_run", "plan_comparison", "plan_finetuning", "plan_seeds"]

OF_THE_COMMAND = {"out": "cell", "compare": [], "methods": {}, "seeds": [], "workers": 0, "pretrain": []}
"""Settings of the command `finetune` that say what is run and not what a run is, with their value in a cell."""
_ONE_OPTION = {group for group, *_ in SINGLE}
"""Groups whose option goes without saying: a key `name` in them is an option like others."""


def plan_comparison(plan: Mapping[str, Any]) -> Comparison:
    """Studies and cells of a plan.

    Args:
        plan: what `diffrl.configs.plans.PlanConfig` describes.

    Raises:
        ValueError: a name or an override that is not known, with the study, case and scheme it stands in.
    """
    if not plan["score_sigmas"]:
        raise InputError(
            "score_sigmas is empty: give at least one noise level, of which the score is the mean"
        )
    sigmas = tuple(f"{sigma:g}" for sigma in plan["score_sigmas"])
    studies, cells, tuning = list[Study](), list[Cell](), list[Cell]()
    schemes: dict[tuple[str, str, str], _Scheme] = {}
    for name, given in plan["studies"].items():
        overrides, axes = _schemes(name, given)
        cases, seeds = tuple(given["cases"]), tuple(given["seeds"])
        tried = read_tuning(plan, name, given)
        named = (name, given["title"], given["baseline"], given["matched"], cases, tuple(overrides), seeds)
        studies.append(Study(*named, axes, tried))
        if tried is not None:
            refuse_tuned_twice(name, overrides, tried)
        for case, scheme in itertools.product(cases, overrides):
            made = _Scheme(studies[-1], case, scheme, _words(plan, name, case, overrides[scheme]), sigmas)
            schemes[name, case, scheme] = made
            if tried is None or plan["tuning"].get("beside", True):
                cells += made.cells(seeds, "fixed")
            tuning += made.tried()
            made.forget()

    def tuned(study: str, case: str, scheme: str, point: str) -> list[Cell]:
        made = schemes[study, case, scheme]
        cells = made.cells(made.study.seeds, "tuned", point)
        made.forget()
        return cells

    return Comparison(plan["name"], sigmas, tuple(studies), tuple(cells), tuple(tuning), tuned)


def _words(plan: Mapping[str, Any], study: str, case: str, overrides: Sequence[str]) -> list[str]:
    """The words of a case, of every cell of a study, and of a scheme."""
    if case not in plan["cases"]:
        raise InputError(f"study {study}: no case {case!r} in the plan: there are {', '.join(plan['cases'])}")
    given = [*plan["cases"][case], *plan["studies"][study]["overrides"], *overrides]
    return [word.replace("{seed}", "${seed}").replace("{data_dir}", plan["data_dir"]) for word in given]


class _Scheme:
    """A scheme of a study on a case: its cells at the plan's own values, and at points of the tuning grid."""

    def __init__(
        self, study: Study, case: str, scheme: str, words: Sequence[str], sigmas: Sequence[str]
    ) -> None:
        self.study, self.case, self.scheme, self.words, self.sigmas = study, case, scheme, words, sigmas
        self._config: DictConfig | None = None

    def cells(self, seeds: Sequence[int], rate: str, point: str = "") -> list[Cell]:
        """One for each seed."""
        tuning, name = self.study.tuning, self.study.name
        words = tuning.grid.words(point) if tuning is not None and point else []
        at = f", {point}" if point else ""
        with _told_where(f"study {name}, case {self.case}, scheme {self.scheme}{at}"):
            config = self._composed(words)
            self._check(config)
            return [
                study_cell(name, self.case, self.scheme, *found, rate=rate, point=point)
                for found in _by_seed(config, seeds)
            ]

    def _check(self, config: DictConfig) -> None:
        """Refuse what the report would leave out without a word."""
        if config["beside"]:
            raise InputError("beside is for one run, and a cell has one scheme: give each a name in schemes")
        measured = [f"{sigma:g}" for sigma in config["eval"]["sigmas"]]
        if missing := [sigma for sigma in self.sigmas if sigma not in measured]:
            raise InputError(
                f"score_sigmas has {missing[0]}, which no cell measures: eval.sigmas is {', '.join(measured)}"
            )

    def tried(self) -> list[Cell]:
        """Those of tuning, one for each point of the grid and seed of it.

        Raises:
            ValueError: two points are one run: a value is written in two ways.
        """
        tuning = self.study.tuning
        if tuning is None:
            return []
        found, points = list[Cell](), dict[str, str]()
        for point in tuning.grid.points:
            found += self.cells(tuning.seeds, "tuning", point)
            if (same := points.setdefault(found[-1].identity, point)) != point:
                raise InputError(
                    f"study {self.study.name}: tuning.grid: {same} and {point} are one run: give each value once"
                )
        return found

    def _composed(self, words: Sequence[str]) -> DictConfig:
        """The configuration at a point; every point sets the same values, so that one is set over another."""
        values = [parsed for word in words if _is_value(parsed := _parsed(word))]
        if len(values) < len(words):  # the choice of a group
            return _composed("train", [*self.words, *words, "compare=false"])
        if self._config is None or not words:
            self._config = _composed("train", [*self.words, "compare=false"])
        return _with_values(self._config, values)

    def forget(self) -> None:
        """Drop the composition, which is large."""
        self._config = None


def plan_finetuning(config: Mapping[str, Any], words: Sequence[str], base: str) -> list[Cell]:
    """A cell for every method in ``config["compare"]`` and seed in ``config["seeds"]``.

    Args:
        config: what Hydra composed for the command `finetune`.
        words: the command line's overrides, which hold for every method.
        base: path of what is tuned.

    Raises:
        ValueError: a method that is not known, or a word of it that is no setting, with the method's name.
    """
    _refuse_words_of_one_run(words)
    cells = []
    for method in config["compare"]:
        if method not in config["methods"]:
            raise InputError(f"compare: no method {method!r}: there are {', '.join(config['methods'])}")
        own = config["methods"][method]
        chosen = {*map(_key, own)}  # each is set once: by the method, else by the command line
        shared = [word for word in words if _key(word) not in chosen and not _is_of_the_command(word)]
        with _told_where(f"compare, {method}"):
            composed = _composed("finetune", [*shared, *own, override("model.path", base)])
            for key, value in OF_THE_COMMAND.items():
                composed[key] = value
            for identity, cell in _by_seed(composed, config["seeds"]):
                where = {"method": method, "seed": cell["seed"]}
                cells.append(Cell("finetune", where, (method,), identity, cell))
    return cells


def plan_seeds(config: Mapping[str, Any], words: Sequence[str]) -> tuple[list[Cell], Path]:
    """A cell for every seed in ``config["seeds"]``, and the folder for all of them.

    Args:
        config: what Hydra composed for the command `train`.
        words: the command line's overrides, which hold for every seed.

    Raises:
        ValueError: `seed` is given too, a seed twice, or what is for one run.
    """
    _refuse_words_of_one_run(words)
    if any(_key(word) == "seed" for word in words):
        raise InputError(
            "seed and seeds are both given: give seed=N for one run, or seeds=[N,M,...] for several"
        )
    composed = _composed("train", [word for word in words if _key(word) not in ("seeds", "workers", *PLACE)])
    cells = [Cell("train", {"seed": c["seed"]}, (), i, c) for i, c in _by_seed(composed, config["seeds"])]
    [(identity, one)] = _by_seed(composed, [0])  # more seeds later belong to the same folder
    name = f"{one['data']['name']}_{one['objective']['name']}_seeds_{identity}"
    return cells, Path(config["run_dir"] or Path("runs") / name)


def base_run(pretrain: Sequence[str], root: Path, *, progress: bool = True) -> Path:
    """The folder of the training run that the words describe: it is trained now unless that was done before.

    Args:
        pretrain: words for the command line of `train`.
        root: where such runs lie, each in a folder named by its words.
        progress: whether to show the training's bar.

    Raises:
        ValueError: a word that is no setting.
        Interrupted: the training was stopped, and is saved; the same command continues.
    """
    path = root / f"base_{_digest(chr(10).join(pretrain))}"
    with _told_where("pretrain"):
        config = _plain(_composed("train", [*pretrain, "compare=false"]))
    if not cell_figures(path):
        try:
            run_in_folder("train", config, path, progress=progress)
        except Interrupted as stop:
            where = str(stop).partition(";")[0]
            raise Interrupted(f"{where}: what is to be tuned; the same command continues") from stop
    return path


def _schemes(study: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Overrides of each scheme, those of the grid among them, and the values of the grid's axes by their labels."""
    grid = read_grid(given["axes"] or {}, f"study {study}")
    return {**given["schemes"], **{point: grid.words(point) for point in grid.points}}, dict(grid.axes)


@contextmanager
def _told_where(where: str) -> Iterator[None]:
    """Turn an error in the words of a cell into one line that says where they stand."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, DiffrlError) as error:
        raise InputError(f"{where}: {explain(error)}") from error


def _key(word: str) -> str:
    """What an override sets."""
    return word.lstrip("+").partition("=")[0]


def _refuse_words_of_one_run(words: Sequence[str]) -> None:
    """Several runs continue by the same command, each as it was begun."""
    if found := [word for word in words if _key(word) in PLACE and _key(word) != "run_dir"]:
        raise InputError(
            f"{found[0]} is for one run, and several are asked for: leave it out, or make one run"
        )


def _is_of_the_command(word: str) -> bool:
    """Whether an override is about what is run, and not about what a run is."""
    return _key(word).partition(".")[0] in (*OF_THE_COMMAND, *PLACE, "seed")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _composed(name: str, words: Sequence[str]) -> DictConfig:
    """The configuration `name` with overrides; choices of groups are composed once for all that share them."""
    parsed = [_parsed(word) for word in with_imported_model(words)]
    if swept := [override.input_line for override in parsed if override.is_sweep_override()]:
        raise InputError(f"{swept[0]} has several values: write a scheme for each, or an axis")
    config = _compose(name, tuple(str(o.input_line) for o in parsed if not _is_value(o))).copy()
    return _with_values(config, [o for o in parsed if _is_value(o)])


@cache
def _parsed(word: str) -> Override:
    """The override in a word: most words are those of many cells."""
    return check_words([word])[0]


def _with_values(config: DictConfig, values: Sequence[Override]) -> DictConfig:
    """The configuration, changed in place."""
    for given in values:
        OmegaConf.update(config, given.key_or_group, given.value(), merge=True)
    return config


def _is_value(override: Override) -> bool:
    """Whether it changes a value within a group, and not the choice of a group."""
    return "." in override.key_or_group and override.type == OverrideType.CHANGE


@cache
def _compose(name: str, words: tuple[str, ...]) -> DictConfig:
    """What Hydra composes, which takes a tenth of a second."""
    register()  # a launcher's worker process has but copies of the schemas, which do not compose
    # in a job, the job's own search path serves: it has the user's --config-dir too
    in_job = GlobalHydra.instance().is_initialized()
    with nullcontext() if in_job else initialize_config_module("diffrl.configs", version_base="1.3"):
        return compose(name, [*words])


def _by_seed(config: DictConfig, seeds: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configuration with each seed, after the letters and digits that identify it."""
    if twice := [seed for i, seed in enumerate(seeds) if seed in seeds[:i]]:
        raise InputError(f"seeds has {twice[0]} twice: it is one run")
    for seed in seeds:
        require_int("each of seeds", seed, 0)
    for seed in seeds:
        config.seed = seed
        plain = _plain(config)
        yield _digest(json.dumps(_deviations(config, plain), sort_keys=True)), plain


def _plain(config: DictConfig) -> dict[str, Any]:
    """The whole configuration, but for where the run lies."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in PLACE}


def _deviations(config: DictConfig, plain: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the code's defaults: an option that the code gains later changes nothing here."""
    usual, found = _defaults(_kind(config)), {}
    for key, value in plain.items():
        if OmegaConf.is_dict(config[key]) and _kind(config[key]) is not dict:
            defaults = _defaults(_kind(config[key]))
            tag = None if key in _ONE_OPTION else "name"
            found[key] = {k: v for k, v in value.items() if k == tag or v != defaults.get(k)}
        elif key not in usual or value != usual[key]:
            found[key] = value
    return found


def _kind(config: Any) -> type:
    """The schema that a configuration follows."""
    return cast(type, OmegaConf.get_type(config))


@cache
def _defaults(kind: type) -> dict[Any, Any]:
    """The defaults of a schema."""
    defaults = OmegaConf.to_container(OmegaConf.structured(kind))
    assert isinstance(defaults, dict)
    return defaults
