"""The command line: Hydra composes a configuration, and a mistake is one line that names it and its remedy."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from omegaconf import DictConfig, OmegaConf

from diffrl.configs.boundary import EXPECTED, explain, reported
from diffrl.configs.groups import register
from diffrl.configs.imported import with_imported_model
from diffrl.configs.output import write_utf8
from diffrl.configs.sweeps import job_reported, sweep_reported
from diffrl.errors import InputError
from diffrl.experiments.resuming import resumed
from diffrl.ranks import refuse_several_processes
from diffrl.registry import IMPORT, import_named

__all__ = [
    "EXPECTED",
    "check_numbers",
    "check_words",
    "command",
    "explain",
    "import_users_modules",
    "one_line",
    "settings",
]

NAMED = ("+plan.cases.", "+plan.studies.", "+plan.tuning.grid.", "+methods.", "+beside.")
"""Begins of words that add a case, a study, a scheme, an axis or a method of fine-tuning under a name of the user's."""
OF_FILES = ("experiment", "plan", "recipe")
"""Groups whose options are files; the others are in Hydra's store."""
FLAGS = (
    *("help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "shell-completion"),
    *("config-path", "config-name", "config-dir", "experimental-rerun", "info"),
)
"""What Hydra takes with two dashes, or begins of it."""
AROUND = ("trainer", "eval", "seed", "seeds", "workers", "device", "logger", "run_dir", "hydra")
"""Words and groups that leave it open what is run."""
LARGEST = 2**63 - 1
"""What a whole number of torch can hold."""


def command(
    config_name: str, main_job: str | None = None, *, shared: bool = False
) -> Callable[[Callable[[dict[str, Any]], None]], Callable[[], None]]:
    """Make a script's main function a command over the config of that name in `diffrl.configs`.

    Where no word says what is to be run, the word `main_job` is added, as if it had been typed. Several processes that
    torchrun started are refused, unless they have a `shared` command to themselves.

    Errors that a user can mend are printed in one line, with exit status 1; HYDRA_FULL_ERROR=1 gives the
    traceback. A run that is stopped by a signal is saved, and ends with exit status 1 too. Of a sweep, a job that fails
    ends no other, and one that is stopped ends it; the exit status is 1 then.
    """

    def decorate(main: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        def entry() -> None:
            given = os.environ.get("HYDRA_FULL_ERROR")
            full = given == "1"
            write_utf8()
            failed: list[str] = []
            with reported(full=full):
                if not shared:
                    refuse_several_processes(f"the command {main.__name__}")
                if any(map(_sweeps, sys.argv[1:])):
                    refuse_several_processes("a sweep")
                import_users_modules()
                register()
                refuse_dashes(sys.argv[1:])
                if main_job is not None and not any(map(_says_what, sys.argv[1:])):
                    sys.argv.append(main_job)
                check_words([word for word in sys.argv[1:] if "=" in word and not word.startswith("-")])
                typed = [*sys.argv]
                sys.argv[1:] = with_imported_model(sys.argv[1:])

            def job(config: DictConfig) -> None:
                sys.argv[:] = typed  # what a run keeps as its command
                # inside too, or Hydra adds a line about its overrides
                with job_reported(failed, full=full, config=config):
                    main(settings(config, HydraConfig.get().overrides.task))

            compose = hydra.main(
                version_base="1.3", config_path="pkg://diffrl.configs", config_name=config_name
            )
            os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own version and exits
            try:
                with reported(full=full), sweep_reported(failed), _quick_help():
                    compose(job)()
            finally:
                os.environ["HYDRA_FULL_ERROR"] = given or "0"

        return entry

    return decorate


@contextmanager
def _quick_help() -> Iterator[None]:
    """Keep Hydra from listing its groups for a help that does not show them: it copies its store for each of 200."""
    listed = Hydra.format_config_groups
    if "--hydra-help" not in sys.argv:
        Hydra.format_config_groups = lambda self, predicate, compact=True: ""  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.format_config_groups = listed  # type: ignore[method-assign]


def import_users_modules() -> None:
    """Take ``--import MODULE`` out of the command line, and import the modules; a launcher's processes do too."""
    words, modules, rest = sys.argv[1:], list[str](), list[str]()
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name != "--import":
            rest.append(word)
        elif equals or words:
            modules.append(value if equals else words.pop(0))
        else:
            raise InputError("--import needs the name of a module")
    if modules:
        import_named(*modules)
        os.environ[IMPORT] = ",".join(modules)
        sys.argv[1:] = rest


def _says_what(word: str) -> bool:
    """Whether a word chooses what is run, and not only how long, how often, where or with which seeds."""
    key, equals, _ = word.partition("=")
    return equals == "=" and not key.startswith("-") and key.partition(".")[0] not in AROUND


def _sweeps(word: str) -> bool:
    """Whether a word asks for one run after the other, in one of the ways that Hydra knows."""
    return word in ("-m", "hydra.mode=MULTIRUN") or (len(word) > 3 and "--multirun".startswith(word))


def refuse_dashes(words: Sequence[str]) -> None:
    """Refuse settings that are written as flags, which Hydra's parser would answer with its usage.

    Raises:
        InputError: a word begins with two dashes, and is no flag of Hydra.
    """
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and not any(flag.startswith(name) for flag in FLAGS):
            raise InputError(f"{word}: settings are written without dashes: {name}={value or '...'}")


def check_words(words: Sequence[str]) -> list[Override]:
    """The overrides in words, without those that Hydra cannot read, or would fail on with a traceback.

    Raises:
        OverrideParseException: a word is no override.
        ValueError: a group is given something that is no name.
    """
    groups = ConfigStore.instance().repo
    parsed = OverridesParser.create().parse_overrides([*words])
    for word in parsed:
        name = word.key_or_group
        chosen = word.value() if isinstance(groups.get(name), dict) or name in OF_FILES else ""
        if not isinstance(chosen, str | dict | list | ChoiceSweep) and not word.is_delete():
            raise InputError(f"{word.input_line}: {name} is a group: give the name of one of its options")
    return parsed


def check_numbers(config: Any, where: str = "") -> None:
    """Refuse numbers that no constructor can use, in every setting alike.

    Args:
        config: settings, as plain dicts, lists and values.
        where: what they are called in errors.

    Raises:
        InputError: one is not finite, or larger than torch can hold.
    """
    if isinstance(config, float) and not math.isfinite(config):
        raise InputError(f"{where} is {config}: give a finite number")
    if isinstance(config, int) and abs(config) > LARGEST:
        raise InputError(f"{where} is {config}: give a number up to {LARGEST}")
    parts = (
        config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    )
    for key, value in parts:
        check_numbers(value, f"{where}[{key}]" if isinstance(config, list) else f"{where}.{key}".lstrip("."))


def settings(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """The configuration to follow; with ``resume``, the one that the old run was started with.

    Args:
        config: what Hydra composed.
        overrides: what was given on the command line.

    Raises:
        ValueError: a key is added or removed, or something is given that cannot be with `resume`.
        RunFolderError: there is no run to resume.
    """
    for override in overrides:
        if override.startswith(("+", "~")) and not override.startswith(NAMED):
            raise InputError(f"{override}: keys are neither added (+) nor removed (~) here; write key=value")
    chosen = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(chosen, dict)
    check_numbers(chosen)
    found = {str(key): value for key, value in chosen.items()}
    return found if found.get("resume") is None else resumed(found, overrides)


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """For the named command, without Hydra: import the user's modules, and print what a user can mend in one line."""
    write_utf8()
    with reported():
        refuse_several_processes(f"the command {name}")
        import_users_modules()
        yield
