"""The command line of the examples: Hydra composes, and a mistake is one line that names it and its remedy."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffrl.checkpoints import CheckpointError
from diffrl.configs.groups import register
from diffrl.extras import MissingExtra
from diffrl.runs import RunFolderError
from diffrl.trainer import NonFiniteLoss

__all__ = ["command"]

EXPECTED = (
    HydraException,
    OmegaConfBaseException,
    CheckpointError,
    MissingExtra,
    NonFiniteLoss,
    RunFolderError,
    ValueError,
)


def command(config_name: str) -> Callable[[Callable[[dict[str, Any]], None]], Callable[[], None]]:
    """Make a script's main function a command over the config of that name in `diffrl.configs`.

    Errors that a user can mend are printed in one line, with exit status 1; HYDRA_FULL_ERROR=1 gives the
    traceback.
    """

    def decorate(main: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
        os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own version and exits

        @contextmanager
        def one_line() -> Iterator[None]:
            try:
                yield
            except EXPECTED as error:
                if verbose:
                    raise
                sys.exit(f"error: {explain(error)}")

        def job(config: DictConfig) -> None:
            with one_line():  # inside too, or Hydra adds a line about its overrides
                main(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]

        def entry() -> None:
            register()
            with one_line():
                hydra.main(version_base="1.3", config_path="pkg://diffrl.configs", config_name=config_name)(
                    job
                )()

        return entry

    return decorate


def explain(error: BaseException) -> str:
    """The error as one line; an unknown key comes with its nearest neighbours."""
    cause: BaseException = error
    while cause.__cause__ is not None and isinstance(cause, HydraException):
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        line = str(cause).splitlines()[0]
        parent, key = cause.parent_node, str(cause.key)
        known = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        if known and key not in known:
            near = get_close_matches(key, known, n=3) or known
            return f"unknown config key {cause.full_key!r}; did you mean {', '.join(near)}?"
        return f"{cause.full_key}: {line}"
    return " ".join(str(cause).partition("Config search path:")[0].split())
