"""A run and its folder: config, versions, metrics.csv, results.json, checkpoints, samples, plots."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.diffusion.denoisers import Denoiser
from diffrl.registry import IMPORT, user_modules
from diffrl.text_files import read_json, write_atomically
from diffrl.training.build import build_data, build_denoiser, build_sampler
from diffrl.training.checkpoints import CheckpointError, latest_checkpoint, load_checkpoint
from diffrl.training.evaluation import draw_samples
from diffrl.training.lock import RunFolderError

__all__ = ["Run", "RunFolder", "RunFolderError", "command_line", "load", "versions"]

GROUPS_SINCE_0_2 = {"rollouts": "chains", "updates": "steps"}
"""Groups without a choice in diffrl 0.1, and the option that runs of then had."""


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies.

    Args:
        path: the folder.
    """

    path: Path

    @classmethod
    def start(cls, config: Mapping[str, Any], label: str | None = None) -> "RunFolder":
        """The folder to work in: with ``resume`` an old run's, else a new one.

        Args:
            config: the run's configuration.
            label: see `create`.

        Raises:
            RunFolderError: there is another run in the folder, or none to resume.
        """
        if config["resume"] is None:
            path = None if config["run_dir"] is None else Path(config["run_dir"])
            return cls.create(path, config, label)
        folder = cls.reopen(Path(config["resume"]))
        stored, movable = folder.config(), ("device", "resume", "run_dir")
        if other := [k for k in config if k not in movable and config[k] != stored.get(k)]:
            raise RunFolderError(
                f"{folder.path} holds a run with other settings of {', '.join(other)}: "
                "it can only be resumed as it was started"
            )
        return folder

    @classmethod
    def create(cls, path: Path | None, config: Mapping[str, Any], label: str | None = None) -> "RunFolder":
        """A folder for a new run, with its config, command and the versions it runs on.

        Args:
            path: the folder; None picks a new one, runs/<time>_<label>_s<seed>.
            config: the run's configuration.
            label: what the run is about; data and objective if None.

        Raises:
            RunFolderError: it holds another run already.
        """
        if path is None:
            label = label or f"{config['data']['name']}_{config['objective']['name']}"
            path = _new_folder(f"{label}_s{config['seed']}")
        folder = cls(path)
        if folder.config_file.exists():
            raise RunFolderError(
                f"{path} already holds a run: continue it with resume={path}, or choose another run_dir"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"{path} cannot be made a run folder ({error}): choose another run_dir"
            ) from error
        write_atomically(path / "versions.json", json.dumps(versions(), indent=2))
        write_atomically(path / "command.txt", command_line() + "\n")
        if modules := user_modules():
            write_atomically(path / "modules.json", json.dumps(modules))
        whole = OmegaConf.create({**config, "run_dir": str(path)})
        write_atomically(folder.config_file, OmegaConf.to_yaml(whole))
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

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        """The folder of a run that is to be continued or loaded.

        Its methods must be known already: a file never names code to run.

        Raises:
            RunFolderError: it holds no run, or one that was made with modules that are not imported now.
        """
        folder, file = cls.open(path), path / "modules.json"
        made_with = read_json(file, list) if file.exists() else []
        if missing := [str(module) for module in made_with if module not in user_modules()]:
            raise RunFolderError(
                f"{path} was made with methods of {', '.join(missing)}: give --import {missing[0]}, or in "
                "Python import it first"
            )
        return folder

    @property
    def config_file(self) -> Path:
        """The whole configuration, written before anything else happens."""
        return self.path / "config.yaml"

    def config(self) -> dict[str, Any]:
        """The run's configuration."""
        config = OmegaConf.to_container(OmegaConf.load(self.config_file))
        assert isinstance(config, dict)
        for group, only in GROUPS_SINCE_0_2.items():
            if group in config:
                config[group] = {"name": only, **config[group]}
        return {str(k): v for k, v in config.items()}

    def results(self) -> dict[str, Any]:
        """What results.json holds so far; empty before the first objective is done."""
        file = self.path / "results.json"
        return read_json(file) if file.exists() else {}

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Replace results.json at once."""
        write_atomically(self.path / "results.json", json.dumps(results, indent=2))

    def checkpoints(self, objective: str) -> Path:
        """Folder of an objective's checkpoints."""
        return self.path / "checkpoints" / objective

    def samples(self) -> dict[str, dict[str, Tensor]]:
        """Samples to look at: objective → network evaluations of each → [n, *E]; "data" → "0" → real ones."""
        files = sorted((self.path / "samples").glob("*.safetensors"))
        return {file.stem: safetensors.torch.load_file(file) for file in files}

    def write_samples(self, objective: str, by_nfe: Mapping[str, Tensor]) -> None:
        """Replace the samples of an objective at once."""
        file = self.path / "samples" / f"{objective}.safetensors"
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_name(file.name + ".tmp")
        tensors = {nfe: x.cpu().contiguous() for nfe, x in by_nfe.items()}
        safetensors.torch.save_file(tensors, temporary)
        os.replace(temporary, file)


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
    folder = RunFolder.reopen(Path(path))
    config = folder.config()
    objective = objective or config["objective"]["name"]
    data = build_data(config)
    dtype = torch.float64 if config["dtype"] == "float64" else torch.float32
    denoiser = build_denoiser(config, data).to(dtype)
    newest = latest_checkpoint(folder.checkpoints(objective))
    if newest is None:
        raise CheckpointError(
            f"{folder.checkpoints(objective)} holds no checkpoint: has {objective} been trained?"
        )
    denoiser.load_state_dict(load_checkpoint(newest).weights["ema"])
    return Run(denoiser.eval(), config, folder.results(), objective, data)


def _new_folder(label: str) -> Path:
    """A folder that nobody else has: runs that start in the same second are numbered."""
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = f"{now}_{label}"
    number = 1
    while True:
        path = Path("runs") / (name if number == 1 else f"{name}_{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path


def versions() -> dict[str, str]:
    """What a run runs on."""
    packages = ("diffrl", "torch", "torchrl", "tensordict", "gymnasium", "numpy", "hydra-core")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def command_line() -> str:
    """The command that runs now, as a user can repeat it."""
    program = sys.argv[0] if sys.argv[0].startswith("-m ") else shlex.quote(sys.argv[0])
    modules = filter(None, os.environ.get(IMPORT, "").split(","))
    words = [word for module in modules for word in ("--import", module)] + sys.argv[1:]
    return " ".join(["python", program, *map(shlex.quote, words)])
