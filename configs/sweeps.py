"""Sweeps: a job that fails ends no other, and the command says at its end which failed; a stop ends the sweep."""

import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from diffrl.configs.boundary import reported
from diffrl.errors import DiffrlError
from diffrl.experiments.run import Interrupted

__all__ = ["JobFailed", "SweepStopped", "job_reported", "sweep_reported"]


class JobFailed(DiffrlError):
    """A job of a sweep failed, and has said why."""


class SweepStopped(BaseException):
    """A job of a sweep was asked to stop: Hydra, which goes on after every Exception, ends the sweep."""


@contextmanager
def job_reported(failed: list[str], *, config: Mapping[Any, Any], full: bool) -> Iterator[None]:
    """As `reported`, for what Hydra runs: alone, or as one of the jobs of a sweep.

    Args:
        failed: takes the names of the jobs of a sweep that failed.
        config: what is followed.
        full: whether errors are raised with their traceback.

    Raises:
        JobFailed: it is one of a sweep and failed; launchers in other processes hand it on.
        SweepStopped: it is one of a sweep and was stopped.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        with reported(full=full, config=config):
            yield
        return
    name = f"job {hydra.job.num} ({hydra.job.override_dirname})"
    try:
        with reported(full=False, config=config):
            try:
                yield
            except (Interrupted, KeyboardInterrupt) as stop:
                raise SweepStopped(f"{str(stop) or 'interrupted'}; the sweep ends with {name}") from None
        return
    except SystemExit as end:
        if not end.code:
            return
        said = str(end.code).removeprefix("error: ")
    except Exception as error:  # not a user's mistake
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"
    print(f"failed  {name}: {said}", flush=True)
    failed.append(name)
    raise JobFailed(f"{name}: {said}")


@contextmanager
def sweep_reported(failed: list[str]) -> Iterator[None]:
    """End a sweep in one line: with the jobs that failed, or with where it was stopped."""
    try:
        yield
    except SweepStopped as stop:
        sys.exit(f"error: {stop}")
    except JobFailed as error:
        sys.exit(
            f"error: {len(failed) or 'some'} jobs failed: {'; '.join(failed) or error}; the others are done"
        )
