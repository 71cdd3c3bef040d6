"""The command line: Hydra composes a configuration, and a mistake is one line that names it and its remedy."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from diffrl.configs.groups import register
from diffrl.errors import DiffrlError, InputError
from diffrl.experiments.run import Interrupted
from diffrl.registry import IMPORT, import_named
from diffrl.training.runs import RunFolder

__all__ = ["EXPECTED", "command", "explain", "import_users_modules", "one_line", "settings"]

EXPECTED = (HydraException, OmegaConfBaseException, DiffrlError)


def command(config_name: str) -> Callable[[Callable[[dict[str, Any]], None]], Callable[[], None]]:
    """Make a script's main function a command over the config of that name in `diffrl.configs`.

    Errors that a user can mend are printed in one line, with exit status 1; HYDRA_FULL_ERROR=1 gives the
    traceback. A run that is stopped by a signal is saved, and ends with exit status 0.
    """

    def decorate(main: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        def entry() -> None:
            given = os.environ.get("HYDRA_FULL_ERROR")
            with _one_line(full=given == "1"):
                import_users_modules()

            def job(config: DictConfig) -> None:
                with _one_line(full=given == "1"):  # inside too, or Hydra adds a line about its overrides
                    main(settings(config, HydraConfig.get().overrides.task))

            compose = hydra.main(
                version_base="1.3", config_path="pkg://diffrl.configs", config_name=config_name
            )
            register()
            os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own version and exits
            try:
                with _one_line(full=given == "1"):
                    compose(job)()
            finally:
                os.environ["HYDRA_FULL_ERROR"] = given or "0"

        return entry

    return decorate


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


def settings(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """The configuration to follow; with ``resume``, the one that the old run was started with.

    Args:
        config: what Hydra composed.
        overrides: what was given on the command line.

    Raises:
        ValueError: a key is added or removed, or something besides `device` is given with `resume`.
        RunFolderError: there is no run to resume.
    """
    for override in overrides:
        if override.startswith(("+", "~")):
            raise InputError(f"{override}: keys are neither added (+) nor removed (~) here; write key=value")
    chosen = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(chosen, dict)
    if chosen.get("resume") is None:
        return {str(key): value for key, value in chosen.items()}
    given = [override for override in overrides if not override.startswith("resume=")]
    if others := [override for override in given if not override.startswith("device=")]:
        raise InputError(f"{', '.join(others)}: a run is resumed as it was started; only device can change")
    stored = RunFolder.reopen(Path(chosen["resume"])).config()
    return {**stored, "resume": chosen["resume"], **({"device": chosen["device"]} if given else {})}


def explain(error: BaseException) -> str:
    """The error as one line; an unknown key comes with its nearest neighbours."""
    cause: BaseException = error
    while cause.__cause__ is not None and isinstance(cause, HydraException):
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        where = str(cause.full_key)
        if isinstance(cause, MissingMandatoryValue):
            return f"{where} has no default: give {where}=..."
        parent, key = cause.parent_node, str(cause.key)
        known = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        if known and key not in known:
            near = _paths(parent, key) or get_close_matches(key, known, n=3) or sorted(set(known) - {"hydra"})
            return f"unknown config key {where!r}; did you mean {', '.join(near)}?"
        return f"{where}: {str(cause).splitlines()[0]}"
    return " ".join(str(cause).partition("Config search path:")[0].split())


def _paths(config: DictConfig, key: str) -> list[str]:
    """Full names of a key that stands within a group and was given without it."""
    return [
        f"{group!s}.{key}"
        for group, options in config.items_ex(resolve=False)
        if group != "hydra" and isinstance(options, DictConfig) and key in options
    ]


@contextmanager
def one_line() -> Iterator[None]:
    """For a command without Hydra: import the user's modules, and print what a user can mend in one line."""
    with _one_line(full=os.environ.get("HYDRA_FULL_ERROR") == "1"):
        import_users_modules()
        yield


@contextmanager
def _one_line(*, full: bool) -> Iterator[None]:
    """Print what a user can mend in one line, unless asked for it in full, and exit."""
    try:
        yield
    except Interrupted as stop:
        print(stop)
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    except EXPECTED as error:
        if full:
            raise
        sys.exit(f"error: {explain(error)}")
