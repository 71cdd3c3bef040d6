"""A run and its folder: config, versions, metrics.csv, results.json, checkpoints, plots; load it again with `load`."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from diffrl.build import build_data, build_denoiser, build_sampler
from diffrl.checkpoints import CheckpointError, latest_checkpoint, load_checkpoint
from diffrl.data import Data
from diffrl.denoisers import Denoiser
from diffrl.evaluation import draw_samples

__all__ = ["Run", "RunFolder", "RunFolderError", "load", "versions", "write_atomically"]


class RunFolderError(RuntimeError):
    """A run folder cannot be used as asked."""


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies.

    Args:
        path: the folder.
    """

    path: Path

    @classmethod
    def start(cls, config: Mapping[str, Any]) -> "tuple[RunFolder, dict[str, Any]]":
        """The folder to work in and the configuration to follow: a new run's, or with ``resume`` an old one's.

        Raises:
            RunFolderError: there is another run in the folder, or none to resume.
        """
        if config["resume"] is not None:
            folder = cls.open(Path(config["resume"]))
            return folder, folder.config()
        return cls.create(Path(config["run_dir"]), config), dict(config)

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> "RunFolder":
        """A folder for a new run, with its config and the versions it runs on.

        Raises:
            RunFolderError: it holds another run already.
        """
        folder = cls(path)
        if folder.config_file.exists():
            raise RunFolderError(
                f"{path} already holds a run: continue it with resume={path}, or choose another run_dir"
            )
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "versions.json", json.dumps(versions(), indent=2))
        write_atomically(folder.config_file, OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of a run that was started.

        Raises:
            RunFolderError: it holds none.
        """
        folder = cls(path)
        if not folder.config_file.is_file():
            raise RunFolderError(f"{path} holds no run: there is no {folder.config_file.name} in it")
        return folder

    @property
    def config_file(self) -> Path:
        """The whole configuration, written before anything else happens."""
        return self.path / "config.yaml"

    def config(self) -> dict[str, Any]:
        """The run's configuration."""
        config = OmegaConf.to_container(OmegaConf.load(self.config_file))
        assert isinstance(config, dict)
        return {str(k): v for k, v in config.items()}

    def results(self) -> dict[str, Any]:
        """What results.json holds so far; empty before the first objective is done."""
        file = self.path / "results.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Replace results.json at once."""
        write_atomically(self.path / "results.json", json.dumps(results, indent=2))

    def checkpoints(self, objective: str) -> Path:
        """Folder of an objective's checkpoints."""
        return self.path / "checkpoints" / objective


@dataclass(frozen=True)
class Run:
    """A run loaded from its folder.

    Args:
        denoiser: the averaged denoiser, in eval mode.
        config: the run's configuration.
        results: what results.json holds.
        objective: name of the objective that trained the denoiser.
        data: the run's data set.
    """

    denoiser: Denoiser
    config: dict[str, Any]
    results: dict[str, Any]
    objective: str
    data: Data

    def sample(self, samples: int, *, num_steps: int, seed: int = 0, guidance_scale: float = 1.0) -> Tensor:
        """Samples [samples, *E] by the run's sampler on a grid of `num_steps` levels."""
        sampler = build_sampler(self.config)
        x, _ = draw_samples(
            self.denoiser,
            self.data,
            sampler,
            num_steps=num_steps,
            samples=samples,
            seed=seed,
            guidance_scale=guidance_scale,
        )
        return x


def load(path: str | Path, objective: str | None = None) -> Run:
    """Load a run folder: its denoiser (averaged weights), configuration and results.

    Args:
        path: the run folder.
        objective: which objective's denoiser; the run's main one if None.

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: there is no checkpoint of that objective, or it is damaged.
    """
    folder = RunFolder.open(Path(path))
    config = folder.config()
    objective = objective or config["objective"]["name"]
    data = build_data(config)
    denoiser = build_denoiser(config, data)
    newest = latest_checkpoint(folder.checkpoints(objective))
    if newest is None:
        raise CheckpointError(
            f"{folder.checkpoints(objective)} holds no checkpoint: has {objective} been trained?"
        )
    denoiser.load_state_dict(load_checkpoint(newest).weights["ema"])
    return Run(denoiser.eval(), config, folder.results(), objective, data)


def versions() -> dict[str, str]:
    """What a run runs on."""
    packages = ("diffrl", "torch", "torchrl", "tensordict", "gymnasium", "numpy", "hydra-core")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
